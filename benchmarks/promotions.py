"""AUC of full, hashed and CAFE tables on every row of the Complete Journey promotions.

``python -m benchmarks.promotions`` trains each kind and seed in a process of its own (``--jobs`` at
a time), skips what an earlier call has finished, and writes the comparison. ``--quick`` takes a
small sample.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from examples.dlrm.config import TrainConfig
from examples.dlrm.data import load_click_log
from examples.dlrm.loop import Result
from examples.dlrm.report import as_json, as_markdown, as_text, plot, table

#: share of Hash's AUC loss that Cafe has to win back, by compression
TARGETS = {"cafe@10x/won_back": 0.6, "cafe@100x/won_back": 0.4}
_KINDS = ("full", "hash", "cafe", "hash_whole")


def _flags(options: argparse.Namespace) -> list[str]:
    size = ["--sample", "200000"] if options.quick else ["--full"]
    # One rank takes the batch that two ranks take together.
    flags = ["--compression", "10,100", "--batch_size", "1024" if options.quick else "8192"]
    return [*size, *flags, "--cache_dir", options.cache_dir]


def _train(options: argparse.Namespace, kind: str, seed: int, port: int) -> list[Result]:
    out = Path(options.out) / f"{kind}_{seed}"
    report = out / "report.json"
    if not report.is_file():
        with (Path(options.out) / f"{kind}_{seed}.log").open("w") as log:
            subprocess.run(
                [
                    *(sys.executable, "-m", "examples.dlrm.train", *_flags(options)),
                    *("--kinds", kind, "--seed", str(seed), "--out", str(out)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                check=True,
                env=_environment(port),
            )
    return [Result(**run) for run in json.loads(report.read_text())["runs"]]


def _environment(port: int) -> dict[str, str]:
    return os.environ | {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(os.cpu_count() or 1)}


def _judge(report: dict[str, Any]) -> None:
    for row in report["rows"]:
        target = TARGETS.get(row["name"])
        if target is not None:
            row["target"], row["met"] = target, row["value"] >= target


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small sample and one seed")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one core each")
    parser.add_argument("--cache_dir", default=".cache", help="where the data is kept")
    parser.add_argument("--out", default="runs/benchmark_promotions", help="folder of the runs")
    parser.add_argument("--json", default="", help="where to write the figures")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.out = 1, f"{options.out}_quick"
    Path(options.out).mkdir(parents=True, exist_ok=True)
    log = load_click_log(
        "promotions",
        cache_dir=Path(options.cache_dir),
        sample=200_000 if options.quick else None,
    )
    jobs = [(kind, seed) for kind in _KINDS for seed in range(options.seeds)]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [
            pool.submit(_train, options, kind, seed, 29600 + number)
            for number, (kind, seed) in enumerate(jobs)
        ]
        parts = [future.result() for future in tqdm(futures, desc="trainings")]
    results = [result for part in parts for result in part]
    config = TrainConfig(seed=tuple(range(options.seeds)), full=not options.quick)
    report = as_json(config, log, results) | {
        "command": " ".join(["python -m benchmarks.promotions", *sys.argv[1:]])
    }
    _judge(report)
    rows = table(results)
    out = Path(options.out)
    plot(out / "report.png", results, log.description)
    (out / "report.md").write_text(as_markdown(report, rows))
    Path(options.json or out / "report.json").write_text(json.dumps(report, indent=1))
    print(as_text(rows))


if __name__ == "__main__":
    main()
