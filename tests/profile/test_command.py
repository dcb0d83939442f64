"""``torchrec-cafe profile`` from end to end: the table, the file, the page."""

import html.parser
import importlib.metadata
import shutil
import subprocess

import numpy as np
import pytest

import torchrec_cafe as tc
from benchmarks.common import zipf_ids
from torchrec_cafe.cli import main

SIZE = 30_000


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "ids.npy"
    columns = [zipf_ids(n, SIZE, 1.05, seed=n).numpy() for n in (5, 3000, 40_000)]
    np.save(path, np.stack(columns, 1))
    return path


def run(capsys, *arguments):
    status = main(["profile", "--quiet", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_profile_prints_and_writes(trace, tmp_path, capsys):
    out = tmp_path / "a" / "profile"
    status, printed, errors = run(
        capsys, trace, "--columns", "0=small,1=middle,2=t<b>", "--days", 3, "--batch-size", 500,
        "--num-embeddings", "t<b>=50000", "--compressions", "10,50,100000", "--out", out,
        "--cache-sizes", "10%,2000",
    )  # fmt: skip
    assert (status, errors) == (0, "")
    assert printed.splitlines()[0].split()[:3] == ["table", "rows", "distinct"]
    assert [line.split()[0] for line in printed.splitlines()[1:4]] == ["small", "middle", "t<b>"]
    assert "all tables uncompressed: 12.9 MiB" in printed
    assert "Cafe 10×: 1.29 MiB, 1 of 3 tables whole" in printed
    assert "Cafe 100\u202f000×: refused: compression=100000 leaves no row for table" in printed
    statistics = tc.load_statistics(out / "statistics.json")
    assert list(statistics) == ["small", "middle", "t<b>"]
    ids = np.load(trace)
    assert statistics["middle"].num_distinct == len(np.unique(ids[:, 1]))
    assert statistics["small"].share_owning(1) == pytest.approx(np.bincount(ids[:, 0]).max() / SIZE)
    assert 0 < statistics["middle"].drift_per_day < 0.3
    check_page((out / "index.html").read_text(), 3)


class Page(html.parser.HTMLParser):
    """Collects what would be fetched or run, and checks that tags close."""

    void = frozenset(("meta", "link", "img", "br"))

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.images, self.ids, self.links = [], [], 0, [], []

    def handle_starttag(self, tag, attrs):
        assert tag != "script"
        values = dict(attrs)
        self.images += tag == "img"
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if tag == "a" else []
        self.sources += [values[k] for k in ("src", "href") if k in values and tag != "a"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text, num_tables):
    page = Page()
    page.feed(text)
    assert not page.open
    assert page.images == num_tables
    assert all(source.startswith("data:") for source in page.sources)
    assert len(set(page.ids)) == num_tables
    assert page.links == [f"#{id_}" for id_ in page.ids]


def test_profile_takes_tables_from_a_file(trace, tmp_path, capsys):
    tables = tmp_path / "tables.yaml"
    tables.write_text(
        "- {name: '0', num_embeddings: 8, embedding_dim: 16}\n"
        "- {name: '1', num_embeddings: 3000, embedding_dim: 32, data_type: FP16}\n"
    )
    status, printed, _ = run(
        capsys, trace, "--columns", "0,1", "--tables", tables, "--out", tmp_path,
        "--embedding-dim", 32,
    )  # fmt: skip
    assert status == 0
    assert f"all tables uncompressed: {(8 * 16 * 4 + 3000 * 32 * 2) / 1024:.0f} KiB" in printed


def batches():
    """A DataLoader, as far as this command can tell."""
    return [{"user": np.arange(10) % 4} for _ in range(6)]


def test_profile_reads_a_loader(tmp_path, capsys):
    loader = f"{__name__}:batches"
    status, printed, errors = run(
        capsys, "--loader", loader, "--samples", 60, "--days", 2, "--out", tmp_path
    )
    assert (status, errors) == (0, "")
    assert tc.load_statistics(tmp_path / "statistics.json")["user"].num_lookups == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either files or --loader must be given"),
        (["TRACE", "--loader", "a:b"], "either files or --loader must be given"),
        (["a.npy"], "traces must be files, got 'a.npy'"),
        (["a.txt"], "traces must be of one kind of .*, got ['.txt']"),
        (["a.npy", "b.csv"], "traces must be of one kind of .*, got ['.csv', '.npy']"),
        (["TRACE", "--columns", "=x"], "--columns: must be NAME or NAME=VALUE, got '=x'"),
        (["TRACE", "--columns", "7"], "columns must be among ['0', '1', '2'], got '7'"),
        (["TRACE", "--compressions", "a"], "--compressions: must be numbers, got 'a'"),
        (["TRACE", "--compressions", "0.5"], "compression must be a finite number >= 1"),
        (["TRACE", "--cache-sizes", "x"], "a cache size must be a share in (0, 1]"),
        (["TRACE", "--memory", "0"], "table_bytes must be >= 65536, got 0"),
        (["TRACE", "--days", "2", "--day-column", "1"], "only one of --days, --day-column"),
        (["TRACE", "--days", "0"], "for 0 equal days they must be >= 1"),
        (["TRACE", "--num-embeddings", "5"], "ids must be below num_embeddings=5, got"),
        (["TRACE", "--num-embeddings", "x=5"], "--num-embeddings: tables must be among"),
        (["TRACE", "--num-embeddings", "many"], "--num-embeddings: must be numbers, got 'many'"),
        (["TRACE", "--embedding-dim", "3"], "embedding_dim must be a positive multiple of 4"),
        (["TRACE", "--dtype", "int8"], "dtype must be float32 or float16, got int8"),
        (
            ["TRACE", "--tables", "YAML"],
            "t.yaml: table 0: num_embeddings must be given as int, got None",
        ),
        (["--loader", "a:b", "--time-column", "x"], "--loader: batches have no day"),
        (["--loader", "nothing:b"], "No module named 'nothing'"),
    ],
)
def test_refusals_are_one_line(trace, tmp_path, capsys, arguments, message):
    (tmp_path / "t.yaml").write_text("- {name: a, rows: 7}\n")
    known = {"TRACE": trace, "YAML": tmp_path / "t.yaml"}
    replaced = [known.get(argument, argument) for argument in arguments]
    status, printed, errors = run(capsys, *replaced, "--out", tmp_path / "out")
    assert (status, printed) == (2, "")
    assert errors.startswith("torchrec-cafe profile: error: ")
    assert errors.count("\n") == 1
    first, _, last = message.partition(".*")
    assert first in errors
    assert last in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["[", "7", "a: 7"])
def test_tables_file_is_checked(trace, tmp_path, capsys, content):
    (tmp_path / "t.yaml").write_text(content)
    assert run(capsys, trace, "--tables", tmp_path / "t.yaml")[0] == 2


def test_console_script_is_installed(capsys):
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="torchrec-cafe")
    with pytest.raises(SystemExit, match="0"):
        script.load()(["profile", "--help"])
    assert "--cache-sizes" in capsys.readouterr().out


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --enable-logging=stderr"
).split()


def console_of(page, tmp_path):
    """What a browser says of a page, and a picture of it."""
    picture = tmp_path / "page.png"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'data'}", "--window-size=1300,2000",
         f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line], picture


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_browser_finds_nothing_wrong_with_the_page(trace, tmp_path, capsys):
    broken = tmp_path / "broken.html"
    broken.write_text("<script>console.error('seen')</script>")
    assert any("seen" in line for line in console_of(broken, tmp_path)[0])
    assert run(capsys, trace, "--out", tmp_path)[0] == 0
    console, picture = console_of(tmp_path / "index.html", tmp_path)
    assert not console
    assert picture.stat().st_size > 50_000
