"""Loading checkpoints of DCP so that one that does not fit is refused before a row is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, Metadata
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchrec_cafe.distributed.layout import (
    FORMAT,
    differences,
    kept_otherwise,
    layouts_in,
    parse_layout_key,
)

_TABLE = re.compile(r"embedding(?:_bag)?s\.(?P<table>[^.]+)\.")
# Problems that an error message lists.
_MAX_LISTED = 5


def _subject(key: str) -> str:
    """What a key is about, for an error message."""
    found = _TABLE.search(key)
    return f"table {found['table']!r} ({key})" if found else repr(key)


class CheckedLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, which says what does not fit, and does so before anything is overwritten.

    DCP's own ignores what the checkpoint has and the state to load has no place for, such as hot
    rows. Use it as ``torch.distributed.checkpoint.load(state, planner=CheckedLoadPlanner(), ...)``;
    :class:`torchrec_cafe.CheckpointManager` does so itself.
    """

    def create_local_plan(self) -> LoadPlan:
        """Check, then plan.

        Raises:
            ValueError: if the checkpoint has other keys, shapes or kinds of tables than the state,
                or comes from a newer version of this package; names the tables and what to do.
        """
        metadata = self.metadata
        assert metadata is not None
        problems = list(_kinds(self.state_dict, metadata)) or list(_keys(self.state_dict, metadata))
        if problems:
            raise ValueError(_refusal(problems))
        return super().create_local_plan()

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Check that everything in the checkpoint is loaded by some rank.

        Raises:
            ValueError: naming the tables that the state to load has no place for.
        """
        metadata = self.metadata
        assert metadata is not None
        taken = {item.storage_index.fqn for plan in global_plan for item in plan.items}
        problems = [
            f"{_subject(key)}: nothing takes this entry of the checkpoint{_remedy(key)}"
            for key, entry in sorted(metadata.state_dict_metadata.items())
            if key not in taken and not _is_empty(entry)
        ]
        if problems:
            raise ValueError(_refusal(problems))
        return super().create_global_plan(global_plan)


def _is_empty(entry: Any) -> bool:
    """Whether a tensor has no elements, so that there is nothing to read."""
    return isinstance(entry, TensorStorageMetadata) and entry.size.numel() == 0


def _refusal(problems: list[str]) -> str:
    listed = "\n  ".join(problems[:_MAX_LISTED])
    more = len(problems) - _MAX_LISTED
    listed += f"\n  and {more} more" if more > 0 else ""
    return f"the checkpoint does not fit, and nothing has been loaded:\n  {listed}"


def _kinds(state: Mapping[str, Any], metadata: Metadata) -> Iterator[str]:
    """Tables that were kept as another kind, or in another format."""
    keys = metadata.state_dict_metadata
    saved, expected = layouts_in(keys), layouts_in(state)
    for path in sorted(saved.keys() | expected.keys()):
        if not any(key.startswith(f"{path}.") for key in (keys if path in expected else state)):
            continue  # a table that only one side has
        subject = f"table {path.rsplit('.', 1)[-1]!r}"
        kind, version = saved.get(path, ("TorchRec's own", FORMAT))
        wanted, _ = expected.get(path, ("TorchRec's own", FORMAT))
        if version > FORMAT:
            yield (
                f"{subject}: the checkpoint has format {version} of {kind}, and this torchrec_cafe "
                f"reads format {FORMAT}; install the version that wrote it"
            )
        elif version < FORMAT:
            yield (
                f"{subject}: the checkpoint has format {version} of {kind}, and this torchrec_cafe "
                f"reads format {FORMAT}; load it with the version that wrote it, and bring the "
                "table here with dense_state_dict"
            )
        elif kind != wanted:
            yield (
                f"{subject}: the checkpoint has it as {kind}, the model as {wanted}; give it the "
                "same `table=` in its ParameterConstraints, or see torchrec_cafe.convert"
            )


def _keys(state: Mapping[str, Any], metadata: Metadata) -> Iterator[str]:
    """Keys that the checkpoint has not, or in another shape."""
    saved = metadata.state_dict_metadata
    for key, value in sorted(state.items()):
        if key not in saved:
            yield f"{_subject(key)}: the checkpoint has no such entry"
            continue
        entry = saved[key]
        size = value.size() if hasattr(value, "size") else None
        if isinstance(entry, TensorStorageMetadata) and size not in (None, entry.size):
            yield (
                f"{_subject(key)}: the checkpoint has shape {list(entry.size)}, the model "
                f"{list(size)}; load it into a model with the same tables, dims and kinds"
            )


def _remedy(key: str) -> str:
    if ".state." not in key:
        return ""
    return "; an optimizer has no state before its first step: call its `init_state()` first"


def check_layouts(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that tables were kept as they are now.

    Args:
        saved: layouts in a checkpoint, by key.
        expected: those of the tables.

    Raises:
        ValueError: naming the tables that were not.
    """
    problems = []
    for key, tensor in expected.items():
        parsed = parse_layout_key(key)
        if parsed is not None and (found := differences(saved[key], tensor)):
            problems.append(kept_otherwise(parsed[0].rsplit(".", 1)[-1], found))
    if problems:
        raise ValueError(_refusal(problems))


class CheckedFileSystemReader(FileSystemReader):
    """DCP's reader, which finds out before it reads whether files are there as a whole.

    Args:
        path: folder of the checkpoint.
    """

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Check the files that this rank is to read.

        Raises:
            ValueError: if one is missing or too short; names a table of it.
        """
        sizes: dict[str, int] = {}
        for item in plan.items:
            part = self.storage_data[item.storage_index]
            file = Path(self.path) / part.relative_path
            if part.relative_path not in sizes:
                sizes[part.relative_path] = file.stat().st_size if file.is_file() else -1
            size, needed = sizes[part.relative_path], part.offset + part.length
            if size < needed:
                state = "is missing" if size < 0 else f"has {size} bytes of at least {needed}"
                raise ValueError(
                    f"{_subject(item.storage_index.fqn)}: the checkpoint is damaged, {file} "
                    f"{state}; nothing has been loaded; load an earlier checkpoint"
                )
        return super().prepare_local_plan(plan)
