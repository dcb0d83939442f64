"""Kills ranks of a training that TorchX has started, and looks at what becomes of it.

``python -m tests.faults.kill --kills 50`` trains :mod:`tests.faults.job` twice, once left alone
and once with a rank killed (SIGKILL) at random moments, start-up and saves included. Both must end
with the same tensors, to the last bit; every restart has loaded the last complete checkpoint, all
rows of which had the checksum that they were saved with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

#: Longer than this after a kill nothing may stand still, in seconds.
PATIENCE = 180.0
_ROOT = Path(__file__).resolve().parents[2]


#: lines of a progress file: when, what, which step
Progress = list[tuple[float, str, int]]


@dataclass
class Outcome:
    """What became of a training.

    Attributes:
        checksum: of all tensors at its end.
        recoveries: seconds from each kill to the first step after it.
        lost_steps: steps that were trained again, per kill.
        restarts: of the ranks.
    """

    checksum: str = ""
    restarts: int = 0
    recoveries: list[float] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)


def _start(folder: Path, steps: int, save_every: int, restarts: int) -> subprocess.Popen[bytes]:
    """The training, on two ranks that are restarted together when one dies."""
    command = ["torchx", "run", "-s", "local_cwd", "--workspace", "", "dist.ddp", "-j", "1x2"]
    # The rendezvous store of torch 2.13 outlives a restart, and with it the addresses of the ranks
    # before: gloo then waits for them (pytorch/pytorch#135712), unless each start has its own.
    environment = {
        "PET_MAX_RESTARTS": restarts,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
        "PYTHONPATH": _ROOT,
        "OMP_NUM_THREADS": 1,
    }
    command += ["--env", ",".join(f"{name}={value}" for name, value in environment.items())]
    command += ["-m", "tests.faults.job", "--", "--folder", str(folder)]
    command += ["--steps", str(steps), "--save-every", str(save_every)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=_ROOT)


def _progress(folder: Path) -> Progress:
    """The lines that are complete."""
    path = folder / "progress"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [(float(t), what, int(step)) for t, what, step in map(str.split, lines)]


def _wait(
    folder: Path, job: subprocess.Popen[bytes], ready: Callable[[Progress], bool]
) -> Progress:
    """Wait until the progress is as wanted, or the training is through."""
    begin, seen = time.monotonic(), 0
    while True:
        progress = _progress(folder)
        if (folder / "end.json").exists() or ready(progress):
            return progress
        if job.poll() is not None:
            raise RuntimeError(f"the training has ended early, see {folder / 'log'}")
        if len(progress) > seen:
            begin, seen = time.monotonic(), len(progress)
        if time.monotonic() - begin > PATIENCE:
            raise RuntimeError(f"no progress for {PATIENCE} s, see {folder / 'log'}")
        time.sleep(0.02)


def _trains(progress: Progress) -> bool:
    return bool(progress) and progress[-1][1] == "step"


def _kill_one(folder: Path, rng: random.Random) -> bool:
    """Kill a rank; whether there was one."""
    try:
        process = int((folder / "ranks" / str(rng.randrange(2))).read_text())
        if b"tests.faults.job" not in Path(f"/proc/{process}/cmdline").read_bytes():
            return False  # the rank is gone, and another has its number
        os.kill(process, signal.SIGKILL)
    except (OSError, ValueError):
        return False
    return True


def run(
    folder: Path, *, steps: int, save_every: int, kills: int, seed: int, within: float = 4.0
) -> Outcome:
    """Train to the end.

    Args:
        folder: where everything lies; made.
        steps: to train.
        save_every: steps between two saves.
        kills: ranks to kill.
        seed: of the moments.
        within: a kill comes at most so many seconds after a step, or after ranks start.

    Raises:
        RuntimeError: if the training hangs or ends early.
    """
    folder.mkdir(parents=True)
    rng, outcome = random.Random(seed), Outcome()
    job = _start(folder, steps, save_every, kills)
    try:
        for _ in tqdm(range(kills), desc="kills", unit="", disable=kills == 0):
            if rng.random() < 0.8:  # the others come while ranks start
                _wait(folder, job, _trains)
            time.sleep(rng.uniform(0, within))
            while not _kill_one(folder, rng):  # ranks are just being started again
                _wait(folder, job, bool)
                if (folder / "end.json").exists():
                    raise RuntimeError(f"the training was through too early, see {folder}")
                time.sleep(0.1)
            before = _progress(folder)
            _note(outcome, before, time.time(), lambda ready: _wait(folder, job, ready))
        _wait(folder, job, lambda _: False)
        job.wait(timeout=PATIENCE)
    finally:
        if job.poll() is None:
            job.terminate()  # TorchX then ends what it has started
            job.wait(timeout=PATIENCE)
    log = (folder / "log").read_text(errors="replace")
    outcome.restarts = log.count(") of binary: ")  # torchrun's line for a rank that has failed
    outcome.checksum = json.loads((folder / "end.json").read_text())["checksum"]
    return outcome


def _note(
    outcome: Outcome,
    before: Progress,
    killed: float,
    wait: Callable[[Callable[[Progress], bool]], Progress],
) -> None:
    """Wait until ranks have started again, and note what that took."""
    starts = sum(what == "start" for _, what, _ in before)
    after = wait(lambda progress: sum(what == "start" for _, what, _ in progress) > starts)
    again = [(when, step) for when, what, step in after if what == "start"][starts:]
    if not again:
        return  # the training was through
    when, begin = again[0]
    outcome.recoveries.append(when - killed)
    trained = [step for _, what, step in after if what == "step"]
    outcome.lost_steps.append(max(0, max(trained, default=begin - 1) + 1 - begin))


def main() -> int:
    """Run both trainings and compare them; exit status 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    arguments = {"steps": options.steps, "save_every": options.save_every, "seed": options.seed}
    killed = run(folder / "killed", kills=options.kills, **arguments)
    alone = run(folder / "alone", kills=0, **arguments)
    print(
        f"{len(killed.recoveries)} kills; seconds until the ranks had loaded: median "
        f"{statistics.median(killed.recoveries):.1f}, most {max(killed.recoveries):.1f}; steps "
        f"trained again: median {statistics.median(killed.lost_steps)}, most "
        f"{max(killed.lost_steps)}; restarts {killed.restarts}; the same end to the last bit: "
        f"{killed.checksum == alone.checksum}"
    )
    if killed.checksum != alone.checksum:
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
