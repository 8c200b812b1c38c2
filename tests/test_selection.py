"""Selection: the objective's pieces against the oracle, then what every selector must obey."""

import copy
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import (
    ALONE,
    NAMES,
    after,
    assert_finite_state,
    assert_same_state,
    close,
    draw,
    exposure_of,
    flat,
    rows_of,
    trained_on,
)
from torch.utils._python_dispatch import TorchDispatchMode

from clipcov_stream import evidence, sketch
from clipcov_stream.evidence import matching
from clipcov_stream.herding import Herding, top
from clipcov_stream.objective import (
    Frame,
    SelectionState,
    Settings,
    gated,
    margin,
    mix,
    random_survivors,
    standardize,
)
from clipcov_stream.pool import Pool, prepared
from clipcov_stream.rivals import NEEDS_LEARNER
from clipcov_stream.selection import SELECTORS, check_survivors, learn, resolve, select
from clipcov_stream.selector import Selector

# The objective's pieces


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
        ([0, 1, 2], r"returned a list; it must return a tensor, \(3,\) of torch.int64"),
        (torch.topk(torch.arange(8.0), 3), r"returned a topk; .* as torch.topk\(...\).indices is"),
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


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"concept_balance"}))
def test_nothing_is_remembered_for_gradients(name):
    """Embeddings fresh from a model, as a plain loop has them: the same survivors, and no graph is kept."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower, scale = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.tensor(3.0))
    found, states = [], []
    for detach in (False, True):
        selector = Selector(name, seed=0)
        for step in range(3):
            pool = draw(48, 8, step)
            image, text, s = tower(pool.image), tower(pool.text), scale.exp()
            if detach:
                image, text, s = image.detach(), text.detach(), s.detach()
            needs = {"learner_image": text, "learner_text": image, "learner_logit_scale": s}
            own = Pool(image, text, s, **(needs if SELECTORS[name] in NEEDS_LEARNER else {}))
            chosen = selector(own, 12)
            selector.learned(image[chosen], text[chosen], s)
            found.append(chosen)
        states.append(selector.state_dict())
        kept = [selector.report, selector.state.state_dict(), {"gain": selector.gain}]
        assert not any(tensor.requires_grad for tensor in tensors_in(kept))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for each in values for tensor in tensors_in(each)]


def test_a_selector_refuses_the_state_of_another():
    saved = Selector("clipcov", seed=0)
    saved(draw(32, 8, 0), 8)
    state = saved.state_dict()
    with pytest.raises(ValueError, match="is of a Selector with selector='clipcov', this one has selector='sem_dedup'"):
        Selector("sem_dedup", seed=0).load_state_dict(state)
    with pytest.raises(ValueError, match="with seed=0, this one has seed=3"):
        Selector("clipcov", seed=3).load_state_dict(state)
    older = {key: value for key, value in state.items() if key != "made_by"}
    Selector("clipcov", seed=3).load_state_dict(older)


def test_ids_beyond_the_data_set_are_warned_of_once():
    selector, pool = Selector("clipcov", dataset_size=100), draw(16, 8, 0)
    pool = replace(pool, ids=1000 * torch.arange(16) + 99)
    with pytest.warns(UserWarning, match="ids of the pool reach 15099, but dataset_size=100"):
        selector(pool, 4)
    selector(pool, 4)  # a second warning would be an error


def test_a_state_holds_nothing_of_the_callers_graph_and_loads_with_weights_only(tmp_path):
    selector, scale = Selector(), torch.tensor([2.0], requires_grad=True)
    with torch.enable_grad():
        selector(replace(draw(16, 4, 0), logit_scale=scale.exp()), 4)
    state = copy.deepcopy(selector.state_dict())
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(loaded["survivors"]["logit_scale"], torch.tensor(2.0).exp())


def test_a_state_that_is_refused_changes_nothing():
    selector, other = Selector(), Selector()
    survivors = selector(draw(16, 4, 0), 4)
    other(draw(16, 3, 0), 5)
    with pytest.raises(ValueError, match="3 x 3 wide"):
        selector.load_state_dict(other.state_dict())
    selector.learned(torch.randn(len(survivors), 2), torch.randn(len(survivors), 2), 50.0)  # of 5 it would raise
    assert selector.state is not None and float(selector.state.lag_weight) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "most", "in_one"),
    [
        ("clipcov", 256, True),
        ("clipcov", 8, False),
        ("random", 256, True),
        ("concept_balance", 256, True),
        ("dissect", 8, True),
    ],
)
def test_torchs_default_type_changes_no_survivor(name, most, in_one, dtype, monkeypatch):
    if not in_one:  # as of pools larger than one block
        monkeypatch.setattr(evidence, "fits", lambda rows, index: False)
    pools = [replace(draw(24, 4, seed), ids=torch.arange(24)) for seed in range(3)]
    learner = {"learner_image": pools[0].text, "learner_text": pools[0].image, "learner_logit_scale": 20.0}
    others = {"concepts": torch.arange(24)[:, None] % 5, "valid": torch.arange(24) % 7 > 0, **learner}

    def chosen() -> list[list[int]]:
        selector, found = Selector(name, dataset_size=24, settings=Settings(soft_start=0.5, references=most)), []
        for pool in pools:
            survivors = selector(pool if name == "clipcov" else replace(pool, **others), 6)
            selector.learned(pool.text[survivors], pool.image[survivors], 20.0)
            found.append(survivors.tolist())
            assert all(value.dtype == torch.float32 for value in selector.report.values() if value.is_floating_point())
        return found

    expected = chosen()
    evidence.edges_on.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert chosen() == expected
    finally:
        torch.set_default_dtype(torch.float32)
