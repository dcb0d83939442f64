"""Copies of a state that training does not change, for saves in the background."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager

from torchrec_cafe.distributed._torchrec import ShardedTensor, sharded_copy


@final
class CopyStager(AsyncStager):
    """Copies every tensor once to the CPU.

    DCP's own default (torch 2.13) cannot copy the ``ShardedTensor`` of TorchRec's tables, and the
    one before that copies them twice.
    """

    # `stage` returns when all is copied.
    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state.

        Args:
            state_dict: dicts, lists and tuples of tensors and of values that can be copied.
        """
        with torch.no_grad():
            return _copied(state_dict)


def _copied(value: Any) -> Any:
    if isinstance(value, ShardedTensor):
        return sharded_copy(value, _to_cpu)
    if isinstance(value, Tensor):
        return _to_cpu(value)
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(entry) for entry in value)
    return copy.deepcopy(value)


def _to_cpu(tensor: Tensor) -> Tensor:
    # Not `.cpu()`: a tensor that is there already would not be copied.
    return torch.empty_like(tensor, device="cpu").copy_(tensor)
