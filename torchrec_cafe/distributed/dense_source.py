"""Rows of uncompressed tables in a DCP checkpoint, range by range."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    FileSystemReader,
    LoadPlan,
    LoadPlanner,
    StorageReader,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future


class _Saved(NamedTuple):
    """A saved part of a tensor whose values lie one after the other in a file."""

    start: int
    sizes: torch.Size
    dtype: torch.dtype


class RowRangeReader(FileSystemReader):
    """DCP's reader of files that reads the rows which are asked for, and no others.

    DCP's own loads a saved part of a tensor in full for any slice of it: with one part a rank, that
    is all that a rank had of the table for every range of rows.

    Args:
        path: folder of the checkpoint.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Note the folder; see the class."""
        super().__init__(path)
        self._saved: dict[MetadataIndex, _Saved | None] = {}

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what is planned; see :class:`torch.distributed.checkpoint.StorageReader`."""
        others = []
        for item in plan.items:
            saved = self._of(item)
            if saved is None:
                others.append(item)
            else:
                self._read_rows(item, saved, planner)
        return super().read_data(LoadPlan(others), planner)

    def _of(self, item: ReadItem) -> _Saved | None:
        """Where the part lies that an item wants, or ``None`` if DCP has to read it."""
        index = item.storage_index
        if item.type == LoadItemType.BYTE_IO or len(item.lengths) == 0:
            return None
        if index not in self._saved:
            self._saved[index] = self._find(index)
        return self._saved[index]

    def _find(self, index: MetadataIndex) -> _Saved | None:
        info: Any = self.storage_data[index]
        if info.transform_descriptors:
            return None
        with self.fs.create_stream(
            self.fs.concat_path(self.path, info.relative_path), "rb"
        ) as file:
            # What the file says of the tensor, without its values.
            tensor = torch.load(
                self._slice_file(file, info), map_location="meta", weights_only=True
            )
        storage = tensor.untyped_storage()
        begin = getattr(storage, "_checkpoint_offset", None)  # older torch does not say
        if begin is None or not tensor.is_contiguous():
            return None
        begin += tensor.storage_offset() * tensor.dtype.itemsize
        return _Saved(info.offset + begin, tensor.shape, tensor.dtype)

    def _read_rows(self, item: ReadItem, saved: _Saved, planner: LoadPlanner) -> None:
        info: Any = self.storage_data[item.storage_index]
        first, count = item.storage_offsets[0], item.lengths[0]
        values = torch.empty((count, *saved.sizes[1:]), dtype=saved.dtype)
        file: Any
        with self.fs.create_stream(
            self.fs.concat_path(self.path, info.relative_path), "rb"
        ) as file:
            file.seek(saved.start + first * saved.sizes[1:].numel() * saved.dtype.itemsize)
            room: Any = values.view(-1).view(torch.uint8).numpy()
            if file.readinto(room) != len(room):
                raise ValueError(
                    f"{self.path}: {info.relative_path!r} must hold {item.storage_index.fqn!r} in "
                    "full, but ends before; save the checkpoint again"
                )
        for axis in range(1, values.dim()):
            values = values.narrow(axis, item.storage_offsets[axis], item.lengths[axis])
        target = planner.resolve_tensor(item)
        target.copy_(values)
        planner.commit_tensor(item, target)


class _Into(DefaultLoadPlanner):
    """Loads everything into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        del index
        return self._target


class DenseSource:
    """The tensors of a DCP checkpoint, by ranges of rows.

    Args:
        reader: of the checkpoint.

    Raises:
        OSError: if there is no checkpoint.
    """

    def __init__(self, reader: StorageReader) -> None:
        """Read what the checkpoint holds; see the class."""
        self._reader = reader
        self.metadata = reader.read_metadata()
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def size(self, key: str) -> torch.Size | None:
        """Shape of a tensor; ``None`` if there is none under that key."""
        tensor = self.metadata.state_dict_metadata.get(key)
        return tensor.size if isinstance(tensor, TensorStorageMetadata) else None

    def keys(self) -> list[str]:
        """Keys of all that the checkpoint holds."""
        return sorted(self.metadata.state_dict_metadata)

    def rows(self, key: str, begin: int, end: int) -> Tensor:
        """Rows ``[begin, end)`` of a tensor.

        Args:
            key: of a tensor of one or two axes.
            begin: first row.
            end: after the last row, at most the tensor's size.

        Returns:
            In the saved dtype, on the CPU.
        """
        saved = self.metadata.state_dict_metadata[key]
        assert isinstance(saved, TensorStorageMetadata)
        rest = saved.size[1:]
        target = torch.empty((end - begin, *rest), dtype=saved.properties.dtype)
        chunk = ChunkStorageMetadata(
            offsets=torch.Size([begin, *[0] * len(rest)]), sizes=target.shape
        )
        items = create_read_items_for_chunk_list(key, saved, [chunk])
        self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        return target
