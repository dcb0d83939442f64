"""Trained tables in TorchRec's inference: a map from ids to rows, and the rows, quantised."""

from torchrec_cafe.serving.collection import (
    GroupFeatures,
    PhysicalBags,
    ServedEmbeddingBagCollection,
    quantize_rows,
    quantized_bags,
)

__all__ = [
    "GroupFeatures",
    "PhysicalBags",
    "ServedEmbeddingBagCollection",
    "quantize_rows",
    "quantized_bags",
]
