"""Options of the two-tower example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torchrec_cafe as tc
from examples.options import (
    check_choice,
    check_compressions,
    check_dim,
    check_least,
    check_rates,
    kind_arguments,
    option,
    parse,
)

KINDS = ("full", "hash", "quotient_remainder", "cafe", "mem_rec")

_EPILOG = """on two ranks:
  torchx run -s local_cwd --workspace "" dist.ddp -j 1x2 -m examples.two_tower.train -- --full"""


@dataclass(frozen=True, kw_only=True)
class TwoTowerConfig:
    """Options of a run; see ``--help`` for what each means."""

    cache_dir: str = option(".cache", "where the prepared purchases are kept")
    sample: int = option(400_000, "about how many purchases to train on")
    full: bool = option(default=False, text="train on every purchase")
    table_kind: tuple[str, ...] = option(
        ("full", "hash", "cafe"), f"tables to train in turn, of {', '.join(KINDS)}"
    )
    compression: tuple[float, ...] = option((20.0,), "dense bytes / bytes of compressed tables")
    cafe: tuple[str, ...] = option((), "arguments of Cafe, as NAME=VALUE,NAME=VALUE")
    mem_rec: tuple[str, ...] = option((), "arguments of MemRec, as NAME=VALUE,NAME=VALUE")
    history: int = option(30, "products of a household's past that the query tower sees")
    embedding_dim: int = option(32, "columns of every table, a multiple of 4")
    hidden: int = option(64, "width of the hidden layer of each tower")
    temperature: float = option(0.05, "of the softmax over the products of a batch")
    batch_size: int = option(1024, "purchases per rank and step")
    learning_rate: float = option(0.1, "of the tables (row-wise Adagrad)")
    dense_learning_rate: float = option(0.002, "of the towers (Adam)")
    epochs: int = option(1, "how often to go through the training purchases, in order of time")
    max_steps: int = option(0, "stop each training after so many steps; 0: never")
    queries: int = option(10_000, "about how many later purchases to look for")
    seed: tuple[int, ...] = option((0,), "one training for each; the report gives their mean")
    out: str = option("runs/two_tower", "folder of the report and the plot")

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            ValueError: naming the option, what it must be and what it was.
        """
        check_choice("table_kind", self.table_kind, KINDS)
        positive = ("sample", "history", "hidden", "batch_size", "epochs", "queries")
        check_least(self, dict.fromkeys(positive, 1) | {"embedding_dim": 4, "max_steps": 0})
        check_rates(self, ("learning_rate", "dense_learning_rate", "temperature"))
        check_compressions(self.compression)
        check_dim(self.embedding_dim)
        if not self.seed or not self.compression:
            raise ValueError("--seed and --compression need at least one value")
        for kind in self.table_kind:
            self.table(kind, self.compression[0])

    def table(self, kind: str, compression: float) -> Any:
        """How tables are kept: the whole difference between the kinds.

        Args:
            kind: of :data:`KINDS`.
            compression: of the compressed ones.

        Returns:
            ``None`` for full tables.

        Raises:
            ValueError: if ``--cafe`` or ``--mem_rec`` cannot be read or are out of range.
        """
        cafe = kind_arguments("--cafe", tc.Cafe, self.cafe)
        mem_rec = kind_arguments("--mem_rec", tc.MemRec, self.mem_rec)
        kinds: dict[str, Any] = {
            "full": lambda: None,
            "hash": lambda: tc.Hash(compression=compression),
            "quotient_remainder": lambda: tc.QuotientRemainder(compression=compression),
            "cafe": lambda: tc.Cafe(compression=compression, **cafe),
            "mem_rec": lambda: tc.MemRec(compression=compression, **mem_rec),
        }
        return kinds[kind]()


def parse_args(arguments: Sequence[str] | None = None) -> TwoTowerConfig:
    """Read the options.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.

    Raises:
        ValueError: if an option is unknown, cannot be read, or is out of range.
    """
    return parse(
        TwoTowerConfig,
        arguments,
        prog="examples.two_tower.train",
        description="Train a two-tower retrieval model with full, hashed and CAFE tables.",
        epilog=_EPILOG,
    )
