"""What a table is, and what it costs. Standard library only."""

from torchrec_cafe.config.kinds import Cafe, Hash, TableKind
from torchrec_cafe.config.memory import Allocation, MemoryBreakdown, TableShape, item_bytes

__all__ = [
    "Allocation",
    "Cafe",
    "Hash",
    "MemoryBreakdown",
    "TableKind",
    "TableShape",
    "item_bytes",
]
