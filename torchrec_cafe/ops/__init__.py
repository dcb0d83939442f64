"""Native operators, their checks and their plain-PyTorch definitions.

Each function checks its arguments, then calls the operator of the same name in
``torch.ops.torchrec_cafe``; :mod:`torchrec_cafe.ops.reference` defines it in plain PyTorch.
"""

from torchrec_cafe.ops.hot_sketch import (
    ACTION_CLEAR,
    ACTION_COPY,
    ACTION_KEEP,
    COLD,
    COUNTERS,
    FREE,
    NO_OWNER,
    SLOTS,
    WEAR,
    SketchState,
    observe,
    rebalance,
)
from torchrec_cafe.ops.row_map import (
    TABLE_COLUMNS,
    HotRows,
    Remapped,
    first_mixed_id,
    mix_ids,
    remap,
    shared_rows_of,
)

__all__ = [
    "ACTION_CLEAR",
    "ACTION_COPY",
    "ACTION_KEEP",
    "COLD",
    "COUNTERS",
    "FREE",
    "NO_OWNER",
    "SLOTS",
    "TABLE_COLUMNS",
    "WEAR",
    "HotRows",
    "Remapped",
    "SketchState",
    "first_mixed_id",
    "mix_ids",
    "observe",
    "rebalance",
    "remap",
    "shared_rows_of",
]
