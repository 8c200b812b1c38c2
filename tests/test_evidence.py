"""Matching and density: against the oracle, on pairs whose truth is known, and their laws."""

import math
import threading
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream import evidence, sketch
from clipcov_stream.evidence import Matching, edge_of, log_density, log_exposure, matching, references, unevenness
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool, log_sum_exp, prepared, softmax
from clipcov_stream.scratch import LARGEST, scratch
from clipcov_stream.selection import select


def draw(n, dim, matched, seed=0, noise=0.3, scale=20.0):
    """Pairs of which the first `matched` share match: a caption is its image and noise, or noise alone."""
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(n, dim, generator=generator) for _ in range(2))
    text = torch.where(torch.arange(n)[:, None] < matched * n, image, other)
    return prepared(Pool(image, text + noise * torch.randn(n, dim, generator=generator), scale))


def test_p_values_equal_the_oracle():
    pool = draw(12, 4, 0.5)
    got = matching(pool, 4096)
    np.testing.assert_allclose(got.p_value, oracle.match_p_values(pool.image, pool.text, 20.0), atol=1e-6)
    assert float(got.share) == pytest.approx(1 - 2 * float((got.p_value > 0.5).float().mean()))


def test_samples_that_are_not_valid_do_not_count():
    pool, valid = draw(20, 4, 0.5), torch.arange(20) % 3 != 1
    whole = matching(prepared(replace(pool, valid=valid)), 4096)
    alone = matching(prepared(replace(pool, image=pool.image[valid], text=pool.text[valid], valid=None)), 4096)
    torch.testing.assert_close(whole.score[valid], alone.score)
    torch.testing.assert_close(whole.p_value[valid], alone.p_value)
    assert float(whole.share) == pytest.approx(float(alone.share))
    assert not whole.score[~valid].any() and (whole.p_value[~valid] == 1).all()


@pytest.mark.parametrize("matched", [0.0, 0.3, 0.6, 1.0])
def test_the_share_of_matches_is_found(matched):
    """Of 600 drawn pairs; the estimate's own standard error is at most 1 / sqrt(600) = .04."""
    share = float(matching(draw(600, 16, matched), 4096).share)
    assert share == pytest.approx(matched, abs=0.12)


def test_p_values_of_mismatched_pairs_are_uniform():
    p_value = matching(draw(2000, 16, 0.0), 4096).p_value
    for level in (0.05, 0.2, 0.5, 0.9):
        assert float((p_value <= level).float().mean()) == pytest.approx(level, abs=0.03)


def filtered(pool, keep, scores):
    """The share `keep` of a pool whose scores are highest."""
    rows = scores.topk(round(keep * len(scores))).indices.sort().values
    return prepared(Pool(pool.image[rows], pool.text[rows], pool.logit_scale)), rows


@pytest.mark.parametrize("keep", [0.9, 0.8, 0.7])
@pytest.mark.parametrize("by", ["cosine", "margin"])
@pytest.mark.parametrize("free", [True, False])
def test_the_share_of_matches_is_found_in_what_a_filter_left(keep, by, free, monkeypatch):
    """By counts alone nearly all seem to match: what Storey's estimate counts is what the filter took."""
    if not free:
        monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())  # as a GPU does
    pool = draw(2000, 16, 0.5)
    whole = matching(pool, 256)
    scores = {"cosine": (pool.image * pool.text).sum(1), "margin": whole.score}[by]
    left, rows = filtered(pool, keep, scores)
    match, true = matching(left, 256), (rows < 1000)
    assert float(match.share) == pytest.approx(float(true.float().mean()), abs=0.1)
    assert 1 - 2 * float((match.p_value > 0.5).float().mean()) > float(true.float().mean()) + 0.1
    assert float(whole.edge) == 1.0 and 0.1 < float(match.edge) < 0.95
    open_ = match.opened(torch.ones(len(rows), dtype=torch.bool), 1.0, 10)
    assert float(true[open_].float().mean()) > 0.85
    posterior = match.posterior(torch.ones(len(rows), dtype=torch.bool))
    assert float(posterior[true].mean()) > 0.75 and float(posterior[~true].mean()) < 0.25


@pytest.mark.parametrize("num", [20, 60, 600])
def test_no_edge_is_seen_where_nobody_filtered(num):
    """Uniform p-values, those of matching pairs as p ** (1 / a) for weak and strong embedders, and mixtures."""
    generator = torch.Generator().manual_seed(num)
    everyone = torch.ones(num, dtype=torch.bool)
    for _ in range(200):
        share, power = torch.rand(2, generator=generator)
        p_value = torch.rand(num, generator=generator)
        p_value[: int(share * num)] **= 1 / (0.02 + 0.98 * power)
        assert float(edge_of(p_value, everyone)) == 1.0
    ends = torch.rand(num, generator=generator) * torch.where(torch.arange(num) < num // 2, 0.5, 0.01)
    assert float(edge_of(ends, everyone)) < 1.0 or num == 20  # too few to tell


@pytest.mark.parametrize("classes", [2, 3, 4, 6, 8])
def test_classes_that_are_not_told_apart_within_are_no_filter(classes):
    """Any of a class' captions fits any of its images, so that p-values are uniform up to the class' share."""
    generator = torch.Generator().manual_seed(classes)
    rows = F.one_hot(torch.arange(640) % classes, 16).float()
    image, text = (rows + 0.05 * torch.randn(640, 16, generator=generator) for _ in range(2))
    match = matching(prepared(Pool(image, text, 20.0)), 256)
    assert float(match.edge) == 1.0 and float(match.share) > 0.95 - (classes == 2) * 0.45


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    num=st.integers(1, 400),
    cut=st.floats(0.05, 1.0),
    share=st.floats(0, 1),
    power=st.floats(0.02, 1.0),
    seed=st.integers(0, 99),
)
def test_edges_equal_the_oracle(num, cut, share, power, seed):
    p_value = torch.rand(num, generator=torch.Generator().manual_seed(seed))
    p_value[: int(share * num)] **= 1 / power
    p_value *= cut
    valid = torch.arange(num) % 5 != 3
    assert float(edge_of(p_value, valid)) == oracle.edge(p_value[valid].tolist())


@pytest.mark.parametrize("edge", [0.2, 0.3, 0.55, 0.8])
def test_an_edge_is_seen_where_it_is(edge):
    """In what is left of a stream of which half matched, and whatever is not valid."""
    drawn = torch.rand(600, generator=torch.Generator().manual_seed(0))
    left, matched = edge * drawn[: int(600 * edge)], edge * drawn**20
    p_value = torch.cat([left, matched, torch.linspace(0, 1, 300)])
    valid = torch.arange(len(p_value)) < len(left) + 600
    assert float(edge_of(p_value, valid)) == pytest.approx(edge, abs=1 / 16 + 0.05 * edge)
    assert float(edge_of(torch.full((600,), 0.01), valid[:600])) == 1.0  # none lie below an edge
    few = torch.cat([left[: len(left) // 8], 0.01 * drawn])  # mismatched, so few that it would change nothing
    assert float(edge_of(few, torch.ones(len(few), dtype=torch.bool))) == 1.0


def test_the_told_are_counted_within_the_edge():
    """Ten pairs at 0, where all others are spread: up to 1 they are not chance's, up to .2 they may be."""
    p_value = torch.cat([torch.zeros(3), torch.linspace(0.01, 0.2, 197)])
    told = [
        float(Matching(-p_value, p_value, torch.tensor(0.1), torch.tensor(edge)).told(p_value < 2, 2 / 3))
        for edge in (1.0, 0.2)
    ]
    assert told[0] > told[1] == 0.0


def test_selection_says_where_a_filter_was_and_opens_no_more_than_match():
    pool = draw(2000, 16, 0.5)
    left, rows = filtered(pool, 0.8, matching(pool, 256).score)
    state = SelectionState.initial(16, Settings())
    whole, report = (select(state, each, 100).report for each in (pool, left))
    assert float(whole["filter_edge"]) == 1.0 and 0.2 < float(report["filter_edge"]) < 0.8
    true = float((rows < 1000).float().mean())
    assert float(report["open_share"]) == pytest.approx(float(report["matched_share"]), abs=0.01)
    assert float(report["matched_share"]) == pytest.approx(true, abs=0.1)


def test_the_gate_lets_matches_through():
    pool = draw(600, 16, 0.5)
    match, valid = matching(pool, 4096), torch.ones(600, dtype=torch.bool)
    open_ = match.opened(valid, 0.8, 10)
    assert int(open_.sum()) == math.ceil(0.8 * float(match.share) * 600)
    assert float((torch.arange(600) < 300)[open_].float().mean()) > 0.97
    assert match.opened(valid, math.inf, 10).all()
    assert int(match.opened(valid, 1e-9, 10).sum()) == 10
    assert match.score[match.opened(valid, 1e-9, 10)].min() >= match.score.topk(10).values.min()
    valid[:100] = False
    assert not match.opened(valid, math.inf, 10)[:100].any()


@pytest.mark.parametrize("matched", [0.3, 0.6])
def test_the_posterior_is_how_often_pairs_match(matched):
    """Of 2,000 drawn pairs, half of which are hard to tell; it errs towards too low a chance."""
    pools = [draw(1000, 16, matched, seed, noise) for seed, noise in enumerate((0.3, 1.5))]
    valid, found, truth = torch.ones(1000, dtype=torch.bool), [], []
    for pool in pools:
        match = matching(pool, 4096)
        posterior = match.posterior(valid)
        assert ((posterior > 0) & (posterior < 1)).all()
        order = match.p_value.argsort(stable=True)
        assert (posterior[order].diff() <= 0).all()  # the smaller its p-value the likelier a pair matches
        found.append(posterior)
        truth.append(torch.arange(1000) < matched * 1000)
    posterior, truth = torch.cat(found), torch.cat(truth).float()
    order = posterior.argsort()
    pairs = [(float(posterior[part].mean()), float(truth[part].mean())) for part in order.chunk(5)]
    for estimated, true in pairs:
        assert -0.1 < true - estimated < 0.35, pairs


@pytest.mark.parametrize("gate", [0.3, 1.0, math.inf])
@pytest.mark.parametrize("free", [True, False])
def test_the_gate_opens_what_has_most_left(gate, free, monkeypatch):
    if not free:
        monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())  # as a GPU does
    pool, valid = draw(200, 8, 0.5), torch.arange(200) % 9 != 4
    match = matching(prepared(replace(pool, valid=valid)), 4096)
    wear = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(1)).float()
    beyond = torch.where(valid, 0.0, 3.0)  # what is not valid has no say
    for unworn in (torch.zeros(200), beyond):
        assert torch.equal(match.opened(valid, gate, 10, unworn), match.opened(valid, gate, 10))
    for lost in (wear, torch.where(torch.arange(200) == 0, 1.0, 0.0)):
        open_ = match.opened(valid, gate, 10, lost)
        left = (match.posterior(valid).log() - lost).numpy()
        number = math.ceil(float(gate * match.share * valid.sum())) if gate < math.inf else 200
        order = np.lexsort((-match.score.numpy(), -left))
        want = np.zeros(200, dtype=bool)
        want[order[: max(number, 10)]] = True
        assert np.array_equal(open_, want & valid.numpy())


def test_a_worn_pair_gives_way_to_a_doubtful_one():
    pool, valid = draw(200, 8, 0.5), torch.ones(200, dtype=torch.bool)
    match = matching(pool, 4096)
    new = match.opened(valid, 1.0, 10, torch.zeros(200))
    worn = match.opened(valid, 1.0, 10, torch.where(new, 50.0, 0.0))
    assert int(worn.sum()) == int(new.sum()) and not (worn & new).sum() > max(0, 2 * int(new.sum()) - 200)


def test_density_equals_the_oracle():
    pool, among = draw(15, 4, 0.5), torch.arange(15) % 4 != 2
    want = oracle.log_density(pool.image, pool.text, among.numpy())
    np.testing.assert_allclose(
        log_density(pool.image, pool.text, among, 4096)[among], want[among.numpy()], rtol=1e-4, atol=1e-4
    )


def test_copies_are_as_dense_as_they_are_many():
    """Eight directions at right angles, one of them nine times: the mean is theirs to share, copies stand out."""
    rows = torch.cat([torch.eye(8), torch.eye(8)[:1].repeat(8, 1)])
    unit = prepared(Pool(rows, rows)).image
    density = log_density(unit, unit, torch.ones(16, dtype=torch.bool), 4096)
    assert (density[[0, *range(8, 16)]] > density[1:8].max() + 1).all()


def test_unevenness_equals_the_oracle_and_forgets_lengths_order_and_what_does_not_count():
    pool, among = draw(40, 4, 0.5), torch.arange(40) % 4 != 2
    got = unevenness(pool.image, pool.text, among, 4096)
    assert float(got) == pytest.approx(oracle.unevenness(pool.image, pool.text, among.numpy()), rel=1e-4)
    order, length = torch.randperm(40, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 9, 40)[:, None]
    torch.testing.assert_close(unevenness((pool.image * length)[order], pool.text[order], among[order], 4096), got)
    torch.testing.assert_close(
        unevenness(pool.image[among], pool.text[among], torch.ones(30, dtype=torch.bool), 4096), got
    )


@pytest.mark.parametrize("most", [7, 40])
def test_unevenness_is_that_of_the_references_whatever_the_pools_size(most):
    pool, among = draw(300, 4, 0.5), torch.arange(300) % 7 != 3
    index, _ = references(among, most)
    want = oracle.unevenness(pool.image[index], pool.text[index], np.ones(most, dtype=bool))
    assert float(unevenness(pool.image, pool.text, among, most)) == pytest.approx(want, rel=1e-4)


def test_copies_make_a_pool_uneven_and_an_even_one_is_not():
    """A hundred directions at right angles, eight of each: all are as common, until copies of one replace others."""
    rows, everyone = torch.eye(100).repeat(8, 1), torch.ones(800, dtype=torch.bool)
    found = []
    for copies in (0, 80, 160):
        now = rows.clone()
        now[:copies] = rows[0]
        found.append(float(unevenness(now, now, everyone, 800)))
    assert found[0] < 1e-6 and 0.5 < found[1] < found[2]


@pytest.mark.parametrize("rows", [torch.ones(6, 3), torch.zeros(6, 3), torch.eye(3)[:1]])
@pytest.mark.parametrize("valid", [True, False])
def test_degenerate_pools_are_defined(rows, valid):
    flags = torch.full((len(rows),), valid)
    pool = prepared(Pool(rows, rows, 100.0, valid=flags))
    match, density = matching(pool, 4096), log_density(pool.image, pool.text, flags, 4096)
    uneven = unevenness(pool.image, pool.text, flags, 4096)
    assert all(torch.isfinite(value).all() for value in (match.score, match.p_value, match.share, density, uneven))
    assert float(uneven) == pytest.approx(0.0, abs=1e-9)
    assert torch.equal(match.opened(flags, 0.8, 1).any(), flags.any())
    assert torch.equal(match.opened(flags, 0.8, 1, torch.ones(len(rows))).any(), flags.any())
    posterior = match.posterior(flags)
    assert ((posterior >= 0) & (posterior < 1)).all() and torch.equal(posterior > 0, flags)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(flags=st.lists(st.booleans(), min_size=1, max_size=40), most=st.integers(1, 50))
def test_references_are_spread_over_what_counts(flags, most):
    among = torch.tensor(flags)
    index, filled = references(among, most)
    places = among.nonzero().squeeze(1).tolist()
    chosen = index[filled].tolist()
    assert len(index) == min(most, len(flags)) and len(chosen) == min(most, len(places))
    if len(places) <= most:
        assert chosen == places
    ranks = [places.index(place) for place in chosen]
    assert ranks == sorted(set(ranks))
    if len(chosen) > 1:
        steps = np.diff([*ranks, len(places)])
        assert steps.max() - steps.min() <= 1


def on_references(pool, valid, most):
    """`matching` and `log_density` by the definition, pair by pair, over the references alone."""
    index, filled = (part.numpy() for part in references(valid, most))
    chosen, ok = index[filled], valid.numpy()
    x, y = oracle.as64(pool.image), oracle.as64(pool.text)
    logits = 20.0 * x @ y.T
    others = [[k for k in chosen if k != i] for i in range(len(x))]
    scaled = np.array([np.log((ok.sum() - 1) / len(other)) for other in others])
    by_image = np.array([np.logaddexp.reduce(logits[i, others[i]]) for i in range(len(x))]) + scaled
    by_text = np.array([np.logaddexp.reduce(logits[others[i], i]) for i in range(len(x))]) + scaled
    margins = logits - by_image[:, None] / 2 - by_text[None, :] / 2
    score = margins.diagonal()
    beaten = [
        np.mean([*(margins[i, k] >= score[i] for k in others[i]), *(margins[k, i] >= score[i] for k in others[i])])
        for i in range(len(x))
    ]
    density = 0.0
    for rows in (x, y):
        centred = oracle.unit(rows - rows[ok].mean(0))
        kernel = np.maximum(centred @ centred.T, 0) ** 8
        mean = np.array([kernel[i, others[i]].mean() for i in range(len(x))])
        density = density + np.log((1 + (ok.sum() - 1) * mean) / ok.sum())
    return np.where(ok, score, 0), np.where(ok, beaten, 1), density


@pytest.mark.parametrize("block", [64, 1 << 18])
@pytest.mark.parametrize("most", [7, 40, 150])
def test_a_few_references_stand_for_the_pool(most, block, monkeypatch):
    monkeypatch.setattr(evidence, "TABLE", block)
    pool, valid = draw(150, 5, 0.5), torch.arange(150) % 7 != 3
    pool = replace(pool, valid=valid)
    match, density = matching(pool, most), log_density(pool.image, pool.text, valid, most)
    score, p_value, want = on_references(pool, valid, most)
    np.testing.assert_allclose(match.score, score, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(match.p_value, p_value, atol=1e-6)
    np.testing.assert_allclose(density[valid], want[valid.numpy()], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("most", [40, 300])
@pytest.mark.parametrize("dropped", [0, 1, 50])
def test_a_pool_of_one_block_is_as_one_of_many(dropped, most, monkeypatch):
    """The form for small pools beside the one in blocks, which the oracle checks above."""
    pool = draw(150, 5, 0.5)
    valid = torch.arange(150) >= dropped
    pool = prepared(replace(pool, valid=valid))
    at_once, dense = matching(pool, most), log_density(pool.image, pool.text, valid, most)
    called = []
    original = evidence.compared
    monkeypatch.setattr(evidence, "compared", lambda *given: called.append(1) or original(*given))
    monkeypatch.setattr(evidence, "fits", lambda rows, index: False)
    blocks = matching(pool, most)
    assert called
    torch.testing.assert_close(at_once.score, blocks.score, rtol=1e-5, atol=1e-4)
    assert torch.equal(at_once.p_value, blocks.p_value) and torch.equal(at_once.share, blocks.share)
    expected = log_density(pool.image, pool.text, valid, most)
    torch.testing.assert_close(dense[valid], expected[valid], rtol=1e-4, atol=1e-4)
    for gate in (0.5, 1.0, math.inf):
        ours = at_once.opened(valid, gate, 10)
        monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())  # as a GPU does
        assert torch.equal(ours, at_once.opened(valid, gate, 10))
        monkeypatch.setattr(sketch, "FREE_SYNC", frozenset({"cpu"}))


def test_references_find_the_share_of_matches_too():
    pool = draw(2000, 16, 0.5)
    assert float(matching(pool, 100).share) == pytest.approx(0.5, abs=0.12)
    assert float(torch.corrcoef(torch.stack([matching(pool, 100).score, matching(pool, 2000).score]))[0, 1]) > 0.95


@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([1.0, 30.0, 100.0, 1e4]),
    st.integers(0, 1),
    st.integers(0, 999),
)
def test_log_sum_exp_is_the_oracles_at_any_range(rows: int, columns: int, scale: float, dim: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = (scale * rng.standard_normal((rows, columns))).astype(np.float32)
    table[rng.random(table.shape) < 0.2] = -np.inf
    with np.errstate(divide="ignore"):
        wanted = np.logaddexp.reduce(table.astype(np.float64), axis=dim)
    found = log_sum_exp(torch.from_numpy(table), dim).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("dim", [0, 1])
def test_softmax_is_torchs(scale, dim):
    table = scale * torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(softmax(table, dim), table.double().softmax(dim).float(), rtol=2e-5, atol=1e-7)


def test_scratch_is_taken_back_and_is_each_threads_own():
    first = scratch("test", 3, 4).fill_(1.0)
    second = scratch("test", 12).fill_(2.0)
    assert first.data_ptr() == second.data_ptr() and bool((first == 2.0).all())
    assert scratch("other", 3, 4).data_ptr() != first.data_ptr()
    found = []
    thread = threading.Thread(target=lambda: found.append(scratch("test", 3, 4).data_ptr()))
    thread.start()
    thread.join()
    assert found[0] != first.data_ptr()
    large = scratch("test", LARGEST + 1)
    assert large.shape == (LARGEST + 1,) and large.data_ptr() != first.data_ptr()


def test_a_pool_looked_at_in_inference_mode_leaves_later_ones_alone():
    pool, found = draw(60, 8, 0.6), []

    def look():  # in a thread, which has no tables yet
        with torch.inference_mode():
            found.append(matching(pool, 32).score.clone())
        found.append(matching(pool, 32).score)

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("block", [64, 1 << 18])
def test_exposure_equals_the_oracle_in_blocks_and_at_once(block, monkeypatch):
    monkeypatch.setattr(evidence, "TABLE", block)
    generator = torch.Generator().manual_seed(0)
    image, text, recent_image, recent_text = (torch.randn(n, 4, generator=generator) for n in (150, 150, 20, 20))
    recent_image[:5], recent_text[:5] = image[:5], text[:5]
    centres = (torch.tensor([0.1, 0.2, -0.3, 0.0]), torch.tensor([0.5, 0.0, 0.1, -0.2]))
    weight = torch.arange(20.0) / 4
    found = log_exposure(image, text, *centres, recent_image, recent_text, weight)
    about = [rows - centre for rows, centre in zip((image, text, recent_image, recent_text), centres * 2, strict=True)]
    want = oracle.log_exposure(*about, weight.numpy())
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)
    assert want[4] > math.log(2) - 1e-6 > want.mean()  # row 4 is there itself, once


@pytest.mark.parametrize("distance", [1e-3, 3e-4, 1e-4, 1e-5, 0.0])
@pytest.mark.parametrize("side", [0, 1])
def test_rounding_beside_the_mean_is_not_exposure(distance: float, side: int):
    generator = torch.Generator().manual_seed(2)
    near = F.normalize(torch.randn(512, generator=generator), dim=0)
    near = F.normalize(near + distance * torch.randn(64, 512, generator=generator) / 512**0.5, dim=1)
    rows = [F.normalize(torch.randn(64, 512, generator=generator), dim=1)] * 2
    rows[side] = near
    centres = [each.mean(0) for each in rows]
    found = log_exposure(*rows, *centres, *rows, torch.ones(64))
    # Every pair resembles itself alone: its caption or image is like no other's.
    assert float(found.max()) < math.log(2) + 0.3


def test_exposure_of_nothing_to_nothing_is_nothing():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    centre = torch.full((4,), 0.5)
    rows[0] = centre
    rows[1] = centre + 1e-5
    empty = torch.zeros(8, 4)
    assert not log_exposure(rows, rows, centre, centre, empty, empty, torch.zeros(8)).any()
    assert not log_exposure(rows, rows, centre, centre, empty + 1, empty + 1, torch.zeros(8)).any()
    found = log_exposure(rows, rows, centre, centre, rows[:2], rows[:2], torch.ones(2))
    assert bool(found.isfinite().all()) and float(found[0]) == 0
