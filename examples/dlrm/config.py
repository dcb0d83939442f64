"""Options of the DLRM example: one dataclass, one flag per field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
from torchrec_cafe.config import Cafe, Lookahead, MemRec

#: hash_whole: hash that may spend a quarter of its budget on whole small tables, as cafe does
KINDS = (
    "full",
    "hash",
    "hash_whole",
    "quotient_remainder",
    "cafe",
    "cafe_single_level",
    "mem_rec",
    "lookahead",
    "custom",
)
#: kinds that keep every row exact
EXACT_KINDS = ("full", "lookahead")
#: tables as the file of ``--tables`` has them
CUSTOM = "custom"
#: kinds that ``--compression`` says nothing about
UNCOMPRESSED_KINDS = (*EXACT_KINDS, CUSTOM)
DEFAULT_KINDS = ("full", "hash", "cafe")
ARCHITECTURES = ("dlrm", "dcn")
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")

_MAY_BE_ZERO = (
    *("max_steps", "num_embeddings", "checkpoint_every"),
    *("validate_every", "early_stopping", "profile_steps"),
)

_EPILOG = """on a laptop:  torchx run -s local_cwd torchx_components/dlrm.py:train
everything:   torchx run -s local_cwd torchx_components/dlrm.py:train --full
own data:     torchx run -s local_cwd torchx_components/dlrm.py:train --data path/to/train.txt"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a run; see ``--help`` for what each means."""

    data: str = option(
        "promotions", "promotions, generator, generator_drift, or a path to Criteo's tsv or npy"
    )
    cache_dir: str = option(".cache", "where prepared data sets are kept")
    sample: int = option(2_000_000, "about how many samples to use, train and test together")
    full: bool = option(default=False, text="use every sample")
    kinds: tuple[str, ...] = option(
        DEFAULT_KINDS, f"tables to train in turn, of {', '.join(KINDS)}", "table_kind"
    )
    tables: str = option(
        "", "YAML file that says how each table is kept, as kind custom; empty: none"
    )
    compression: tuple[float, ...] = option((100.0,), "dense bytes / bytes of compressed tables")
    cafe: tuple[str, ...] = option((), "arguments of Cafe, as NAME=VALUE,NAME=VALUE")
    mem_rec: tuple[str, ...] = option((), "arguments of MemRec, as NAME=VALUE,NAME=VALUE")
    lookahead: tuple[str, ...] = option((), "arguments of Lookahead, as NAME=VALUE,NAME=VALUE")
    depth: int = option(4, "batches to look ahead, with tables of kind lookahead")
    arch: str = option("dlrm", f"TorchRec model: {' or '.join(ARCHITECTURES)} (DLRM_DCN)")
    over_arch: tuple[int, ...] = option((256, 128), "hidden layers after the interaction")
    embedding_dim: int = option(16, "columns of every table, a multiple of 4")
    batch_size: int = option(4096, "samples per rank and step")
    optimizer: str = option("rowwise_adagrad", f"of the tables: {', '.join(OPTIMIZERS)}")
    learning_rate: float = option(0.05, "of the tables")
    dense_learning_rate: float = option(0.001, "of the dense layers (Adam)")
    seed: tuple[int, ...] = option((0,), "one training for each; the report gives their mean")
    epochs: int = option(1, "how often to go through the training samples, in order")
    max_steps: int = option(0, "stop each training after so many steps; 0: never")
    validate_every: int = option(
        0, "steps between two validations, on the last training samples; 0: train on those, too"
    )
    validation_share: float = option(
        0.1, "share of the training samples to validate on, the last in time"
    )
    early_stopping: int = option(
        0, "stop after so many validations without a lower log-loss, and test the best; 0: never"
    )
    num_embeddings: int = option(0, "most ids of a feature of Criteo's; 0: the data set's default")
    checkpoint_dir: str = option(
        "", "where to save each training (DCP), and go on with it if it is there; empty: nowhere"
    )
    checkpoint_every: int = option(0, "steps between two saves; 0: only at the end")
    profile_steps: int = option(10, "steps to take apart for the report, after the test; 0: none")
    out: str = option("runs/latest", "folder of the report, the plots and TensorBoard's scalars")

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            ValueError: naming the option, what it must be and what it was.
        """
        check_choice("kinds", self.kinds, KINDS)
        check_choice("optimizer", (self.optimizer,), OPTIMIZERS)
        check_choice("arch", (self.arch,), ARCHITECTURES)
        least: dict[str, int] = dict.fromkeys(
            ("sample", "batch_size", "embedding_dim", "epochs", "depth"), 1
        )
        check_least(self, least | dict.fromkeys(_MAY_BE_ZERO, 0))
        check_rates(self, ("learning_rate", "dense_learning_rate"))
        check_compressions(self.compression)
        check_dim(self.embedding_dim)
        if any(size < 1 for size in self.over_arch):
            raise ValueError(f"--over_arch needs layers of at least 1, got {self.over_arch}")
        if not self.seed or not self.compression:
            raise ValueError("--seed and --compression need at least one value")
        self._check_tables()
        self._check_validation()
        self.cafe_arguments()
        self.mem_rec_arguments()
        self.lookahead_arguments()

    def _check_tables(self) -> None:
        if self.tables and CUSTOM not in self.kinds:
            object.__setattr__(self, "kinds", (*self.kinds, CUSTOM))
        if not self.tables and CUSTOM in self.kinds:
            raise ValueError(f"--kinds {CUSTOM} needs --tables, a YAML file; see docs/dlrm.md")

    def _check_validation(self) -> None:
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"--validation_share must be above 0 and below 1, got {self.validation_share:g}"
            )
        if self.early_stopping and not self.validate_every:
            raise ValueError(
                f"--early_stopping {self.early_stopping} needs --validate_every, the number of "
                "steps between two validations"
            )

    def cafe_arguments(self) -> dict[str, Any]:
        """The arguments of Cafe that ``--cafe`` gives, by name.

        Raises:
            ValueError: if a name is unknown, or a value cannot be read or is out of range.
        """
        return kind_arguments("--cafe", Cafe, self.cafe)

    def mem_rec_arguments(self) -> dict[str, Any]:
        """The arguments of MemRec that ``--mem_rec`` gives, by name.

        Raises:
            ValueError: if a name is unknown, or a value cannot be read or is out of range.
        """
        return kind_arguments("--mem_rec", MemRec, self.mem_rec)

    def lookahead_arguments(self) -> dict[str, Any]:
        """The arguments of Lookahead that ``--lookahead`` gives, by name.

        Raises:
            ValueError: if a name is unknown, or a value cannot be read or is out of range.
        """
        return kind_arguments("--lookahead", Lookahead, self.lookahead)


def parse_args(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "examples.dlrm.train",
    description: str = "Train a TorchRec DLRM with full, hashed and CAFE tables, and compare.",
) -> TrainConfig:
    """Read the options.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
        program: for the help.
        description: for the help.

    Raises:
        ValueError: if an option is unknown, cannot be read, or is out of range.
    """
    return parse(
        TrainConfig,
        arguments,
        prog=program,
        description=description,
        epilog=_EPILOG,
    )
