"""What a user asks of a table: TorchRec's constraints, and how the table is kept."""

from __future__ import annotations

import dataclasses

from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from torchrec_cafe.config import TableKind
from torchrec_cafe.distributed._torchrec import TorchRecConstraints
from torchrec_cafe.distributed.types import physical_kernel, sharding_types


@dataclasses.dataclass
class ParameterConstraints(TorchRecConstraints):
    """TorchRec's constraints of a table, and how the table is kept.

    Attributes:
        table: a :class:`torchrec_cafe.Cafe` or another kind; ``None`` leaves the table to
            TorchRec, as ever, or to the planner's :class:`torchrec_cafe.Auto`.
    """

    table: TableKind | None = None

    def __hash__(self) -> int:
        """TorchRec hashes constraints to recognise a plan's inputs."""
        return hash((super().__hash__(), self.table))

    def sharding_type(self) -> str:
        """How the table is sharded: the first way that its kind can be and that is allowed."""
        assert self.table is not None
        possible = sharding_types(self.table)
        allowed = self.sharding_types or possible
        return next(sharding_type for sharding_type in possible if sharding_type in allowed)

    def check(self, name: str) -> None:
        """Refuse what a table of its kind cannot do.

        Args:
            name: of the table.

        Raises:
            ValueError: naming the table, what it can do and what was asked.
        """
        assert self.table is not None
        types, possible = self.sharding_types, sharding_types(self.table)
        if types is not None and not set(types) & set(possible):
            raise ValueError(
                f"table {name!r}: a {type(self.table).__name__} table can be sharded "
                f"{' or '.join(possible)}, got sharding_types={types}; "
                "leave sharding_types out or leave the table uncompressed"
            )
        kernels = self.compute_kernels
        allowed = {
            physical_kernel(self.sharding_type()),
            EmbeddingComputeKernel.CUSTOMIZED_KERNEL.value,
        }
        if kernels is not None and not set(kernels) & allowed:
            raise ValueError(
                f"table {name!r}: the compute kernel of a compressed table is its own, got "
                f"compute_kernels={kernels}; leave compute_kernels out"
            )

    def physical(self) -> ParameterConstraints:
        """What TorchRec is told: a fused table that is sharded so."""
        return dataclasses.replace(
            self,
            sharding_types=[self.sharding_type()],
            compute_kernels=[physical_kernel(self.sharding_type())],
        )
