"""Herding: picks, their objective and their bound, against brute force on explicit atoms."""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import close

from clipcov_stream import herding as herding_module
from clipcov_stream import sketch
from clipcov_stream.herding import Herding


def drawn_atoms(seed, num=14, dim=3):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(num, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    worth = torch.randn(num, generator=generator, dtype=torch.float64)
    aim = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return image, text, worth, aim, torch.rand(num, generator=generator) < 0.8


@pytest.mark.parametrize("coverage", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_brute_force_on_explicit_atoms(seed, coverage):
    image, text, worth, aim, valid = drawn_atoms(seed)
    expected = oracle.greedy(oracle.atoms(image, text), worth.numpy(), aim, coverage, valid.numpy(), 6)
    assert Herding(image, text, worth, aim, coverage, valid, 6).picks().index.tolist() == expected


def test_greedy_avoids_both_copies_and_breaks_ties_by_order():
    image = F.normalize(torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), dim=1).repeat(2, 1)
    worth, valid, aim = torch.zeros(12), torch.ones(12, dtype=torch.bool), torch.zeros(32, 32)
    assert Herding(image, image, worth, aim, 0.0, valid, 4).picks().index.tolist() == [0, 1, 2, 3]
    chosen = Herding(image, image, worth, aim, 100.0, valid, 6).picks().index
    assert sorted((chosen % 6).tolist()) == list(range(6))


@pytest.mark.parametrize("device_waits", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_chunks_that_see_the_whole_pool_are_exact(chunk, device_waits, monkeypatch):
    """On the CPU's own loop and on the one that a GPU runs."""
    monkeypatch.setattr(sketch, "FREE_SYNC", frozenset() if device_waits else frozenset({"cpu"}))
    monkeypatch.setattr(herding_module, "NEAR", 12)
    for seed in range(4):
        image, text, worth, aim, valid = drawn_atoms(seed, num=30)
        expected = oracle.greedy(oracle.atoms(image, text), worth.numpy(), aim, 0.7, valid.numpy(), 12)
        picks = Herding(image, text, worth, aim, 0.7, valid, 12).picks(chunk)
        assert picks.index.tolist() == expected
        assert float(picks.slack) == 0.0


def long_herding(seed, num=900, dim=12, num_survivors=200):
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(num, dim, generator=generator), dim=1)
    text = F.normalize(image + 0.5 * torch.randn(num, dim, generator=generator), dim=1)
    worth, valid = torch.rand(num, generator=generator), torch.rand(num, generator=generator) < 0.9
    return Herding(image, text, worth, image.T @ text / num, 1.0, valid, num_survivors)


@pytest.mark.parametrize("seed", range(4))
def test_chunks_reach_what_exact_picks_reach(seed):
    """Beside a random choice, which is what there is to gain."""
    herding = long_herding(seed)
    exact, chunked = herding.picks(chunk=1), herding.picks()
    at_random = torch.randperm(900, generator=torch.Generator().manual_seed(seed))
    at_random = at_random[herding.valid[at_random]][:200]
    lowest, highest, reached = (float(herding.objective(i)) for i in (at_random, exact.index, chunked.index))
    assert lowest < highest and (reached - lowest) / (highest - lowest) > 0.99
    assert len(set(chunked.index.tolist())) == 200 and bool(herding.valid[chunked.index].all())


def test_the_objective_is_a_distance_and_worths():
    herding = long_herding(0, num=20, dim=3, num_survivors=6)
    chosen = torch.tensor([3, 1, 17, 9, 4, 5])
    atoms = oracle.atoms(herding.image, herding.text)
    aim = oracle.as64(herding.aim).reshape(-1)
    total = atoms.reshape(20, -1)[chosen.numpy()].sum(0)
    distance = ((total - 6 * aim) ** 2).sum() - 36 * (aim**2).sum()
    norms = (atoms.reshape(20, -1)[chosen.numpy()] ** 2).sum()
    close(herding.objective(chosen), float(herding.worth[chosen].sum()) - (distance - norms) / 2)


def test_slack_is_what_a_pick_falls_short_of_the_mean():
    """Seen from the start alone, the second copy of the best is as good as the best; by then it is the worst left."""
    x = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    worth, aim = torch.tensor([0.2, 0.1, 0.0, 0.0]), torch.zeros(3, 3)
    herding = Herding(x, x, worth, aim, 5.0, torch.ones(4, dtype=torch.bool), 2)
    assert herding.picks(chunk=1).index.tolist() == [0, 2]
    slack = herding.slack(torch.tensor([0, 1]), torch.tensor([0.2, -4.9]))
    # Before the second pick: -4.9 for the copy, 0 for the two others.
    assert float(slack) == pytest.approx((0 + 0 - 4.9) / 3 + 4.9, rel=1e-3)
    assert float(herding.bound(slack)) > float(herding.bound())


def error_of(all_atoms, chosen, aim):
    return float(np.linalg.norm(all_atoms[list(map(int, chosen))].mean(0) - np.asarray(aim)))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    seed=st.integers(0, 10**6),
    num=st.integers(2, 12),
    dim=st.integers(1, 4),
    coverage=st.sampled_from([0.1, 1.0, 10.0]),
    worths=st.sampled_from([0.0, 0.2, 3.0]),
    aims=st.sampled_from([0.0, 1.0, 4.0]),
    data=st.data(),
)
def test_herding_stays_within_its_bound(seed, num, dim, coverage, worths, aims, data):
    image, text, worth, aim, valid = drawn_atoms(seed, num, dim)
    valid[:2] = True
    num_survivors = data.draw(st.integers(1, int(valid.sum())))
    worth, all_atoms = worths * worth, oracle.atoms(image, text)
    # Aims 0 is the mean atom itself, where the bound has no first term.
    aim = torch.from_numpy(all_atoms[valid.numpy()].mean(0)) + aims * aim
    herding = Herding(image, text, worth, aim, coverage, valid, num_survivors)
    for chunk in (1, data.draw(st.integers(1, 12))):
        picks = herding.picks(chunk)
        bound = float(herding.bound(picks.slack)) * (1 + 1e-6) + 1e-9
        assert error_of(all_atoms, picks.index, aim) <= bound
        mean = torch.from_numpy(all_atoms[valid.numpy()].mean(0))
        known = replace(herding, known_mean=mean)
        assert torch.equal(known.picks(chunk).index, picks.index)
        assert float(known.bound(picks.slack)) * (1 + 1e-6) + 1e-9 == pytest.approx(bound, rel=1e-5, abs=1e-6)


def test_the_bound_in_numbers():
    """Two atoms, +1 and -1, around their mean 0: one pick is 1 away, and the bound says 1; both are 0 away."""
    image, text = torch.tensor([[1.0], [-1.0]]), torch.ones(2, 1)
    zeros, every = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    assert float(Herding(image, text, zeros, torch.zeros(1, 1), 1.0, every, 1).bound()) == pytest.approx(1.0)
    assert float(Herding(image, text, zeros, torch.zeros(1, 1), 1.0, every, 2).bound()) == pytest.approx(0.0, abs=1e-6)
    worth = torch.tensor([0.0, 1.5])
    assert float(Herding(image, text, worth, torch.zeros(1, 1), 1.0, every, 1).bound()) == pytest.approx(2.0)
    assert math.isinf(float(Herding(image, text, zeros, torch.zeros(1, 1), 0.0, every, 1).bound()))


@pytest.mark.parametrize("num, num_survivors", [(250, 40), (350, 100), (500, 300)])
def test_picks_of_a_small_pool_are_exact_and_from_one_table(num, num_survivors, monkeypatch):
    tables = []
    original = herding_module.pick_among
    monkeypatch.setattr(
        herding_module, "pick_among", lambda gain, *rest: tables.append(len(gain)) or original(gain, *rest)
    )
    herding = long_herding(1, num=num, num_survivors=num_survivors)
    herding = replace(herding, valid=torch.ones(num, dtype=torch.bool))
    picks = herding.picks()
    assert tables == [num] and float(picks.slack) == 0.0
    exact = herding.picks(chunk=1)
    assert picks.index.tolist() == exact.index.tolist()
    close(picks.gain, exact.gain, 1e-3)
    tables.clear()
    long_herding(1, num=900).picks()
    assert max(tables) == herding_module.NEAR * herding_module.CHUNK
