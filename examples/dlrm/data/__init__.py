"""Click logs to train on: the default promotions, a generator, and Criteo's published formats."""

from dataclasses import replace
from pathlib import Path

from .click_log import BatchLoader, ClickLog, FeatureSpec, Split
from .criteo import prepare_criteo
from .generator import NAMES as GENERATED
from .generator import prepare_generated
from .promotions import prepare_promotions

__all__ = [
    "BatchLoader",
    "ClickLog",
    "FeatureSpec",
    "Split",
    "default_cache_dir",
    "hold_out",
    "load_click_log",
    "prepare_criteo",
    "prepare_generated",
    "prepare_promotions",
    "sample_click_log",
]


def default_cache_dir() -> Path:
    """Returns ``.cache`` in the current directory: needs no home directory."""
    return Path(".cache")


def load_click_log(
    source: str,
    *,
    cache_dir: Path | None = None,
    sample: int | None = None,
    num_embeddings_per_feature: int | None = None,
    progress: bool = True,
) -> ClickLog:
    """Loads a click log, preparing it the first time.

    Args:
        source: ``"promotions"``, ``"generator"``, ``"generator_drift"``, or a path: Criteo's
            ``train.txt``, one ``day_*`` file, or a folder with either or with TorchRec's ``npy``
            files of them.
        cache_dir: where prepared data is kept; :func:`default_cache_dir` by default.
        sample: about how many rows to keep in all, see :func:`sample_click_log`; all by default.
        num_embeddings_per_feature: see :func:`prepare_criteo`; for a path only.
        progress: whether to show a progress bar while preparing.

    Returns:
        The log, memory-mapped unless it is a sample.

    Raises:
        ValueError: if ``source`` is neither, an option is out of range, or a row is malformed.
        FileNotFoundError: if ``source`` is a folder without Criteo's files.
    """
    # Before the preparation, which may take minutes.
    if sample is not None and sample < 2:
        raise ValueError(
            f"load_click_log: `sample` must be at least 2, got {sample}; "
            "pass how many rows to keep, or None for all"
        )
    cache_dir = default_cache_dir() if cache_dir is None else cache_dir
    if source == "promotions" or source in GENERATED:
        if num_embeddings_per_feature is not None:
            raise ValueError(
                f"load_click_log: `num_embeddings_per_feature` must be None for {source!r}, "
                f"whose ids are not hashed, got {num_embeddings_per_feature}; leave it out"
            )
        if source == "promotions":
            log = prepare_promotions(cache_dir, progress=progress)
        else:
            log = prepare_generated(cache_dir, source, progress=progress)
    elif source and Path(source).exists():
        log = prepare_criteo(
            Path(source),
            cache_dir,
            num_embeddings_per_feature=num_embeddings_per_feature,
            progress=progress,
        )
    else:
        raise ValueError(
            "load_click_log: `source` must be 'promotions', 'generator', 'generator_drift' or the "
            "path of Criteo's train.txt or of the folder of day_0 .. day_23, got "
            f"{source!r}, which does not exist; check the path"
        )
    return log if sample is None else sample_click_log(log, sample)


def sample_click_log(log: ClickLog, num_rows: int) -> ClickLog:
    """Keeps some rows of a log, evenly spaced in time, in memory.

    Args:
        log: the log.
        num_rows: about how many rows to keep in all, at least 2; training and test set keep their
            proportion, and at least one row each if they have any. Not fewer than a log has is all.

    Returns:
        The sample. Its features keep their number of embeddings.

    Raises:
        ValueError: if ``num_rows`` is less than 2.
    """
    if num_rows < 2:
        raise ValueError(
            f"sample_click_log: `num_rows` must be at least 2, got {num_rows}; ask for more rows"
        )
    total = len(log.train) + len(log.test)
    if num_rows >= total:
        return log
    splits = [
        split.take(min(len(split), max(1, round(num_rows * len(split) / total))))
        for split in (log.train, log.test)
    ]
    return replace(log, train=splits[0], test=splits[1])


def hold_out(log: ClickLog, share: float) -> ClickLog:
    """Holds out the last training rows, to validate on.

    Args:
        log: the log.
        share: of the training rows, above 0 and below 1.

    Returns:
        The log with fewer training rows, in the same arrays, and the others as ``validation``.

    Raises:
        ValueError: if ``share`` is out of range, or either part would be empty.
    """
    rows = len(log.train)
    begin = rows - round(rows * share) if 0 < share < 1 else 0
    if not 0 < begin < rows:
        raise ValueError(
            "hold_out: `share` must be above 0 and below 1, and leave rows to train and to "
            f"validate on, got {share:g} of {rows} rows; hold out another share"
        )
    train, validation = log.train.part(0, begin), log.train.part(begin, rows)
    return replace(log, train=train, validation=validation)
