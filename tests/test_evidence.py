"""Matching and density: against the oracle, on pairs whose truth is known, and their laws."""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from clipcov_stream.evidence import log_density, matching
from clipcov_stream.pool import Pool, prepared


def draw(n, dim, matched, seed=0, noise=0.3, scale=20.0):
    """Pairs of which the first `matched` share match: a caption is its image and noise, or noise alone."""
    generator = torch.Generator().manual_seed(seed)
    image, other = (torch.randn(n, dim, generator=generator) for _ in range(2))
    text = torch.where(torch.arange(n)[:, None] < matched * n, image, other)
    return prepared(Pool(image, text + noise * torch.randn(n, dim, generator=generator), scale))


def test_p_values_equal_the_oracle():
    pool = draw(12, 4, 0.5)
    got = matching(pool)
    np.testing.assert_allclose(got.p_value, oracle.match_p_values(pool.image, pool.text, 20.0), atol=1e-6)
    assert float(got.share) == pytest.approx(1 - 2 * float((got.p_value > 0.5).float().mean()))


def test_samples_that_are_not_valid_do_not_count():
    pool, valid = draw(20, 4, 0.5), torch.arange(20) % 3 != 1
    whole = matching(prepared(replace(pool, valid=valid)))
    alone = matching(prepared(replace(pool, image=pool.image[valid], text=pool.text[valid], valid=None)))
    torch.testing.assert_close(whole.score[valid], alone.score)
    torch.testing.assert_close(whole.p_value[valid], alone.p_value)
    assert float(whole.share) == pytest.approx(float(alone.share))
    assert not whole.score[~valid].any() and (whole.p_value[~valid] == 1).all()


@pytest.mark.parametrize("matched", [0.0, 0.3, 0.6, 1.0])
def test_the_share_of_matches_is_found(matched):
    """Of 600 drawn pairs; the estimate's own standard error is at most 1 / sqrt(600) = .04."""
    share = float(matching(draw(600, 16, matched)).share)
    assert share == pytest.approx(matched, abs=0.12)


def test_p_values_of_mismatched_pairs_are_uniform():
    p_value = matching(draw(2000, 16, 0.0)).p_value
    for level in (0.05, 0.2, 0.5, 0.9):
        assert float((p_value <= level).float().mean()) == pytest.approx(level, abs=0.03)


def test_the_gate_lets_matches_through():
    pool = draw(600, 16, 0.5)
    match, valid = matching(pool), torch.ones(600, dtype=torch.bool)
    open_ = match.opened(valid, 0.8, 10)
    assert int(open_.sum()) == math.ceil(0.8 * float(match.share) * 600)
    assert float((torch.arange(600) < 300)[open_].float().mean()) > 0.97
    assert match.opened(valid, math.inf, 10).all()
    assert int(match.opened(valid, 1e-9, 10).sum()) == 10
    assert match.score[match.opened(valid, 1e-9, 10)].min() >= match.score.topk(10).values.min()
    valid[:100] = False
    assert not match.opened(valid, math.inf, 10)[:100].any()


def test_density_equals_the_oracle():
    pool, among = draw(15, 4, 0.5), torch.arange(15) % 4 != 2
    want = oracle.log_density(pool.image, pool.text, among.numpy())
    np.testing.assert_allclose(log_density(pool, among)[among], want[among.numpy()], rtol=1e-4, atol=1e-4)


def test_copies_are_as_dense_as_they_are_many():
    """Eight directions at right angles, one of them nine times: the mean is theirs to share, copies stand out."""
    rows = torch.cat([torch.eye(8), torch.eye(8)[:1].repeat(8, 1)])
    density = log_density(prepared(Pool(rows, rows)), torch.ones(16, dtype=torch.bool))
    assert (density[[0, *range(8, 16)]] > density[1:8].max() + 1).all()


@pytest.mark.parametrize("rows", [torch.ones(6, 3), torch.zeros(6, 3), torch.eye(3)[:1]])
@pytest.mark.parametrize("valid", [True, False])
def test_degenerate_pools_are_defined(rows, valid):
    flags = torch.full((len(rows),), valid)
    pool = prepared(Pool(rows, rows, 100.0, valid=flags))
    match, density = matching(pool), log_density(pool, flags)
    assert all(torch.isfinite(value).all() for value in (match.score, match.p_value, match.share, density))
    assert torch.equal(match.opened(flags, 0.8, 1).any(), flags.any())
