"""Ids that are not in their table: counted, and reported as FBGEMM would."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from torchrec_cafe.distributed._torchrec import ShardedEmbeddingTable

logger = logging.getLogger(__name__)


class BoundsReport:
    """Says what is wrong with the ids of a batch.

    Args:
        tables: the tables, in the order of the features of a batch; those without features are
            passed over. Their ``bounds_check_mode`` says what to do about ids out of range, as
            FBGEMM's; ``NONE`` is taken as ``IGNORE``.
    """

    def __init__(self, tables: Sequence[ShardedEmbeddingTable]) -> None:
        """Note the tables; see the class."""
        self.names = [table.name for table in tables for _ in range(table.num_features())]
        self._modes = [
            (table.fused_params or {}).get("bounds_check_mode", BoundsCheckMode.WARNING)
            for table in tables
            for _ in range(table.num_features())
        ]
        self.is_needed = any(
            mode in (BoundsCheckMode.FATAL, BoundsCheckMode.WARNING) for mode in self._modes
        )
        self._warned: set[str] = set()

    def __call__(self, out_of_range: Tensor) -> None:
        """Report; see the class.

        Args:
            out_of_range: int64 ``[F]``, ids of each feature that are out of range.

        Raises:
            ValueError: for an id out of range, under ``BoundsCheckMode.FATAL``.
        """
        if not self.is_needed or not out_of_range.any():
            return
        for name, mode, count in zip(self.names, self._modes, out_of_range.tolist(), strict=True):
            if count == 0:
                continue
            if mode == BoundsCheckMode.FATAL:
                raise ValueError(
                    f"table {name!r}: ids must be in [0, num_embeddings), got {count} ids out of "
                    "range in one batch; fix the ids or use BoundsCheckMode.WARNING"
                )
            if mode == BoundsCheckMode.WARNING and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "table %r: %d ids of a batch are out of range and taken as id 0 "
                    "(said once per table)",
                    name,
                    count,
                )
