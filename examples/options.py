"""Options of the examples: a frozen dataclass, one flag per field."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field
from typing import IO, Any, NoReturn, TypeVar

T = TypeVar("T")


def option(default: Any, text: str, *aliases: str) -> Any:
    """A field of options.

    Args:
        default: of the flag.
        text: what ``--help`` says.
        aliases: other names of the flag.
    """
    return field(default=default, metadata={"help": text, "aliases": aliases})


def check_choice(name: str, values: Iterable[str], choices: Sequence[str]) -> None:
    """Refuse a value that is not a choice.

    Args:
        name: of the option.
        values: at least one.
        choices: that there are.

    Raises:
        ValueError: naming the option, the choices and the values.
    """
    given = list(values)
    if not given or any(value not in choices for value in given):
        raise ValueError(f"--{name} must be of {', '.join(choices)}, got {', '.join(given)}")


def check_least(options: Any, least: Mapping[str, int]) -> None:
    """Refuse numbers that are too small.

    Args:
        options: has them.
        least: by option, its least value.

    Raises:
        ValueError: naming the option, its least value and its value.
    """
    for name, lowest in least.items():
        if getattr(options, name) < lowest:
            raise ValueError(f"--{name} must be at least {lowest}, got {getattr(options, name)}")


def check_rates(options: Any, names: Iterable[str]) -> None:
    """Refuse learning rates that are none.

    Args:
        options: has them.
        names: of the options.

    Raises:
        ValueError: naming the option and its value.
    """
    for name in names:
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name} must be finite and above 0, got {value:g}")


def check_compressions(values: Iterable[float]) -> None:
    """Refuse compressions that are none.

    Args:
        values: of ``--compression``.

    Raises:
        ValueError: naming the value.
    """
    for value in values:
        if not (math.isfinite(value) and value >= 1):
            raise ValueError(f"--compression must be finite and at least 1, got {value:g}")


def check_dim(embedding_dim: int) -> None:
    """Refuse a dim that FBGEMM's rows cannot have.

    Args:
        embedding_dim: of ``--embedding_dim``.

    Raises:
        ValueError: naming the nearest one that they can.
    """
    if embedding_dim % 4:
        raise ValueError(
            f"--embedding_dim must be a multiple of 4 (FBGEMM's row alignment), got "
            f"{embedding_dim}; use {4 * max(1, round(embedding_dim / 4))}"
        )


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


def kind_arguments(flag: str, kind: Any, given: Sequence[str]) -> dict[str, Any]:
    """Arguments of a kind of table from ``NAME=VALUE``, compression and sizes left out.

    Args:
        flag: that has given them, for messages.
        kind: such as :class:`torchrec_cafe.Cafe`.
        given: ``NAME=VALUE`` each.

    Raises:
        ValueError: if a name is unknown, or a value cannot be read or is out of range.
    """
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


def parse(
    options: type[T],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    epilog: str | None = None,
) -> T:
    """Read the options.

    Args:
        options: a dataclass whose fields are made by :func:`option`.
        arguments: command line without the program; ``None`` reads the process's own.
        prog: name of the program.
        description: what it does.
        epilog: what ``--help`` ends with.

    Raises:
        ValueError: if an option is unknown, cannot be read, or is out of range.
    """
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for of_field in dataclasses.fields(options):  # pyright: ignore[reportArgumentType]
        text = of_field.metadata["help"]
        if of_field.type == "bool":
            parser.add_argument(f"--{of_field.name}", action="store_true", help=text)
            continue
        shown = of_field.default
        if isinstance(shown, tuple):
            shown = ",".join(
                f"{part:g}" if isinstance(part, float) else str(part) for part in shown
            )
        parser.add_argument(
            f"--{of_field.name}",
            *(f"--{alias}" for alias in of_field.metadata["aliases"]),
            dest=of_field.name,
            type=_parser_of(str(of_field.type)),
            default=of_field.default,
            metavar=of_field.name.upper(),
            help=f"{text} (default: {shown or 'none'})",
        )
    return options(**vars(parser.parse_args(arguments)))
