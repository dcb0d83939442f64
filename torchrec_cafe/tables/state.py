"""What a rank keeps of a group besides rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from torch import Tensor


class ShardedState(ABC):
    """What a rank keeps besides rows, by virtual shard; checkpoints hold and reshard it."""

    @property
    @abstractmethod
    def first_shard(self) -> int:
        """Global number of the rank's first virtual shard."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes that are resident for lookups, optimizer state left out."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold, not copied; the first axis is the virtual shard."""

    @abstractmethod
    def reload(self) -> None:
        """Take over what a checkpoint has written into the tensors."""


@final
class JointState(ShardedState):
    """What several parts keep, of the same virtual shards.

    Args:
        parts: at least one; the names of their tensors differ.
    """

    def __init__(self, parts: Sequence[ShardedState]) -> None:
        """Join them; see the class."""
        self._parts = tuple(parts)

    @property
    def first_shard(self) -> int:
        """Global number of the rank's first virtual shard."""
        return self._parts[0].first_shard

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self._parts)

    def state_tensors(self) -> dict[str, Tensor]:
        """The tensors of all parts, not copied."""
        return {
            name: tensor for part in self._parts for name, tensor in part.state_tensors().items()
        }

    def reload(self) -> None:
        """Take over what a checkpoint has written into the tensors."""
        for part in self._parts:
            part.reload()
