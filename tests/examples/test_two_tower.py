"""The two-tower example as a user starts it, and its parts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from examples.two_tower.batches import BAGS, BatchMaker
from examples.two_tower.config import parse_args
from examples.two_tower.loop import products_before, recall
from examples.two_tower.model import attend, check_budgets
from examples.two_tower.purchases import Purchases, prepare_purchases, write_purchases
from tests.launch.torchx import torchx

ROOT = Path(__file__).parent.parent.parent


def frames(count: int = 6000) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Purchases of 40 households, each of which keeps to some of 300 products."""
    random = np.random.default_rng(0)
    household = random.integers(1, 41, count)
    product = 1000 + (household * 7 + random.integers(0, 12, count) ** 2 // 6) % 300
    minutes = np.sort(random.integers(0, 365 * 24 * 60, count))
    transactions = pd.DataFrame(
        {
            "household_id": household,
            "product_id": product,
            "basket_id": minutes * 100 + household,
            "week": 1 + minutes // (7 * 24 * 60),
            "transaction_timestamp": pd.Timestamp("2017-01-01")
            + pd.to_timedelta(minutes, unit="min"),
        }
    ).sample(frac=1, random_state=0)
    names = np.arange(1000, 1300)
    products = pd.DataFrame(
        {
            "product_id": names,
            "manufacturer_id": names % 50,
            "department": [f"d{name % 7}" for name in names],
            "brand": ["National" if name % 3 else "Private" for name in names],
            "product_category": [f"c{name % 31}" for name in names],
            "product_type": [None if name % 11 == 0 else f"t{name % 60}" for name in names],
        }
    )
    return transactions, products


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    (folder / "purchases-v1").mkdir()
    write_purchases(folder / "purchases-v1", *frames())
    return folder


@pytest.fixture(scope="module")
def data(cache: Path) -> Purchases:
    return prepare_purchases(cache)


def test_histories_are_what_the_household_bought_before(data: Purchases):
    transactions, _ = frames()
    names = np.unique(transactions["product_id"])
    places = data.test(50)
    batch = BatchMaker(data, history=5).of_purchases(places)
    histories = batch.sequences["history"]
    ends = np.cumsum(histories.lengths().numpy())
    weeks = transactions.sort_values(["household_id", "transaction_timestamp"])["week"].to_numpy()
    assert (weeks[places] > 44).all()
    for number, place in enumerate(places):
        mine = transactions[transactions["household_id"] == 1 + data.user[place]].sort_values(
            ["transaction_timestamp", "basket_id", "product_id"]
        )
        now = mine.iloc[place - data.first[place]]
        assert names[data.product[place]] == now["product_id"]
        before = mine[mine["transaction_timestamp"] < now["transaction_timestamp"]]
        expected = before["product_id"].to_numpy()[-5:]
        length = int(histories.lengths()[number])
        found = histories.values()[ends[number] - length : ends[number]].numpy()
        assert names[found].tolist() == expected.tolist()


def test_batches_have_one_candidate_with_its_attributes(data: Purchases):
    maker = BatchMaker(data, history=5)
    batch = maker.of_products(np.arange(data.sizes["product"]))
    assert batch.sequences["history"].values().numel() == 0
    assert torch.equal(batch.sequences["candidate"].values(), batch.products)
    for name in BAGS:
        assert batch.bags[name].values().max() < data.sizes[name]
    shares = batch.log_share.exp()
    assert 0.9 < float(shares[torch.from_numpy(maker.counts > 0)].sum()) < 1.1
    assert list(data.train(None)) == list(data.order[: data.num_train])
    assert len(data.train(100)) == 100


def test_attention_passes_over_what_is_not_there():
    from torchrec.sparse.jagged_tensor import JaggedTensor

    values = torch.randn(3, 4)
    found = attend(JaggedTensor(values, lengths=torch.tensor([2, 0, 1])), torch.zeros(3, 4), 5)
    expected = torch.stack([values[:2].mean(0), torch.zeros(4), values[2]])
    torch.testing.assert_close(found, expected)


def test_recall_counts_products_before_the_one_that_was_bought():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0], [5.0, 1.0, 0.0, 0.0, 0.0]])
    assert products_before(scores, torch.tensor([[2.0], [5.0]])).tolist() == [2, 0]
    assert recall(torch.tensor([0, 1, 30, 4000]))[10] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table_kind", "full,lookahead"], "--table_kind must be of full, hash"),
        (["--compression", "0.5"], "--compression must be finite and at least 1"),
        (["--embedding_dim", "6"], "use 8"),
        (["--history", "0"], "--history must be at least 1, got 0"),
        (["--cafe", "compression=2"], "--cafe must be NAME=VALUE"),
        (["--kinds", "cafe"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse_args(arguments)


def test_a_compression_that_leaves_no_row_is_refused_before_training(data: Purchases):
    config = parse_args(["--table_kind", "cafe", "--compression", "1e6"])
    with pytest.raises(ValueError, match="leaves no row"):
        check_budgets(config, data.sizes)


def test_two_ranks_train_and_report(cache: Path, tmp_path: Path):
    done = torchx(
        *("run", "-s", "local_cwd", "--workspace", "", "dist.ddp", "-j", "1x2"),
        *("-m", "examples.two_tower.train", "--"),
        *("--cache_dir", str(cache), "--out", str(tmp_path / "out")),
        *("--table_kind", "full,hash,cafe,mem_rec", "--compression", "3", "--cafe"),
        *("num_shards=4,whole_fraction=0", "--mem_rec", "num_shards=4", "--batch_size", "32"),
        *("--max_steps", "12", "--queries", "100", "--learning_rate", "0.2"),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    values = {row["name"]: row["value"] for row in report["rows"]}
    dense = values["full/embedding_bytes"]
    for kind in ("full", "hash@3x", "cafe@3x", "mem_rec@3x"):
        assert 0 <= values[f"{kind}/recall@10"] <= values[f"{kind}/recall@100"] <= 1
        assert values[f"{kind}/purchases_per_second"] > 0
        assert kind == "full" or 0 < values[f"{kind}/embedding_bytes"] <= dense / 3
    assert values["popular/recall@100"] > 0.1
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000
    assert "| cafe 3x |" in (tmp_path / "out" / "report.md").read_text()
    assert "recall@100" in done.stdout + done.stderr
