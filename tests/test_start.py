"""A soft start: how many places selection has, who gets the others, and that both forms of it agree."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream import ClipCov, Pool, Selector, Settings, sketch
from clipcov_stream.evidence import Matching, matching
from clipcov_stream.objective import SelectionState
from clipcov_stream.pool import prepared
from clipcov_stream.rivals import SelectorFn
from clipcov_stream.selection import learn, select
from clipcov_stream.start import LIKELY, num_places, with_random


def draw(n, dim, noise, seed=0, matched=0.6):
    """Pairs of which a share match, told apart the worse the more noise there is."""
    generator = torch.Generator().manual_seed(seed)
    image, other, rest = (torch.randn(n, dim, generator=generator) for _ in range(3))
    text = torch.where(torch.rand(n, 1, generator=generator) < matched, image, other)
    return prepared(Pool(image, text + noise * rest, 20.0))


def places_of(pool, num, soft_start=0.5):
    return num_places(matching(pool, 256), torch.ones(len(pool), dtype=torch.bool), num, soft_start)


def test_places_follow_from_the_definition():
    """By the mixture of p-values that `Matching.posterior` says, reckoned here by hand."""
    p_value = torch.tensor([0.002, 0.01, 0.05, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.95])
    match = Matching(-p_value, p_value, torch.tensor(0.4), torch.tensor(1.0))
    valid = torch.ones(10, dtype=torch.bool)
    own = (float(p_value.mean()) - 0.3) / 0.4  # of those that match, whose mean is a / (1 + a); 1/2 of the others
    power = own / (1 - own)
    density = 0.4 * power * p_value.numpy() ** (power - 1)
    told = int((density / (0.6 + density) > LIKELY).sum()) / (0.4 * 10)
    assert told == 0.5
    assert num_places(match, valid, 100, 0.9) == 56  # 100 * 0.5 / 0.9, and what is begun counts
    assert num_places(match, valid, 100, 0.5) == 100
    assert num_places(match, valid, 100, 1.0) == 50
    assert num_places(match, valid, 100, 0.0) == 100


def test_places_grow_with_what_the_embedder_tells_apart():
    mean = [np.mean([places_of(draw(400, 16, noise, seed), 80) for seed in range(8)]) for noise in (64.0, 3, 1.5, 0.3)]
    assert mean == sorted(mean)
    assert mean[0] < 16 and mean[-1] == 80


@pytest.mark.parametrize(("pool", "most"), [(80, 0.3), (640, 0.05)])
def test_an_embedder_that_knows_nothing_has_next_to_no_places(pool, most):
    """Also where chance has some pairs whose p-value is 0."""
    places = [places_of(draw(pool, 16, 0.3, seed, matched=0.0), pool // 5) for seed in range(60)]
    assert np.mean(places) < most * pool / 5 + 1
    assert sum(number == pool // 5 for number in places) <= 2


def test_places_depend_on_the_embedder_and_not_on_the_noise_of_the_captions():
    """A good embedder has all places, however few pairs match, and whether few or many survive."""
    for matched in (0.15, 0.4, 0.9):
        for num in (20, 200):
            assert [places_of(draw(400, 32, 0.2, seed, matched), num) for seed in range(4)] == [num] * 4


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_left_goes_to_others_evenly(data):
    pool = data.draw(st.integers(2, 40))
    num = data.draw(st.integers(1, pool))
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=pool, max_size=pool)))
    if int(valid.sum()) < num:
        valid = torch.ones(pool, dtype=torch.bool)
    places = data.draw(st.integers(1, num))
    index = torch.tensor(data.draw(st.permutations(valid.nonzero().squeeze(1).tolist())))[:num]
    gain = torch.arange(num, 0, -1.0)
    found, gains = with_random(index[:places], gain[:places], float(places), valid, num)
    assert len(set(found.tolist())) == num and bool(valid[found].all())
    assert found[:places].tolist() == index[:places].tolist()
    assert gains[:places].tolist() == gain[:places].tolist() and bool(gains[places:].isnan().all())
    rest = [i for i in range(pool) if valid[i] and i not in index[:places].tolist()]
    missing = num - places
    assert found[places:].tolist() == [rest[(2 * k + 1) * len(rest) // (2 * missing)] for k in range(missing)]
    # As on a GPU, where as many are picked as survive.
    tensors = with_random(index, gain, torch.tensor(float(places)), valid, num)
    assert tensors[0].tolist() == found.tolist()
    torch.testing.assert_close(tensors[1], gains, equal_nan=True)


def test_too_few_valid_candidates_are_no_error_of_its_own():
    """`Selector` and `ClipCov` say so; here indices only have to lie in the pool."""
    valid = torch.tensor([True, False, True, False])
    for places in (1.0, torch.tensor(1.0)):
        picks = torch.tensor([0, 2, 1, 3]) if isinstance(places, torch.Tensor) else torch.tensor([0])
        found, _ = with_random(picks, torch.zeros(len(picks)), places, valid, 4)
        assert found.shape == (4,) and int(found.min()) >= 0 and int(found.max()) < 4
    pool = draw(20, 4, 1.0)
    with pytest.raises(RuntimeError, match="only 3 of the pool's 20 samples can be used, 8 are needed"):
        Selector(settings=Settings(soft_start=0.5))(replace(pool, valid=torch.arange(20) < 3), 8)


def test_the_chosen_are_those_of_a_smaller_batch():
    """What has a place is what would survive if there were no more places."""
    seen = set()
    for seed, noise in enumerate((2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 6.0, 20.0)):
        pool = draw(300, 16, noise, seed)
        state = SelectionState.initial(16, Settings(soft_start=0.5))
        after, survivors, report, gain = select(state, pool, 60)
        places = round(60 * (1 - float(report["random_share"])))
        fewer = select(replace(state, settings=Settings()), pool, places)
        assert survivors[:places].tolist() == fewer.survivors.tolist()
        assert int(gain.isnan().sum()) == 60 - places
        assert float(report["aim_residual"]) == pytest.approx(float(fewer.report["aim_residual"]), rel=1e-4)
        assert float(report["aim_residual"]) <= float(report["aim_residual_bound"])
        assert int(after.kept.num_samples) == 60  # all that is trained on is remembered
        seen.add(places)
    assert len(seen) > 3 and min(seen) < 60


def test_a_gpu_gives_the_same_places_to_the_same(monkeypatch):
    """The operations of a GPU, which read nothing back, over a stream whose embedder learns."""
    monkeypatch.setattr("clipcov_stream.herding.NEAR", 100)  # exact picks, however few
    states = [SelectionState.initial(12, Settings(half_life=5000.0, soft_start=0.5)) for _ in range(2)]
    shares = []
    for step, noise in enumerate((30.0, 4.0, 3.0, 2.0, 1.0, 0.3)):
        pool = replace(draw(300, 12, noise, step), valid=torch.arange(300) % 11 != 5)
        found = []
        for place, free in enumerate((frozenset({"cpu"}), frozenset())):
            monkeypatch.setattr(sketch, "FREE_SYNC", free)
            chosen = select(states[place], pool, 48)
            states[place] = learn(chosen.state, Pool(*(rows[chosen.survivors] for rows in (pool.image, pool.text))))
            found.append(chosen)
        ours, theirs = found
        assert ours.survivors.tolist() == theirs.survivors.tolist()
        assert len(set(theirs.survivors.tolist())) == 48
        torch.testing.assert_close(ours.gain, theirs.gain, rtol=1e-3, atol=1e-3, equal_nan=True)
        for name in ("random_share", "matched_share", "aim_residual"):
            torch.testing.assert_close(ours.report[name], theirs.report[name], rtol=1e-3, atol=1e-3)
        assert float(theirs.report["aim_residual"]) <= float(theirs.report["aim_residual_bound"])
        shares.append(float(ours.report["random_share"]))
    assert shares[0] > 0.5 and shares[-1] == 0.0


def test_who_opens_every_candidate_has_all_places():
    settings_ = Settings(gate=math.inf, soft_start=0.5)
    found = select(SelectionState.initial(16, settings_), draw(90, 16, 50.0), 30)
    assert "random_share" not in found.report and not bool(found.gain.isnan().any())
    assert ClipCov(gate=math.inf).warmup.to_timestring() == ClipCov(soft_start=0.0).warmup.to_timestring() == "100ba"


def own(pool: Pool, num_survivors: int, state: SelectionState) -> torch.Tensor:
    return torch.arange(num_survivors)


@pytest.mark.parametrize(
    ("embed", "selector", "warmup", "soft_start"),
    [
        ("teacher", "clipcov", "0ba", 0.5),
        ("columns", "clipcov", "0ba", 0.0),
        ("teacher", "vas", "100ba", 0.5),
        ("teacher", own, "100ba", 0.5),
        ("columns", "vas", "0ba", 0.0),
        ("teacher", "random", "0ba", 0.5),
    ],
)
def test_an_embedder_in_training_is_not_trusted_at_once(
    embed: str, selector: str | SelectorFn, warmup: str, soft_start: float
) -> None:
    clipcov = ClipCov(embed=embed, selector=selector)
    assert (clipcov.warmup.to_timestring(), clipcov.settings.soft_start) == (warmup, soft_start)
    given_ = ClipCov(embed=embed, selector=selector, warmup="3ba", soft_start=0.25)
    assert (given_.warmup.to_timestring(), given_.settings.soft_start) == ("3ba", 0.25)
