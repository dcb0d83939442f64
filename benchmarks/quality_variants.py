"""What the accuracy study compares: ways to keep the tables, and changes to Cafe made from outside.

Some variants differ from Cafe by an option, others by a hook that reaches into the model before a
step, so that the product needs no code for what only a study does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from torchrec.distributed.model_parallel import DistributedModelParallel

import torchrec_cafe as tc
from examples.dlrm.data.generator import NUM_DAYS
from examples.dlrm.loop import OnStep
from torchrec_cafe.config import TableShape
from torchrec_cafe.distributed import ShardedCompressedEmbeddingBagCollection
from torchrec_cafe.distributed.kernel import CompressedEmbeddingBag
from torchrec_cafe.ops import TABLE_COLUMNS
from torchrec_cafe.tables import HotRowPool

#: compressions at which what is compared with one other variant alone is trained by default
_ABLATED = (100.0, 1000.0)
#: arguments of Cafe in every variant that does not give them: ablations change one thing, and the
#: one that they are compared with stays as it is when Cafe's defaults change
BASELINE_CAFE = ("num_weight_hashes=0", "medium_fraction=0.3", "half_life=4000")
#: Cafe and MEM-REC as they come: at each compression they are one of the variants
DEFAULT = "cafe_default"
MEM_REC_DEFAULT = "mem_rec_default"
_WITHOUT = "cafe:half_life=16000+medium_fraction=0"
#: by weights of a factor
_DEFAULTS = {0: _WITHOUT, 2: f"{_WITHOUT}+num_weight_hashes=2+weight_fraction=0.6"}
#: by the share of the weights of tables of 16 columns
_EQUAL_SHARE = 4 / 68
_MEM_REC_DEFAULTS = {_EQUAL_SHARE: "mem_rec", 0.6: "mem_rec:weight_fraction=.6"}
#: variants that are made from arguments of a kind and a number of epochs, such as
#: ``cafe:hot_fraction=.5+half_life=300`` or ``mem_rec:num_hashes=2+epochs=3``
_GENERIC = re.compile(r"(full|hash|cafe|mem_rec):([^/]+)")
GENERIC_TEXT = "KIND:NAME=VALUE+NAME=VALUE with KIND of full, hash, cafe, mem_rec"


def kernels(model: DistributedModelParallel) -> Iterator[CompressedEmbeddingBag]:
    """The kernels of a model's compressed tables, on this rank."""
    for module in model.modules():
        if isinstance(module, ShardedCompressedEmbeddingBagCollection):
            yield from module.compressed_kernels()


def pools(model: DistributedModelParallel) -> Iterator[HotRowPool]:
    """The pools of a model's Cafe tables, on this rank."""
    for kernel in kernels(model):
        if kernel.bags.pool is not None:
            yield kernel.bags.pool


def promote_wrong_rows(pool: HotRowPool) -> None:
    """Make promotion copy another shared row of the same table, as the CAFE paper's code does.

    The pool's own ``tables`` serve only to find the row to copy. With half the shared rows in
    them, an id of row r copies about row r / 2: inside the table, and another row than its own for
    all ids but those of row 0.
    """
    pool.tables[:, TABLE_COLUMNS.index("shared_rows")].floor_divide_(2).clamp_(min=1)


def _wrong_row(_steps_per_day: float) -> OnStep:
    def on_step(step: int, model: DistributedModelParallel) -> None:
        if step == 0:
            for pool in pools(model):
                promote_wrong_rows(pool)

    return on_step


def _frozen(steps_per_day: float) -> OnStep:
    """Stop learning which ids are hot after the first day; rows go on training."""
    last = max(1, math.floor(steps_per_day))

    def on_step(step: int, model: DistributedModelParallel) -> None:
        if step == last:
            for kernel in kernels(model):
                kernel.eval()

    return on_step


def _fresh(steps_per_day: float) -> OnStep:
    """Forget all scores when the last day begins: that day alone elects the hot ids."""
    first = math.ceil((NUM_DAYS - 1) * steps_per_day)

    def on_step(step: int, model: DistributedModelParallel) -> None:
        if step == first:
            for pool in pools(model):
                pool.sketch.scores.zero_()

    return on_step


def per_table(
    shapes: Sequence[TableShape], compression: float
) -> tuple[dict[str, tc.ParameterConstraints], dict[str, int]]:
    """Every table with a pool and a budget of its own.

    Tables of equal kinds share both, so the compressions differ by less than what a row costs.
    The tables whose budgets are too small for a pool are hashed, in one budget; if that leaves one
    of them without a row, the next larger tables join them.

    Args:
        shapes: the tables.
        compression: of each table.

    Returns:
        Constraints by table, and how many tables have a pool and how many are hashed.

    Raises:
        ValueError: if a budget is too small.
    """
    pooled: dict[str, tc.Cafe] = {}
    for number, shape in enumerate(shapes):
        own = tc.Cafe(compression=compression * (1 + 1e-9 * number), num_weight_hashes=0)
        if _fits(own, [shape]):
            pooled[shape.name] = own
    hashed = tc.Hash(compression=compression)
    by_size = sorted(shapes, key=lambda shape: (shape.name in pooled, shape.num_embeddings))
    rest = len(shapes) - len(pooled)
    while rest and not _fits(hashed, by_size[:rest]):
        if rest == len(shapes):
            hashed.allocate(shapes)  # says what is too little
        del pooled[by_size[rest].name]
        rest += 1
    tables = {
        shape.name: tc.ParameterConstraints(table=pooled.get(shape.name, hashed))
        for shape in shapes
    }
    return tables, {"tables_with_pool": len(pooled), "tables_hashed": rest}


def _fits(kind: tc.Cafe | tc.Hash, shapes: Sequence[TableShape]) -> bool:
    try:
        kind.allocate(shapes)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to keep the tables.

    Attributes:
        text: what it is, for the report.
        kind: of :data:`examples.dlrm.config.KINDS`.
        cafe: the option ``--cafe``. Without learned factors, unless it says how many: what they
            do is a variant of its own.
        mem_rec: the option ``--mem_rec``.
        epochs: how often to go through the data.
        ablation: whether it is compared with one other variant alone, at two compressions by
            default.
        data: data sets on which it is trained by default; empty: all.
        hook: what it does to the model, given the steps of a day.
        per_table: whether every table has a pool and a budget of its own.
        oracle: whether exact frequencies decide beforehand which ids own a row.
    """

    text: str
    kind: str = "cafe"
    cafe: tuple[str, ...] = BASELINE_CAFE
    mem_rec: tuple[str, ...] = ()
    epochs: int = 1
    ablation: bool = False
    data: tuple[str, ...] = ()
    hook: Callable[[float], OnStep] | None = None
    per_table: bool = False
    oracle: bool = False

    @property
    def baseline(self) -> str:
        """The variant that it is compared with."""
        return "cafe" if self.cafe else DEFAULT

    def compressions(self, of_data: Sequence[float]) -> tuple[float, ...]:
        """What to train by default, of the compressions of a data set."""
        if self.kind == "full" and not self.oracle:
            return (1.0,)
        return tuple(c for c in of_data if not self.ablation or c in _ABLATED)


def trained_as(name: str, compression: float) -> str:
    """The variant whose runs are those of a variant.

    Args:
        name: of a variant.
        compression: of the runs.
    """
    if name == DEFAULT:
        return _DEFAULTS[tc.Cafe(compression=compression).weight_hashes]
    if name == MEM_REC_DEFAULT:
        return _MEM_REC_DEFAULTS[tc.MemRec(compression=compression).weight_share(row_bytes=64)]
    return name


def _with_default(arguments: Sequence[str]) -> tuple[str, ...]:
    given = {text.split("=")[0] for text in arguments}
    left = (text for text in BASELINE_CAFE if text.split("=")[0] not in given)
    return (*left, *arguments)


def _ablation(text: str, *cafe: str) -> Variant:
    return Variant(text=text, cafe=_with_default(cafe), ablation=True)


def _mem_rec(text: str, *mem_rec: str) -> Variant:
    equal = f"weight_fraction={_EQUAL_SHARE!r}"
    return Variant(text=text, kind="mem_rec", mem_rec=(equal, *mem_rec))


VARIANTS = {
    "full": Variant(text="full tables", kind="full"),
    "hash": Variant(text="Hash: num_embeddings / compression rows per table", kind="hash"),
    "hash_whole": Variant(
        text="Hash that may spend a quarter of its budget on whole small tables, as Cafe does",
        kind="hash_whole",
    ),
    "quotient_remainder": Variant(text="QuotientRemainder", kind="quotient_remainder"),
    DEFAULT: Variant(
        text="Cafe as it comes: learned factors of ids from 50x on",
        cafe=(),
    ),
    "cafe": Variant(
        text="Cafe without learned factors, with a half-life of 4000 bags per hot row: ids between "
        "hot and cold look up two shared rows"
    ),
    "cafe_single_level": Variant(
        text="the same without second rows: ids are hot or cold", kind="cafe_single_level"
    ),
    MEM_REC_DEFAULT: Variant(
        text="MEM-REC as it comes, a row and four weights an id: from 50x on the weights take .6 "
        "of the bytes",
        kind="mem_rec",
    ),
    "mem_rec": _mem_rec("MEM-REC with as many weights as rows, as in its paper"),
    "mem_rec_two_rows": _mem_rec("the same with two rows an id", "num_hashes=2"),
    "mem_rec_sample": _mem_rec("the same with one vector a sample", "per=sample"),
    "oracle": Variant(
        text="frequency oracle of the same bytes: Cafe's division of the budget, the bytes of "
        "hot rows, sketch and maps all given to the ids most frequent in the training split",
        kind="full",
        oracle=True,
    ),
    "per_table": Variant(
        text="a pool and a budget per table instead of shared ones", ablation=True, per_table=True
    ),
    "wrong_row": Variant(
        text="promotion copies another shared row, as the CAFE paper's code does",
        ablation=True,
        hook=_wrong_row,
    ),
    "frequency": _ablation("importance is 1 per occurrence", "importance=frequency"),
    "no_decay": _ablation("scores never decay", "half_life=inf"),
    "fresh": Variant(
        text="Cafe as it comes, all scores set to zero when the last day begins",
        cafe=(),
        ablation=True,
        data=("generator_drift",),
        hook=_fresh,
    ),
    "frozen": Variant(
        text="Cafe as it comes, hot ids fixed after the first day: no decay, no eviction",
        cafe=(),
        ablation=True,
        data=("generator_drift",),
        hook=_frozen,
    ),
}


def variant(name: str) -> Variant:
    """A variant by its name, or one made from arguments.

    Args:
        name: of :data:`VARIANTS`, or ``KIND:NAME=VALUE+NAME=VALUE`` with arguments of the kind and
            ``epochs``. With arguments of Cafe it is an ablation.

    Raises:
        ValueError: for any other name.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    made = _GENERIC.fullmatch(name)
    if made is None:
        raise ValueError(
            f"--variants must be of {', '.join(VARIANTS)} or {GENERIC_TEXT}, got {name!r}"
        )
    kind, text = made.groups()
    arguments = [part for part in text.split("+") if not part.startswith("epochs=")]
    epochs = [part.removeprefix("epochs=") for part in text.split("+") if part not in arguments]
    if len(epochs) > 1 or not all(number.isdecimal() for number in epochs):
        raise ValueError(f"--variants {name!r}: epochs must be given once, as a number")
    if arguments and kind not in ("cafe", "mem_rec"):
        raise ValueError(f"--variants {name!r}: {kind} has no arguments but epochs")
    return replace(
        VARIANTS[kind],
        text=f"{kind} with {', '.join(text.split('+'))}",
        cafe=_with_default(arguments) if kind == "cafe" else (),
        mem_rec=tuple(arguments) if kind == "mem_rec" else (),
        epochs=int(epochs[0]) if epochs else 1,
        ablation=kind == "cafe" and not epochs,
    )
