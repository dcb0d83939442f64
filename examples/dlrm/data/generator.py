"""A generator in place of Criteo's click log, which cannot be had everywhere.

It has the 26 cardinalities published for Criteo Kaggle and the skew that the CAFE paper found in
it, and plants what a model can learn: an effect of each id, and of each pair of ids. No result on
it is a result on Criteo's data.

Shape legend: ``n`` rows, ``N`` ids of a feature.
"""

from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .click_log import ClickLog, FeatureSpec
from .storage import open_click_log, prepare_once, write_header

#: ids of Criteo Kaggle's categorical features, as DLRM's reference code publishes them
NUM_EMBEDDINGS = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
NUM_TRAIN, NUM_TEST = 10_000_000, 1_000_000
#: days of equal length; the test rows follow on the last
NUM_DAYS = 10
#: with drift, the share of a feature's ids that swap popularity among each other every day
RESHUFFLED = 0.3
#: names by which :func:`examples.dlrm.data.load_click_log` knows the two logs
NAMES = ("generator", "generator_drift")

_ZIPF = (1.05, 1.1)  # of the first and the last feature; between, the others
_NUM_DENSE = 13
_FACTORS = 4  # of an id; a pair of ids counts the product of theirs
# Variance of the logit. The best possible AUC is about that of full tables on Criteo Kaggle, .80.
_VARIANCE = {"ids": 1.2, "pairs": 0.4, "dense": 0.8}
_BIAS = -1.5
# Rare ids tell less than popular ones, and features with more ids tell more. The two exponents are
# such that hashed tables lose about what they lose on Criteo Kaggle in the CAFE paper (figure 8a):
# at 10x, 100x, 1000x and 10000x .003, .016, .030 and .046 AUC here; .003, .012, .031, .052 there.
_FADE_FROM_RANK, _FADE_EXPONENT = 100, 0.5
_VARIANCE_BY_IDS = 0.3


def prepare_generated(
    cache_dir: Path, name: str, *, seed: int = 0, progress: bool = True
) -> ClickLog:
    """Generates a log, the first time, and maps it.

    Args:
        cache_dir: generated data lies in its folder ``<name>-v1`` (1.7 GB).
        name: of :data:`NAMES`; with drift, ids swap their popularity every day.
        seed: of everything.
        progress: whether to show a progress bar while generating.

    Returns:
        Ten million rows to train on, one million to test on, in order of time.

    Raises:
        ValueError: for another name.

    Note:
        Deterministic for one version of NumPy. Uses no network.
    """
    if name not in NAMES:
        raise ValueError(f"prepare_generated: `name` must be of {', '.join(NAMES)}, got {name!r}")
    suffix = f"-seed{seed}" if seed else ""
    folder = cache_dir / f"{name}-v1{suffix}"
    reshuffled = RESHUFFLED if name == "generator_drift" else 0.0
    prepare_once(
        folder,
        lambda partial: write_generated(
            partial, NUM_TRAIN, NUM_TEST, reshuffled=reshuffled, seed=seed, progress=progress
        ),
    )
    return open_click_log(folder)


def write_generated(
    folder: Path,
    num_train: int,
    num_test: int,
    *,
    num_embeddings: tuple[int, ...] = NUM_EMBEDDINGS,
    reshuffled: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Writes a generated log.

    Args:
        folder: an existing folder.
        num_train: rows to train on.
        num_test: rows to test on.
        num_embeddings: ids of each feature.
        reshuffled: share of each feature's ids that swap their popularity every day, in [0, 1].
        seed: of everything.
        progress: whether to show a progress bar.
    """
    rows = num_train + num_test
    days = np.minimum(np.arange(rows) * NUM_DAYS // max(num_train, 1), NUM_DAYS - 1)
    random = np.random.default_rng(seed)
    ids = np.lib.format.open_memmap(
        folder / "ids.npy",
        "w+",
        dtype=np.int32,
        shape=(rows, len(num_embeddings)),
        fortran_order=True,
    )
    dense, logit = draw_rows(
        ids, days, num_embeddings, reshuffled=reshuffled, random=random, progress=progress
    )
    np.save(folder / "dense.npy", dense)
    clicked = random.random(rows, np.float32) < 1 / (1 + np.exp(-logit))
    np.save(folder / "labels.npy", clicked.astype(np.uint8))
    ids.flush()
    drift = f", {reshuffled:.0%} of the ids swapping popularity every day" if reshuffled else ""
    write_header(
        folder,
        name="generator_drift" if reshuffled else "generator",
        description=(
            "Generator (not real data): Criteo Kaggle's 26 cardinalities, Zipf "
            f"{_ZIPF[0]:g}-{_ZIPF[1]:g} popularity, planted effects of ids and pairs{drift}"
        ),
        features=[FeatureSpec(f"cat_{i}", size) for i, size in enumerate(num_embeddings)],
        num_train=num_train,
    )


def draw_rows(
    ids: np.ndarray,
    days: np.ndarray,
    num_embeddings: tuple[int, ...],
    *,
    reshuffled: float,
    random: np.random.Generator,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws features, and how likely each row is to be clicked.

    Args:
        ids: int32 ``[n, F]``, overwritten.
        days: ``[n]``, the day of each row, ascending from 0, below :data:`NUM_DAYS`.
        num_embeddings: ids of each feature.
        reshuffled: see :func:`write_generated`.
        random: where to draw from.
        progress: whether to show a progress bar.

    Returns:
        Dense features float32 ``[n, D]`` and the logits of the labels, float32 ``[n]``: nobody can
        tell the labels better.
    """
    rows, features = ids.shape
    bounds = np.searchsorted(days, np.arange(NUM_DAYS + 1))
    logit = np.full(rows, _BIAS, np.float32)
    sums, squares = np.zeros((2, rows, _FACTORS), np.float32)
    shares = np.array(num_embeddings, dtype=np.float64) ** _VARIANCE_BY_IDS
    shares /= shares.sum()
    # The variance of the sum over all pairs of features, were every factor of size 1.
    pairs = _FACTORS * (np.sqrt(shares).sum() ** 2 - shares.sum()) / 2 if features > 1 else 1.0
    bar = tqdm(num_embeddings, desc="generating clicks", unit="feature", disable=not progress)
    for feature, size in enumerate(bar):
        exponent = _ZIPF[0] + (_ZIPF[1] - _ZIPF[0]) * feature / max(features - 1, 1)
        popularity = np.arange(1, size + 1, dtype=np.float64) ** -exponent
        id_of_rank = random.permutation(size).astype(np.int32)
        column, ranks = _draw_ids(popularity, bounds, id_of_rank, reshuffled, random)
        ids[:, feature] = column
        fade = _fade(popularity)[ranks]  # of the day: an id that becomes popular tells more
        effects = fade * random.standard_normal(size, np.float32)[column]
        logit += np.float32(np.sqrt(_VARIANCE["ids"] * shares[feature])) * effects
        size_of_factor = np.float32((_VARIANCE["pairs"] * shares[feature] / pairs) ** 0.25)
        factors = random.standard_normal((size, _FACTORS), np.float32)[column]
        factors = size_of_factor * (fade[:, None] * factors)
        sums += factors
        squares += factors**2
    logit += (sums**2 - squares).sum(1) / 2
    dense = random.standard_normal((rows, _NUM_DENSE), np.float32)
    weights = random.standard_normal(_NUM_DENSE, np.float32)
    logit += dense @ (weights * np.sqrt(_VARIANCE["dense"] / (weights**2).sum()))
    return dense, logit


def _fade(popularity: np.ndarray) -> np.ndarray:
    """Size of what the id of each rank tells, float32 ``[N]``, of mean square 1 over the rows."""
    fade = (1 + np.arange(len(popularity)) / _FADE_FROM_RANK) ** -_FADE_EXPONENT
    return (fade / np.sqrt((popularity * fade**2).sum() / popularity.sum())).astype(np.float32)


def _draw_ids(
    popularity: np.ndarray,
    bounds: np.ndarray,
    id_of_rank: np.ndarray,
    reshuffled: float,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and their ranks, int32 ``[n]``; rows ``[bounds[d], bounds[d + 1])`` are day d's."""
    size = len(popularity)
    cumulated = np.cumsum(popularity)
    ids, ranks = np.empty((2, bounds[-1]), np.int32)
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        draws = random.random(end - begin) * cumulated[-1]
        ranks[begin:end] = np.minimum(np.searchsorted(cumulated, draws), size - 1)
        ids[begin:end] = id_of_rank[ranks[begin:end]]
        swapped = np.flatnonzero(random.random(size) < reshuffled)
        id_of_rank[swapped] = id_of_rank[random.permutation(swapped)]
    return ids, ranks
