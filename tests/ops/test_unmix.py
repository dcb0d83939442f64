"""Mixed ids back to ids."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrec_cafe.ops import mix_ids, unmix_ids


@given(
    st.one_of(st.integers(1, 40), st.integers(1, 2**47 - 1)).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=20))
    )
)
def test_unmixing_undoes_mixing(case: tuple[int, list[int]]):
    num_embeddings, values = case
    ids = torch.tensor(values, dtype=torch.int64)
    out_of_range = torch.zeros(1, dtype=torch.int64)
    starts = torch.tensor([0, len(ids)])
    mixed = mix_ids(ids, starts, torch.tensor([num_embeddings]), out_of_range)
    before = mixed.clone()
    assert torch.equal(unmix_ids(mixed, num_embeddings), ids)
    assert torch.equal(mixed, before)
