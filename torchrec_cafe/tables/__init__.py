"""Compressed tables without distribution: ids in, rows of a stock FBGEMM TBE out."""

from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.compressed import CompressedBags
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout
from torchrec_cafe.tables.mem_rec import MemRecLayout, MemRecRows, MemRecSamples, sample_vectors
from torchrec_cafe.tables.mem_rec_dense import DenseMemRecBags
from torchrec_cafe.tables.rows import QuotientRemainderRows, RowLookup, SharedRows, TableLayout
from torchrec_cafe.tables.state import ShardedState
from torchrec_cafe.tables.weights import IdFactors, WeightTable

__all__ = [
    "CompressedBags",
    "DenseMemRecBags",
    "HotRowPool",
    "IdFactors",
    "MemRecLayout",
    "MemRecRows",
    "MemRecSamples",
    "PoolLayout",
    "QuotientRemainderRows",
    "RowLookup",
    "RowRangeTBE",
    "ShardedState",
    "SharedRows",
    "TableLayout",
    "WeightTable",
    "sample_vectors",
]
