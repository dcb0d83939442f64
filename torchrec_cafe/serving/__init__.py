"""Trained tables in TorchRec's inference: a map from ids to rows, and the rows, quantised."""

from torchrec_cafe.serving.collection import (
    GroupFeatures,
    PhysicalBags,
    ServedEmbeddingBagCollection,
    quantize_rows,
    quantized_bags,
)
from torchrec_cafe.serving.delta import (
    CollectionDelta,
    GroupDelta,
    ModelDelta,
    RowsDelta,
    apply_delta,
)

__all__ = [
    "CollectionDelta",
    "GroupDelta",
    "GroupFeatures",
    "ModelDelta",
    "PhysicalBags",
    "RowsDelta",
    "ServedEmbeddingBagCollection",
    "apply_delta",
    "quantize_rows",
    "quantized_bags",
]
