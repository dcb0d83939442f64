"""An ``EmbeddingBagCollection`` with compressed tables, for inference.

Shape legend: N ids, F features, B samples, D columns.
"""

# Annotations stay what they are: torch.fx hands them on to TorchScript.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import List, Optional  # noqa: UP035  TorchScript's own

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig, PoolingType
from torchrec.quant.embedding_modules import EmbeddingBagCollection as QuantEmbeddingBagCollection
from torchrec.quant.embedding_modules import quantize_state_dict
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchrec_cafe.tables.row_maps import RowMap


@torch.fx.wrap
def features_in_order(
    features: KeyedJaggedTensor,
    names: List[str],  # noqa: UP006  TorchScript's own
) -> KeyedJaggedTensor:
    """Some features of a batch, in the given order."""
    keys = features.keys()
    return features.permute([keys.index(name) for name in names])


@torch.fx.wrap
def bags_of_rows(
    name: str,
    rows: Tensor,
    starts: Tensor,
    weights: Optional[Tensor],  # noqa: UP045  TorchScript's own
) -> KeyedJaggedTensor:
    """Bags of physical rows as the only feature of a batch."""
    return KeyedJaggedTensor(keys=[name], values=rows, weights=weights, offsets=starts)


#: Quantised rows, and a scale and an offset for each, if the data type has these.
QuantizedRows = tuple[Tensor, Tensor]


def quantize_rows(rows: Tensor, data_type: DataType) -> QuantizedRows:
    """Quantise a table, row by row.

    Args:
        rows: float32 or float16 ``[R, D]`` on the CPU.
        data_type: FP32, FP16 or INT8.
    """
    bag = nn.Module()
    bag.register_buffer("weight", rows)
    quantized: dict[str, QuantizedRows] = {}
    quantize_state_dict(nn.ModuleDict({"table": bag}), quantized, {"table": data_type})
    return quantized["table"]


def quantized_bags(
    tables: Sequence[EmbeddingBagConfig],
    rows: Mapping[str, QuantizedRows],
    data_type: DataType,
    *,
    is_weighted: bool,
) -> QuantEmbeddingBagCollection:
    """Stock quantised bags.

    Args:
        tables: their configurations.
        rows: by table.
        data_type: of the rows.
        is_weighted: whether features have per-sample weights.
    """
    return QuantEmbeddingBagCollection(
        [_config_of(table, len(rows[table.name][0]), data_type) for table in tables],
        is_weighted,
        torch.device("cpu"),
        table_name_to_quantized_weights=dict(rows),
        register_tbes=True,
    )


def _config_of(table: EmbeddingBagConfig, rows: int, data_type: DataType) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=table.name,
        num_embeddings=rows,
        embedding_dim=table.embedding_dim,
        feature_names=list(table.feature_names),
        pooling=table.pooling,
        data_type=data_type,
    )


@dataclass(frozen=True, kw_only=True)
class GroupFeatures:
    """How the features of a group are looked up.

    Attributes:
        name: of the physical table.
        features: names, in the order of the row map's.
        embedding_dim: columns of a row.
        is_weighted: whether ids have per-sample weights.
        pooling: how the vectors of a bag are pooled.
    """

    name: str
    features: tuple[str, ...]
    embedding_dim: int
    is_weighted: bool
    pooling: PoolingType


class PhysicalBags(nn.Module):
    """The bags of a group of compressed tables.

    To the stock module behind the map there is one table, of physical rows, and one feature, whose
    bags are those of all features, sample by sample; a row's factor is its per-sample weight.

    Args:
        group: the features.
        row_map: finds the rows.
        rows: the physical rows, float32 or float16 ``[R, D]``.
        data_type: what they are quantised to.

    Attributes:
        row_map: finds the rows.
        bags: has the rows.
        name: of the physical table.
    """

    def __init__(
        self, group: GroupFeatures, row_map: RowMap, rows: Tensor, data_type: DataType
    ) -> None:
        """Quantise the rows; see the class."""
        super().__init__()
        self.row_map = row_map
        self.name = group.name
        self._features = list(group.features)
        self._columns = len(group.features) * group.embedding_dim
        self._dim = group.embedding_dim
        self._weighted = group.is_weighted
        self._mean = group.pooling is PoolingType.MEAN
        self._factors = row_map.has_factors
        table = EmbeddingBagConfig(
            name=group.name,
            num_embeddings=len(rows),
            embedding_dim=group.embedding_dim,
            feature_names=[group.name],
        )
        quantized = {group.name: quantize_rows(rows, data_type)}
        self.bags = quantized_bags(
            [table], quantized, data_type, is_weighted=self._factors or self._weighted
        )

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Look up and pool.

        Args:
            features: a batch.

        Returns:
            float32 ``[B, F * D]``, the features in the order of the group's.
        """
        selected = features_in_order(features, self._features)
        offsets = selected.offsets().long()
        rows, starts, source, factors = self.row_map(selected.values().long(), offsets)
        weights: Optional[Tensor] = None  # noqa: UP045  TorchScript's own
        if self._factors and self._weighted:
            weights = (factors * selected.weights()).index_select(0, source)
        elif self._factors:
            weights = factors.index_select(0, source)
        elif self._weighted:
            weights = selected.weights().index_select(0, source)
        pooled = self.bags(bags_of_rows(self.name, rows, starts, weights)).values()
        pooled = pooled.view(-1, self._columns)
        if self._mean:
            sizes = offsets.diff().float()
            if self._weighted:
                sizes = torch.segment_reduce(
                    selected.weights(), "sum", offsets=offsets, initial=0.0
                )
            count = len(self._features)
            by_sample = sizes.view(count, -1).t().unsqueeze(2)
            pooled = (pooled.view(-1, count, self._dim) / (by_sample + 1e-6)).view(
                -1, self._columns
            )
        return pooled


class ServedEmbeddingBagCollection(nn.Module):
    """Bags of compressed tables, and of others beside them, for inference.

    It can be saved, loaded, and scripted as TorchRec's quantised modules are:
    ``torch.jit.script(torchrec.fx.symbolic_trace(module))``. A process that loads such a file needs
    the operators of torchrec_cafe and FBGEMM, and nothing else of either.

    Args:
        groups: bags of compressed tables, with the names of their embeddings.
        others: stock quantised bags of one pooling each, with the names of their embeddings.
        names: all embeddings, in the order of the result.
        dims: columns of each.

    Attributes:
        version: int64 scalar, of the model that it was made from; 0: no tracker has made it.
    """

    version: Tensor

    def __init__(
        self,
        groups: Sequence[tuple[PhysicalBags, Sequence[str]]],
        others: Sequence[tuple[QuantEmbeddingBagCollection, Sequence[str]]],
        names: Sequence[str],
        dims: Sequence[int],
    ) -> None:
        """Join them; see the class."""
        super().__init__()
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))
        self.groups = nn.ModuleList([group for group, _ in groups])
        self.others = nn.ModuleList([other for other, _ in others])
        self._names = list(names)
        self._dims = list(dims)
        found = [name for _, given in (*groups, *others) for name in given]
        dim_of = dict(zip(names, dims, strict=True))
        self._found = found
        self._found_dims = [dim_of[name] for name in found]
        self._in_order = found == self._names

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Look up and pool.

        Args:
            features: a batch.

        Returns:
            What the uncompressed collection would: float32, by embedding.
        """
        parts: List[Tensor] = []  # noqa: UP006  TorchScript's own
        for group in self.groups:
            parts.append(group(features))  # noqa: PERF401  TorchScript's own
        for other in self.others:
            parts.append(other(features).values())
        values = torch.cat(parts, 1)
        if not self._in_order:
            found = KeyedTensor(keys=self._found, length_per_key=self._found_dims, values=values)
            values = KeyedTensor.regroup([found], [self._names])[0]
        return KeyedTensor(keys=self._names, length_per_key=self._dims, values=values)
