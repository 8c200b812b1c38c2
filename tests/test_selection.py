"""Selection: the objective's pieces against the oracle, then what every selector must obey."""

import contextlib
import math
from dataclasses import replace
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from clipcov_stream import herding as herding_module
from clipcov_stream import sketch
from clipcov_stream.evidence import matching
from clipcov_stream.graphed import of_state, with_values
from clipcov_stream.herding import Herding, along, top
from clipcov_stream.objective import (
    LAG_DECAY,
    RECENT,
    SKETCHES,
    Frame,
    SelectionState,
    Settings,
    certificate,
    gated,
    margin,
    mix,
    random_survivors,
    standardize,
)
from clipcov_stream.pool import Pool, prepared
from clipcov_stream.rivals import NEEDS_LEARNER
from clipcov_stream.selection import SELECTORS, check_survivors, learn, reads_lag, resolve, select
from clipcov_stream.selector import Selector
from clipcov_stream.sketch import CrossCovSketch

NAMES = sorted(SELECTORS)
ALONE = [name for name in NAMES if SELECTORS[name] not in NEEDS_LEARNER]


def draw(n, dim, seed=0, learner=True):
    """A pool whose captions match their images in part, away from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, dim, generator=generator) for _ in range(4)]
    image, text = rows[0] + 0.5, rows[0] + rows[1]
    named = {"ids": torch.randint(40, (n,), generator=generator), "concepts": concepts_of(n, generator)}
    if not learner:
        return Pool(image=image, text=text, logit_scale=10.0, **named)
    return Pool(image, text, 10.0, rows[2] + image, rows[3] + text, 5.0, **named)


def concepts_of(n, generator):
    """Up to three of eight concepts each."""
    concepts = torch.rand(n, 8, generator=generator).argsort(1)[:, :3]
    return concepts.masked_fill(torch.rand(n, 3, generator=generator) < 0.3, -1)


def rows_of(pool, index):
    def pick(rows):
        return None if rows is None else rows[index]

    fields = ("image", "text", "learner_image", "learner_text", "valid", "ids", "concepts")
    return replace(pool, **{name: pick(getattr(pool, name)) for name in fields})


def after(pools, num_survivors=3, selector="clipcov", **knobs):
    state = SelectionState.initial(pools[0].image.shape[1], Settings(**knobs))
    for pool in pools:
        state, *_ = select(state, pool, num_survivors, SELECTORS[selector])
    return state


def flat(state):
    """Every tensor of a state dict by its path."""
    items = {}
    for name, value in state.items():
        nested = flat(value) if isinstance(value, dict) else {"": value}
        items |= {f"{name}.{path}": torch.as_tensor(tensor) for path, tensor in nested.items()}
    return items


def assert_same_state(left, right):
    left, right = flat(left.state_dict()), flat(right.state_dict())
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def assert_finite_state(state):
    bad = {name: value for name, value in flat(state.state_dict()).items() if not torch.isfinite(value.double()).all()}
    assert set(bad) <= {f"{name}.half_life." for name in SKETCHES}, bad


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(got), want, rtol=tolerance, atol=tolerance)


# The objective's pieces


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


def test_a_pool_whose_covariance_rows_are_all_invalid_has_distinct_survivors():
    """Covariances come from every seventh row here; without one there is nothing to whiten by, yet."""
    pool = replace(draw(1000, 32), valid=torch.arange(1000) % 7 != 0)
    state, survivors, report, _ = select(SelectionState.initial(32, Settings()), pool, 200)
    assert len(set(survivors.tolist())) == 200 and bool(pool.valid[survivors].all())
    assert all(bool(value.isfinite()) for value in report.values())
    assert not state.stream.image_cov.any()


def test_margin_is_minus_the_contrastive_loss_of_the_valid_samples():
    pool = prepared(draw(9, 4))
    close(margin(pool), oracle.margin(pool.image, pool.text, 10.0))
    valid = torch.arange(9) % 4 != 1
    partial = margin(prepared(replace(draw(9, 4), valid=valid)))
    close(partial[valid], oracle.margin(pool.image[valid], pool.text[valid], 10.0))
    assert not partial[~valid].any()


def test_margin_of_a_sharp_scale_does_not_overflow():
    assert torch.isfinite(margin(prepared(replace(draw(9, 4), logit_scale=1e4)))).all()


def test_standardize():
    score, valid = torch.tensor([1.0, 2.0, 6.0, 1e9, 3.0]), torch.tensor([True, True, True, False, True])
    values = score[valid].numpy()
    got = standardize(score, valid)
    close(got[valid], (values - values.mean()) / values.std())
    assert float(got[3]) == 0
    assert not standardize(torch.full((4,), 7.0), torch.ones(4, dtype=torch.bool)).any()
    assert not standardize(torch.full((4,), 7.0), torch.zeros(4, dtype=torch.bool)).any()


def test_gate_drops_the_lowest_scores_but_leaves_enough():
    score, every = torch.tensor([5.0, 1.0, 4.0, 0.0, 3.0, 2.0]), torch.ones(6, dtype=torch.bool)
    assert gated(score, every, 0.0, 1).all()
    assert gated(score, every, 0.5, 1).tolist() == [True, False, True, False, True, False]
    assert gated(score, every, 0.9, 5).tolist() == [True, True, True, False, True, True]
    valid = every.clone()
    valid[0] = False
    assert gated(score, valid, 0.5, 1).tolist() == [False, False, True, False, True, True]


def test_top_is_stable():
    assert top(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 4, 3]


def test_whitened_inner_products_equal_those_of_symmetric_roots():
    pools = [draw(20, 4, seed) for seed in range(3)]
    state, pool = learn(after(pools, ridge=0.2), trained_on(9)), prepared(pools[-1])
    frame = Frame.of(state.stream, 0.2)
    image, text = (np.asarray(part, np.float64) for part in frame.rows(pool.image, pool.text))
    rows = [(oracle.unit(p.image), oracle.unit(p.text)) for p in pools]
    stream = oracle.moments(np.concatenate([x for x, _ in rows]), np.concatenate([y for _, y in rows]))
    image_root, text_root = oracle.inverse_root(stream.image_cov, 0.2), oracle.inverse_root(stream.text_cov, 0.2)
    x, y = (rows[-1][0] - stream.image_mean) @ image_root, (rows[-1][1] - stream.text_mean) @ text_root
    everybody = np.concatenate([(image - stream.image_mean) @ image_root for image, _ in rows])
    everything = np.concatenate([(text - stream.text_mean) @ text_root for _, text in rows])
    x_size, y_size = (np.sqrt((part**2).sum(1).mean()) for part in (everybody, everything))
    close(image @ image.T, x @ x.T / x_size**2)
    close(text @ text.T, y @ y.T / y_size**2)
    kept = np.asarray(state.kept.cross_cov_about(state.stream.image_mean, state.stream.text_mean), np.float64)
    assert not np.allclose(kept, stream.cross_cov)
    mean_lag = np.asarray(state.lag / state.lag_weight, np.float64)
    assert mean_lag.any()
    opened = np.asarray(state.opened.cross_cov_about(state.stream.image_mean, state.stream.text_mean), np.float64)
    assert not np.allclose(opened, stream.cross_cov)
    for matrix in (opened, kept, mean_lag):
        got = np.asarray(frame.matrix(torch.from_numpy(matrix).float()), np.float64)
        want = np.einsum("na,ab,nb->n", x, image_root @ matrix @ text_root, y) / (x_size * y_size) ** 2
        close(np.einsum("na,ab,nb->n", image, got, text), want)


def test_the_target_is_what_the_gate_let_through():
    pools = [replace(draw(30, 4, seed), valid=torch.arange(30) % 7 != seed) for seed in range(2)]
    state = after(pools, gate=0.9, half_life=40.0)
    image, text, weights = [], [], []
    for age, pool in enumerate(map(prepared, pools)):
        open_ = matching(pool, 4096).opened(pool.valid, 0.9, 3)
        assert 3 < int(open_.sum()) < int(pool.valid.sum())
        # The second pool's valid samples age the first's.
        decay = 2 ** (-int(prepared(pools[1]).valid.sum()) / 40) if age == 0 else 1.0
        image.append(pool.image[open_])
        text.append(pool.text[open_])
        weights.append(np.full(int(open_.sum()), decay))
    expected = oracle.moments(torch.cat(image), torch.cat(text), np.concatenate(weights))
    close(state.opened.cross_cov, expected.cross_cov)
    close(state.opened.image_mean, expected.image_mean)
    assert int(state.opened.num_samples) == sum(map(len, image))


# Lag


def trained_on(seed, n=8, dim=4):
    """Survivors as the embedder and the learner, of another width, see them."""
    rows = draw(n, dim, seed)
    learner = draw(n, dim + 2, seed + 50)
    return replace(rows, learner_image=learner.image, learner_text=learner.text, learner_logit_scale=5.0)


def test_lag_sum_equals_the_oracle_and_decays():
    state = after([draw(20, 3, 5)], learnability=1.0)
    total, weight = np.zeros((3, 3)), 0.0
    for seed in range(2):
        survivors = replace(trained_on(seed, dim=3), valid=torch.arange(8) != seed)
        state = learn(state, survivors)
        ok = survivors.valid
        image = oracle.unit(survivors.image[ok]) - np.asarray(state.stream.image_mean, np.float64)
        text = oracle.unit(survivors.text[ok]) - np.asarray(state.stream.text_mean, np.float64)
        learner = oracle.unit(survivors.learner_image[ok]), oracle.unit(survivors.learner_text[ok])
        total = LAG_DECAY * total + oracle.lag_sum(image, text, *learner, 5.0)
        weight = LAG_DECAY * weight + 7
        close(state.lag, total)
        close(state.lag_weight, weight)


def test_the_embedder_stands_in_for_a_missing_learner():
    pool = prepared(draw(8, 3, learner=False))
    explicit = replace(pool, learner_image=pool.image, learner_text=pool.text, learner_logit_scale=10.0)
    state = SelectionState.initial(3, Settings())
    assert torch.equal(learn(state, pool).lag, learn(state, explicit).lag)


def test_a_learner_that_reproduces_everything_leaves_no_lag():
    eye = torch.eye(6)
    survivors = Pool(eye, eye, learner_image=eye, learner_text=eye, learner_logit_scale=1000.0)
    state = SelectionState.initial(6, Settings())
    close(learn(state, survivors).lag, np.zeros((6, 6)))
    blind = replace(survivors, learner_text=eye.roll(1, 0))
    assert float(learn(state, blind).lag.diagonal().min()) > 0.9


def test_selection_leaves_the_lag_alone_and_reads_it_in_later_pools():
    seen = []

    def spy(pool, num_survivors, state):
        frame = Frame.of(state.stream, Settings.ridge)
        seen.append((state.lag, along(*frame.rows(pool.image, pool.text), frame.matrix(state.lag))))
        return SELECTORS["clipcov"](pool, num_survivors, state)

    state = SelectionState.initial(4, Settings(learnability=1.0))
    for seed in range(3):
        before = state.lag
        state, *_ = select(state, draw(16, 4, seed), 4, spy)
        assert torch.equal(seen[-1][0], before) and torch.equal(state.lag, before)
        state = learn(state, trained_on(seed))
        assert not torch.equal(state.lag, before)
    assert not seen[0][1].any() and seen[1][1].any() and seen[2][1].any()


def test_what_the_learner_makes_of_survivors_changes_what_comes_next():
    state = after([draw(32, 4, 0)], learnability=10.0)
    survivors, later = trained_on(1), draw(32, 4, 2)
    other = replace(survivors, learner_image=-survivors.learner_image)
    first, second = (select(learn(state, seen), later, 8)[1] for seen in (survivors, other))
    assert not torch.equal(first, second)
    with_none, without = (
        select(learn(replace(state, settings=Settings(learnability=0.0)), seen), later, 8)[1]
        for seen in (survivors, other)
    )
    assert torch.equal(with_none, without)


def test_a_selector_is_told_what_the_learner_made_of_its_survivors():
    pools = [draw(24, 4, seed) for seed in range(2)]
    selector = Selector(settings=Settings(learnability=3.0))
    survivors = selector(pools[0], 6)
    seen = trained_on(7, n=6)
    before = selector.state
    with pytest.raises(ValueError, match="embedded 5 samples, there are 6 survivors"):
        selector.learned(seen.learner_image[:5], seen.learner_text[:5], 5.0)
    selector.learned(seen.learner_image, seen.learner_text, 5.0)
    rows = replace(rows_of(pools[0], survivors), learner_image=seen.learner_image, learner_text=seen.learner_text)
    assert torch.equal(selector.state.lag, learn(before, replace(rows, learner_logit_scale=5.0)).lag)
    told = selector.state
    selector.learned(seen.learner_image, seen.learner_text, 5.0)  # a second time, of the same survivors
    assert selector.state is told

    # Saved between the selection and the training pass, the survivors wait in the state.
    selector(pools[1], 6)
    resumed = Selector(settings=Settings(learnability=3.0))
    resumed.load_state_dict(selector.state_dict())
    for one in (selector, resumed):
        one.learned(seen.learner_image, seen.learner_text, 5.0)
    assert not torch.equal(selector.state.lag, told.lag) and torch.equal(resumed.state.lag, selector.state.lag)

    rival = Selector("clip_score")
    rival(pools[0], 6)
    rival.learned(seen.learner_image, seen.learner_text, 5.0)
    assert float(rival.state.lag_weight) == 0


# The certificate


@pytest.mark.parametrize("num_survivors", [1, 3, 6, 7])
def test_random_residual_is_the_exact_mean_over_all_subsets(num_survivors):
    state = after([draw(20, 3, seed) for seed in range(2)])
    pool = prepared(replace(draw(8, 3, 9), valid=torch.arange(8) != 5))
    survivors = torch.tensor([0, 7, 2, 1, 3, 4, 6])[:num_survivors]
    streamed = CrossCovSketch(3).update(pool.image, pool.text, pool.valid)
    kept = CrossCovSketch(3).update(pool.image[survivors], pool.text[survivors])
    report = certificate(pool, survivors, state, streamed, kept)
    stream = [np.asarray(part, np.float64) for part in (state.stream.image_mean, state.stream.text_mean)]
    target = np.asarray(state.stream.cross_cov, np.float64)
    image, text = oracle.as64(pool.image), oracle.as64(pool.text)
    # A one-element tensor would index NumPy as a number.
    ok, chosen = pool.valid.numpy(), survivors.numpy()
    close(
        report["residual_random"],
        oracle.random_residual(image[ok], text[ok], *stream, target, num_survivors),
    )
    close(report["residual"], oracle.residual(image[chosen], text[chosen], *stream, target))
    close(report["alignment_pool"], (image * text).sum(1)[ok].mean())
    close(report["alignment_survivors"], (image * text).sum(1)[chosen].mean())
    assert int(report["num_invalid"]) == 1


def test_residual_total_is_that_of_all_survivors_so_far():
    state = SelectionState.initial(3, Settings(half_life=math.inf))
    streamed, kept = [], []
    for seed in range(4):
        pool = draw(16, 3, seed)
        state, survivors, report, _ = select(state, pool, 4)
        rows = oracle.unit(pool.image), oracle.unit(pool.text)
        streamed.append(rows)
        kept.append([part[survivors.numpy()] for part in rows])
        image, text = (np.concatenate(parts) for parts in zip(*streamed, strict=True))
        stream = oracle.moments(image, text)
        chosen = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
        want = oracle.residual(*chosen, stream.image_mean, stream.text_mean, stream.cross_cov)
        close(report["residual_total"], want)
        assert int(state.stream.num_samples) == 16 * (seed + 1) and int(state.kept.num_samples) == 4 * (seed + 1)


def test_survivors_are_forgotten_on_the_streams_clock():
    state, kept = SelectionState.initial(3, Settings(half_life=20.0)), []
    for seed in range(4):
        pool = draw(16, 3, seed)
        state, survivors, *_ = select(state, pool, 4)
        kept.append([oracle.unit(rows)[survivors.numpy()] for rows in (pool.image, pool.text)])
    weights = oracle.half_life_weights([4] * 4, 20.0, clock=[16] * 4)
    expected = oracle.moments(*(np.concatenate(parts) for parts in zip(*kept, strict=True)), weights)
    close(state.kept.cross_cov, expected.cross_cov)
    close(state.kept.effective_size, expected.effective_size)


@pytest.mark.parametrize("half_life", [math.inf, 150.0])
def test_random_survivors_measure_what_the_certificate_expects(half_life):
    measured, expected = [], []
    for seed in range(40):
        state = SelectionState.initial(4, Settings(half_life=half_life, seed=seed))
        for step in range(6):
            state, _, report, _ = select(state, draw(48, 4, 100 * seed + step, learner=False), 12, SELECTORS["random"])
        measured.append(float(report["residual_total"]) ** 2)
        expected.append(float(report["residual_total_random"]) ** 2)
    # 40 runs of some 16 degrees of freedom each: the ratio scatters by a few percent.
    assert 0.8 < np.mean(measured) / np.mean(expected) < 1.25


# Laws of every selector


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(data=st.data(), name=st.sampled_from(NAMES), pool_size=st.integers(1, 24), dim=st.integers(1, 9))
def test_survivors_are_distinct_in_range_and_valid(data, name, pool_size, dim):
    num_survivors = data.draw(st.integers(1, pool_size))
    num_invalid = data.draw(st.integers(0, pool_size - num_survivors))
    learner = name not in ALONE or data.draw(st.booleans())
    pool = draw(pool_size, dim, data.draw(st.integers(0, 99)), learner=learner)
    pool.image[:num_invalid] = math.nan
    selector = Selector(name)
    for step in range(2):
        survivors = selector(pool, num_survivors)
        assert survivors.dtype == torch.int64 and survivors.shape == (num_survivors,)
        assert len(set(survivors.tolist())) == num_survivors
        assert num_invalid <= int(survivors.min()) and int(survivors.max()) < pool_size
        assert int(selector.report["num_invalid"]) == num_invalid
        assert all(value.ndim == 0 and torch.isfinite(value) for value in selector.report.values()), selector.report
        assert_finite_state(selector.state)
        assert int(selector.state.kept.num_samples) == num_survivors * (step + 1)


@pytest.mark.parametrize("name", ["clipcov", "clip_score", "neg_clip_loss", "vas", "c_rho", "rho", "jest_topk"])
@pytest.mark.parametrize("seed", range(5))
def test_permuting_the_pool_permutes_the_survivors(name, seed):
    pool = draw(40, 6, seed)
    pool.text[3] = math.inf
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    state = after([draw(40, 6, 50)], 10, name)
    straight = select(state, pool, 10, SELECTORS[name])[1]
    permuted = select(state, rows_of(pool, order), 10, SELECTORS[name])[1]
    assert torch.equal(order[permuted], straight)


@pytest.mark.parametrize("dim", [3, 8])
def test_duplicates_are_not_both_taken_while_an_equal_alternative_exists(dim):
    basis = torch.eye(dim).repeat(2, 1)
    state = SelectionState.initial(dim, Settings(coverage=100.0, gate=math.inf))
    for _ in range(3):
        state, survivors, *_ = select(state, Pool(basis, basis), dim)
        assert sorted((survivors % dim).tolist()) == list(range(dim))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("field", ["image", "text", "learner_image", "learner_text", "valid"])
def test_bad_samples_are_counted_and_otherwise_ignored(name, junk, field):
    bad = torch.arange(24) % 6 == 2
    pool = draw(24, 5)
    if field == "valid":
        pool = replace(pool, valid=~bad)
    else:
        getattr(pool, field)[bad, 1] = junk
    selector = Selector(name)
    survivors = selector(pool, 20)
    assert not bad[survivors].any()
    assert int(selector.report["num_invalid"]) == 4
    good = draw(24, 5)
    expected = oracle.moments(oracle.unit(good.image[~bad]), oracle.unit(good.text[~bad]))
    close(selector.state.stream.cross_cov, expected.cross_cov)
    assert int(selector.state.stream.num_samples) == 20
    assert_finite_state(selector.state)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_usable_samples_raise_and_leave_the_state_alone(name):
    selector = Selector(name)
    selector(draw(8, 3), 4)
    before = selector.state
    with pytest.raises(RuntimeError, match=r"only 3 of the pool's 8 samples can be used, 4 .*needed.* 5 are"):
        selector(replace(draw(8, 3, 1), valid=torch.arange(8) < 3), 4)
    assert selector.state is before


@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_pool_survives_if_as_many_are_asked_for(name):
    selector = Selector(name)
    assert sorted(selector(draw(9, 4), 9).tolist()) == list(range(9))
    assert float(selector.report["residual"]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [torch.ones(8, 3), torch.zeros(8, 3), torch.eye(3)[:1], torch.eye(3)[:2]])
def test_degenerate_pools_have_a_defined_result(name, rows):
    selector = Selector(name)
    for _ in range(3):
        pool = Pool(rows, rows, 100.0, rows, rows, concepts=torch.zeros(len(rows), 1, dtype=torch.int64))
        survivors = selector(pool, max(1, len(rows) // 2))
        assert len(set(survivors.tolist())) == max(1, len(rows) // 2)
        assert_finite_state(selector.state)
        assert all(torch.isfinite(value) for value in selector.report.values())


def test_clip_score_takes_the_best_aligned():
    pool = draw(20, 4)
    cosine = (oracle.unit(pool.image) * oracle.unit(pool.text)).sum(1)
    assert Selector("clip_score")(pool, 5).tolist() == np.argsort(-cosine)[:5].tolist()


# Randomness


def test_random_depends_on_seed_step_and_rank_and_on_nothing_else():
    pool = draw(30, 3)

    def run(seed=0, rank=0):
        selector = Selector("random", seed, rank=rank)
        return [selector(pool, 8).tolist() for _ in range(2)]

    first = run()
    torch.manual_seed(123)
    global_state = torch.get_rng_state()
    assert run() == first
    assert torch.equal(torch.get_rng_state(), global_state)
    draws = {tuple(step) for run_ in (first, run(seed=1), run(rank=1)) for step in run_}
    assert len(draws) == 6
    assert len({mix(*key) for key in np.ndindex(8, 8, 8)}) == 512


def test_random_is_uniform_over_the_valid():
    valid = torch.arange(10) < 8
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        counts[random_survivors(valid, 2, generator)] += 1
    assert not counts[8:].any()
    # Each of the eight is drawn 500 times in the mean, with a standard deviation of 19.
    assert ((counts[:8] - 500).abs() < 100).all()


# State


@pytest.mark.parametrize("name", NAMES)
def test_select_is_pure(name):
    state, pool = after([draw(20, 4, 1)], 5, name), draw(20, 4, 2)
    saved, image = {path: value.clone() for path, value in flat(state.state_dict()).items()}, pool.image.clone()
    first, second = (select(state, pool, 5, SELECTORS[name]) for _ in range(2))
    assert all(torch.equal(saved[path], value) for path, value in flat(state.state_dict()).items())
    assert torch.equal(pool.image, image) and pool.valid is None
    assert torch.equal(first[1], second[1])
    assert_same_state(first[0], second[0])
    assert first[0].step == state.step + 1


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_selector_goes_on_bit_for_bit(name, tmp_path):
    knobs = Settings(half_life=60.0, coverage=4.0)
    straight = Selector(name, seed=3, settings=knobs)
    same_pool = draw(24, 5, 7)
    for seed in range(2):
        straight(draw(24, 5, seed), 6)
    torch.save(straight.state_dict(), tmp_path / "selector.pt")
    saved = torch.load(tmp_path / "selector.pt", weights_only=True)
    resumed = Selector(name, seed=3, settings=knobs)
    resumed.load_state_dict(saved)
    assert flat(resumed.state_dict()).keys() == flat(straight.state_dict()).keys()
    steps = []
    for _ in range(2):
        survivors = straight(same_pool, 6)
        assert torch.equal(resumed(same_pool, 6), survivors)
        for one in (straight, resumed):
            one.learned(*(same_pool.learner_image[survivors], same_pool.learner_text[survivors]), 5.0)
        assert_same_state(resumed.state, straight.state)
        assert all(torch.equal(resumed.report[key], value) for key, value in straight.report.items())
        steps.append((survivors.tolist(), straight.state.stream.cross_cov))
    assert not torch.equal(steps[0][1], steps[1][1])
    if name not in ("clip_score", "neg_clip_loss", "c_rho", "rho", "jest_topk"):  # which choose by this pool alone
        assert steps[0][0] != steps[1][0]
    back = Selector(name, seed=3, settings=knobs)
    back(draw(24, 5, 99), 6)
    back.load_state_dict(saved)
    assert back(same_pool, 6).tolist() == steps[0][0]


def test_an_empty_state_starts_afresh():
    selector = Selector()
    assert selector.state_dict() == {}
    first = selector(draw(12, 3), 3)
    selector.load_state_dict({})
    assert torch.equal(selector(draw(12, 3), 3), first) and selector.state.step == 1


# Custom selectors and errors


def test_a_function_of_ones_own_is_a_selector():
    def last(pool, num_survivors, state):
        assert pool.valid is not None and int(state.stream.num_samples) == 9
        torch.testing.assert_close(pool.image.norm(dim=1), torch.ones(9))
        return torch.arange(len(pool) - num_survivors, len(pool))

    assert Selector(last)(draw(9, 3), 2).tolist() == [7, 8]
    assert resolve(last) is last and resolve("random") is SELECTORS["random"]


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        (torch.tensor([1, 1, 2]), "distinct indices from 0 to 7"),
        (torch.tensor([0, 1, 8]), "distinct indices from 0 to 7"),
        (torch.tensor([-1, 1, 2]), "distinct indices from 0 to 7"),
        (torch.tensor([0, 1]), r"returned \(2,\) of torch.int64; it must return \(3,\)"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "of torch.int32"),
        (torch.tensor([0.0, 1.0, 2.0]), "of torch.float32"),
    ],
)
def test_a_bad_selector_is_named(survivors, message):
    def careless(pool, num_survivors, state):
        return survivors

    with pytest.raises(RuntimeError, match=f"selector careless .*{message}"):
        Selector(careless)(draw(8, 3), 3)
    with pytest.raises(RuntimeError, match=message):
        check_survivors(survivors, torch.arange(8) != 7, 3, careless)


def test_a_selector_that_takes_invalid_samples_is_named():
    def first(pool, num_survivors, state):
        return torch.arange(num_survivors)

    pool = replace(draw(8, 3), valid=torch.arange(8) != 2)
    with pytest.raises(RuntimeError, match="selector first returned samples that are not valid"):
        Selector(first)(pool, 3)
    assert Selector(first)(pool, 2).tolist() == [0, 1]


def test_only_who_reads_the_lag_is_charged_for_it():
    def own(pool, num_survivors, state):
        return torch.arange(num_survivors)

    assert reads_lag(SELECTORS["clipcov"], Settings())
    assert not reads_lag(SELECTORS["clipcov"], Settings(learnability=0.0))
    for name in set(NAMES) - {"clipcov"}:
        assert not reads_lag(SELECTORS[name], Settings())
    assert not reads_lag(own, Settings())
    own.reads_lag = True
    assert reads_lag(own, Settings()) and reads_lag(partial(own), Settings())
    assert not reads_lag(own, Settings(learnability=0.0))


def best_open(state, pool, num_survivors, worth):
    """Survivors by an oracle: the most worth of those that the gate opens."""
    open_ = matching(prepared(pool), 4096).opened(prepared(pool).valid, state.settings.gate, num_survivors)
    return np.argsort(-np.where(open_, worth, -np.inf), kind="stable")[:num_survivors].tolist()


def deviations(values, among):
    return (values - values[among].mean()) / values[among].std()


@pytest.mark.parametrize("seed", range(3))
def test_each_weight_by_itself_ranks_by_what_it_says(seed):
    """Without coverage the picks are a plain top-k of one term, each found in float64 from its definition."""
    none = {"coverage": 0.0, "balance": 0.0, "novelty": 0.0, "quality": 0.0, "learnability": 0.0, "gate": 0.8}
    pool = draw(60, 5, seed + 10)
    x, y = oracle.unit(pool.image), oracle.unit(pool.text)
    everyone = np.arange(60)

    def survivors(**knobs):
        state = after([draw(60, 5, seed), draw(60, 5, seed + 5)], 9, **{**none, **knobs})
        state = learn(state, trained_on(seed, n=9, dim=5))
        return state, select(state, pool, 9)[1].tolist()

    state, got = survivors(balance=1.0)
    open_ = matching(prepared(pool), 4096).opened(prepared(pool).valid, 0.8, 9).numpy()
    assert 9 < open_.sum() < 60  # or balance would have nothing to choose from
    assert got == best_open(state, pool, 9, -oracle.log_density(x, y, open_))

    state, got = survivors(novelty=1.0, recent=32)
    seen = seen_by(state, pool)
    centres = [np.asarray(mean, np.float64) for mean in (seen.image_mean, seen.text_mean)]
    exposure = exposure_of(state, x, y, centres)
    assert exposure.max() > 0.2 and got == best_open(state, pool, 9, -exposure)

    others = np.where(np.eye(60, dtype=bool), -np.inf, pool.logit_scale * x @ y.T)
    by_image = np.logaddexp.reduce(others, axis=1)
    by_text = np.logaddexp.reduce(others, axis=0)
    score = pool.logit_scale * (x * y).sum(1) - by_image / 2 - by_text / 2
    state, got = survivors(quality=1.0)
    assert got == best_open(state, pool, 9, score)

    state, got = survivors(learnability=1.0, gate=math.inf)
    unit = prepared(pool)
    frame = Frame.of(seen_by(state, pool), Settings.ridge)
    rows, matrix = frame.rows(unit.image, unit.text), frame.matrix(state.lag / state.lag_weight)
    lag = np.einsum("na,ab,nb->n", *(part.double().numpy() for part in (rows[0], matrix, rows[1])))
    assert np.abs(lag).max() > 0 and got == best_open(state, pool, 9, lag)

    # Together: worths add up, margin and lag in standard deviations over the open pairs; the less uneven the pool, the
    # less rarity counts.
    among = np.ones(60, dtype=bool)
    rarity, uneven = -oracle.log_density(x, y, among), oracle.unevenness(*rows, among)
    common = {"balance": 0.3, "novelty": 0.6, "recent": 32}
    for full in (0.0, uneven / 2, uneven * 3):
        state, got = survivors(quality=0.7, learnability=0.4, unevenness=full, gate=math.inf, **common)
        exposure = exposure_of(state, x, y, centres)
        part = 1.0 if full < uneven else 1 / 9
        others = 0.7 * deviations(score, everyone) + 0.4 * deviations(lag, everyone)
        assert got == best_open(state, pool, 9, part * (0.3 * rarity - 0.6 * exposure) + others)


def exposure_of(state, image, text, centres):
    """The oracle's, of rows of which the centres are not taken off yet."""
    recent = [np.asarray(getattr(state, name), np.float64) for name in RECENT]
    rows = (part - centre for part, centre in zip((image, text, *recent[:2]), (*centres, *centres), strict=True))
    return oracle.log_exposure(*rows, recent[2])


def test_a_survivor_that_comes_again_waits_until_others_had_their_turn():
    """The same pool again and again: novelty goes round, and without it the same survive every time."""
    pool = draw(64, 5, 1)
    rounds = {}
    for novelty in (0.0, 100.0):
        knobs, chosen = Settings(novelty=novelty, unevenness=0.0, gate=math.inf, recent=64), []
        state = SelectionState.initial(5, knobs)
        for _ in range(4):
            state, survivors, *_ = select(state, pool, 8)
            chosen += survivors.tolist()
        rounds[novelty] = len(set(chosen))
    assert rounds[0.0] < 20 and rounds[100.0] > 28


def test_recent_survivors_are_spaced_evenly_and_stand_for_all():
    settings = Settings(recent=16)
    state, steps = SelectionState.initial(3, settings), []
    for seed in range(10):
        pool = draw(20, 3, seed)
        state, survivors, *_ = select(state, pool, 5)
        steps.append([oracle.unit(rows)[survivors[:4:2]] for rows in (pool.image, pool.text)])
    for rows, side in ((state.recent_image, 0), (state.recent_text, 1)):
        # Two of five a step, the latest last; of ten steps the last eight.
        close(rows, np.concatenate([step[side] for step in steps[2:]]))
    assert state.recent_weight.tolist() == [2.5] * 16
    # As many as there are, where the places are more; the others stay empty.
    few = select(SelectionState.initial(3, Settings(recent=80)), draw(20, 3), 5).state
    assert few.recent_weight.tolist() == [0.0] * 75 + [1.0] * 5
    rivals = select(SelectionState.initial(3, settings), draw(20, 3), 5, SELECTORS["random"]).state
    assert not rivals.recent_weight.any()


def counting(pools, num_survivors, dataset_size=40, **knobs):
    """The state after pools of a data set of that size, and the ids trained on."""
    state, ids = SelectionState.initial(pools[0].image.shape[1], Settings(**knobs), dataset_size=dataset_size), []
    for pool in pools:
        state, survivors, *_ = select(state, pool, num_survivors)
        ids.append(pool.ids[survivors])
    return state, ids


def test_it_is_counted_how_often_each_sample_was_trained_on():
    pools = [replace(draw(20, 3, seed), ids=torch.randperm(40)[:20]) for seed in range(9)]
    state, ids = counting(pools, 5)
    assert state.times.tolist() == np.bincount(torch.cat(ids), minlength=40).tolist()
    # A sample that a step has twice is counted once: it is one step's gradient.
    twice, ids = counting([draw(20, 3)], 20)
    assert twice.times.tolist() == [int(number in ids[0]) for number in range(40)] and len(set(ids[0].tolist())) < 20
    # Ids beyond the data set, of any sign, share places.
    shared, ids = counting([replace(pool, ids=pool.ids * 2**40 - 7) for pool in pools[:1]], 5)
    assert shared.times.nonzero().squeeze(1).tolist() == sorted(set((ids[0] % 40).tolist()))
    full, _ = counting([draw(20, 3)], 20)
    full = replace(full, times=full.times.bool() * torch.tensor(255, dtype=torch.uint8))
    assert torch.equal(select(full, draw(20, 3), 20).state.times, full.times)


@pytest.mark.parametrize("without", ["knob", "size", "ids"])
def test_what_is_not_counted_changes_nothing(without):
    pools = [draw(20, 3, seed) for seed in range(4)]
    plain_, ids = counting(pools, 5, 0, repeats=math.inf)
    if without == "ids":
        got = SelectionState.initial(3, Settings(), dataset_size=40)
        for pool in pools:
            got = select(got, replace(pool, ids=None), 5).state
    else:
        got, others = counting(pools, 5, 40 if without == "knob" else 0, repeats=math.inf if without == "knob" else 2.0)
        assert all(map(torch.equal, ids, others))
    assert (
        len(got.times) == (40 if without == "ids" else 0)
        and not got.times.any()
        and "repeats" not in select(got, replace(pools[0], ids=None), 5).report
    )
    assert_same_state(replace(got, times=plain_.times), plain_)


def test_until_a_pair_wears_out_counting_changes_no_choice():
    pools = [replace(draw(20, 3, seed), ids=torch.arange(20) + 20 * (seed % 2)) for seed in range(6)]
    # Three passes: before the last nothing was trained on more often than `repeats`, 2.
    (_, ids), (_, others) = counting(pools, 5), counting(pools, 5, 0)
    assert all(map(torch.equal, ids, others))
    assert not all(map(torch.equal, counting(pools, 5, repeats=1.0)[1], others))
    assert not all(map(torch.equal, counting(pools * 4, 12)[1], counting(pools * 4, 12, 0)[1]))


def test_the_gate_reads_how_often_each_was_trained_on():
    """Survivors by the oracle: the most worth of those that have most left to give."""
    pool, knobs = draw(60, 5, 3), {"coverage": 0.0, "balance": 0.0, "novelty": 0.0, "learnability": 0.0, "gate": 0.8}
    pool = replace(pool, ids=torch.arange(60))
    state = SelectionState.initial(5, Settings(quality=1.0, **knobs), dataset_size=60)
    state = replace(state, times=torch.randint(0, 9, (60,), dtype=torch.uint8))
    selected, unit = select(state, pool, 9), prepared(pool)
    match = matching(unit, 4096)
    left = np.asarray(match.posterior(unit.valid), np.float64) / (1 + np.maximum(state.times.numpy() - 2.0, 0.0))
    order = np.lexsort((-match.score.numpy(), -left))
    num_open = math.ceil(0.8 * float(match.share) * 60)
    among = np.zeros(60, dtype=bool)
    among[order[:num_open]] = True
    want = np.argsort(-np.where(among, match.score.numpy(), -np.inf), kind="stable")[:9]
    assert 9 < num_open < 60 and selected.survivors.tolist() == want.tolist()
    assert float(selected.report["repeats"]) == pytest.approx(state.times.numpy()[want].mean())


def test_over_many_passes_every_pair_has_its_turn():
    pool = replace(draw(64, 5, 1), ids=torch.arange(64))
    trained = {}
    for repeats in (0.0, 2.0, math.inf):  # eight are open, those with most left
        chosen = torch.cat(counting([pool] * 120, 8, 64, repeats=repeats, gate=1e-6)[1]).unique()
        trained[repeats] = len(chosen)
    assert trained == {0.0: 64, 2.0: 64, math.inf: 8}


def test_counts_go_on_with_a_data_set_that_has_grown_or_shrunk():
    state, _ = counting([draw(20, 3, seed) for seed in range(3)], 5)
    saved = state.state_dict()
    for size in (30, 40, 55):
        fresh = SelectionState.initial(3, Settings(), dataset_size=size)
        dropped = state.times[size:].any()
        with pytest.warns(UserWarning, match="has 30 .dataset_size.") if dropped else contextlib.nullcontext():
            times = fresh.restored(saved).times
        assert dropped == (size == 30)
        assert times.tolist() == [*state.times.tolist(), *[0] * 15][:size]
    del saved["times"]
    with pytest.raises(ValueError, match=r"selection state lacks .'times'."):
        SelectionState.initial(3, Settings(), dataset_size=40).restored(saved)
    for fresh in (SelectionState.initial(3, Settings(repeats=math.inf), dataset_size=40), after([draw(20, 3)])):
        assert not len(fresh.restored(saved).times)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_type_are_counted(dtype):
    pool = draw(20, 3)
    (want, _), (got, _) = counting([pool], 5), counting([replace(pool, ids=pool.ids.to(dtype))], 5)
    assert torch.equal(got.times, want.times) and want.times.any()


@pytest.mark.parametrize("novelty", [0.0, 2.0])
def test_a_recording_reads_and_writes_all_that_is_remembered(novelty):
    """On a GPU a graph's state goes through a list of tensors: none may be left out."""
    state, other = (
        learn(counting([draw(20, 3, seed)], 8, novelty=novelty)[0], trained_on(seed, dim=3)) for seed in range(2)
    )
    assert not torch.equal(state.times, other.times)
    copied = with_values(replace(other, step=state.step), of_state(state))
    assert_same_state(copied, state)


def test_a_state_of_before_there_was_novelty_is_taken_without_it_alone():
    old = after([draw(20, 3)], novelty=0.0).state_dict()
    for name in RECENT:
        assert not len(old.pop(name))
    assert SelectionState.initial(3, Settings(novelty=0.0)).restored(old).step == 1
    with pytest.raises(ValueError, match=r"selection state lacks .'recent_image', 'recent_text', 'recent_weight'."):
        SelectionState.initial(3, Settings()).restored(old)
    with pytest.raises(ValueError, match=r"selection state holds 256 recent survivors, not selection.recent=64"):
        SelectionState.initial(3, Settings(recent=64)).restored(after([draw(20, 3)]).state_dict())


def test_where_a_pool_is_uneven_balance_counts_in_full_and_where_it_is_not_it_does_not():
    pools = [draw(120, 5, seed) for seed in range(3)]
    crowded = [rows_of(pool, crowd) for pool, crowd in zip(pools, crowds(3), strict=True)]

    def chosen(of, **knobs):
        state = learn(after(of[:2], 20, **knobs), trained_on(0, n=20, dim=5))
        selected = select(state, of[2], 20)
        return selected.survivors.tolist(), float(selected.report.get("unevenness", math.nan))

    full, none = chosen(crowded, unevenness=0.0)
    got, uneven = chosen(crowded, unevenness=0.12)
    assert math.isnan(none) and uneven > 0.12
    assert got == full != chosen(crowded, balance=0.0)[0]
    # With a pool that is even beside `unevenness`: nothing is worth anything for being rare.
    without = chosen(pools, balance=0.0, unevenness=1e9)[0]
    assert chosen(pools, unevenness=1e9)[0] == without != chosen(pools, unevenness=0.0)[0]


def crowds(num):
    """For every pool of 120, who takes whose place: a third become copies of one sample."""
    for seed in range(num):
        who = torch.arange(120)
        who[torch.randperm(120, generator=torch.Generator().manual_seed(seed))[:40]] = seed
        yield who


def seen_by(state, pool):
    stream = state.stream.clone()
    stream.update(prepared(pool).image, prepared(pool).text)
    return stream


def test_errors_name_the_values():
    for num_survivors in (0, -1, 9):
        with pytest.raises(ValueError, match=rf"num_survivors={num_survivors} must be from 1 to .* 8"):
            Selector()(draw(8, 3), num_survivors)
    selector = Selector()
    selector(draw(8, 3), 2)
    with pytest.raises(ValueError, match=r"embeddings are 5 wide, the sketch is 3 wide"):
        selector(draw(8, 5), 2)
    other = Selector()
    other.load_state_dict(selector.state_dict())
    with pytest.raises(ValueError, match=r"3 x 3 wide, this run's embeddings are 5 x 5"):
        other(draw(8, 5), 2)
    with pytest.raises(ValueError, match=r"'clipcof' is not one of \['c_rho', .*'vas'\]"):
        Selector("clipcof")


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *[("half_life", 0.0), ("gate", 0.0), ("gate", math.nan), ("balance", -1.0), ("quality", -1.0)],
        *[("repeats", -1.0), ("repeats", math.nan)],
        *[("novelty", -1.0), ("recent", 7)],
        *[("coverage", math.inf), ("ridge", 0.0), ("references", 1), ("unevenness", -0.1), ("unevenness", math.inf)],
    ],
)
def test_settings_out_of_range_name_the_knob(knob, value):
    with pytest.raises(ValueError, match=rf"selection\.{knob}={value} must be"):
        Settings(**{knob: value})


def test_pools_that_do_not_fit_together():
    rows = torch.ones(4, 3)
    with pytest.raises(ValueError, match=r"image 3, text 2"):
        Pool(rows, torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(5, 3\)"):
        Pool(rows, torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"both learner_image and learner_text"):
        Pool(rows, rows, learner_image=rows)
    with pytest.raises(ValueError, match=r"learner embeddings of 5 samples in a pool of 4"):
        Pool(rows, rows, learner_image=torch.ones(5, 2), learner_text=torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"shape \(3,\), the pool has 4"):
        Pool(rows, rows, valid=torch.ones(3, dtype=torch.bool))


# Speed


class NoHostSync(TorchDispatchMode):
    """Raises at what makes the CPU wait for a GPU: reading a value, or a shape that depends on values."""

    WAITS = frozenset({"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"})

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # On a GPU a mask as an index is a nonzero(); the CPU kernel hides it.
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in self.WAITS or by_mask:
            raise AssertionError(f"host sync: {func}")
        return func(*args, **(kwargs or {}))


# These two grow a table to the largest id or concept they meet.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"dissect", "concept_balance"}))
def test_select_never_waits_for_the_device(name, monkeypatch):
    # As on a GPU: on a CPU nothing has to be waited for, and what is not open is left out.
    monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())
    pool = replace(draw(24, 5), valid=torch.arange(24) != 3)
    state = SelectionState.initial(5, Settings(soft_start=0.5))
    with NoHostSync():
        for _ in range(2):
            state, *_ = select(state, pool, 6, SELECTORS[name])
            state = learn(state, replace(rows_of(pool, torch.arange(6)), learner_logit_scale=torch.tensor(5.0)))
    assert state.step == 2


def test_the_tripwire_trips():
    rows = torch.arange(3.0)
    by_index = (lambda: rows[rows > 1], lambda: rows[torch.tensor(1)])
    for sync in (*by_index, lambda: float(rows[0]), lambda: bool(rows.any())):
        with NoHostSync(), pytest.raises(AssertionError, match="host sync"):
            sync()


@pytest.mark.parametrize("seed", range(3))
def test_leaving_closed_candidates_out_changes_no_survivor(seed, monkeypatch):
    pools = [replace(draw(80, 6, seed + 10 * step), valid=torch.arange(80) % 9 != 2) for step in range(3)]
    short = after(pools, 12, gate=0.8)
    monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())
    whole = after(pools, 12, gate=0.8)
    unit = prepared(pools[0])
    assert 12 < int(matching(unit, 4096).opened(unit.valid, 0.8, 12).sum()) < 60  # or nothing would be left out
    for name in ("kept", "opened"):
        close(getattr(short, name).cross_cov, getattr(whole, name).cross_cov)


@pytest.mark.parametrize("half_life", [math.inf, 500.0])
@pytest.mark.parametrize("num, dim, num_survivors", [(90, 6, 12), (300, 24, 64), (700, 16, 128)])
def test_numbers_read_for_nothing_change_no_survivor(num, dim, num_survivors, half_life, monkeypatch):
    """What a CPU does in fewer operations, beside the operations that a GPU does, over a stream and its lags."""
    monkeypatch.setattr(Herding, "_at_once", lambda self: False)  # exact picks, which chunks are not
    pools = [draw(num, dim, seed) for seed in range(4)]
    pools[2] = replace(pools[2], valid=torch.arange(num) % 9 != 2)
    settings = Settings(half_life=half_life, memory=0.5, quality=0.3)
    states = [SelectionState.initial(dim, settings) for _ in range(2)]
    for pool in pools:
        found = []
        for place, free in enumerate((frozenset({"cpu"}), frozenset())):
            monkeypatch.setattr(sketch, "FREE_SYNC", free)
            chosen = select(states[place], pool, num_survivors)
            states[place] = learn(chosen.state, rows_of(pool, chosen.survivors))
            found.append(chosen)
        ours, theirs = found
        assert ours.survivors.tolist() == theirs.survivors.tolist()
        close(ours.gain, theirs.gain, 1e-3)
        for name, value in ours.report.items():
            assert value.dtype == theirs.report[name].dtype and value.shape == ()
            close(value, theirs.report[name], 1e-3)
        left, right = (flat(state.state_dict()) for state in states)
        for name, value in left.items():
            assert value.dtype == right[name].dtype
            close(value, right[name], 1e-3)


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


def preserve(memory: float) -> tuple[float, float]:
    """With nothing but coverage, on clean embeddings: residual of a step and of all survivors, each over chance's."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator)
    settings = Settings(gate=math.inf, balance=0.0, learnability=0.0, memory=memory)
    selector = Selector("clipcov", settings=settings)
    ratios = []
    for _ in range(10):
        shared = torch.randn(320, 16, generator=generator) * torch.linspace(2, 0.2, 16)
        image = shared + 0.5 * torch.randn(320, 16, generator=generator)
        text = shared @ mixing + 0.5 * torch.randn(320, 16, generator=generator)
        selector(Pool(image=image, text=text), 64)
        ratios.append(float(selector.report["residual"] / selector.report["residual_random"]))
    total = float(selector.report["residual_total"] / selector.report["residual_total_random"])
    return sum(ratios) / len(ratios), total


def test_coverage_alone_preserves_better_than_chance_and_memory_adds_up():
    step, total = preserve(memory=0.0)
    assert step < 0.65 and total < 1.0
    step_with, total_with = preserve(memory=1.0)
    # What a batch gives up for the sake of the sum is less than what the sum gains.
    assert step < step_with < 0.75 and total_with < 0.8 * total
