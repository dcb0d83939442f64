"""Checkpoints of a training in one folder, of which a complete one always remains."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, final

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner
from torch.distributed.checkpoint.stateful import Stateful

from torchrec_cafe.distributed.layout import parse_layout_key
from torchrec_cafe.distributed.load_checks import (
    CheckedFileSystemReader,
    CheckedLoadPlanner,
    check_layouts,
)
from torchrec_cafe.distributed.staging import CopyStager

_STEP = re.compile(r"^step_(\d+)$")
# DCP writes it last, under another name first: a checkpoint that has it is complete.
_METADATA = ".metadata"

T = TypeVar("T")


@final
class CheckpointManager:
    """Saves numbered checkpoints with DCP, keeps the newest, and loads the newest complete one.

    A checkpoint is a folder ``step_{step}`` as :func:`torch.distributed.checkpoint.save` writes it,
    and nothing else. Every rank must make the manager and call its methods together, but for
    :meth:`steps`. Ranks talk through a gloo group of the manager's own, so that a save in the
    background does not get mixed up with the training's collectives.

    Args:
        folder: where the checkpoints lie, on a file system that all ranks see.
        keep: complete checkpoints to keep, >= 1; older ones are removed after a save.
        timeout: after which a rank gives up waiting for others, which may have died.

    Raises:
        ValueError: if ``keep`` is less than 1.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, timeout: timedelta = timedelta(minutes=30)
    ) -> None:
        """Make the group; see the class."""
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        self.folder = Path(folder)
        self._keep = keep
        group: Any = dist.new_group(backend="gloo", timeout=timeout)
        self._group: dist.ProcessGroup = group  # every rank is in it
        self._saving: Any = None  # the future of the save in the background

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(step for step, path in self._folders() if (path / _METADATA).is_file())

    def latest(self) -> int | None:
        """The last step with a complete checkpoint, the same on every rank; ``None`` without."""
        return self._on_first_rank(lambda: max(self.steps(), default=None))

    def save(self, state: dict[str, Any], step: int) -> None:
        """Save; the checkpoint is complete when this returns.

        Args:
            state: as for :func:`torch.distributed.checkpoint.save`: objects with ``state_dict`` and
                ``load_state_dict`` (the model, the optimizer), tensors, values that can be pickled.
            step: number of the checkpoint, >= 0.

        Raises:
            ValueError: if there is a complete checkpoint of that step, or ``step`` is negative.
            RuntimeError: if it cannot be written, or the save in the background before it could
                not; the earlier checkpoints are as they were.
        """
        self.wait()
        path = self._on_first_rank(lambda: self._begin(step))
        _plainly(lambda: dcp.save(state, checkpoint_id=path, process_group=self._group))
        self._on_first_rank(self._remove_old)

    def async_save(self, state: dict[str, Any], step: int) -> None:
        """Copy the state, then write the copy while training goes on.

        Waits for the save before it, if that still goes on. The copy takes as much host memory as
        the state; files of :class:`torchrec_cafe.Lookahead` tables would be copied, too: use
        :meth:`save` where they do not fit.

        Args:
            state: as in :meth:`save`.
            step: as in :meth:`save`.

        Raises:
            ValueError: as in :meth:`save`.
            RuntimeError: if the save before it has failed.
        """
        self.wait()
        path = self._on_first_rank(lambda: self._begin(step))
        self._saving = _plainly(
            lambda: dcp.async_save(
                state,
                checkpoint_id=path,
                process_group=self._group,
                async_stager=CopyStager(),
            )
        )

    def wait(self) -> None:
        """Return when the save in the background is complete; call it before the process ends.

        Raises:
            RuntimeError: if that save has failed; the earlier checkpoints are as they were.
        """
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        _plainly(saving.result)
        self._on_first_rank(self._remove_old)

    def load(self, state: dict[str, Any], step: int | None = None) -> int:
        """Load a checkpoint, in place, on any number of ranks and with tables sharded in any way.

        What does not fit is found out before anything of ``state`` is changed.

        Args:
            state: as for :func:`torch.distributed.checkpoint.load`, mutated: what was saved, under
                the same names. An optimizer must have its state already (``init_state()``).
            step: which; ``None``: the last complete one.

        Returns:
            The step.

        Raises:
            FileNotFoundError: if there is no such complete checkpoint.
            ValueError: if it is damaged or does not fit, naming the tables.
            RuntimeError: if it cannot be read for another reason.
        """
        self.wait()
        chosen = self._on_first_rank(lambda: self._choose(step))
        path = self._path(chosen)

        def load(into: dict[str, Any], planner: DefaultLoadPlanner) -> None:
            reader = CheckedFileSystemReader(path)
            dcp.load(into, storage_reader=reader, planner=planner, process_group=self._group)

        expected = _layouts(state)
        saved = {
            name: {key: tensor.clone() for key, tensor in layouts.items()}
            for name, layouts in expected.items()
        }
        _plainly(lambda: load(saved, DefaultLoadPlanner(allow_partial_load=True)))
        for name, layouts in expected.items():
            check_layouts(saved[name], layouts)
        _plainly(lambda: load(state, CheckedLoadPlanner()))
        return chosen

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _folders(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = [(_STEP.match(path.name), path) for path in self.folder.iterdir()]
        return [(int(match[1]), path) for match, path in found if match]

    def _begin(self, step: int) -> Path:
        """An empty folder for a step."""
        path = self._path(step)
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if (path / _METADATA).is_file():
            raise ValueError(
                f"{path} is a complete checkpoint, and is not overwritten: remove it, or save "
                "under another step"
            )
        if path.exists():  # of a save that died
            shutil.rmtree(path)
        path.mkdir(parents=True)
        return path

    def _remove_old(self) -> None:
        """Remove all but the newest complete checkpoints, and older saves that have died."""
        complete = self.steps()[-self._keep :]
        for step, path in self._folders():
            if complete and step < complete[0]:
                # First what makes it complete, so that half of it is never taken for a whole.
                (path / _METADATA).unlink(missing_ok=True)
                shutil.rmtree(path)

    def _choose(self, step: int | None) -> int:
        steps = self.steps()
        if step is None and steps:
            step = steps[-1]
        if step is None or step not in steps:
            wanted = (
                "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            )
            raise FileNotFoundError(f"{self.folder} has no {wanted}; it has {steps}")
        path = self._path(step)
        try:
            CheckedFileSystemReader(path).read_metadata()
        except Exception as error:
            raise ValueError(
                f"the checkpoint {path} is damaged: {_METADATA} cannot be read ({error!r}); "
                "nothing has been loaded; load an earlier checkpoint"
            ) from error
        return step

    def _on_first_rank(self, function: Callable[[], T]) -> T:
        """What a function returns on the first rank, or raises there, on every rank."""
        outcome: list[Any] = [None, None]
        if dist.get_rank(self._group) == 0:
            try:
                outcome[0] = function()
            except Exception as error:  # noqa: BLE001  raised below, on every rank
                outcome[1] = error
        dist.broadcast_object_list(
            outcome, src=dist.get_global_rank(self._group, 0), group=self._group
        )
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]


def _layouts(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The layouts of compressed tables in what is to be loaded."""
    found = {}
    for name, value in state.items():
        entries = value.state_dict() if isinstance(value, Stateful) else value
        if isinstance(entries, Mapping):
            layouts = {k: v for k, v in entries.items() if parse_layout_key(str(k)) is not None}
            if layouts:
                found[name] = layouts
    return found


def _plainly(function: Callable[[], T]) -> T:
    """Call a function of DCP, whose own exception no ``except Exception`` would catch."""
    try:
        return function()
    except CheckpointException as failure:
        rank, (error, _) = next(iter(failure.failures.items()))
        if isinstance(error, ValueError):
            raise ValueError(str(error)) from failure
        ranks = sorted(failure.failures)
        raise RuntimeError(
            f"checkpoint: failed on ranks {ranks}; on rank {rank}: {error!r}"
        ) from failure
