"""A small click log, generated in memory: what the short examples train on."""

from __future__ import annotations

import numpy as np

from examples.dlrm.data.click_log import ClickLog, FeatureSpec, Split
from examples.dlrm.data.generator import draw_rows

#: categorical features and how many ids each has
FEATURES = (
    FeatureSpec("user", 200_000),
    FeatureSpec("item", 50_000),
    FeatureSpec("site", 2_000),
    FeatureSpec("country", 100),
)


def click_log(num_train: int, num_test: int = 0, *, seed: int = 0) -> ClickLog:
    """Rows drawn from a generator that plants what a model can learn; no real data.

    Args:
        num_train: rows to train on.
        num_test: rows to test on.
        seed: of everything.

    Returns:
        The log. Deterministic for one version of NumPy.
    """
    rows = num_train + num_test
    random = np.random.default_rng(seed)
    ids = np.empty((rows, len(FEATURES)), np.int32, order="F")
    sizes = tuple(feature.num_embeddings for feature in FEATURES)
    dense, logit = draw_rows(ids, np.zeros(rows, np.int64), sizes, reshuffled=0.0, random=random)
    labels = (random.random(rows, np.float32) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
    return ClickLog(
        name="clicks",
        description="Generator (not real data): four features, planted effects of ids and pairs",
        features=FEATURES,
        num_dense=dense.shape[1],
        train=Split(labels[:num_train], dense[:num_train], ids[:num_train]),
        test=Split(labels[num_train:], dense[num_train:], ids[num_train:]),
    )
