"""Rows in files: what is moved is what the mapped tensors show, by the page cache or around it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrec_cafe.tables import FileStore, MemoryStore, RowStore

ROWS = 50


@pytest.fixture(params=["memory", "small rows", "blocks"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RowStore:
    dim = 128 if request.param == "blocks" else 12
    like = [torch.zeros(4, dim), torch.full((4,), 0.5), torch.full((4, dim), 0.25)]
    if request.param == "memory":
        return MemoryStore(ROWS, like)
    return FileStore(tmp_path / "a" / "b", ROWS, like, io_threads=3)


def test_states_start_at_what_the_optimizer_says(store: RowStore):
    assert (store.tensors[1] == 0.5).all()
    assert (store.tensors[2] == 0.25).all()
    assert store.row_bytes == 4 * (2 * store.tensors[0].shape[1] + 1)


def test_mapped_rows_and_moved_rows_are_the_same(store: RowStore):
    torch.manual_seed(0)
    whole = [torch.randn_like(tensor) for tensor in store.tensors]
    for tensor, values in zip(store.tensors, whole, strict=True):
        tensor.copy_(values)
    slots = [torch.zeros(20, *tensor.shape[1:]) for tensor in store.tensors]
    rows, at = torch.randperm(ROWS)[:20], torch.randperm(20)
    store.read(rows, slots, at)
    for tensor, values in zip(slots, whole, strict=True):
        assert torch.equal(tensor[at], values[rows])
    for round_ in range(5):  # rows leave, others come, and all see it
        out, coming = torch.randperm(ROWS).split(12)[:2]
        places = torch.randperm(20)[:12]
        for tensor in slots:
            tensor.add_(round_)
        leaving = [tensor[places].clone() for tensor in slots]
        store.exchange(slots, (out, places), (coming, places))
        for number, values in enumerate(whole):
            values[out] = leaving[number]
            assert torch.equal(store.tensors[number], values)
            assert torch.equal(slots[number][places], values[coming])
    store.sync()


def test_threads_copy_what_one_would():
    like = [torch.zeros(1, 4), torch.zeros(1)]
    stores = [MemoryStore(30_000, like, num_threads=count) for count in (1, 3)]
    rows, at = torch.randperm(30_000)[:9000], torch.randperm(9000)
    slots = [[torch.randn(9000, 4), torch.randn(9000)], [torch.zeros(9000, 4), torch.zeros(9000)]]
    for store in stores:
        store.write(rows, slots[0], at)
    for one, other in zip(stores[0].tensors, stores[1].tensors, strict=True):
        assert torch.equal(one, other)
    stores[1].read(rows, slots[1], at)
    for one, other in zip(*slots, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="rows"):
        stores[1].read(rows + 30_000, slots[1], at)


def test_files_are_let_go_of(tmp_path: Path):
    like = [torch.zeros(1, 4)]
    first = FileStore(tmp_path, ROWS, like, io_threads=1)
    with pytest.raises(ValueError, match="in use by another training"):
        FileStore(tmp_path, ROWS, like, io_threads=1)
    first.close()
    FileStore(tmp_path, ROWS, like, io_threads=1)


def test_a_rank_without_rows_has_an_empty_store(tmp_path: Path):
    store = FileStore(tmp_path, 0, [torch.zeros(1, 4)], io_threads=1)
    assert store.tensors[0].shape == (0, 4)
