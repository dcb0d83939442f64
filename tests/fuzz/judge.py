"""Runs batches against a model: a defined result, or an error that has changed nothing."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor

from tests.distributed import models
from tests.fuzz.batches import FEATURES, KEYS, Batch
from tests.fuzz.bed import DIM, OWN, Bed
from tests.fuzz.plain import Plain

#: what a step may do: not train, or train on such gradients
STEPS = ["none", "finite", "finite", "finite", "nan", "inf", "huge"]
#: an error names a table or a feature, says what was given, and what to do
_EXPLAINS = re.compile(r"\b(f|t)_(a|b|b2|c|own)\b.*\bgot\b.*; ", re.DOTALL)
_GOOD = [[3, 3], [5], [1, 2], [], [6], [0, 4], [22], [7], [10], [2, 2]]


class Judge:
    """Runs cases, one after the other, each on the model as it was in the beginning.

    Args:
        bed: the model.
    """

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.plain = Plain(bed)
        weights = [0.5] * sum(map(len, _GOOD)) if bed.setup.weighted else None
        self.good = Batch(_GOOD, 2, weights)
        self.expected = bed.step(self.good), bed.snapshot()
        self.seen: Counter[str] = Counter()

    def judge(self, batch: Batch, step: str) -> None:
        """Run a case."""
        self.bed.reset()
        is_sound = batch.is_sound()
        meant = batch.regrouped() if is_sound else batch
        if is_sound and meant.is_pruned:
            return
        has_strays = is_sound and meant.has_strays
        if is_sound and not (has_strays and self.bed.setup.mode is BoundsCheckMode.FATAL):
            self._accepted(batch, meant.clean(), step)
        else:
            self._refused(batch)
        self.seen["cases"] += 1
        self.seen["sound"] += is_sound
        self.seen["strays"] += has_strays

    def _refused(self, batch: Batch) -> None:
        bed = self.bed
        with pytest.raises((ValueError, TypeError)) as caught:
            bed.step(batch)
        assert _EXPLAINS.search(str(caught.value)), caught.value
        assert bed.changed(bed.base) == []
        assert torch.equal(bed.step(self.good), self.expected[0])
        assert bed.changed(self.expected[1]) == []

    def _accepted(self, batch: Batch, clean: Batch, step: str) -> None:
        """The result is the plain definition's, and all that is learned that of the clean batch."""
        bed, expected = self.bed, self.plain.pooled(clean)
        if step == "none":
            bed.model.eval()
            _assert_close(bed.look_up(batch), expected)
            bed.model.train()
            _assert_close(bed.look_up(batch), expected)
            assert bed.changed(bed.base) == []
            return
        grad, skipped = _gradient(clean, step), bed.non_finite()
        _assert_close(bed.step(batch, grad), expected)
        self._check_rows(clean, grad)
        assert bed.non_finite() - skipped == self._num_skipped(clean, grad)
        bed.check_sketch()
        after = bed.snapshot()
        bed.check_sketch()
        bed.reset()
        bed.step(clean, grad)
        assert bed.changed(after) == []

    def _check_rows(self, batch: Batch, grad: Tensor) -> None:
        """Rows stay finite but those of ids whose bag has a gradient that is not, or a weight."""
        lost: dict[str, set[int]] = {FEATURES[key]: set() for key in KEYS}
        for key, sample, id_, is_lost in self._occurrences(batch, grad.abs() < 1e18):
            of_sample = self.plain.samples is not None and FEATURES[key] != OWN
            if is_lost or (of_sample and bool((grad[sample].abs() >= 1e18).any())):
                lost[FEATURES[key]].add(id_)
        for kernel in self.bed.module.compressed_kernels():
            names = [table.name for table in kernel.group.tables]
            allowed = {
                row for name in names for id_ in lost[name] for row in self.plain.rows[name][id_]
            }
            rows = kernel.emb_module.physical_tensors()[0]
            found = (~rows.isfinite().all(1)).nonzero().squeeze(1).tolist()
            assert set(found) <= allowed

    def _num_skipped(self, batch: Batch, grad: Tensor) -> int:
        """Occurrences whose importance is not finite, of the tables that sketches track."""
        by_count = any(
            pool.layout.kind.importance == "frequency" for pool in models.pools(self.bed.model)
        )
        tracked = {
            table.name
            for kernel in self.bed.module.compressed_kernels()
            for table in kernel.group.tables
            if kernel.bags.pool is not None and table.index >= 0
        }
        is_good = torch.ones_like(grad, dtype=torch.bool) if by_count else grad.isfinite()
        return sum(
            FEATURES[key] in tracked and lost
            for key, _, _, lost in self._occurrences(batch, is_good)
        )

    @staticmethod
    def _occurrences(batch: Batch, is_good: Tensor) -> Iterator[tuple[str, int, int, bool]]:
        """Feature, sample and id of each occurrence, and whether its bag or weight is no good."""
        good = is_good.view(batch.num_samples, len(KEYS), DIM).all(2).tolist()
        weights = iter(batch.weights or ())
        for number, key in enumerate(KEYS):
            for sample in range(batch.num_samples):
                for id_ in batch.bag(key, sample):
                    weight = 1.0 if batch.weights is None else next(weights)
                    yield key, sample, id_, not (good[sample][number] and math.isfinite(weight))


def _gradient(batch: Batch, kind: str) -> Tensor:
    size = batch.num_samples * len(KEYS) * DIM
    grad = (torch.arange(size) % 13 - 6) * 0.01
    if kind != "finite":
        grad[:: 3 * DIM] = {"nan": math.nan, "inf": math.inf, "huge": 3e38}[kind]
    return grad.view(batch.num_samples, len(KEYS) * DIM)


def _assert_close(got: Tensor, expected: Tensor) -> None:
    """Whether two are close; an id with two rows and an infinite weight may be inf - inf."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got[finite].float(), expected[finite], rtol=1e-3, atol=1e-3)
