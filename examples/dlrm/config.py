"""Options of the DLRM example: one dataclass, one flag per field."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NoReturn

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


def _option(default: Any, text: str, *aliases: str) -> Any:
    return field(default=default, metadata={"help": text, "aliases": aliases})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of a run; see ``--help`` for what each means."""

    data: str = _option(
        "promotions", "promotions, generator, generator_drift, or a path to Criteo's tsv or npy"
    )
    cache_dir: str = _option(".cache", "where prepared data sets are kept")
    sample: int = _option(2_000_000, "about how many samples to use, train and test together")
    full: bool = _option(default=False, text="use every sample")
    kinds: tuple[str, ...] = _option(
        DEFAULT_KINDS, f"tables to train in turn, of {', '.join(KINDS)}", "table_kind"
    )
    tables: str = _option(
        "", "YAML file that says how each table is kept, as kind custom; empty: none"
    )
    compression: tuple[float, ...] = _option((100.0,), "dense bytes / bytes of compressed tables")
    cafe: tuple[str, ...] = _option((), "arguments of Cafe, as NAME=VALUE,NAME=VALUE")
    mem_rec: tuple[str, ...] = _option((), "arguments of MemRec, as NAME=VALUE,NAME=VALUE")
    lookahead: tuple[str, ...] = _option((), "arguments of Lookahead, as NAME=VALUE,NAME=VALUE")
    depth: int = _option(4, "batches to look ahead, with tables of kind lookahead")
    arch: str = _option("dlrm", f"TorchRec model: {' or '.join(ARCHITECTURES)} (DLRM_DCN)")
    over_arch: tuple[int, ...] = _option((256, 128), "hidden layers after the interaction")
    embedding_dim: int = _option(16, "columns of every table, a multiple of 4")
    batch_size: int = _option(4096, "samples per rank and step")
    optimizer: str = _option("rowwise_adagrad", f"of the tables: {', '.join(OPTIMIZERS)}")
    learning_rate: float = _option(0.05, "of the tables")
    dense_learning_rate: float = _option(0.001, "of the dense layers (Adam)")
    seed: tuple[int, ...] = _option((0,), "one training for each; the report gives their mean")
    epochs: int = _option(1, "how often to go through the training samples, in order")
    max_steps: int = _option(0, "stop each training after so many steps; 0: never")
    validate_every: int = _option(
        0, "steps between two validations, on the last training samples; 0: train on those, too"
    )
    validation_share: float = _option(
        0.1, "share of the training samples to validate on, the last in time"
    )
    early_stopping: int = _option(
        0, "stop after so many validations without a lower log-loss, and test the best; 0: never"
    )
    num_embeddings: int = _option(0, "most ids of a feature of Criteo's; 0: the data set's default")
    checkpoint_dir: str = _option(
        "", "where to save each training (DCP), and go on with it if it is there; empty: nowhere"
    )
    checkpoint_every: int = _option(0, "steps between two saves; 0: only at the end")
    profile_steps: int = _option(10, "steps to take apart for the report, after the test; 0: none")
    out: str = _option("runs/latest", "folder of the report, the plots and TensorBoard's scalars")

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            ValueError: naming the option, what it must be and what it was.
        """
        self._check_choice("kinds", self.kinds, KINDS)
        self._check_choice("optimizer", (self.optimizer,), OPTIMIZERS)
        self._check_choice("arch", (self.arch,), ARCHITECTURES)
        self._check_numbers()
        if self.embedding_dim % 4:
            raise ValueError(
                f"--embedding_dim must be a multiple of 4 (FBGEMM's row alignment), got "
                f"{self.embedding_dim}; use {4 * max(1, round(self.embedding_dim / 4))}"
            )
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
        return _arguments("--cafe", Cafe, self.cafe)

    def mem_rec_arguments(self) -> dict[str, Any]:
        """The arguments of MemRec that ``--mem_rec`` gives, by name.

        Raises:
            ValueError: if a name is unknown, or a value cannot be read or is out of range.
        """
        return _arguments("--mem_rec", MemRec, self.mem_rec)

    def lookahead_arguments(self) -> dict[str, Any]:
        """The arguments of Lookahead that ``--lookahead`` gives, by name.

        Raises:
            ValueError: if a name is unknown, or a value cannot be read or is out of range.
        """
        return _arguments("--lookahead", Lookahead, self.lookahead)

    def _check_numbers(self) -> None:
        least = dict.fromkeys(("sample", "batch_size", "embedding_dim", "epochs", "depth"), 1)
        for name, lowest in (least | dict.fromkeys(_MAY_BE_ZERO, 0)).items():
            if getattr(self, name) < lowest:
                raise ValueError(f"--{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("learning_rate", "dense_learning_rate"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"--{name} must be finite and above 0, got {value:g}")
        for value in self.compression:
            if not (math.isfinite(value) and value >= 1):
                raise ValueError(f"--compression must be finite and at least 1, got {value:g}")

    @staticmethod
    def _check_choice(name: str, values: tuple[str, ...], choices: tuple[str, ...]) -> None:
        unknown = [value for value in values if value not in choices]
        if unknown or not values:
            raise ValueError(f"--{name} must be of {', '.join(choices)}, got {', '.join(values)}")


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with; only rank 0 shows the help."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def print_help(self, file: IO[str] | None = None) -> None:
        if os.environ.get("RANK", "0") == "0":
            super().print_help(file)


_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "None": lambda text: {"none": None}[text.lower()],
}


def _read(text: str, annotation: str) -> Any:
    """A value of the first of the annotation's types that the text can be read as."""
    for name in annotation.split("|"):
        try:
            return _READERS.get(name.strip(), str)(text)
        except (KeyError, ValueError):
            continue
    raise ValueError(text)


def _arguments(flag: str, kind: Any, given: Sequence[str]) -> dict[str, Any]:
    """Arguments of a kind of table from ``NAME=VALUE``, compression and sizes left out."""
    types = {option.name: str(option.type) for option in dataclasses.fields(kind)}
    all_names = set(types)
    for name in ("compression", "num_token_rows"):  # an option of its own, and what it decides
        types.pop(name, None)
    arguments: dict[str, Any] = {}
    for item in given:
        name, equals, text = item.partition("=")
        if not equals or name not in types:
            raise ValueError(
                f"{flag} must be NAME=VALUE,... with names of {', '.join(types)}, got {item!r}"
            )
        try:
            arguments[name] = _read(text, types[name])
        except ValueError:
            raise ValueError(f"{flag}: {name} must be {types[name]}, got {text!r}") from None
    compression = {"compression": 1.0} if "compression" in all_names else {}
    try:
        kind(**compression, **arguments)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None
    return arguments


def _parser_of(annotation: str) -> Any:
    item = {"str": str, "int": int, "float": float}
    if annotation.startswith("tuple["):
        convert = item[annotation.removeprefix("tuple[").split(",")[0]]
        return lambda text: tuple(convert(part) for part in text.split(",") if part)
    return item[annotation]


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
    parser = _Parser(
        prog=program,
        description=description,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in dataclasses.fields(TrainConfig):
        text = option.metadata["help"]
        aliases = [f"--{alias}" for alias in option.metadata["aliases"]]
        if option.type == "bool":
            parser.add_argument(f"--{option.name}", action="store_true", help=text)
            continue
        shown = option.default
        if isinstance(shown, tuple):
            shown = ",".join(
                f"{part:g}" if isinstance(part, float) else str(part) for part in shown
            )
        parser.add_argument(
            f"--{option.name}",
            *aliases,
            dest=option.name,
            type=_parser_of(str(option.type)),
            default=option.default,
            metavar=option.name.upper(),
            help=f"{text} (default: {shown or 'none'})",
        )
    return TrainConfig(**vars(parser.parse_args(arguments)))
