"""Who trains which survivor, by its laws; that ranks really agree is shown with real ranks in test_algorithm."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream.pool import Pool
from clipcov_stream.ranks import Placement, Shares


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(num_ranks=st.integers(1, 5), share=st.integers(1, 6), spare=st.integers(0, 5), data=st.data())
def test_every_survivor_is_trained_once_and_travels_only_if_it_must(num_ranks, share, spare, data):
    pool_size = share + spare
    places = data.draw(st.permutations(range(num_ranks * pool_size)))[: num_ranks * share]
    shares = Shares.of(places, pool_size, num_ranks)
    assert [owner * pool_size + place for owner, place in zip(shares.owner, shares.place, strict=True)] == places
    assert Counter(shares.trainer) == dict.fromkeys(range(num_ranks), share)
    mine = [shares.of_rank(rank) for rank in range(num_ranks)]
    assert sorted(number for numbers in mine for number in numbers) == list(range(len(places)))
    owned = Counter(shares.owner)
    stay = sum(owner == trainer for owner, trainer in zip(shares.owner, shares.trainer, strict=True))
    assert stay == sum(min(owned[rank], share) for rank in range(num_ranks))
    for rank in range(num_ranks):
        # Of its own, a rank keeps those chosen first.
        own = [number for number, owner in enumerate(shares.owner) if owner == rank]
        assert [number for number in own if shares.trainer[number] == rank] == own[:share]


def test_on_one_rank_survivors_come_in_the_order_chosen():
    batch = {"image": torch.arange(6.0)[:, None], "label": list("abcdef"), "ok": torch.arange(6) > 2}
    taken = Shares.of([4, 0, 3], 6, 1).exchange(batch, torch.device("cpu"))
    assert taken["image"].tolist() == [[4.0], [0.0], [3.0]] and taken["label"] == ["e", "a", "d"]
    assert taken["ok"].tolist() == [True, False, True]
    assert Shares.of([4, 0, 3], 6, 1).in_order(torch.arange(3)).tolist() == [0, 1, 2]


def test_the_global_pool_is_in_the_order_of_ids():
    ids = torch.tensor([7, 3, 9, 3])
    placement = Placement.of(ids)
    assert placement.origin.tolist() == [1, 3, 0, 2]  # of equal ids the earlier first
    rows = torch.tensor([[1.0], [2.0], [3.0], [1 / 3]])
    pool = Pool(rows, -rows, torch.tensor(5.0), valid=torch.tensor([True, False, True, True]), ids=ids)
    whole = placement.whole_pool(pool)
    assert whole.ids.tolist() == [3, 3, 7, 9] and whole.valid.tolist() == [False, True, True, True]
    assert whole.image[:, 0].tolist() == [2.0, pytest.approx(1 / 3, rel=1e-2), 1.0, 3.0]
    assert whole.image.dtype == torch.float32 and float(whole.image[1]) != pytest.approx(1 / 3, rel=1e-6)  # bfloat16
    assert float(whole.logit_scale) == 5.0


def test_concepts_travel():
    concepts = torch.tensor([[1, 2], [3, -1]])
    pool = Pool(torch.eye(2), torch.eye(2), concepts=concepts, ids=torch.tensor([5, 4]))
    assert Placement.of(torch.tensor([5, 4])).whole_pool(pool).concepts.tolist() == [[3, -1], [1, 2]]
