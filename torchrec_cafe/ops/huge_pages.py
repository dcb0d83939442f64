"""Huge pages under tensors that are read at random."""

from __future__ import annotations

import torch
from torch import Tensor


def advise_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for huge pages under a tensor, before it is first written.

    Random reads of a large tensor would otherwise wait for the page table as often as for the data.
    A wish that may go unheard.

    Args:
        tensor: of any dtype and shape, on the CPU.

    Returns:
        The tensor itself.
    """
    torch.ops.torchrec_cafe.advise_huge_pages.default(tensor)
    return tensor


@torch.library.register_fake("torchrec_cafe::advise_huge_pages")
def _(tensor: Tensor) -> None:
    return None
