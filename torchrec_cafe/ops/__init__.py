"""Native operators, their checks and their plain-PyTorch definitions.

Each function checks its arguments, then calls the operator of the same name in
``torch.ops.torchrec_cafe``; :mod:`torchrec_cafe.ops.reference` defines it in plain PyTorch.
"""

from torchrec_cafe.ops.bloom import (
    BitsOfSamples,
    BloomBits,
    bloom_rows,
    bloom_union,
)
from torchrec_cafe.ops.bloom_weights import bloom_pool, bloom_weigh, bloom_weigh_backward
from torchrec_cafe.ops.hot_sketch import (
    ACTION_ADD,
    ACTION_CLEAR,
    ACTION_COPY,
    ACTION_KEEP,
    COLD,
    COUNTERS,
    FREE,
    MEDIUM,
    NO_OWNER,
    SLOTS,
    WEAR,
    SketchState,
    observe,
    rebalance,
)
from torchrec_cafe.ops.huge_pages import advise_huge_pages
from torchrec_cafe.ops.key_factors import (
    WEIGHTS_PER_LINE,
    factor_gradients,
    key_factors,
)
from torchrec_cafe.ops.learning import ScaledRows, learn, learn_scaled
from torchrec_cafe.ops.pool_keys import PooledKeys, pool_keys
from torchrec_cafe.ops.pool_rows import (
    Lookups,
    Moves,
    add_second_rows,
    move_rows,
    quotient_remainder,
)
from torchrec_cafe.ops.row_map import (
    ID_BITS,
    TABLE_COLUMNS,
    HotRows,
    PoolRows,
    Remapped,
    first_mixed_id,
    mix_ids,
    remap,
)
from torchrec_cafe.ops.row_store import copy_rows, read_rows, write_rows
from torchrec_cafe.ops.slot_map import (
    Announced,
    SlotMapState,
    SlotPlan,
    announce_rows,
    plan_slots,
    postpone_rows,
    release_slots,
    retract_rows,
    slots_of_occurrences,
)
from torchrec_cafe.ops.unmix import unmix_ids

__all__ = [
    "Announced",
    "PooledKeys",
    "SlotMapState",
    "SlotPlan",
    "advise_huge_pages",
    "announce_rows",
    "copy_rows",
    "plan_slots",
    "pool_keys",
    "postpone_rows",
    "read_rows",
    "release_slots",
    "retract_rows",
    "slots_of_occurrences",
    "write_rows",
    "ACTION_ADD",
    "ACTION_CLEAR",
    "ACTION_COPY",
    "ACTION_KEEP",
    "COLD",
    "COUNTERS",
    "FREE",
    "MEDIUM",
    "NO_OWNER",
    "SLOTS",
    "TABLE_COLUMNS",
    "WEAR",
    "WEIGHTS_PER_LINE",
    "BitsOfSamples",
    "BloomBits",
    "HotRows",
    "ID_BITS",
    "Lookups",
    "Moves",
    "PoolRows",
    "Remapped",
    "ScaledRows",
    "SketchState",
    "add_second_rows",
    "bloom_pool",
    "bloom_rows",
    "bloom_union",
    "bloom_weigh",
    "bloom_weigh_backward",
    "factor_gradients",
    "first_mixed_id",
    "key_factors",
    "learn",
    "learn_scaled",
    "mix_ids",
    "move_rows",
    "observe",
    "quotient_remainder",
    "rebalance",
    "remap",
    "unmix_ids",
]
