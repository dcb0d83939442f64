"""Compressed tables without distribution: ids in, rows of a stock FBGEMM TBE out."""

from torchrec_cafe.tables._fbgemm import RowRangeTBE, SlotTBE
from torchrec_cafe.tables.compressed import CompressedBags
from torchrec_cafe.tables.host_mapped import on_device
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout
from torchrec_cafe.tables.id_counts import IdCounts
from torchrec_cafe.tables.lookahead import LookaheadBags, StoredTable
from torchrec_cafe.tables.mem_rec import MemRecLayout, MemRecRows, MemRecSamples, sample_vectors
from torchrec_cafe.tables.mem_rec_dense import DenseMemRecBags
from torchrec_cafe.tables.planned_lookup import (
    LookaheadStatistics,
    PlannedLookup,
    ScratchpadFullError,
)
from torchrec_cafe.tables.row_store import FileStore, MemoryStore, RowStore
from torchrec_cafe.tables.rows import QuotientRemainderRows, RowLookup, SharedRows, TableLayout
from torchrec_cafe.tables.scratchpad import Scratchpad
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.weights import IdFactors, WeightTable

__all__ = [
    "CompressedBags",
    "DenseMemRecBags",
    "FileStore",
    "HotRowPool",
    "IdCounts",
    "IdFactors",
    "LookaheadBags",
    "LookaheadStatistics",
    "MemRecLayout",
    "MemRecRows",
    "MemRecSamples",
    "MemoryStore",
    "PlannedLookup",
    "PoolLayout",
    "QuotientRemainderRows",
    "RowLookup",
    "RowRangeTBE",
    "RowStore",
    "Scratchpad",
    "ScratchpadFullError",
    "ShardedState",
    "SharedRows",
    "SlotTBE",
    "StoredTable",
    "TableLayout",
    "WeightTable",
    "on_device",
    "sample_vectors",
]
