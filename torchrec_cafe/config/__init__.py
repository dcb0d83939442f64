"""What a table is, and what it costs. Standard library only."""

from torchrec_cafe.config.budget import TableKind
from torchrec_cafe.config.cafe import Cafe
from torchrec_cafe.config.hashing import Hash, QuotientRemainder, remainder_rows
from torchrec_cafe.config.lookahead import Lookahead
from torchrec_cafe.config.mem_rec import MemRec
from torchrec_cafe.config.memory import Allocation, MemoryBreakdown, TableShape, item_bytes

__all__ = [
    "Allocation",
    "Cafe",
    "Hash",
    "Lookahead",
    "MemRec",
    "MemoryBreakdown",
    "QuotientRemainder",
    "TableKind",
    "TableShape",
    "item_bytes",
    "remainder_rows",
]
