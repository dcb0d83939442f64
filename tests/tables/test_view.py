"""Vectors of ids of tables that are in one place."""

import pytest
import torch

import torchrec_cafe as tc
from torchrec_cafe.ops import PoolRows, reference
from torchrec_cafe.tables import TableLayout
from torchrec_cafe.tables.view import GroupLayout, GroupView, TableView

NUM_IDS, DIVISOR = 50, 9


def _table(name: str, **sizes: int) -> TableLayout:
    return TableLayout(name=name, num_ids=NUM_IDS, first_row=0, num_features=1, **sizes)


def _view(dtype: torch.dtype) -> GroupView:
    """A table before, whose rows are not looked up, and one with remainder and quotient rows."""
    quotients = -(-NUM_IDS // DIVISOR)
    tables = (
        _table("t_other", shared_rows=NUM_IDS, num_rows=NUM_IDS, index=-1),
        _table("t_qr", shared_rows=DIVISOR, num_rows=DIVISOR + quotients, index=-1),
    )
    rows = NUM_IDS + DIVISOR + quotients
    layout = GroupLayout(
        kind=tc.QuotientRemainder(compression=2),
        tables=tables,
        pool=PoolRows(offset=rows, hot_rows_per_shard=0),
        mem_rec=None,
        num_rows=rows,
    )
    return GroupView(layout=layout, rows=torch.randn(rows, 8).to(dtype), state={})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_vectors_are_sums_of_rows(dtype: torch.dtype):
    torch.manual_seed(0)
    view = _view(dtype)
    table = TableView(view, "t_qr")
    assert (table.size, table.dtype) == (torch.Size([NUM_IDS, 8]), dtype)
    ids = torch.tensor([3, 49, 0, 3, 70])  # the last is out of range: taken as 0
    mixed = [reference.mix_id(id_, NUM_IDS) for id_ in (3, 49, 0, 3, 0)]
    first = torch.tensor([NUM_IDS + m % DIVISOR for m in mixed])
    second = torch.tensor([NUM_IDS + DIVISOR + m // DIVISOR for m in mixed])
    expected = (view.rows[first].float() + view.rows[second].float()).to(dtype)
    assert torch.equal(table.vectors(ids), expected)
    assert table.vectors(ids[:0]).shape == (0, 8)


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match="tables must be among .'t_other', 't_qr'., got .'t_x'."):
        _view(torch.float32).vectors("t_x", torch.tensor([0]))
