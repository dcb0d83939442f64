"""Argument checks of the operators: name the argument, what it must be, what it was.

The operators check everything themselves before they touch memory. These functions run when one
has refused, to say why: checking twice would cost more than a small batch takes.
"""

from __future__ import annotations

import re

from torch import Tensor, dtype

# Function, place in the source and reason: how torch's stable ABI words what a check has found.
_REASON = re.compile(r"\w+, .*?:\d+, (.*)")


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


def value_error(op: str, error: Exception) -> Exception:
    """What to raise when an operator refuses its arguments for a reason that only it can see.

    Args:
        op: operator, for the message.
        error: what it raised.

    Returns:
        A ``ValueError`` or ``TypeError`` with the operator's reason, or ``error`` itself if it is
        about something else.
    """
    found = _REASON.match(str(error))
    if found is None:
        return error
    reason = found.group(1)
    kind = TypeError if reason.endswith("has the wrong dtype") else ValueError
    return kind(f"{op}: {reason}")
