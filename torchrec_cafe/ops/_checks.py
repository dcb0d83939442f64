"""Argument checks of the operators: name the argument, what it must be, what it was."""

from __future__ import annotations

from types import TracebackType

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
    if tensor.dtype is not wanted:
        raise TypeError(
            f"{op}: `{name}` must be {wanted}, got {tensor.dtype}; convert it with .to({wanted})"
        )
    got = tensor.shape
    fits = len(got) == len(shape)
    if fits:
        for size, expected in zip(got, shape, strict=True):
            fits &= expected is None or size == expected
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{op}: `{name}` must have shape [{text}], got {list(got)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: `{name}` must be contiguous; call .contiguous() on it")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Check that all arguments are on one device.

    Raises:
        ValueError: naming each argument's device, if they differ.
    """
    device = None
    for tensor in tensors.values():
        if device is None:
            device = tensor.device
        elif tensor.device != device:
            text = ", ".join(f"`{name}` on {given.device}" for name, given in tensors.items())
            raise ValueError(f"{op}: all tensors must be on one device, got {text}")


class ValueErrors:
    """Lets a value that an operator's own check refuses be a ``ValueError`` of the caller's words.

    Such a message names its argument in backticks, after the place in the source that torch puts
    before it. A context manager; a class, since a generator costs as much as a small operator.

    Args:
        op: operator, for the message.
    """

    __slots__ = ("_op",)

    def __init__(self, op: str) -> None:
        """Name the operator; see the class."""
        self._op = op

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Translate the operator's error.

        Raises:
            ValueError: with the operator's message.
        """
        if isinstance(error, RuntimeError):
            _, backtick, text = str(error).splitlines()[0].partition("`")
            if backtick:
                raise ValueError(f"{self._op}: `{text}") from None
