"""The accuracy study: AUC and log-loss of full, hashed and CAFE tables, several seeds each.

``python -m benchmarks.quality`` trains every data set, variant, compression and seed in a process
of its own on one thread, ``--jobs`` at a time, and writes a report. What an earlier call has
finished is not trained again, so a study may be interrupted at any time, and goes on elsewhere with
``--restore`` and the JSON file of its report. ``--quick`` ends within a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from benchmarks import quality_report
from benchmarks.quality_oracle import Budget, oracle_log
from benchmarks.quality_records import Records
from benchmarks.quality_run import (
    DATA,
    DONE,
    FAILED,
    REFUSED,
    Run,
    Study,
    execute,
    load,
    read_records,
    restore,
    settings,
    write_record,
)
from benchmarks.quality_traces import measure_traces
from benchmarks.quality_variants import GENERIC_TEXT, VARIANTS, trained_as, variant
from examples.dlrm.config import TrainConfig
from examples.dlrm.data import ClickLog
from examples.dlrm.model import table_shapes
from examples.dlrm.report import machine

TRACES = "traces"
_QUICK_VARIANTS = ("full", "hash", "cafe", "oracle")
_QUICK_DATA = ("generator",)
_QUICK_COMPRESSIONS = (100.0,)


def plan_runs(
    data: Sequence[str],
    variants: Sequence[str],
    compressions: Sequence[float],
    seeds: int,
) -> list[Run]:
    """The runs of a study, one seed after the other, so that what is interrupted has whole seeds.

    Args:
        data: of :data:`DATA`.
        variants: their names; empty: those that a data set has by default.
        compressions: of every compressed variant; empty: each data set's and variant's own.
        seeds: how many.
    """
    runs = (
        Run(name, trained_as(chosen, compression), compression, seed)
        for seed in range(seeds)
        for name in data
        for chosen in variants or _default_variants(name)
        for compression in _compressions(name, chosen, compressions)
    )
    return list(dict.fromkeys(runs))


def _default_variants(data: str) -> list[str]:
    return [name for name, chosen in VARIANTS.items() if not chosen.data or data in chosen.data]


def _compressions(data: str, name: str, given: Sequence[float]) -> Sequence[float]:
    chosen = variant(name)
    own = chosen.compressions(DATA[data].compressions)
    return own if own == (1.0,) or not given else given


def is_finished(study: Study, run: Run) -> bool:
    """Whether a run needs no training: it is done, or its budget is too small for good."""
    path = study.record(run)
    return path.is_file() and json.loads(path.read_text())["status"] in (DONE, REFUSED)


class Workers:
    """Processes that train, a few at a time.

    Args:
        study: where the runs keep their things.
        jobs: how many at a time.
    """

    def __init__(self, study: Study, jobs: int) -> None:
        self._study = study
        self._jobs = jobs
        self._lock = threading.Lock()
        self._live: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, runs: Sequence[Run]) -> None:
        """Train all; an interrupt ends the processes and is raised again."""
        before = signal.signal(signal.SIGTERM, _raise_exit)
        try:
            self._run(runs)
        finally:
            signal.signal(signal.SIGTERM, before)

    def _run(self, runs: Sequence[Run]) -> None:
        with ThreadPoolExecutor(self._jobs) as pool:
            futures: dict[Future[None], Run] = {pool.submit(self._train, r): r for r in runs}
            try:
                with tqdm(total=len(runs), desc="trainings") as bar:
                    for future in as_completed(futures):
                        future.result()
                        done = futures[future]
                        bar.set_postfix_str(f"{done.data}/{done.name}", refresh=False)
                        bar.update()
            except BaseException:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._live:
                process.terminate()

    def _train(self, run: Run) -> None:
        study = self._study
        log = study.scratch(run, ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        study.record(run).unlink(missing_ok=True)  # of a failure
        command = [
            sys.executable,
            "-m",
            "benchmarks.quality",
            "--run",
            *map(str, vars(run).values()),
        ]
        command += ["--out", str(study.out), "--cache_dir", str(study.cache_dir)]
        command += ["--quick"] * study.quick
        environment = os.environ | {
            name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        with log.open("w") as output:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment | {"CUDA_VISIBLE_DEVICES": ""},
                )
                self._live.add(process)
            status = process.wait()
        with self._lock:
            self._live.remove(process)
            stopped = self._stopped
        if not study.record(run).is_file() and not stopped:
            message = f"the process ended with status {status} and no record, see {log}"
            write_record(study.record(run), vars(run) | {"status": FAILED, "error": message})


def prepare(study: Study, runs: Sequence[Run]) -> None:
    """Make the data that the runs need, where a progress bar is seen.

    Args:
        study: where they are kept.
        runs: those to train; what is wrong with the data of one, the run itself will report.
    """
    for data in dict.fromkeys(run.data for run in runs):
        with suppress(Exception):
            log = load(study, data, progress=True)
            for run in runs:
                if run.data == data and variant(run.variant).oracle:
                    _prepare_oracle(study, run, log)


def _prepare_oracle(study: Study, run: Run, log: ClickLog) -> None:
    with suppress(ValueError):  # too small a budget
        budget = Budget.of(table_shapes(settings(study, run), log), run.compression)
        oracle_log(log, budget, study.data_dir, progress=True)


def _split(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="", help=f"of {', '.join([*DATA, TRACES])}; default: all")
    add("--variants", default="", help=f"of {', '.join(VARIANTS)}, or {GENERIC_TEXT}")
    add("--compressions", default="", help="of all compressed variants; default: 10,100,1000,...")
    add("--seeds", type=int, default=5, help="trainings of each kind (default: 5)")
    add("--jobs", type=int, default=2, help="trainings at a time, a core each (default: 2)")
    add("--quick", action="store_true", help="small data, one seed, in a folder of its own")
    add("--restore", default="", help="JSON of an earlier report, whose runs count as trained")
    add("--report-only", action="store_true", help="train nothing, report what there is")
    add("--cache_dir", default=".cache", help="where prepared data is kept")
    add("--traces", default="../shared/data/cache2k", help="folder of cache2k's *.trace.xz")
    add("--out", default="runs/quality", help="folder of the records and of the report")
    add("--json", default="", help="where to write the figures, besides the report")
    add("--results", default="", help="folder for quality_<hardware>_<date>.md, .json, .png")
    add("--hardware", default="", help="for that name; default: cores and processor")
    add("--run", nargs=4, metavar="PART", help="internal: data, variant, compression and seed")
    options = parser.parse_args(arguments)
    try:
        _check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _check(options: argparse.Namespace) -> None:
    """Turn lists into tuples and refuse what is unknown, before anything is trained."""
    default = _QUICK_DATA if options.quick else (*DATA, TRACES)
    options.data = tuple(_split(options.data)) or default
    options.variants = tuple(_split(options.variants))
    unknown = [name for name in options.data if name not in (*DATA, TRACES)]
    if unknown:
        raise ValueError(f"--data must be of {', '.join([*DATA, TRACES])}, got {unknown[0]!r}")
    for name in options.variants:
        made = variant(name)
        TrainConfig(cafe=made.cafe, mem_rec=made.mem_rec, epochs=made.epochs)
    try:
        options.compressions = tuple(float(part) for part in _split(options.compressions))
    except ValueError:
        raise ValueError(f"--compressions must be numbers, got {options.compressions!r}") from None
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")


def _study(options: argparse.Namespace) -> Study:
    return Study(Path(options.out), Path(options.cache_dir), options.quick)


def _forget(study: Study) -> None:
    """Remove records and data, for a quick study is to show what the code does now."""
    shutil.rmtree(study.data_dir, ignore_errors=True)
    for data in DATA:
        for path in (study.out / data).glob("*.json"):
            path.unlink()


def _one_run(options: argparse.Namespace) -> NoReturn:
    data, name, compression, seed = options.run
    record = execute(_study(options), Run(data, name, float(compression), int(seed)))
    print(record)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if record["status"] == DONE else 1)  # gloo's teardown may abort after all is done


def _raise_exit(_signal: int, _frame: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def hardware(described: str) -> str:
    """A machine as part of a file name, such as ``2-core-EPYC``.

    Args:
        described: what :func:`examples.dlrm.report.machine` says.
    """
    cores, _, processor = described.partition(" x ")
    processor = processor.partition(",")[0].partition("@")[0]
    noise = r"\((R|TM|r|tm)\)|\b(AMD|Intel|CPU|Processor|\d+-Core)\b"
    words = re.findall(r"[\w-]+", re.sub(noise, " ", processor))
    return f"{cores}-core-{'-'.join(words) or 'CPU'}"


def _report(study: Study, options: argparse.Namespace) -> None:
    found = read_records(study, [name for name in options.data if name in DATA])
    records = Records(found, judge=not study.quick)
    traces = read_records(study, [TRACES]) if TRACES in options.data else []
    stems = [study.out / "report"]
    if options.results:
        name = f"quality_{options.hardware or hardware(machine())}_{date.today().isoformat()}"
        stems.append(Path(options.results) / name)
    for stem in stems:
        quality_report.save(stem, records, traces, options.json)
    print(f"\n{quality_report.as_text_report(records, traces)}\n\nreport: {stems[-1]}.md")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    options = _parse(arguments)
    if options.run:
        _one_run(options)
    if options.quick:
        options.out, options.seeds = f"{options.out}_quick", 1
        options.variants = options.variants or _QUICK_VARIANTS
        options.compressions = options.compressions or _QUICK_COMPRESSIONS
    study = _study(options)
    if options.restore:
        print(f"restored {restore(study, Path(options.restore))} runs")
    if not options.report_only:
        if options.quick:
            _forget(study)
        data = [name for name in options.data if name in DATA]
        planned = plan_runs(data, options.variants, options.compressions, options.seeds)
        runs = [run for run in planned if not is_finished(study, run)]
        if runs:
            prepare(study, runs)
            Workers(study, options.jobs).run(runs)
        if TRACES in options.data:
            measure_traces(Path(options.traces), study.out / TRACES, write_record)
    _report(study, options)


if __name__ == "__main__":
    main()
