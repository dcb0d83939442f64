"""What a rank keeps of a group besides rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

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
