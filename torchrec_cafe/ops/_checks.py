"""Argument checks of the operators: name the argument, what it must be, what it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, dtype


def check_tensor(
    op: str, name: str, tensor: Tensor, wanted: dtype, shape: tuple[int | None, ...]
) -> None:
    """Check dtype, shape and layout of one argument.

    Args:
        op: operator, for the message.
        name: argument, for the message.
        tensor: what was given.
        wanted: dtype it must have.
        shape: shape it must have; ``None`` is any size.

    Raises:
        TypeError: if the dtype differs.
        ValueError: if the shape differs or the tensor is not contiguous.
    """
    if tensor.dtype != wanted:
        raise TypeError(
            f"{op}: `{name}` must be {wanted}, got {tensor.dtype}; convert it with .to({wanted})"
        )
    fits = tensor.dim() == len(shape) and all(
        size is None or size == got for size, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: `{name}` must have shape [{text}], got {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: `{name}` must be contiguous; call .contiguous() on it")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Check that all arguments are on one device.

    Raises:
        ValueError: naming each argument's device, if they differ.
    """
    if len({tensor.device for tensor in tensors.values()}) > 1:
        text = ", ".join(f"`{name}` on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {text}")


@contextmanager
def value_errors(op: str) -> Iterator[None]:
    """Let a value that an operator's own check refuses be a ``ValueError`` of the caller's words.

    Such a message names its argument in backticks, after the place in the source that torch puts
    before it.

    Raises:
        ValueError: with the operator's message.
    """
    try:
        yield
    except RuntimeError as error:
        _, backtick, text = str(error).splitlines()[0].partition("`")
        if not backtick:
            raise
        raise ValueError(f"{op}: `{text}") from None
