"""Memory of the CPU that a GPU can use, and tensors of the GPU over it.

FBGEMM has such memory (``new_unified_tensor(..., is_host_mapped=True)``), but gives no tensor of
the CPU over it: its ``uvm_to_cpu`` takes managed memory only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Flags of cudaHostRegister: for all contexts, and with an address for the GPU.
_PORTABLE, _MAPPED = 1, 2


class _MappedMemory:
    """The memory of a tensor, for a GPU to use as long as this lives.

    Args:
        tensor: on the CPU, contiguous, not empty; kept alive.
        device: a GPU.
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self._tensor = tensor
        self._address: int | None = None
        size = tensor.numel() * tensor.element_size()
        with torch.cuda.device(device):
            cudart: Any = torch.cuda.cudart()
            code = int(cudart.cudaHostRegister(tensor.data_ptr(), size, _PORTABLE | _MAPPED))
        if code != 0:
            raise RuntimeError(
                f"cudaHostRegister must pin {size} bytes of host memory for {device}, got CUDA "
                f"error {code}; give the process more memory (a container's limit counts), or use "
                "a kind of table that takes less"
            )
        self._address = tensor.data_ptr()
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (self._address, False),
            "strides": None,
            "version": 2,
        }

    def __del__(self) -> None:
        """Let go of the memory before it is freed."""
        if self._address is not None:
            with contextlib.suppress(Exception):  # the driver may be gone when the process ends
                cudart: Any = torch.cuda.cudart()
                cudart.cudaHostUnregister(self._address)


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The same memory, as tensors of a device.

    A GPU reaches it over its bus: this is for checkpoints and initial values, not for lookups.
    Whoever uses one side waits for what the other has asked for.

    Args:
        tensors: on the CPU, contiguous; their memory lives as long as the results.
        device: the CPU, or a GPU with its index.

    Returns:
        Tensors of the same shapes and dtypes; on the CPU, the tensors themselves.

    Raises:
        RuntimeError: if the memory cannot be pinned, or the GPU has another address for it.
    """
    if device.type == "cpu":
        return list(tensors)
    return [_mapped(tensor, device) for tensor in tensors]


def _mapped(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.numel() == 0:
        return torch.empty_like(tensor, device=device)
    mapped = torch.as_tensor(_MappedMemory(tensor, device), device=device)
    if mapped.data_ptr() != tensor.data_ptr():
        raise RuntimeError(
            f"{device} must have the CPU's address for pinned memory, got another; use a GPU with "
            "unified addressing, or a kind of table that keeps its rows on the GPU"
        )
    return mapped.view(tensor.dtype).view(tensor.shape)
