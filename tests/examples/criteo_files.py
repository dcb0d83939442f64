"""Small files in Criteo's published formats."""

from __future__ import annotations

import random
from pathlib import Path


def write_criteo(path: Path, *, samples: int, ids: int) -> None:
    """A file as Kaggle's ``train.txt``: label, 13 integers, 26 hexadecimal ids.

    Args:
        path: to write.
        samples: lines.
        ids: of each feature, the first the most popular; that of the first tells of the label.
    """
    source = random.Random(0)
    lines = []
    for _ in range(samples):
        found = [int(source.random() ** 3 * ids) for _ in range(26)]
        label = int(source.random() < 0.1 + 0.5 * (found[0] % 2))
        integers = [str(source.randrange(100)) for _ in range(13)]
        lines.append("\t".join([str(label), *integers, *(f"{id_:08x}" for id_ in found)]) + "\n")
    path.write_text("".join(lines))
