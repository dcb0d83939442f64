"""Serves what :mod:`examples.serving.export` has written, and compares it with the trained model.

``python -m examples.serving.serve`` needs no process group, no sharding and no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec.fx import symbolic_trace
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import torchrec_cafe as tc
from examples.process import quieten
from torchrec_cafe.config.text import as_text

#: What a prediction with exact rows may differ by from the trained model's.
TOLERANCE = 1e-5


def _parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("runs/serving"), help="its folder")
    return parser.parse_args(arguments)


@torch.no_grad()
def predict(model: nn.Module, requests: dict[str, Any]) -> Tensor:
    """Probabilities of clicks.

    Args:
        model: the DLRM of what was exported, without its loss; or scripted.
        requests: ``dense`` float32 ``[n, D]``, ``ids`` int64 ``[n, F]``, ``keys`` of the features.

    Returns:
        float32 ``[n]``.
    """
    ids = requests["ids"]
    features = KeyedJaggedTensor(
        keys=requests["keys"],
        values=ids.T.reshape(-1),
        lengths=torch.ones(ids.numel(), dtype=torch.int32),
    )
    return model(requests["dense"], features).view(-1).sigmoid()


def _row(name: str, ours: Tensor, trained: Tensor, labels: Tensor) -> list[str]:
    auc = binary_auroc(ours, labels.int(), thresholds=None)
    log_loss = nn.functional.binary_cross_entropy(ours.double(), labels.double())
    return [name, f"{(ours - trained).abs().max():.1e}", f"{auc:.4f}", f"{log_loss:.5f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; exit status 1 if exact rows predict something else than the trained model.

    Args:
        arguments: command line without the program; ``None`` reads the process's own.
    """
    quieten()
    folder = _parse_args(arguments).model
    requests = torch.load(folder / "requests.pt")
    # Modules and deltas are pickled: load those only that you have written.
    models: dict[str, Any] = {
        name: torch.load(folder / f"{name}.pt", weights_only=False) for name in ("float32", "int8")
    }
    delta = torch.load(folder / "delta.pt", weights_only=False)
    table = [["model", "largest difference", "AUC", "log-loss"]]
    worst = 0.0
    for trained, when in zip(requests["trained"], ("", ", after the delta"), strict=True):
        table.append(_row(f"trained{when}", trained, trained, requests["labels"]))
        for name, model in models.items():
            ours = predict(model.model, requests)
            table.append(_row(f"{name}{when}", ours, trained, requests["labels"]))
            if name == "float32":
                worst = max(worst, float((ours - trained).abs().max()))
        scripted: Any = torch.jit.script(symbolic_trace(models["int8"].model))
        ours = predict(scripted, requests)
        table.append(_row(f"int8, TorchScript{when}", ours, trained, requests["labels"]))
        if not when:
            for model in models.values():
                tc.apply_delta(model, delta)
    print(as_text(table))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
