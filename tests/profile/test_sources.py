"""Every form of a trace gives the same samples; every refusal says why."""

import datetime
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from torchrec import KeyedJaggedTensor

from torchrec_cafe.profile.arrow import ArrowSource
from torchrec_cafe.profile.loader import LoaderSource
from torchrec_cafe.profile.pieces import joined
from torchrec_cafe.profile.sources import Columns, NpySource

IDS = np.array([[3, 10], [1, 11], [4, 10], [1, 12]])
ALL = Columns(tables={})


def read(source):
    samples = joined(list(source.parts()))
    return {name: (b.ids.tolist(), None if b.lengths is None else b.lengths.tolist())
            for name, b in samples.bags.items()}, samples  # fmt: skip


def parquet(path, **columns):
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path


def test_npy_of_one_or_two_axes_or_a_file_for_each_table(tmp_path):
    both, user, item = (tmp_path / name for name in ("both.npy", "user.npy", "item.npy"))
    np.save(both, IDS.astype(np.int32))
    np.save(user, IDS[:, 0])
    np.save(item, IDS[:, 1].astype(np.uint16))
    a, b = IDS[:, 0].tolist(), IDS[:, 1].tolist()
    assert read(NpySource([both], ALL))[0] == {"0": (a, None), "1": (b, None)}
    assert read(NpySource([user, item], ALL))[0] == {"user": (a, None), "item": (b, None)}
    assert read(NpySource([both], Columns(tables={"1": "t"})))[0] == {"t": (b, None)}
    source = NpySource([both], Columns(tables={}, day="1"))
    assert source.num_samples == 4
    found, samples = read(source)
    assert list(found) == ["0"]
    assert samples.days is not None
    assert samples.days.tolist() == b


def test_npy_is_checked(tmp_path):
    floats, cube, short, ids = (tmp_path / f"{n}.npy" for n in ("floats", "cube", "short", "ids"))
    np.save(floats, np.ones(3))
    np.save(cube, np.ones((1, 2, 3), dtype=int))
    np.save(short, np.arange(2))
    np.save(ids, np.arange(3))
    with pytest.raises(ValueError, match="cube.npy: must be .*, got "):
        NpySource([cube], ALL)
    with pytest.raises(ValueError, match=r"must be of equal length, got \{'ids': 3, 'short': 2\}"):
        NpySource([ids, short], ALL)
    with pytest.raises(TypeError, match="column 'floats' must have integers, got float64"):
        NpySource([floats], Columns(tables={"floats": "t"}))
    with pytest.raises(ValueError, match="there must be columns of integers"):
        NpySource([floats], ALL)
    with pytest.raises(ValueError, match=r"columns must be among \['ids'\], got 'x'"):
        NpySource([ids], Columns(tables={"x": "x"}))
    with pytest.raises(ValueError, match="only one of the day column and the time column"):
        Columns(tables={}, day="a", time="b")


def test_parquet_with_lists_nulls_and_two_files(tmp_path):
    columns = {
        "user": pa.array([3, None, 4], pa.int32()),
        "items": pa.array([[1, 2], None, []], pa.list_(pa.int64())),
        "big": pa.array([[7], [8], [9]], pa.large_list(pa.uint64())),
        "price": [0.5, 1.5, 2.5],
    }
    paths = [parquet(tmp_path / f"{n}.parquet", **columns) for n in (1, 2)]
    source = ArrowSource(paths, ALL)
    assert source.num_samples == 6
    assert read(source)[0] == {
        "user": ([3, 4] * 2, [1, 0, 1] * 2),
        "items": ([1, 2] * 2, [2, 0, 0] * 2),
        "big": ([7, 8, 9] * 2, [1] * 6),
    }
    renamed = Columns(tables={"items": "t_items"})
    assert list(read(ArrowSource(paths, renamed))[0]) == ["t_items"]


DAY = datetime.date(2024, 2, 29)
NUMBER = (DAY - datetime.date(1970, 1, 1)).days
SECONDS = NUMBER * 86_400 + 5


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("day", pa.array([NUMBER], pa.int32())),
        ("day", pa.array([DAY])),
        ("day", pa.array([DAY], pa.date64())),
        ("day", pa.array([SECONDS * 1000], pa.timestamp("ms"))),
        ("time", pa.array([SECONDS])),
        ("time", pa.array([SECONDS + 0.5])),
        ("time", pa.array([SECONDS * 10**9], pa.timestamp("ns", "UTC"))),
    ],
)
def test_days_come_from_a_column(tmp_path, kind, column):
    path = parquet(tmp_path / "a.parquet", ids=[1], when=column)
    found, samples = read(ArrowSource([path], Columns(tables={}, **{kind: "when"})))
    assert list(found) == ["ids"]
    assert samples.days is not None
    assert samples.days.tolist() == [NUMBER]


def test_csv_and_tsv(tmp_path):
    table = pa.table({"user": IDS[:, 0], "item": [10, None, 12, 13], "note": list("abcd")})
    expected = {"user": (IDS[:, 0].tolist(), None), "item": ([10, 12, 13], [1, 0, 1, 1])}
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"a{suffix}"
        options = pyarrow.csv.WriteOptions(delimiter=delimiter)
        pyarrow.csv.write_csv(table, path, options)
        source = ArrowSource([path], ALL)
        assert source.num_samples is None
        assert read(source)[0] == expected
    bare = tmp_path / "bare.csv"
    bare.write_text("1,2\n3,4\n")
    found = read(ArrowSource([bare], Columns(tables={"f1": "t"}, header=False)))[0]
    assert found == {"t": ([2, 4], None)}


def test_arrow_files_are_checked(tmp_path):
    def refused(error, message, columns=ALL, **content):
        path = parquet(tmp_path / "a.parquet", **content)
        with pytest.raises(error, match=message):
            list(ArrowSource([path], columns).parts())

    one = Columns(tables={"x": "x"})
    refused(ValueError, r"a.parquet: columns must be among \['ids'\], got 'x'", one, ids=[1])
    refused(TypeError, "'x' must have integers or lists of them, got string; map", one, x=["a"])
    refused(ValueError, "there must be columns of integers", x=["a"])
    refused(ValueError, "column 'x': lists must have integers only, got 1 null", x=[[1, None]])
    refused(ValueError, "a.parquet: ", x=pa.array([2**63], pa.uint64()))
    day, time = Columns(tables={}, day="d"), Columns(tables={}, time="d")
    refused(
        ValueError, "'d' must have a value in every row, got 1 null", day, x=[1, 2], d=[1, None]
    )
    refused(
        TypeError, "'d' must have integers, dates or timestamps, got double", day, x=[1], d=[0.5]
    )
    refused(TypeError, "'d' must have seconds or timestamps, got string", time, x=[1], d=["a"])
    broken = tmp_path / "broken.csv"
    broken.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="broken.csv: "):
        list(ArrowSource([broken], ALL).parts())


KJT = KeyedJaggedTensor(
    keys=["user", "item"], values=torch.tensor([3, 1, 7, 8, 9]), lengths=torch.tensor([1, 1, 3, 0])
)


class Wrapped:
    """Like TorchRec's ``Batch``."""

    sparse_features = KJT


LOADERS = {
    "kjt": lambda: [KJT, KJT],
    "tuple": lambda: [(torch.ones(2, 4), KJT, torch.ones(2))] * 2,
    "batch": lambda: iter([Wrapped(), Wrapped()]),
    "mapping": lambda: [{"user": torch.tensor([3, 1]), "item": np.array([[7, 8], [9, 9]])}],
    "floats": lambda: [{"user": torch.ones(2)}],
    "cube": lambda: [{"user": torch.ones(1, 1, 1, dtype=torch.int64)}],
    "uneven": lambda: [{"user": torch.arange(2), "item": torch.arange(3)}],
    "nothing": lambda: [torch.arange(3)],
}
number = 3


def none():
    """No iterable."""


@pytest.fixture
def loader(monkeypatch):
    """Makes a loader of this very module."""

    def make(name, tables=None):
        monkeypatch.setitem(sys.modules, "loader_module", sys.modules[__name__])
        monkeypatch.setattr(sys.modules[__name__], "make", LOADERS[name], raising=False)
        return LoaderSource("loader_module:make", tables or {})

    return make


@pytest.mark.parametrize("name", ["kjt", "tuple", "batch"])
def test_loader_of_kjts(loader, name):
    assert read(loader(name))[0] == {
        "user": ([3, 1] * 2, [1] * 4),
        "item": ([7, 8, 9] * 2, [3, 0] * 2),
    }
    assert list(read(loader(name, {"item": "t"}))[0]) == ["t"]


def test_loader_of_mappings(loader):
    assert read(loader("mapping"))[0] == {
        "user": ([3, 1], None),
        "item": ([7, 8, 9, 9], [2, 2]),
    }


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("floats", TypeError, "batch 0: 'user' must have integers, got float32"),
        ("cube", ValueError, r"batch 0: 'user' must have shape \[B\] or \[B, L\], got"),
        ("uneven", ValueError, "batch 0: tables must have as many samples each, got"),
        ("nothing", TypeError, "batch 0: must have a KeyedJaggedTensor or be a mapping"),
    ],
)
def test_batches_are_checked(loader, name, error, message):
    with pytest.raises(error, match=message):
        list(loader(name).parts())


def test_loaders_are_checked(loader):
    for path in ("module", ":make", "module:"):
        with pytest.raises(ValueError, match="the loader must be package.module:callable, got"):
            LoaderSource(path, {})
    with pytest.raises(ValueError, match="No module named 'no_such_module'; is its directory in"):
        LoaderSource("no_such_module:make", {})
    with pytest.raises(TypeError, match="must return an iterable of batches, got NoneType"):
        LoaderSource(f"{__name__}:none", {})
    with pytest.raises(ValueError, match="must be a callable, got '.*:number': int"):
        LoaderSource(f"{__name__}:number", {})
    with pytest.raises(ValueError, match=r"columns must be among \['user', 'item'\], got 'x'"):
        list(loader("kjt", {"x": "x"}).parts())
