"""Traces in parquet and csv files, read by Arrow a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from torchrec_cafe.profile.pieces import Bags, Samples
from torchrec_cafe.profile.sources import Columns, days_of_seconds

# Rows of a parquet file, and bytes of a csv file, read at a time.
_ROWS = 1 << 17
_CSV_BYTES = 4 << 20


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _holds_ids(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind.value_type if _is_list(kind) else kind)


class ArrowSource:
    """Parquet files, or csv files, as parts of one trace.

    A cell without a value is a sample without a lookup.

    Args:
        paths: the files in their order, of one kind: ``.parquet``, ``.csv`` (commas), ``.tsv``.
        columns: of the files.
    """

    def __init__(self, paths: Sequence[Path], columns: Columns) -> None:
        """Open the files; see the class."""
        self.name = ", ".join(str(path) for path in paths)
        self._paths, self._columns = paths, columns
        self.num_samples: int | None = None
        if paths[0].suffix == ".parquet":
            metadata = [pyarrow.parquet.read_metadata(path) for path in paths]
            self.num_samples = sum(each.num_rows for each in metadata)

    def parts(self) -> Iterator[Samples]:
        """The samples in their order.

        Raises:
            TypeError: if a column has no integers.
            ValueError: if a column is not there, or a file is not what its name says.
        """
        for path in self._paths:
            try:
                for batch in self._batches(path):
                    yield self._samples(batch, path)
            except pa.ArrowInvalid as error:
                raise ValueError(f"{path}: {error}") from None

    def _batches(self, path: Path) -> Iterator[pa.RecordBatch]:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path) as file:
                chosen = self._chosen(file.schema_arrow, path)
                wanted = [*chosen, *([self._columns.when] if self._columns.when else [])]
                yield from file.iter_batches(_ROWS, columns=wanted, use_threads=False)
        else:
            reader = pyarrow.csv.open_csv(
                path,
                read_options=pyarrow.csv.ReadOptions(
                    block_size=_CSV_BYTES,
                    use_threads=False,
                    autogenerate_column_names=not self._columns.header,
                ),
                parse_options=pyarrow.csv.ParseOptions(
                    delimiter="\t" if path.suffix == ".tsv" else ","
                ),
            )
            with reader:
                yield from reader

    def _chosen(self, schema: pa.Schema, path: Path) -> list[str]:
        usable = [field.name for field in schema if _holds_ids(field.type)]
        chosen = self._columns.select(schema.names, usable, path)
        for name in chosen:
            if name not in usable:
                raise TypeError(
                    f"{path}: column {name!r} must have integers or lists of them, got "
                    f"{schema.field(name).type}; map its values to ids first"
                )
        return chosen

    def _samples(self, batch: pa.RecordBatch, path: Path) -> Samples:
        chosen = self._chosen(batch.schema, path)
        bags = {
            self._columns.table_of(name): _bags(batch.column(name), f"{path}: column {name!r}")
            for name in chosen
        }
        when = self._columns.when
        days = None if when is None else self._days(batch.column(when), f"{path}: column {when!r}")
        return Samples(bags, batch.num_rows, days)

    def _days(self, column: pa.Array, where: str) -> NDArray[np.int64]:
        if column.null_count:
            raise ValueError(
                f"{where} must have a value in every row, got {column.null_count} null"
            )
        kind = column.type
        if pa.types.is_date(kind):
            return column.cast(pa.date32()).cast(pa.int32()).to_numpy().astype(np.int64)
        if pa.types.is_timestamp(kind):
            seconds = column.cast(pa.timestamp("s", kind.tz), safe=False).cast(pa.int64())
            return days_of_seconds(seconds.to_numpy())
        if self._columns.time is not None and (
            pa.types.is_integer(kind) or pa.types.is_floating(kind)
        ):
            return days_of_seconds(column.to_numpy())
        if self._columns.time is None and pa.types.is_integer(kind):
            return column.to_numpy().astype(np.int64)
        wanted = "seconds or timestamps" if self._columns.time else "integers, dates or timestamps"
        raise TypeError(f"{where} must have {wanted}, got {kind}")


def _bags(column: Any, where: str) -> Bags:
    if _is_list(column.type):
        lengths = pc.fill_null(pc.call_function("list_value_length", [column]), 0)
        return Bags(_integers(column.flatten(), where), lengths.to_numpy().astype(np.int64))
    if column.null_count == 0:
        return Bags(_integers(column, where))
    lengths = column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)
    return Bags(_integers(column.drop_null(), where), lengths)


def _integers(column: Any, where: str) -> NDArray[np.int64]:
    if column.null_count:
        raise ValueError(f"{where}: lists must have integers only, got {column.null_count} null")
    if pa.types.is_uint64(column.type):
        column = column.cast(pa.int64())  # raises beyond 2**63
    return column.to_numpy().astype(np.int64, copy=False)
