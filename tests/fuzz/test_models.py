"""Broken batches against every kind of table: a defined result, or an error that does no harm."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from hypothesis import given
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import DataType, PoolingType

import torchrec_cafe as tc
from tests.distributed.ranks import run_ranks
from tests.fuzz.batches import Batch, batches
from tests.fuzz.bed import CAFE, Bed, Setup
from tests.fuzz.judge import STEPS, Judge
from tests.fuzz.profile import fuzz

# Many processes, or many cases: on a busy machine they take long.
pytestmark = pytest.mark.timeout(900)

#: cases of each setup
CASES = 200
FATAL, IGNORE, NONE = BoundsCheckMode.FATAL, BoundsCheckMode.IGNORE, BoundsCheckMode.NONE
MEAN, HALF = PoolingType.MEAN, DataType.FP16
HASH, QUOTIENT = tc.Hash(compression=3), tc.QuotientRemainder(compression=3)
MEM_REC = tc.MemRec(compression=3, num_hashes=2, num_weight_hashes=3, num_shards=4)
SAMPLES = tc.MemRec(compression=3, num_hashes=2, num_shards=4, per="sample")
MEDIUM = dataclasses.replace(CAFE, medium_fraction=0.3)
FACTORS = dataclasses.replace(MEDIUM, num_weight_hashes=2)
COUNTS = dataclasses.replace(CAFE, importance="frequency")
LOOKAHEAD = tc.Lookahead(cache_fraction=0.05, min_slots=60)


def setups(folder: str) -> dict[str, Setup]:
    """Every kind, and every way to keep it."""
    files = dataclasses.replace(LOOKAHEAD, path=folder)
    several: dict[str, Any] = {"t_a": CAFE, "t_b": HASH, "t_c": LOOKAHEAD}
    adagrad, sgd = EmbOptimType.EXACT_ADAGRAD, EmbOptimType.EXACT_SGD
    return {
        "cafe": Setup(CAFE),
        "cafe, halves": Setup(CAFE, "table_wise", weighted=True, precision=HALF, mode=IGNORE),
        "medium, means": Setup(MEDIUM, pooling=MEAN, mode=NONE),
        "factors": Setup(FACTORS, weighted=True),
        "factors, strict": Setup(FACTORS, "table_wise", mode=FATAL, optimizer=sgd),
        "frequency": Setup(COUNTS, "table_wise", weighted=True),
        "hash": Setup(HASH, weighted=True, optimizer=sgd),
        "hash, strict means": Setup(HASH, "table_wise", pooling=MEAN, mode=FATAL),
        "quotient": Setup(QUOTIENT, precision=HALF),
        "quotient, strict": Setup(QUOTIENT, "table_wise", weighted=True, mode=FATAL),
        "mem_rec": Setup(MEM_REC, weighted=True),
        "mem_rec, means": Setup(MEM_REC, "table_wise", pooling=MEAN, precision=HALF),
        "samples": Setup(SAMPLES, mode=IGNORE),
        "samples, strict": Setup(SAMPLES, "table_wise", mode=FATAL),
        "lookahead": Setup(LOOKAHEAD, weighted=True),
        "lookahead, files": Setup(files, "table_wise", optimizer=adagrad),
        "lookahead, strict": Setup(LOOKAHEAD, pooling=MEAN, precision=HALF, mode=FATAL),
        "several": Setup(several, optimizer=sgd, weighted=True),
    }


def _fuzz(setup: Setup) -> Counter[str]:
    judge = Judge(Bed(setup))

    @fuzz(CASES)
    @given(batch=batches(weighted=setup.weighted), step=st.sampled_from(STEPS))
    def run(batch: Batch, step: str) -> None:
        judge.judge(batch, step)

    run()
    return judge.seen


def _fuzz_all(folder: str) -> dict[str, Counter[str]]:
    return {name: _fuzz(setup) for name, setup in setups(folder).items()}


def test_every_kind(tmp_path: Path):
    (seen,) = run_ranks(1, tmp_path, _fuzz_all, str(tmp_path / "rows"))
    for name, counts in seen.items():
        assert counts["cases"] > 0.9 * CASES, name
        assert 0.2 * CASES < counts["sound"] < 0.8 * counts["cases"], name
        assert counts["strays"] > 0.05 * CASES, name
