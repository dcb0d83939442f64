"""``torchrec-cafe profile``: reads a trace of ids once, and reports on every table."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_cafe.profile.sources import Columns, Source

_EXAMPLE = """
examples:
  torchrec-cafe profile clicks.parquet --day-column day --out profile
  torchrec-cafe profile ids.npy --days 7 --num-embeddings 10000000 --cache-sizes 1%,5%,100000
  torchrec-cafe profile --loader my_package.data:train_batches --samples 4000000

writes DIR/statistics.json, which the planner reads, and DIR/index.html
"""


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``torchrec-cafe``.

    Args:
        subparsers: as ``ArgumentParser.add_subparsers`` gives them.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "profile",
        help="read a trace of ids: what each way of keeping a table would cost and catch",
        description="Reads a trace of ids once, in bounded memory, and says per table what each "
        "way of keeping it would cost and catch.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    _add_inputs(parser)
    add = parser.add_argument
    add("--batch-size", type=int, default=2048, metavar="N", help="samples of a batch (2048)")
    add("--depth", type=int, default=4, metavar="N", help="batches looked ahead (4)")
    add(
        "--cache-sizes",
        default="1%,5%,20%",
        metavar="LIST",
        help="shares of a table's rows, or rows (1%%,5%%,20%%)",
    )
    add(
        "--compressions",
        default="10,100,1000,10000",
        metavar="LIST",
        help="of Cafe tables (10,100,1000,10000)",
    )
    add("--memory", type=float, default=32, metavar="MIB", help="MiB kept for each table (32)")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    add("--out", type=Path, default=Path("profile"), metavar="DIR", help="where to (./profile)")
    add("--quiet", action="store_true", help="no progress bar")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "traces",
        nargs="*",
        type=Path,
        metavar="FILE",
        help=".parquet, .csv or .tsv: parts of one trace; .npy: one array [N] or [N, tables], or "
        "one [N] for each table",
    )
    add("--loader", metavar="MODULE:CALLABLE", help="returns an iterable of batches instead")
    add(
        "--columns",
        default="",
        metavar="LIST",
        help="columns or keys of ids, NAME or NAME=TABLE (all of integers)",
    )
    add("--day-column", metavar="NAME", help="the day of a sample: an integer or a date")
    add("--time-column", metavar="NAME", help="its time: seconds since 1970, or a timestamp")
    add("--days", type=int, metavar="N", help="cut the trace into N equal days")
    add("--samples", type=int, metavar="N", help="samples of the trace, where it does not say")
    add("--no-header", action="store_true", help="csv files have no names: columns are f0, f1, ...")
    add(
        "--num-embeddings",
        default="",
        metavar="LIST",
        help="rows of all tables, N, or of each, TABLE=N (the largest id + 1)",
    )
    add(
        "--tables",
        type=Path,
        metavar="YAML",
        help="TABLE: {num_embeddings: N, embedding_dim: N, dtype: float32}, all optional",
    )
    add("--embedding-dim", type=int, default=64, metavar="N", help="of tables without one (64)")
    add("--dtype", default="float32", help="of tables without one: float32 or float16 (float32)")


def run(args: argparse.Namespace) -> int:
    """Read the trace, print the table, write the files.

    Args:
        args: as the parser gives them.

    Returns:
        0, or 2 if an argument or the trace is refused; then one line says why.
    """
    try:
        _run(args)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"torchrec-cafe profile: error: {error}\n")
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from torchrec_cafe.config import Cafe, TableShape, item_bytes, save_statistics
    from torchrec_cafe.planning.entries import read_entries
    from torchrec_cafe.profile.costs import cache_cost, compression_cost, parse_cache_size
    from torchrec_cafe.profile.page import as_page
    from torchrec_cafe.profile.report import Report, printed, table_reports
    from torchrec_cafe.profile.table import TraceOptions
    from torchrec_cafe.profile.trace import profile_trace

    compressions = [_number("--compressions", text) for text in _list(args.compressions)]
    sizes = _list(args.cache_sizes)
    for size in sizes:  # refused before an hour of reading
        parse_cache_size(size, 1)
    for value in compressions:
        Cafe(compression=value)
    options = TraceOptions(
        batch_size=args.batch_size,
        depth=args.depth,
        table_bytes=int(args.memory * 2**20),
        seed=args.seed,
    )
    if args.days is not None and (args.day_column or args.time_column):
        raise ValueError("only one of --days, --day-column and --time-column must be given")
    TableShape(  # refused before an hour of reading
        name="--embedding-dim",
        num_embeddings=1,
        embedding_dim=args.embedding_dim,
        item_bytes=item_bytes(args.dtype),
    )
    described = dict(read_entries(args.tables)) if args.tables is not None else {}
    source = open_source(args)
    profile = profile_trace(source, options, days=args.days, progress=not args.quiet)
    shapes = _shapes(args, profile.largest_ids, described)
    costs = [compression_cost(profile.statistics, shapes, value) for value in compressions]
    caches = {
        name: [cache_cost(statistics, shapes[name], size) for size in sizes]
        for name, statistics in profile.statistics.items()
    }
    report = Report(
        source=source.name,
        command=f"torchrec-cafe {shlex.join(sys.argv[1:])}",
        num_samples=profile.num_samples,
        depth=options.depth,
        costs=costs,
        tables=table_reports(profile.statistics, shapes, costs, caches),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    save_statistics(args.out / "statistics.json", profile.statistics)
    (args.out / "index.html").write_text(as_page(report), encoding="utf-8")
    files = f"{args.out / 'statistics.json'}, {args.out / 'index.html'}"
    sys.stdout.write(f"{printed(report)}\n\n{files}\n")


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: must be numbers, got {text!r}") from None


def _named(option: str, text: str) -> dict[str, str]:
    """``a,b=c`` as ``{"a": "a", "b": "c"}``."""
    named = {}
    for part in _list(text):
        name, equals, value = part.partition("=")
        if not name or (equals and not value):
            raise ValueError(f"{option}: must be NAME or NAME=VALUE, got {part!r}")
        named[name] = value or name
    return named


def open_source(args: argparse.Namespace) -> Source:
    """The trace that the arguments name.

    Args:
        args: as the parser gives them.

    Raises:
        TypeError: if a column has no integers.
        ValueError: if it is not one trace of a known kind.
    """
    from torchrec_cafe.profile.loader import LoaderSource
    from torchrec_cafe.profile.sources import Columns

    if bool(args.traces) == (args.loader is not None):
        raise ValueError("either files or --loader must be given")
    tables = _named("--columns", args.columns)
    if args.loader is not None:
        if args.day_column or args.time_column:
            raise ValueError("--loader: batches have no day; use --days and --samples")
        return LoaderSource(args.loader, tables, args.samples)
    columns = Columns(
        tables=tables,
        day=args.day_column,
        time=args.time_column,
        header=not args.no_header,
    )
    source = _open_files(args.traces, columns)
    if source.num_samples is None:
        source.num_samples = args.samples
    return source


def _open_files(paths: list[Path], columns: Columns) -> Source:
    from torchrec_cafe.profile.sources import NpySource

    suffixes = {path.suffix for path in paths}
    known = (".npy", ".parquet", ".csv", ".tsv")
    if len(suffixes) != 1 or not suffixes <= set(known):
        raise ValueError(f"traces must be of one kind of {known}, got {sorted(suffixes)}")
    for path in paths:
        if not path.is_file():
            raise ValueError(f"traces must be files, got {str(path)!r}")
    if suffixes == {".npy"}:
        return NpySource(paths, columns)
    try:
        from torchrec_cafe.profile.arrow import ArrowSource
    except ImportError as error:
        raise ValueError(f"{paths[0]}: {error}; pip install 'torchrec-cafe[profile]'") from None
    return ArrowSource(paths, columns)


def _shapes(
    args: argparse.Namespace, largest: Mapping[str, int], described: dict[str, Mapping[str, Any]]
) -> dict[str, Any]:
    from torchrec_cafe.config import item_bytes
    from torchrec_cafe.profile.costs import shapes_of

    rows = {name: f["num_embeddings"] for name, f in described.items()}
    for name, value in _named("--num-embeddings", args.num_embeddings).items():
        number = int(_number("--num-embeddings", value))
        if name != value and name not in largest:
            raise ValueError(
                f"--num-embeddings: tables must be among {list(largest)}, got {name!r}"
            )
        rows |= dict.fromkeys(largest, number) if name == value else {name: number}
    fields = {name: described.get(name, {}) for name in largest}
    dims = {name: f.get("embedding_dim", args.embedding_dim) for name, f in fields.items()}
    sizes = {name: item_bytes(f.get("data_type", args.dtype)) for name, f in fields.items()}
    return shapes_of(largest, rows, dims, sizes)
