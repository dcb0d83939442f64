"""Pooled lookups of full tables over those of MEM-REC, whose two tables fit the last-level cache.

``python -m benchmarks.mem_rec`` looks up batches of 2048 samples in eight tables of 8 GiB together,
and in MEM-REC's token rows and weights. All take turns; the figure of a case is the median over the
rounds of full / MEM-REC, and the target is 3.4 for the forward pass at pooling factor 120 (the
paper's RM2-like test, 3.3 on average).

The forward pass is inference: without gradients, MEM-REC encodes, looks up, scales and pools in one
operator. Forward and backward together are a training step of the tables, both through FBGEMM with
its row-wise Adagrad. Ids are uniform, as in micro-benchmarks of that kind, or Zipf(1.05), of which
a cache holds the popular rows of full tables too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import Row, print_rows, write_json, zipf_ids
from examples.dlrm.memory import keep_freed_pages
from torchrec_cafe.config import MemRec, TableShape
from torchrec_cafe.tables import (
    CompressedBags,
    MemRecLayout,
    MemRecRows,
    RowRangeTBE,
    TableLayout,
)

DIM = 128
NUM_TABLES = 8
BATCH = 2048
POOLING = (1, 20, 120)
TARGET = 3.4
#: token rows and their precision; the first is the paper's
TOKEN_TABLES = (
    (75_000, SparseType.FP32),
    (75_000, SparseType.FP16),
    (40_000, SparseType.FP16),
    (20_000, SparseType.FP16),
)
_OPTIMIZER = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.01}

#: ids and offsets, feature-major
Batch = tuple[Tensor, Tensor]


class FullTables:
    """Stock FBGEMM tables.

    Args:
        rows: of each table.
    """

    def __init__(self, rows: int) -> None:
        """Allocate and fill; see the class."""
        spec = (rows, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)
        self._tbe = SplitTableBatchedEmbeddingBagsCodegen([spec] * NUM_TABLES, **_OPTIMIZER)
        for weights in tqdm(self._tbe.split_embedding_weights(), desc="full tables", leave=False):
            weights.uniform_(-0.01, 0.01)

    def __call__(self, batch: Batch) -> Tensor:
        """``[B, F * D]``."""
        return self._tbe(indices=batch[0], offsets=batch[1])


def mem_rec(rows: int, token_rows: int, precision: SparseType) -> CompressedBags:
    """The same tables under MEM-REC, with the paper's one row and four weights an id.

    Args:
        rows: of each table.
        token_rows: of the token table.
        precision: of the token table.
    """
    kind = MemRec(num_token_rows=token_rows)
    shapes = [
        TableShape(name=f"t_{number}", num_embeddings=rows, embedding_dim=DIM)
        for number in range(NUM_TABLES)
    ]
    allocation = kind.allocate(shapes)
    held = allocation.num_shards * allocation.token_rows_per_shard
    tbe = RowRangeTBE(
        [*[0] * NUM_TABLES, held],
        DIM,
        weights_precision=precision,
        device=torch.device("cpu"),
        fused_params=_OPTIMIZER,
    )
    tbe.physical_tensors()[0].uniform_(-0.01, 0.01)
    layout = MemRecLayout(
        kind=kind,
        first_shard=0,
        shards_held=allocation.num_shards,
        token_rows_per_shard=allocation.token_rows_per_shard,
        weights_per_shard=allocation.weights_per_shard,
    )
    tables = [
        TableLayout(
            name=shape.name,
            num_ids=rows,
            shared_rows=allocation.num_shards,
            first_row=0,
            num_rows=0,
            num_features=1,
            index=index,
        )
        for index, shape in enumerate(shapes)
    ]
    return CompressedBags(MemRecRows(tables, layout, tbe, _OPTIMIZER), tbe)


@dataclass(frozen=True)
class Case:
    """What is looked up.

    Attributes:
        pooling: ids of a bag.
        exponent: of the ids' Zipf distribution; 0: uniform.
        backward: whether gradients follow.
    """

    pooling: int
    exponent: float
    backward: bool

    def __str__(self) -> str:
        ids = f"Zipf {self.exponent:g}" if self.exponent else "uniform"
        what = "forward + backward" if self.backward else "forward"
        return f"{what}, {ids}, {self.pooling} ids a bag"

    def batches(self, rows: int, count: int, samples: int = BATCH) -> list[Batch]:
        """Distinct batches."""
        size = samples * self.pooling
        per_table = [
            zipf_ids(rows, count * size, self.exponent, seed).split(size)
            for seed in range(NUM_TABLES)
        ]
        offsets = torch.arange(NUM_TABLES * samples + 1) * self.pooling
        return [(torch.cat(parts), offsets) for parts in zip(*per_table, strict=True)]


def job(lookup: Callable[[Batch], Tensor], batch: Batch, gradient: Tensor | None) -> float:
    """Seconds of one lookup.

    Args:
        lookup: the tables.
        batch: what is looked up.
        gradient: of the pooled bags; ``None``: inference.
    """
    start = time.perf_counter()
    if gradient is None:
        with torch.no_grad():
            lookup(batch)
    else:
        lookup(batch).backward(gradient)
    return time.perf_counter() - start


def measure(
    case: Case, lookups: Mapping[str, Callable[[Batch], Tensor]], rows: int, rounds: int
) -> list[Row]:
    """The figures of a case.

    Args:
        case: what is looked up.
        lookups: the tables by name, the full ones first.
        rows: of each full table.
        rounds: in which all take turns, each time on another batch.
    """
    batches = case.batches(rows, min(rounds, 4))
    gradient = torch.randn(BATCH, NUM_TABLES * DIM) / BATCH if case.backward else None
    seconds: dict[str, list[float]] = {name: [] for name in lookups}
    for number in range(-1, rounds):
        for name, lookup in lookups.items():
            spent = job(lookup, batches[number % len(batches)], gradient)
            if number >= 0:  # after a warm-up
                seconds[name].append(spent)
    full, *others = seconds
    per_id = 1e9 / (BATCH * NUM_TABLES * case.pooling)
    base = per_id * statistics.median(seconds[full])
    figures = [Row(f"{case}/{full}", base, "ns/id")]
    for name in others:
        ratios = [a / b for a, b in zip(seconds[full], seconds[name], strict=True)]
        judged = case.pooling == POOLING[-1] and not case.backward and case.exponent == 0
        figures += [
            Row(f"{case}/{name}", per_id * statistics.median(seconds[name]), "ns/id", base),
            Row(
                f"{case}/{full} over {name}",
                statistics.median(ratios),
                "x",
                1.0,
                TARGET if judged else None,
            ),
        ]
    return figures


def _plot(path: str, rows: Sequence[Row], threads: int) -> None:
    """Ratios over the pooling factor, forward and with backward."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, backward in zip(axes, (False, True), strict=True):
        for exponent, style in ((0.0, "-"), (1.05, ":")):
            for tokens, precision in TOKEN_TABLES:
                name = token_name(tokens, precision)
                found = {
                    row.name: row.value for row in rows if row.name.endswith(f"full over {name}")
                }
                values = [
                    found.get(f"{Case(pooling, exponent, backward)}/full over {name}")
                    for pooling in POOLING
                ]
                if None in values:
                    continue
                label = f"{name}, {'uniform' if not exponent else 'Zipf'}"
                axis.plot(POOLING, [v or 0.0 for v in values], style, marker="o", label=label)
        axis.set(xscale="log", xlabel="ids a bag", xticks=POOLING, xticklabels=POOLING)
        axis.set_title("forward + backward" if backward else "forward")
        axis.axhline(1.0, color="grey", linewidth=0.8)
    axes[0].axhline(TARGET, color="red", linestyle="--", linewidth=0.8)
    axes[0].set_ylabel(f"full / MEM-REC, {threads} thread{'s' * (threads > 1)}")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def token_name(token_rows: int, precision: SparseType) -> str:
    """Name of a token table, for the figures."""
    return f"MEM-REC {token_rows:,} {precision.name}"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gib", type=float, default=8.0, help="of the full tables together (default: 8)")
    add("--threads", type=int, default=1, help="of torch; FBGEMM's CPU lookups use one")
    add("--quick", action="store_true", help="1 GiB, few rounds: within a minute, judges nothing")
    add("--json", default="", help="where to write the figures")
    add("--plot", default="", help="where to draw the ratios")
    options = parser.parse_args()
    keep_freed_pages()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    gib = 1.0 if options.quick else options.gib
    rows = round(gib * 2**30 / (NUM_TABLES * DIM * 4))
    full = FullTables(rows)
    lookups: dict[str, Callable[[Batch], Tensor]] = {"full": full}
    for token_rows, precision in TOKEN_TABLES[: 2 if options.quick else None]:
        bags = mem_rec(rows, token_rows, precision)
        lookups[token_name(token_rows, precision)] = lambda batch, bags=bags: bags(*batch)
    cases = [
        Case(pooling, exponent, backward)
        for backward in (False, True)
        for exponent in (0.0, 1.05)
        for pooling in POOLING
        if not options.quick or (not backward and exponent == 0)
    ]
    found: list[Row] = []
    for case in tqdm(cases, desc="cases"):
        found += measure(case, lookups, rows, 5 if options.quick or case.backward else 15)
    print_rows(found)
    write_json(options.json, "mem_rec", found)
    if options.plot:
        _plot(options.plot, found, options.threads)


if __name__ == "__main__":
    main()
