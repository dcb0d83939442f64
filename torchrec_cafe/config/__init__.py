"""What a table is, and what it costs. Standard library only."""

from torchrec_cafe.config.auto import Auto
from torchrec_cafe.config.budget import TableKind
from torchrec_cafe.config.cafe import Cafe
from torchrec_cafe.config.hashing import Hash, QuotientRemainder, remainder_rows
from torchrec_cafe.config.kinds import KINDS
from torchrec_cafe.config.lookahead import Lookahead
from torchrec_cafe.config.mem_rec import MemRec
from torchrec_cafe.config.memory import Allocation, MemoryBreakdown, TableShape, item_bytes
from torchrec_cafe.config.statistics import IdStatistics, load_statistics, save_statistics

__all__ = [
    "KINDS",
    "Allocation",
    "Auto",
    "Cafe",
    "Hash",
    "IdStatistics",
    "Lookahead",
    "MemRec",
    "MemoryBreakdown",
    "QuotientRemainder",
    "TableKind",
    "TableShape",
    "item_bytes",
    "load_statistics",
    "remainder_rows",
    "save_statistics",
]
