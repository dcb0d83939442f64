"""How good a model's predictions are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.metrics.ne import compute_cross_entropy, compute_ne
from tqdm import tqdm

from examples.dlrm.data import BatchLoader

#: how far the normalised entropy keeps probabilities from 0 and 1, as TorchRec's metrics do
_ETA = 1e-12


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How good predictions are.

    Attributes:
        auc: area under the ROC curve, exact, in [0, 1].
        log_loss: mean cross entropy, in nats.
        normalized_entropy: log-loss / that of predicting the mean label of the same samples; 1 is
            as good as knowing nothing else.
    """

    auc: float
    log_loss: float
    normalized_entropy: float

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Figures:
        """The figures of some predictions.

        Args:
            logits: float ``[n]``.
            labels: float ``[n]``, 0 or 1.
        """
        logits, labels = logits.double(), labels.double()
        predictions = logits.sigmoid()
        auc = binary_auroc(predictions, labels.int(), thresholds=None)
        log_loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        ones = torch.ones_like(labels)
        # Clamps what it is given, in place.
        entropy = compute_cross_entropy(labels, predictions.clone(), ones, _ETA)
        clicks = labels.sum()
        normalized = compute_ne(entropy.sum(), ones.sum(), clicks, len(labels) - clicks, _ETA)
        return cls(auc=float(auc), log_loss=float(log_loss), normalized_entropy=float(normalized))


def progress_bar(label: str, total: int, done: int = 0, *, keep: bool = True) -> tqdm:
    """A bar of samples on rank 0; a line now and then where the output is no terminal.

    Args:
        label: what goes on.
        total: samples in all.
        done: samples that are done already.
        keep: whether the bar stays when all is done.
    """
    return tqdm(
        desc=label,
        total=total,
        initial=done,
        unit=" samples",
        unit_scale=True,
        mininterval=1.0,
        leave=keep,
        disable=dist.get_rank() != 0,
    )


@torch.no_grad()
def evaluate(
    model: DistributedModelParallel, loader: BatchLoader, label: str, *, keep: bool = True
) -> Figures:
    """Predict what a loader yields; the model is in evaluation mode afterwards.

    Args:
        model: the model, called by all ranks together.
        loader: this rank's batches.
        label: of the progress bar.
        keep: whether the bar stays when all is done.

    Returns:
        The figures of all ranks' samples together, the same on every rank.
    """
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    model.eval()
    with progress_bar(label, loader.num_samples, keep=keep) as bar:
        for batch in loader:
            _, (_, logit, label_) = model(batch.to(model.device))
            logits.append(logit.view(-1).cpu())
            labels.append(label_.view(-1).cpu())
            bar.update(len(batch.labels) * dist.get_world_size())
    parts: list[tuple[Tensor, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (torch.cat(logits), torch.cat(labels)))
    whole = [part for part in parts if part is not None]
    return Figures.of(
        torch.cat([part[0] for part in whole]), torch.cat([part[1] for part in whole])
    )
