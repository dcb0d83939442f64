"""The benchmark of look-ahead tables on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.distributed.types import CacheAlgorithm

from benchmarks import lookahead_cuda
from benchmarks.lookahead_cuda_ways import Sizes, Way, batches, collection, fused_params, plan, ways
from torchrec_cafe.distributed.types import CompressedParameterSharding

SMALL = Sizes(tables=2, rows=1000, dim=16, batch=8, pooling=3, over_arch=(8,))
CPU = torch.device("cpu")


def test_the_papers_sizes_and_every_way():
    options = lookahead_cuda.arguments([])
    sizes = lookahead_cuda.sizes_of(options)
    assert (sizes.tables, sizes.rows, sizes.dim) == (8, 10_000_000, 128)
    assert (sizes.batch, sizes.pooling) == (2048, 20)
    assert sizes.table_bytes == 40_960_000_000
    found = lookahead_cuda.wanted(options)
    assert {way.fraction for way in found if not way.kernel} == {0.02, 0.05, 0.1}
    assert len({way.key for way in found}) == len(found) == 3 * 6 + 1
    groups = lookahead_cuda.groups_of(found)
    assert [way.key for way in groups[0]] == ["lookahead, depth 4 0.05", "lookahead, depth 0 0.05"]
    assert len(groups) == 3 * 5 + 1
    smaller = lookahead_cuda.arguments(["--rows", "1000", "--ways", "lru,uvm", "--quick"])
    assert lookahead_cuda.sizes_of(smaller).rows == 1000
    assert {way.name.split(",")[0] for way in lookahead_cuda.wanted(smaller)} == {"lru", "uvm"}
    with pytest.raises(SystemExit, match="--ways must be of"):
        lookahead_cuda.wanted(lookahead_cuda.arguments(["--ways", "ssd"]))


@pytest.mark.parametrize("way", [Way("hbm", "fused"), *ways([0.1], [0, 4])], ids=lambda w: w.name)
def test_plans_for_a_gpu(way: Way):
    planned: Any = plan(collection(SMALL), SMALL, way, torch.device("cuda")).plan[""]
    for entry in planned.values():
        assert entry.sharding_type == "table_wise"
        assert str(entry.sharding_spec.shards[0].placement) == "rank:0/cuda:0"
        if not way.kernel:
            assert isinstance(entry, CompressedParameterSharding)
            assert entry.group.kind.cache_fraction == 0.1
            continue
        assert entry.compute_kernel == way.kernel
        if way.kernel == "fused_uvm_caching":
            assert entry.cache_params.load_factor == 0.1
            assert entry.cache_params.prefetch_pipeline is way.prefetch
            lfu = entry.cache_params.algorithm is CacheAlgorithm.LFU
            assert lfu == way.name.startswith("lfu")
    assert fused_params(way).get("uvm_host_mapped", False) == way.kernel.startswith("fused_uvm")


def test_popular_ids_are_as_popular_as_they_should_be():
    made = batches(SMALL, 1.05, 300, CPU)
    assert made[0].sparse_features.values().shape == (2 * 8 * 3,)
    ids = torch.cat([batch.sparse_features["f_1"].values() for batch in made])
    share = ids.bincount(minlength=1000).sort(descending=True).values[:10].sum() / len(ids)
    expected = (torch.arange(1, 1001.0) ** -1.05)[:10].sum() / (
        torch.arange(1, 1001.0) ** -1.05
    ).sum()
    assert share.item() == pytest.approx(expected.item(), rel=0.1)


@pytest.mark.filterwarnings("ignore")  # of TorchRec about torch
def test_a_run_without_a_gpu_goes_on_where_it_ended(tmp_path: Path, capsys):
    words = "--quick --device cpu --tables 2 --rows 3000 --dim 16 --batch 16 --pooling 3 --rounds 1"
    words += " --steps 2 --batches 6 --exponents 0.8 --fractions 0.5"
    report, parts = tmp_path / "report.json", tmp_path / "parts.json"
    given = [*words.split(), "--json", str(report), "--parts", str(parts)]
    lookahead_cuda.main([*given, "--minutes", "0"])
    assert "not measured within --minutes" in capsys.readouterr().out
    lookahead_cuda.main(given)
    noted = json.loads(parts.read_text())["parts"]
    assert set(noted) == {"lookahead, depth 0 0.5", "lookahead, depth 4 0.5"}
    parts.write_text(parts.read_text().replace('"hbm": ', '"hbm": 1000'))  # not measured again
    lookahead_cuda.main(given)
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    main = rows["zipf 0.8/lookahead 0.5 over hbm"]
    assert main["target"] == 0.95
    assert main["met"]
    with pytest.raises(SystemExit, match="has other sizes: name another file"):
        lookahead_cuda.main([*given, "--dim", "32"])


def test_targets_are_those_of_the_best_cache():
    def part(seconds: float) -> dict[str, Any]:
        return {"1.05": {"hbm": 1.0, "other": seconds, "moved": {}}}

    parts = {
        "lookahead, depth 4 0.05": part(1.0),
        "lru 0.05": part(4.0),
        "lfu 0.05": part(2.0),
        "lru, prefetched 0.05": part(1.5),
    }
    rows = {row.name: row for row in lookahead_cuda.judge(parts, 100, ["0.05"])}
    name = "zipf 1.05/lookahead 0.05 over"
    assert (rows[f"{name} hbm"].value, rows[f"{name} hbm"].met) == (1.0, True)
    assert (rows[f"{name} cached"].value, rows[f"{name} cached"].met) == (2.0, False)
    assert (rows[f"{name} prefetched"].value, rows[f"{name} prefetched"].met) == (1.5, True)
