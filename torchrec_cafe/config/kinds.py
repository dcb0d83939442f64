"""The kinds of tables, by name. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torchrec_cafe.config.budget import TableKind
from torchrec_cafe.config.cafe import Cafe
from torchrec_cafe.config.hashing import Hash, QuotientRemainder
from torchrec_cafe.config.lookahead import Lookahead
from torchrec_cafe.config.mem_rec import MemRec

#: Every kind, by the name of its class.
KINDS: Mapping[str, type[TableKind]] = MappingProxyType(
    {kind.__name__: kind for kind in (Cafe, MemRec, Lookahead, Hash, QuotientRemainder)}
)
