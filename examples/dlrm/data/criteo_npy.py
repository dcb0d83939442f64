"""Criteo's click logs as TorchRec's ``npy`` files.

``torchrec.datasets.scripts.npy_preproc_criteo`` makes three of each file of the log, such as
``day_0_dense.npy`` (float32 ``[n, 13]``, of which it has taken the logarithm), ``day_0_sparse.npy``
(integers ``[n, 26]``, 0 where missing) and ``day_0_labels.npy`` (``[n, 1]``); of Kaggle's
``train_dense.npy`` and so on.

Shape legend: ``n`` rows of a file, ``m`` rows of one block of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_PARTS = ("dense", "sparse", "labels")
_NAME = re.compile(rf"(day_(\d+)|train)_({'|'.join(_PARTS)})\.npy")
_WIDTHS = {"dense": 13, "sparse": 26, "labels": 1}
_BLOCK_BYTES = 8 << 20


class NpyFiles(NamedTuple):
    """The three files of a part of the log.

    Attributes:
        dense: float ``[n, 13]``.
        sparse: integers ``[n, 26]``, taken as 32 bits without a sign.
        labels: ``[n, 1]`` or ``[n]``, 0 or 1.
    """

    dense: Path
    sparse: Path
    labels: Path

    @property
    def name(self) -> str:
        """What they are the parts of, such as ``day_0``."""
        return self.dense.name.removesuffix("_dense.npy")

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
        """Read some rows at a time.

        Yields:
            Labels uint8 ``[m]``, dense float32 ``[m, 13]``, values of the sparse features int64
            ``[m, 26]`` in ``[0, 2**32)``, and how many bytes were read.

        Raises:
            ValueError: naming the file, if it is not what it must be.
        """
        dense, sparse, labels = (_open(path, part) for part, path in zip(_PARTS, self, strict=True))
        for path, array in ((self.sparse, sparse), (self.labels, labels)):
            if len(array) != len(dense):
                raise ValueError(
                    f"{path}: must have as many rows as {self.dense.name}, {len(dense)}, got "
                    f"{len(array)}; make them again"
                )
        row_bytes = sum(array.nbytes for array in (dense, sparse, labels)) // max(1, len(dense))
        rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for begin in range(0, len(dense), rows):
            block = slice(begin, begin + rows)
            clicked, integers = labels[block].reshape(-1), dense[block].astype(np.float32)
            if wrong := np.flatnonzero((clicked != 0) & (clicked != 1)).tolist():
                value = clicked[wrong[0]]
                raise ValueError(
                    f"{self.labels}, row {begin + wrong[0]}: must be 0 or 1, got {value}"
                )
            if wrong := np.flatnonzero(~np.isfinite(integers).all(axis=1)).tolist():
                raise ValueError(f"{self.dense}, row {begin + wrong[0]}: must be finite numbers")
            values = sparse[block].astype(np.int64) & 0xFFFFFFFF
            yield clicked.astype(np.uint8), integers, values, len(clicked) * row_bytes


def find_npy_files(path: Path) -> list[NpyFiles]:
    """Find the files of a click log, in order of time.

    Args:
        path: a folder, or one of three files that belong together.

    Returns:
        The files, three by three; none if there are no such names.

    Raises:
        FileNotFoundError: if one of three is missing.
    """
    folder = path.parent if path.is_file() else path
    matches = [_NAME.fullmatch(file.name) for file in sorted(folder.iterdir())]
    stems = {match[1]: int(match[2] or 0) for match in matches if match}
    if path.is_file():
        match = _NAME.fullmatch(path.name)
        stems = {match[1]: 0} if match else {}
    elif "train" in stems and len(stems) > 1:  # days come first, as they do of text
        del stems["train"]
    found = []
    for stem in sorted(stems, key=stems.__getitem__):
        files = NpyFiles(*(folder / f"{stem}_{part}.npy" for part in _PARTS))
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"prepare_criteo: `path` must hold {' and '.join(missing)} beside the other files "
                f"of {stem}, got {str(folder)!r} without; make them again"
            )
        found.append(files)
    return found


def _open(path: Path, part: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: must be a complete npy file, got {error}") from error
    width, kinds = _WIDTHS[part], "f" if part == "dense" else "iu"
    shaped = array.ndim == 2 and array.shape[1] == width or width == array.ndim == 1
    if not shaped or array.dtype.kind not in kinds + ("f" if part == "labels" else ""):
        numbers = "floats" if part == "dense" else "integers"
        raise ValueError(
            f"{path}: must be {numbers} of shape [n, {width}], got {array.dtype} of shape "
            f"{list(array.shape)}; is this one of TorchRec's files?"
        )
    return array
