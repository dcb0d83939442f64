"""``torchrec-cafe plan``: how tables would be kept, on a cluster that is only described."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchrec_cafe.config import Auto
    from torchrec_cafe.distributed import PlanReport

_EXAMPLE = """
examples:
  torchrec-cafe plan --tables tables.yaml --world-size 8 --hbm 80GB
  torchrec-cafe plan --tables tables.yaml --world-size 1024 --hbm 80GB --ddr 128GB \\
      --statistics profile/statistics.json --max-compression 300 --json

tables.yaml is a list of tables:
  - {name: t_user, num_embeddings: 400_000_000, embedding_dim: 128, bag_size: 1}
  - {name: t_ad, count: 40, num_embeddings: 3_000_000, embedding_dim: 64, data_type: FP16}
  - name: t_page
    num_embeddings: 90_000_000
    embedding_dim: 64
    table: {kind: Cafe, compression: 100}
"""
_OPTIMIZERS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "partial_rowwise_adam")
_UNITS = {"": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("b", 1000), ("ib", 1024))
    if prefix or unit == "b"
}


def size_in_bytes(text: str) -> int:
    """A size such as ``80GB`` or ``64 GiB``.

    Args:
        text: a number and, if wanted, B, kB, MB, GB, TB (powers of 1000), KiB, MiB, GiB or TiB.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    try:
        size = float(match[1]) if match else 0.0
    except ValueError:
        size = 0.0
    if unit is None or size <= 0:
        raise argparse.ArgumentTypeError(f"must be a size such as 80GB or 64GiB, got {text!r}")
    return round(size * unit)


def add_parser(subparsers: Any) -> None:
    """Add the command to the parser of ``torchrec-cafe``.

    Args:
        subparsers: as ``ArgumentParser.add_subparsers`` gives them.
    """
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="plan the tables of a model on a cluster that is only described",
        description="Says how each table would be kept, on which ranks, in how many bytes, and "
        "why; needs no GPU and no cluster.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--tables", type=Path, required=True, metavar="FILE", help="description of the tables")
    add("--world-size", type=int, required=True, metavar="N", help="ranks")
    add("--local-world-size", type=int, metavar="N", help="ranks of a host (up to 8)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="compute device (cuda)")
    add("--hbm", type=size_in_bytes, metavar="SIZE", help="device memory of a rank, as 80GB")
    add("--ddr", type=size_in_bytes, metavar="SIZE", help="host memory of a rank, as 128GB")
    add("--reserve", type=float, default=0.15, metavar="SHARE", help="kept for the rest (0.15)")
    add("--batch-size", type=int, default=2048, metavar="N", help="samples of a rank (2048)")
    add("--optimizer", choices=_OPTIMIZERS, default="rowwise_adagrad", help="(rowwise_adagrad)")
    add("--fixed", action="store_true", help="choose nothing: tables as the file has them")
    add("--allow", default="Cafe,MemRec,Lookahead", metavar="LIST", help="kinds that may be chosen")
    add("--max-compression", type=float, default=1000.0, metavar="X", help="(1000)")
    add("--path", metavar="DIR", help="fast local disk of the ranks, for Lookahead rows in files")
    add("--statistics", type=Path, metavar="FILE", help="of `torchrec-cafe profile`")
    add("--risk-weight", type=float, default=10.0, metavar="X", help="price of accuracy (10)")
    add("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    """Plan, and print.

    Args:
        args: of the command line.

    Returns:
        The exit status: 1 if nothing fits, 2 for arguments that cannot be.
    """
    import logging
    import warnings

    logging.disable(logging.WARNING)  # TorchRec's, about clusters that are only described
    warnings.filterwarnings("ignore")
    from torchrec_cafe.distributed import BudgetError, PlannerError

    try:
        report = plan(args)
    except (BudgetError, PlannerError) as error:
        sys.stderr.write(f"torchrec-cafe plan: {error}\n")
        return 1
    except (OSError, TypeError, ValueError) as error:
        sys.stderr.write(f"torchrec-cafe plan: error: {error}\n")
        return 2
    finally:
        logging.disable(logging.NOTSET)
    sys.stdout.write(f"{report.to_json() if args.json else report}\n")
    return 0


def plan(args: argparse.Namespace) -> PlanReport:
    """The report of a plan.

    Args:
        args: of the command line.

    Raises:
        ValueError: for arguments that cannot be.
        BudgetError: if nothing fits.
        PlannerError: if TorchRec's planner finds no plan.
    """
    from torchrec_cafe.distributed.capacity import Cluster, plan_capacity
    from torchrec_cafe.planning.tables_file import read_tables

    _check(args)
    tables = read_tables(args.tables)
    cluster = Cluster(
        world_size=args.world_size,
        local_world_size=args.local_world_size,
        compute_device=args.device,
        hbm=args.hbm,
        ddr=args.ddr,
        reserve=args.reserve,
    )
    return plan_capacity(
        tables.module,
        tables.constraints,
        cluster,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        auto=None if args.fixed else _auto(args),
    )


def _check(args: argparse.Namespace) -> None:
    checks = {
        "--world-size": (args.world_size >= 1, ">= 1", args.world_size),
        "--batch-size": (args.batch_size >= 1, ">= 1", args.batch_size),
        "--reserve": (0 <= args.reserve < 1, "in [0, 1)", args.reserve),
        "--hbm": (args.hbm or args.device == "cpu", "given for --device cuda", args.hbm),
        "--path": (
            args.path is None or args.device == "cpu",
            "left out with --device cuda, whose look-ahead rows lie in host memory",
            args.path,
        ),
        "--ddr": (args.ddr or args.device == "cuda", "given for --device cpu", args.ddr),
    }
    for name, (holds, wanted, value) in checks.items():
        if not holds:
            raise ValueError(f"{name} must be {wanted}, got {value}")
    local = args.local_world_size
    if local is not None and (local < 1 or args.world_size % local):
        raise ValueError(
            f"--local-world-size must divide --world-size, got {local} and {args.world_size}"
        )


def _auto(args: argparse.Namespace) -> Auto:
    from torchrec_cafe import config

    allow: list[Any] = []
    for name in filter(None, args.allow.split(",")):
        if name not in config.KINDS:
            raise ValueError(f"--allow must be of {', '.join(config.KINDS)}, got {name!r}")
        kind: Any = config.KINDS[name]
        allow.append(kind(path=args.path) if kind is config.Lookahead and args.path else kind)
    return config.Auto(
        allow=tuple(allow),
        max_compression=args.max_compression,
        stats=config.load_statistics(args.statistics) if args.statistics else {},
        risk_weight=args.risk_weight,
    )
