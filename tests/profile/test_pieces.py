"""However a trace is read, its pieces are the same batches in the same order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_cafe.profile import pieces
from torchrec_cafe.profile.pieces import Bags, Samples, cut_into_pieces, joined


def trace(lengths, days):
    ids = np.arange(sum(lengths))
    bags = {"bags": Bags(ids, np.array(lengths, dtype=np.int64))}
    bags["single"] = Bags(np.arange(len(lengths)))
    return Samples(bags, len(lengths), np.sort(np.array(days, dtype=np.int64)))


@settings(deadline=None)
@given(st.data())
def test_pieces_are_whole_batches_of_one_day(data):
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=60))
    size = len(lengths)
    days = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    batch_size = data.draw(st.integers(1, 9))
    whole = trace(lengths, days)
    parts, rest = [], whole
    while rest.size:
        part, rest = rest.split(data.draw(st.integers(1, rest.size)))
        parts.append(part)
    found = list(cut_into_pieces(parts, batch_size))
    again = joined([piece.samples for piece in found])
    for name, (ids, of_samples) in whole.bags.items():
        np.testing.assert_array_equal(again.bags[name].ids, ids)
        if of_samples is not None:
            np.testing.assert_array_equal(again.bags[name].lengths, of_samples)
    assert whole.days is not None
    for piece in found:
        assert piece.begin % batch_size == 0
        starts = whole.days[piece.begin : piece.begin + piece.samples.size : batch_size]
        assert set(starts.tolist()) == {piece.day}
    assert all(piece.samples.size % batch_size == 0 for piece in found[:-1])


def test_pieces_have_at_most_so_many_lookups_and_batches(monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE_LOOKUPS", 40)
    many = trace([10] * 100, [0] * 100)
    assert {len(p.samples.bags["bags"].ids) for p in cut_into_pieces([many], 2)} == {40}
    one = trace([1] * 100, [0] * 100)
    monkeypatch.setattr(pieces, "_PIECE_BATCHES", 5)
    assert {p.samples.size for p in cut_into_pieces([one], 2)} == {10}
    assert {p.samples.size for p in cut_into_pieces([many], 50)} == {50}  # a batch is not cut


def test_the_rest_of_a_trace_is_one_piece():
    whole = trace([1] * 1001, [0] * 1001)
    assert [piece.samples.size for piece in cut_into_pieces(whole.split(7), 2)] == [1001]


def test_bags_and_single_ids_can_be_joined():
    part = Samples({"t": Bags(np.array([4, 5]))}, 2)
    bags = Samples({"t": Bags(np.array([6, 7, 8]), np.array([2, 1]))}, 2)
    ids, lengths = joined([part, bags]).bags["t"]
    assert ids.tolist() == [4, 5, 6, 7, 8]
    assert lengths is not None
    assert lengths.tolist() == [1, 1, 2, 1]


def test_batches_of_ids_follow_the_lengths():
    samples = trace([2, 0, 1, 3, 1], [0] * 5)
    assert samples.batch_of_ids("bags", 2).tolist() == [0, 0, 1, 1, 1, 1, 2]
    assert samples.batch_of_ids("single", 2).tolist() == [0, 0, 1, 1, 2]
