"""Criteo's click logs in their published formats.

Kaggle's ``train.txt`` and the Terabyte log's ``day_0`` .. ``day_23`` hold one row a line, in order
of time: 40 columns with tabs between them: the label, 13 integers, 26 hexadecimal strings; all but
the label may be empty. TorchRec's ``npy`` files of them are read by :mod:`.criteo_npy`.

Shape legend: ``m`` rows of one block of a file, ``n`` rows of all files.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
from tqdm.auto import tqdm

from .click_log import ClickLog, FeatureSpec
from .criteo_npy import NpyFiles, find_npy_files
from .storage import ArrayWriter, file_identity, open_click_log, prepare_once, write_header

NUM_DENSE = 13
NUM_CATEGORICAL = 26
NUM_COLUMNS = 1 + NUM_DENSE + NUM_CATEGORICAL
DEFAULT_NUM_EMBEDDINGS = 10_000_000
_FORMAT = 1  # raise it when what is written changes
_BLOCK_BYTES = 8 << 20
_MAX_LINE_BYTES = 1 << 16
_MAX_HEX_DIGITS = 8
_MAX_INTEGER_DIGITS = 18  # fits int64
_TAB, _NEWLINE, _MINUS = b"\t\n-"

_DIGIT = np.full(256, 255, dtype=np.uint8)  # value of a character as a digit, 255 if it is none
for _value in range(16):
    _DIGIT[[ord(f"{_value:x}"), ord(f"{_value:X}")]] = _value


class Rows(NamedTuple):
    """Parsed rows.

    Attributes:
        labels: uint8 ``[m]``, 0 or 1.
        integers: int64 ``[m, 13]``, 0 where missing.
        values: int64 ``[m, 26]``, the value of the hexadecimal string, -1 where missing.
    """

    labels: np.ndarray
    integers: np.ndarray
    values: np.ndarray


def prepare_criteo(
    path: Path,
    cache_dir: Path,
    *,
    num_embeddings_per_feature: int | None = None,
    progress: bool = True,
) -> ClickLog:
    """Prepares a click log of Criteo's, the first time, and maps it.

    A dense value ``x`` becomes ``log(1 + max(x, 0))``, a missing one 0. A categorical value ``v``
    goes to bucket ``1 + v % (num_embeddings_per_feature - 1)``, a missing one to bucket 0; the
    buckets of a feature that occur are then numbered 0, 1, ..., so that a feature of few values
    has a small table.

    Args:
        path: ``train.txt``, one ``day_*`` file, or a folder with either; files may end in ``.gz``,
            or be TorchRec's ``*_dense.npy``, ``*_sparse.npy`` and ``*_labels.npy``, whose dense
            values are taken as they are, and which count a missing value as 0.
        cache_dir: prepared data lies in a folder of it named after the files, their sizes and times
            and the options; 157 bytes a row.
        num_embeddings_per_feature: most ids a feature may have, at least 2; 10,000,000 by default.
        progress: whether to show a progress bar while preparing.

    Returns:
        The log. Of a folder of days the last day is the test set; of a single file, the last
        seventh of its rows (the last day of Kaggle's seven).

    Raises:
        FileNotFoundError: if there is no such file, or no such files in the folder.
        ValueError: if the option is out of range, a file is empty, or a row malformed.

    Note:
        Reads the files as a stream. Nothing is left in ``cache_dir`` when it fails.
    """
    limit = num_embeddings_per_feature
    if limit is None:
        limit = DEFAULT_NUM_EMBEDDINGS
    if not 2 <= limit <= 2**31 - 1:
        raise ValueError(
            "prepare_criteo: `num_embeddings_per_feature` must be between 2 and 2147483647, "
            f"got {limit}; pass the most rows that a table may have"
        )
    sources = find_sources(path)
    files = [file for source in sources for file in source.files]
    key = json.dumps([_FORMAT, limit, [file_identity(file) for file in files]])
    folder = cache_dir / f"criteo-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def write(made: Path) -> None:
        _write(made, sources, limit, progress=progress)

    prepare_once(folder, write)
    return open_click_log(folder)


class Source(NamedTuple):
    """A part of a click log, such as a day.

    Attributes:
        name: for reports.
        files: it is read from.
        blocks: yields labels uint8 ``[m]``, dense float32 ``[m, 13]``, and values int64
            ``[m, 26]``, -1 where missing, about ``_BLOCK_BYTES`` at a time; moves the bar.
    """

    name: str
    files: tuple[Path, ...]
    blocks: Callable[[tqdm], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def find_sources(path: Path) -> list[Source]:
    """Finds the parts of a click log, in order of time.

    Args:
        path: see :func:`prepare_criteo`.

    Returns:
        The parts, at least one; of a folder with text and ``npy`` files, the text.

    Raises:
        FileNotFoundError: if there are none, or not all files of a part.
    """
    if path.exists() and (path.suffix == ".npy" or not _text_files(path)):
        if npy := find_npy_files(path):
            return [Source(f.name, tuple(f), partial(_npy_blocks, f)) for f in npy]
    return [Source(f.name, (f,), partial(_text_blocks, f)) for f in find_files(path)]


def find_files(path: Path) -> list[Path]:
    """Finds the text files of a click log, in order of time.

    Args:
        path: a file, or a folder that holds ``train.txt`` or ``day_*``.

    Returns:
        The files, at least one.

    Raises:
        FileNotFoundError: if there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"prepare_criteo: `path` must be a file or folder of Criteo's, got {str(path)!r}, "
            "which does not exist; pass the path of train.txt, or the folder of day_0 .. day_23"
        )
    if files := _text_files(path):
        return files
    raise FileNotFoundError(
        "prepare_criteo: `path` must hold train.txt or day_0 .. day_23 (or these with .gz, or "
        f"TorchRec's npy files), got folder {str(path)!r} without them; pass the folder that has "
        "the files"
    )


def _text_files(path: Path) -> list[Path]:
    """The text files of a folder in order of time, if it has any; a file itself."""
    if path.is_file():
        return [path]
    days: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        match = re.fullmatch(r"day_(\d+)(\.gz)?", file.name)
        if match:
            days.setdefault(int(match[1]), file)  # day_0 comes before day_0.gz
    if days:
        return [days[day] for day in sorted(days)]
    names = ("train.txt", "train.txt.gz")
    return [path / name for name in names if (path / name).is_file()][:1]


def parse_rows(block: bytes, *, file: Path, first_line: int) -> Rows:
    """Parses whole lines.

    Args:
        block: lines, each ended by a newline.
        file: where they are from, for errors.
        first_line: number of the first line in the file, from 1, for errors.

    Returns:
        The rows.

    Raises:
        ValueError: if a line is malformed; names the file and the line.
    """
    buffer = np.frombuffer(block.replace(b"\r\n", b"\n"), dtype=np.uint8)
    ends = np.flatnonzero((buffer == _TAB) | (buffer == _NEWLINE))
    last_ends = np.flatnonzero(buffer[ends] == _NEWLINE)
    columns = np.diff(last_ends, prepend=-1)
    wrong = np.flatnonzero(columns != NUM_COLUMNS)
    if wrong.size:
        _fail(
            file,
            first_line + int(wrong[0]),
            f"must have {NUM_COLUMNS} columns with tabs between them, "
            f"got {columns[wrong[0]]}; is this one of Criteo's training files?",
        )
    begins = np.concatenate([[0], ends[:-1] + 1]).reshape(-1, NUM_COLUMNS)
    lengths = ends.reshape(-1, NUM_COLUMNS) - begins
    # Padded, so that digits can be looked up past the end of the last field.
    buffer = np.concatenate([buffer, np.zeros(_MAX_INTEGER_DIGITS, dtype=np.uint8)])

    first_hex = 1 + NUM_DENSE
    negative = (buffer[begins[:, :first_hex]] == _MINUS) & (lengths[:, :first_hex] > 1)
    integers, integers_good = _parse_digits(
        buffer,
        begins[:, :first_hex] + negative,
        lengths[:, :first_hex] - negative,
        base=10,
        max_digits=_MAX_INTEGER_DIGITS,
    )
    integers = np.where(negative, -integers, integers)
    integers_good[:, 0] &= (lengths[:, 0] == 1) & (integers[:, 0] >= 0) & (integers[:, 0] <= 1)
    values, values_good = _parse_digits(
        buffer, begins[:, first_hex:], lengths[:, first_hex:], base=16, max_digits=_MAX_HEX_DIGITS
    )
    bad = np.flatnonzero(~np.concatenate([integers_good, values_good], axis=1).reshape(-1))
    if bad.size:
        row, column = divmod(int(bad[0]), NUM_COLUMNS)
        begin = begins[row, column]
        text = buffer[begin : begin + min(int(lengths[row, column]), 40)].tobytes()
        expected = "an integer or empty" if column < first_hex else "1 to 8 hex digits or empty"
        _fail(
            file,
            first_line + row,
            f"column {column + 1} must be {'0 or 1' if column == 0 else expected}, "
            f"got {text.decode('utf-8', 'replace')!r}; correct or remove the line",
        )
    values = np.where(lengths[:, first_hex:] == 0, -1, values)
    return Rows(integers[:, 0].astype(np.uint8), integers[:, 1:], values)


def _parse_digits(
    buffer: np.ndarray, begins: np.ndarray, lengths: np.ndarray, *, base: int, max_digits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values, 0 where empty, and whether each was well-formed."""
    values = np.zeros(begins.shape, dtype=np.int64)
    good = lengths <= max_digits
    digit_at = _DIGIT[buffer]
    for place in range(min(max_digits, int(lengths.max(initial=0)))):
        present = lengths > place
        digits = digit_at.take(begins + place)  # of the next field, where not present
        good &= ~present | (digits < base)
        values = np.where(present, values * base + digits, values)
    return values, good


def _fail(file: Path, line: int, problem: str) -> NoReturn:
    raise ValueError(f"{file}, line {line}: {problem}")


def _read_blocks(file: Path, bar: tqdm) -> Iterator[bytes]:
    """Yields whole lines, about ``_BLOCK_BYTES`` at a time, each ended by a newline."""
    rest, line, position = b"", 1, 0
    with file.open("rb") as raw:
        stream = gzip.open(raw) if file.suffix == ".gz" else raw
        try:
            while chunk := stream.read(_BLOCK_BYTES):
                bar.update(raw.tell() - position)  # compressed bytes, if it is compressed
                position = raw.tell()
                whole, newline, rest = (rest + chunk).rpartition(b"\n")
                if len(rest) > _MAX_LINE_BYTES:
                    _fail(
                        file,
                        line + whole.count(b"\n") + len(newline),
                        f"must be at most {_MAX_LINE_BYTES} bytes, got more; is this a text file?",
                    )
                if newline:
                    yield whole + newline
                    line += whole.count(b"\n") + 1
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(
                f"{file}: must be a complete gzip file, got {error}; fetch it again"
            ) from error
    if rest:
        yield rest + b"\n"


def _text_blocks(file: Path, bar: tqdm) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    num_rows = 0
    for block in _read_blocks(file, bar):
        rows = parse_rows(block, file=file, first_line=num_rows + 1)
        num_rows += len(rows.labels)
        yield rows.labels, np.log1p(np.maximum(rows.integers, 0), dtype=np.float32), rows.values


def _npy_blocks(files: NpyFiles, bar: tqdm) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for labels, dense, values, size in files.blocks():
        bar.update(size)
        yield labels, dense, values


def _write(folder: Path, sources: list[Source], limit: int, *, progress: bool) -> None:
    """Writes the prepared log of some files."""
    occurs = np.zeros((NUM_CATEGORICAL, limit), dtype=bool)
    rows_of_source = []
    total_bytes = sum(file.stat().st_size for source in sources for file in source.files)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=total_bytes,
                desc="preparing Criteo's log",
                unit="B",
                unit_scale=True,
                disable=not progress,
            )
        )
        labels = stack.enter_context(ArrayWriter(folder / "labels.npy", np.uint8, ()))
        dense = stack.enter_context(ArrayWriter(folder / "dense.npy", np.float32, (NUM_DENSE,)))
        ids = stack.enter_context(ArrayWriter(folder / "ids.npy", np.int32, (NUM_CATEGORICAL,)))
        for source in sources:
            num_rows = 0
            for clicked, integers, values in source.blocks(bar):
                buckets = np.where(values < 0, 0, 1 + values % (limit - 1))
                occurs[np.arange(NUM_CATEGORICAL), buckets] = True
                labels.append(clicked)
                dense.append(integers)
                ids.append(buckets)
                num_rows += len(buckets)
            if num_rows == 0:
                file = source.files[0]
                raise ValueError(f"{file}: must hold rows, got an empty file; fetch it again")
            rows_of_source.append(num_rows)

    num_test = rows_of_source[-1] if len(sources) > 1 else max(1, rows_of_source[0] // 7)
    write_header(
        folder,
        name="criteo",
        description=f"Criteo's click log, read from {', '.join(source.name for source in sources)}",
        features=_renumber(folder, occurs),
        num_train=sum(rows_of_source) - num_test,
    )


def _renumber(folder: Path, occurs: np.ndarray) -> list[FeatureSpec]:
    """Numbers the buckets that occur (bool ``[26, buckets]``) 0, 1, ... in the file of ids."""
    ids = np.load(folder / "ids.npy", mmap_mode="r+")
    block_rows = 1 << 20
    features = []
    renumbered = np.zeros(occurs.shape, dtype=np.int32)  # memory only where it is written
    for column in range(NUM_CATEGORICAL):
        buckets = np.flatnonzero(occurs[column])
        renumbered[column, buckets] = np.arange(len(buckets))
        features.append(FeatureSpec(f"cat_{column}", len(buckets)))
    for begin in range(0, len(ids), block_rows):
        block = ids[begin : begin + block_rows]
        for column in range(NUM_CATEGORICAL):
            block[:, column] = renumbered[column][block[:, column]]
    ids.flush()
    return features
