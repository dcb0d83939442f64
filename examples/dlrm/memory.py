"""How the C library keeps memory."""

from __future__ import annotations

import ctypes


def keep_freed_pages() -> None:
    """Let glibc keep the memory that a step frees for the next step.

    By default it hands large blocks back to the system, and every step has all their pages made
    anew: with DLRM's activations that takes a third of a step. Does nothing with other libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)
