"""Prepared click logs on disk: ``.npy`` files and one ``log.json``, written once and mapped.

Shape legend: ``n`` rows (train, then test), ``F`` categorical features, ``D`` dense features.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import final

import numpy as np

from .click_log import ClickLog, FeatureSpec, Split

_logger = logging.getLogger(__name__)


def prepare_once(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes ``folder`` with what ``write`` puts in it, unless it is already there.

    Args:
        folder: the folder to make. It appears by a rename, so that it is complete or absent.
        write: called with an empty folder beside ``folder`` that becomes ``folder`` on return. If
            it raises, what it wrote is removed.

    Note:
        Processes of one machine may call this together: one prepares, the others wait. A lock file
        ``<folder>.lock`` stays behind.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, or the process dies
        if folder.is_dir():
            return
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        partial.mkdir()
        try:
            write(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _logger.info("prepared %s", folder)


def write_header(
    folder: Path,
    *,
    name: str,
    description: str,
    features: Sequence[FeatureSpec],
    num_train: int,
) -> None:
    """Writes ``log.json``, which says what the arrays in ``folder`` are.

    Args:
        folder: holds ``labels.npy`` uint8 ``[n]``, ``dense.npy`` float32 ``[n, D]`` and
            ``ids.npy`` int32 ``[n, F]``.
        name: see :class:`ClickLog`.
        description: see :class:`ClickLog`.
        features: see :class:`ClickLog`.
        num_train: the first ``num_train`` rows are the training rows.
    """
    header = {
        "name": name,
        "description": description,
        "features": [list(feature) for feature in features],
        "num_train": num_train,
    }
    (folder / "log.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def open_click_log(folder: Path) -> ClickLog:
    """Maps a prepared click log.

    Args:
        folder: what :func:`prepare_once` made.

    Returns:
        The log; its arrays are read-only memory maps.
    """
    header = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    arrays = [np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("labels", "dense", "ids")]
    num_train = header["num_train"]
    return ClickLog(
        name=header["name"],
        description=header["description"],
        features=tuple(FeatureSpec(*feature) for feature in header["features"]),
        num_dense=arrays[1].shape[1],
        train=Split(*(array[:num_train] for array in arrays)),
        test=Split(*(array[num_train:] for array in arrays)),
    )


@final
class ArrayWriter:
    """Appends rows to a ``.npy`` file whose length is not known beforehand.

    Args:
        path: the file to make.
        dtype: type of the elements.
        row_shape: shape of one row, ``()`` for a vector.
    """

    def __init__(self, path: Path, dtype: type[np.generic], row_shape: tuple[int, ...]) -> None:
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._num_rows = 0
        self._file = path.open("wb")
        self._write_header()
        self._data_begin = self._file.tell()

    def __enter__(self) -> "ArrayWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._data_begin
        self._file.close()

    def append(self, rows: np.ndarray) -> None:
        """Appends ``rows``, of shape ``[m, *row_shape]``."""
        assert rows.shape[1:] == self._row_shape
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self._num_rows += len(rows)

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis can grow without moving the data.
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)


def file_identity(path: Path) -> tuple[str, int, int]:
    """Returns what tells one version of a file from another: resolved path, size, mtime (ns)."""
    status = os.stat(path)
    return str(path.resolve()), status.st_size, status.st_mtime_ns
