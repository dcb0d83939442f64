"""Compressed tables without distribution: ids in, rows of a stock FBGEMM TBE out."""

from torchrec_cafe.tables._fbgemm import RowRangeTBE
from torchrec_cafe.tables.compressed import CompressedBags, TableLayout
from torchrec_cafe.tables.hot_rows import HotRowPool, PoolLayout

__all__ = ["CompressedBags", "HotRowPool", "PoolLayout", "RowRangeTBE", "TableLayout"]
