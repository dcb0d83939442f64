"""The operators in plain PyTorch and Python: the readable statement of what they do.

Same names, same arguments, same results bit for bit, no native code. Slow: one step per occurrence.
"""

from torchrec_cafe.ops.reference.cafe import (
    INFLATION_LIMIT,
    MAX_SCORE,
    NORM_BLOCK,
    add_second_rows,
    bucket_of,
    find,
    hash64,
    insert,
    l2_norms,
    learn,
    mix_id,
    mix_ids,
    move_rows,
    observe,
    quotient_remainder,
    rebalance,
    remap,
    second_row,
)
from torchrec_cafe.ops.reference.factors import factor_gradients, key_factors, learn_scaled
from torchrec_cafe.ops.reference.lookahead import (
    SlotMap,
    copy_rows,
    pool_keys,
    read_rows,
    slots_of_occurrences,
    write_rows,
)
from torchrec_cafe.ops.reference.mem_rec import (
    bloom_bits,
    bloom_pool,
    bloom_rows,
    bloom_union,
    bloom_weigh,
    bloom_weigh_backward,
)

__all__ = [
    "INFLATION_LIMIT",
    "MAX_SCORE",
    "NORM_BLOCK",
    "SlotMap",
    "add_second_rows",
    "bloom_bits",
    "bloom_pool",
    "bloom_rows",
    "bloom_union",
    "bloom_weigh",
    "bloom_weigh_backward",
    "bucket_of",
    "copy_rows",
    "factor_gradients",
    "find",
    "hash64",
    "insert",
    "key_factors",
    "l2_norms",
    "learn",
    "learn_scaled",
    "mix_id",
    "mix_ids",
    "move_rows",
    "observe",
    "pool_keys",
    "quotient_remainder",
    "read_rows",
    "rebalance",
    "remap",
    "second_row",
    "slots_of_occurrences",
    "write_rows",
]
