"""Compressed tables as uncompressed checkpoints and as modules of inference, on gloo ranks."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torchrec.fx import symbolic_trace
from torchrec.modules.embedding_configs import PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from tests.distributed import models
from tests.distributed.ranks import run_ranks
from torchrec_cafe.distributed import dense_export

KINDS: dict[str, tuple[Any, str]] = {
    "cafe": (models.CAFE, "row_wise"),
    "multi_level": (models.KINDS["multi_level"], "row_wise"),
    "factors": (models.KINDS["factors"], "row_wise"),
    "on one rank": (models.KINDS["factors"], "table_wise"),
    "quotient_remainder": (models.KINDS["quotient_remainder"], "row_wise"),
    "mem_rec": (models.KINDS["mem_rec"], "row_wise"),
    "replicas": (models.KINDS["mem_rec"], "data_parallel"),
    "lookahead": (tc.Lookahead(cache_fraction=0.5), "row_wise"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean": {"pooling": PoolingType.MEAN},
    "weighted": {"is_weighted": True},
}


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.ebc = models.collection(**options)
        self.dense = nn.Linear(32, 1)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        vectors = self.ebc(features)  # sharded collections have another order
        return self.dense(torch.cat([vectors[name] for name in features.keys()], 1))


def _trained(kind: str, **options: Any) -> nn.Module:
    table, sharding_type = KINDS[kind]
    constraint = tc.ParameterConstraints(table=table, sharding_types=[sharding_type])
    constraints = models.constraints() | {"t_big": constraint, "t_small": constraint}
    torch.manual_seed(dist.get_rank())
    model = models.sharded(Model(**options), constraints)
    for batch in models.batches(20, 24, weighted=options.get("is_weighted", False)):
        model(batch).pow(2).mean().backward()
    return model


def _vectors(model: Any, batch: KeyedJaggedTensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(batch).to_dict()


def _export_all(folder: str) -> dict[str, float]:
    """How far predictions of stock TorchRec are from ours, by kind."""
    dense_export.CHUNK_BYTES = 10_000  # a table has many chunks
    distances = {}
    for kind in KINDS:
        model: Any = _trained(kind)
        dcp.save(
            {"model": tc.dense_state_dict(model)},
            checkpoint_id=f"{folder}/{kind}",
            planner=tc.DenseSavePlanner(),
        )
        plain = Model()
        plain.ebc = models.collection(device="cpu")
        loaded = {"model": plain.state_dict()}
        dcp.load(loaded, checkpoint_id=f"{folder}/{kind}")
        plain.load_state_dict(loaded["model"])
        # And in row-wise and table-wise shards.
        sharded = models.sharded(Model(), {"t_fused": models.constraints()["t_fused"]})
        loaded = {"model": sharded.state_dict()}
        dcp.load(loaded, checkpoint_id=f"{folder}/{kind}")
        sharded.load_state_dict(loaded["model"])
        model.eval()
        for batch in models.batches(3, 24, seed=7):
            ours, theirs, third = model(batch), plain(batch), sharded(batch)
            far = torch.stack([(ours - theirs).abs().max(), (ours - third).abs().max()]).max()
            distances[kind] = max(distances.get(kind, 0.0), float(far))
    return distances


def _unplanned() -> str:
    state = tc.dense_state_dict(_trained("cafe"))
    with pytest.raises(TypeError) as error:
        torch.save(state, io.BytesIO())
    return str(error.value)


def _export_and_refuse(folder: str) -> tuple[dict[str, float], str]:
    return _export_all(folder), _unplanned()


def test_stock_torchrec_loads_what_was_compressed(tmp_path: Path):
    results = run_ranks(2, tmp_path / "ranks", _export_and_refuse, str(tmp_path / "out"))
    for distances, message in results:
        assert distances.keys() == KINDS.keys()
        assert max(distances.values()) < 1e-6, distances
        assert message.startswith("table 't_big' of `dense_state_dict` is computed while")


def _scripted(served: nn.Module, batch: KeyedJaggedTensor) -> Tensor:
    """What the module computes after it was scripted, saved and loaded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit
        torch.jit.save(torch.jit.script(symbolic_trace(served)), file)
        file.seek(0)
        return torch.jit.load(file)(batch).values()


def _pickled(served: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(served, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _serve(kind: str, name: str) -> float:
    options = OPTIONS[name]
    model: Any = _trained(kind, **options)
    exact: Any = tc.to_inference(model, Model(**options), dtype=torch.float32)
    small: Any = tc.to_inference(model, Model(**options))
    model.eval()
    far = 0.0
    for batch in models.batches(2, 24, weighted="is_weighted" in options, seed=3):
        ours = _vectors(model.module.ebc, batch)
        prediction = model(batch).detach()
        if dist.get_rank() > 0:
            assert exact is None
            continue
        theirs, coarse = _vectors(exact.ebc, batch), _vectors(small.ebc, batch)
        assert list(theirs) == ["f_big", "f_small", "f_hash", "f_fused"]
        assert torch.allclose(exact(batch), prediction, atol=1e-6)
        for feature, vectors in ours.items():
            far = max(far, float((vectors - theirs[feature]).abs().max()))
            # A step of INT8 is 1/255 of a row's range; a bag has up to two ids of two rows.
            spread = 2 * float(vectors.abs().max().clamp(min=0.1))
            assert float((vectors - coarse[feature]).abs().max()) < 4 * spread / 255
    if exact is not None:
        if name != "sum" or kind in ("factors", "quotient_remainder", "mem_rec"):
            assert torch.equal(_scripted(exact.ebc, batch), exact.ebc(batch).values())
        again = _pickled(small)
        assert torch.equal(again(batch), small(batch))
        for tensor in again.state_dict().values():
            if tensor.dtype is torch.uint8:
                tensor.zero_()
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(batch), small(batch))
    return far


def _serve_all() -> dict[str, float]:
    cases = [(kind, "sum") for kind in KINDS]
    cases += [(kind, name) for kind in ("multi_level", "factors") for name in ("mean", "weighted")]
    return {f"{kind}, {name}": _serve(kind, name) for kind, name in cases}


def _serve_and_refuse() -> tuple[dict[str, float], list[str]]:
    model = _trained("cafe")
    per_sample = tc.ParameterConstraints(table=models.KINDS["mem_rec_sample"])
    of_samples = models.sharded(models.collection({"t_big": 5000}), {"t_big": per_sample})
    messages = []
    attempts = (
        lambda: tc.to_inference(model, Model(), dtype=torch.int32),
        lambda: tc.to_inference(model, nn.Linear(2, 2)),
        lambda: tc.to_inference(of_samples, models.collection({"t_big": 5000})),
        lambda: tc.dense_state_dict(of_samples),
    )
    for attempt in attempts:
        with pytest.raises(ValueError) as error:  # noqa: PT011  the message is returned
            attempt()
        messages.append(str(error.value))
    return _serve_all(), messages


def test_inference_predicts_what_was_trained(tmp_path: Path):
    expected = [
        "`dtype` must be torch.float32, torch.float16 or torch.int8, got torch.int32",
        "`unsharded` must have an EmbeddingBagCollection at 'ebc', as the sharded model, got None",
        "tables ['t_big']: an id of a MemRec(per='sample') table has no vector of its own",
        "tables ['t_big']: an id of a MemRec(per='sample') table has no vector of its own",
    ]
    for distances, messages in run_ranks(2, tmp_path, _serve_and_refuse):
        assert max(distances.values()) < 1e-6, distances
        for message, start in zip(messages, expected, strict=True):
            assert message.startswith(start)
