"""A limit of the memory of a process, page cache included, through Linux's control groups.

Tables in files are read through the page cache, which would hold them whole on a machine that has
the memory. Under the limit it holds what is said, whatever the machine has.
"""

from __future__ import annotations

import os
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A control group of this process alone.

    Raises:
        OSError: if the process may not make one; that takes root.
    """

    def __init__(self) -> None:
        """Enter a new group, without a limit."""
        self._is_v1 = (_V1 / "memory.limit_in_bytes").exists()
        self._path = (_V1 if self._is_v1 else _V2) / f"cafe_benchmark_{os.getpid()}"
        self._path.mkdir()
        (self._path / "cgroup.procs").write_text(str(os.getpid()))

    def anonymous_bytes(self) -> int:
        """Bytes of the process that are not page cache."""
        key = "total_rss" if self._is_v1 else "anon"
        lines = (self._path / "memory.stat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.split()[0] == key)

    def limit(self, page_cache_bytes: int) -> int:
        """Allow what the process has now, and so much page cache.

        Returns:
            The limit.
        """
        limit = self.anonymous_bytes() + page_cache_bytes
        name = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (self._path / name).write_text(str(limit))
        return limit

    def leave(self) -> None:
        """Go back to the root group and remove this one."""
        root = self._path.parent / "cgroup.procs"
        root.write_text(str(os.getpid()))
        self._path.rmdir()
