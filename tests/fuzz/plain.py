"""What the tables of a model say a batch looks up, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchrec.modules.embedding_configs import PoolingType

from tests.fuzz.batches import FEATURES, KEYS, SIZES, Batch
from tests.fuzz.bed import DIM, OWN, Bed
from torchrec_cafe.ops import reference
from torchrec_cafe.tables import MemRecRows, MemRecSamples, QuotientRemainderRows, SharedRows


class Plain:
    """The tables of a bed on one rank, as plain vectors of ids: what lookups have to give.

    Args:
        bed: in the state that is meant.
    """

    def __init__(self, bed: Bed) -> None:
        bed.tensors()  # up to date
        self._pooling = bed.setup.pooling
        self._vectors: dict[str, Tensor] = {}
        self._bits: dict[str, dict[str, list[set[int]]]] = {}
        self.rows: dict[str, list[set[int]]] = {}
        self.samples: Callable[[Batch], Tensor] | None = None
        for kernel in bed.ours:
            for number, table in enumerate(kernel._config.embedding_tables):
                if table.num_features() == 0:
                    continue  # a pool
                if not hasattr(kernel.bags, "rows"):
                    weights = kernel.split_embedding_weights()[number]
                    self._vectors[table.name] = weights.detach().float().clone()
                    continue
                before = kernel._config.embedding_tables[:number]
                first = sum(other.num_features() for other in before)
                columns = kernel.bags.rows._tables[first : first + 1]
                self._vectors[table.name] = self._of(kernel, columns, table.name)
        own = bed.module.embedding_bags[OWN].weight
        self._vectors[OWN] = torch.as_tensor(own.detach()).float().clone()

    def _of(self, kernel: Any, columns: Tensor, name: str) -> Tensor:
        """The vector of each id of a table."""
        lookup, size = kernel.bags.rows, SIZES[name]
        starts = torch.arange(size + 1)
        ends, none = torch.tensor([0, size]), torch.zeros(1, dtype=torch.int64)
        ids = reference.mix_ids(torch.arange(size), ends, ends[1:].clone(), none)
        physical = kernel.emb_module.physical_tensors()[0].float()
        factors = torch.ones(size)
        if isinstance(lookup, SharedRows):
            hot = lookup._no_hot_rows if lookup.pool is None else lookup.pool.hot_rows()
            found = batch = reference.remap(ids, starts, columns, hot)
            if hot.rows.second_rows_per_shard > 0:
                found = reference.add_second_rows(batch, hot.rows)
            if lookup.factors is not None:
                weights, num_hashes = lookup.factors.weights.table, lookup.factors._num_hashes
                factors = reference.key_factors(
                    weights, batch.keys, batch.shards, num_hashes=num_hashes
                )
        elif isinstance(lookup, QuotientRemainderRows):
            found = reference.quotient_remainder(ids, starts, columns)
        else:
            assert isinstance(lookup, MemRecRows | MemRecSamples)
            layout = lookup._layout
            found = reference.bloom_rows(ids, starts, columns, layout.token_bits)
            if isinstance(lookup, MemRecSamples):
                self._note_bits(lookup, physical, (ids, starts, columns), name)
            else:
                weights = lookup.weights.table, ids, starts, columns
                factors = reference.bloom_weigh(*weights, layout.weight_bits)
        self.rows[name] = [set() for _ in range(size)]
        for row, source in zip(found.rows.tolist(), found.source.tolist(), strict=True):
            self.rows[name][source].add(row)
        sums = torch.zeros(size, DIM).index_add_(0, found.source.long(), physical[found.rows])
        return sums * factors[:, None]

    def _note_bits(
        self, lookup: MemRecSamples, rows: Tensor, batch: tuple[Tensor, Tensor, Tensor], name: str
    ) -> None:
        """Note the bits of each id: a sample's vector is of all of them, each once."""
        layout = lookup._layout
        unions = {
            "rows": reference.bloom_union(*batch, layout.token_bits, of="rows"),
            "weights": reference.bloom_union(*batch, layout.weight_bits, of="weights"),
        }
        self._bits[name] = {
            of: [set(bits.tolist()) for bits in found.bits.split(found.offsets.diff().tolist())]
            for of, found in unions.items()
        }
        token_rows, weights = rows.clone(), lookup.weights.table.detach().flatten().clone()

        def samples(batch: Batch) -> Tensor:
            vectors = torch.zeros(batch.num_samples, DIM)
            for number in range(batch.num_samples):
                hit: dict[str, set[int]] = {"rows": set(), "weights": set()}
                for key in KEYS:
                    for id_ in batch.bag(key, number) if FEATURES[key] in self._bits else ():
                        for of in hit:
                            hit[of] |= self._bits[FEATURES[key]][of][id_]
                factor = weights[sorted(hit["weights"])].sum()
                vectors[number] = factor * token_rows[sorted(hit["rows"])].sum(0)
            return vectors

        self.samples = samples

    def pooled(self, batch: Batch) -> Tensor:
        """What a batch of ids in their tables looks up, ``[B, F * D]``."""
        columns = []
        weights = iter(batch.weights or ())
        for key in KEYS:
            vectors = self._vectors[FEATURES[key]]
            column = torch.zeros(batch.num_samples, DIM)
            for sample in range(batch.num_samples):
                ids = batch.bag(key, sample)
                scales = [1.0 if batch.weights is None else next(weights) for _ in ids]
                column[sample] = (vectors[ids] * torch.tensor(scales).view(-1, 1)).sum(0)
                if self._pooling is PoolingType.MEAN:
                    column[sample] /= max(1, len(ids))
            of_samples = self.samples is not None and FEATURES[key] != OWN
            columns.append(self.samples(batch) if self.samples and of_samples else column)
        return torch.cat(columns, 1)
