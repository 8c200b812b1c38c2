"""LowRankSketch against exact covariances: the bound it states, and what it is exact for."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipcov_stream.lowrank import LowRankSketch


def pairs(n, image_dim=7, text_dim=5, latent=3, noise=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = draw(n, latent)
    image = hidden @ draw(latent, image_dim) + noise * draw(n, image_dim) + 0.7
    return image, hidden @ draw(latent, text_dim) + noise * draw(n, text_dim) - 0.4


def sketch_of(image, text, sizes, rank, half_life=math.inf):
    sketch = LowRankSketch(image.shape[1], text.shape[1], rank=rank, half_life=half_life, dtype=torch.float64)
    for x, y in zip(image.split(sizes), text.split(sizes), strict=True):
        sketch.update(x, y)
    return sketch


def spectral_error(sketch, exact):
    return float(np.linalg.norm(sketch.cross_cov.numpy() - exact.cross_cov, 2))


def promised(exact, image, text, weights, rank):
    """|X|_F |Y|_F / (rank + 1) over the weight, written from the definition."""
    x, y = image.numpy() - exact.image_mean, text.numpy() - exact.text_mean
    norms = [np.sqrt((weights[:, None] * rows**2).sum()) for rows in (x, y)]
    return norms[0] * norms[1] / (rank + 1) / weights.sum()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    rank=st.integers(1, 6),
    latent=st.integers(1, 6),
    half_life=st.sampled_from([math.inf, 50.0, 7.0]),
    seed=st.integers(0, 999),
)
def test_the_error_is_within_the_bound_and_the_bound_within_the_published_kind(sizes, rank, latent, half_life, seed):
    image, text = pairs(sum(sizes), latent=latent, noise=1.0, seed=seed)
    sketch = sketch_of(image, text, sizes, rank, half_life)
    weights = oracle.half_life_weights(sizes, half_life)
    exact = oracle.moments(image, text, weights)
    bound = float(sketch.error_bound)
    assert spectral_error(sketch, exact) <= bound + 1e-9
    assert bound <= promised(exact, image, text, weights, rank) + 1e-9
    np.testing.assert_allclose(sketch.image_mean.numpy(), exact.image_mean, atol=1e-9)
    np.testing.assert_allclose(float(sketch.weight), exact.weight)
    assert int(sketch.num_samples) == sum(sizes)


def test_the_bound_is_met_by_something_and_not_trivial():
    image, text = pairs(200, noise=1.0)
    exact = oracle.moments(image, text)
    coarse, fine = (sketch_of(image, text, [50] * 4, rank) for rank in (1, 4))
    assert spectral_error(coarse, exact) > 0.2 * float(coarse.error_bound) > 0
    assert float(fine.error_bound) < 0.5 * float(coarse.error_bound)


@pytest.mark.parametrize("half_life", [math.inf, 9.0])
def test_what_has_no_more_directions_than_columns_is_exact(half_life):
    sizes = [12, 3, 0, 25]
    image, text = pairs(40, noise=0.0, latent=2)
    sketch = sketch_of(image, text, sizes, rank=2, half_life=half_life)
    exact = oracle.moments(image, text, oracle.half_life_weights(sizes, half_life))
    assert float(sketch.error_bound) < 1e-9
    np.testing.assert_allclose(sketch.cross_cov.numpy(), exact.cross_cov, atol=1e-9)
    centres = torch.full((7,), 0.3).double(), torch.full((5,), -1.0).double()
    x, y = image - centres[0], text - centres[1]
    weights = torch.from_numpy(oracle.half_life_weights(sizes, half_life))
    about = (x * weights[:, None]).T @ y / weights.sum()
    torch.testing.assert_close(sketch.cross_cov_about(*centres), about, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("half_life", [math.inf, 9.0])
def test_merged_streams_keep_the_bound(half_life):
    sizes = [20, 30, 14]
    image, text = pairs(64, noise=1.0, seed=4)
    parts = [
        sketch_of(x, y, [len(x)], 2, half_life) for x, y in zip(image.split(sizes), text.split(sizes), strict=True)
    ]
    before = parts[1].state_dict()
    parts[0].merge(parts[1])
    assert all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(parts[1].state_dict()[name]))
        for name, value in before.items()
    )
    parts[0].merge(parts[2])
    weights = oracle.half_life_weights(sizes, half_life)
    exact = oracle.moments(image, text, weights)
    bound = float(parts[0].error_bound)
    assert spectral_error(parts[0], exact) <= bound + 1e-9
    assert bound <= promised(exact, image, text, weights, 2) + 1e-9
    np.testing.assert_allclose(parts[0].text_mean.numpy(), exact.text_mean, atol=1e-9)
    empty = LowRankSketch(7, 5, rank=2, half_life=half_life, dtype=torch.float64)
    empty.merge(parts[0])
    torch.testing.assert_close(empty.cross_cov, parts[0].cross_cov)


@pytest.mark.parametrize("junk", [1e30, math.nan, math.inf])
def test_invalid_rows_are_as_if_never_streamed(junk):
    image, text = pairs(24)
    valid = torch.arange(24) % 3 != 0
    dirty = image.clone(), text.clone()
    dirty[0][~valid], dirty[1][~valid, 0] = junk, junk
    got = LowRankSketch(7, 5, rank=3, dtype=torch.float64)
    got.update(*dirty, valid)
    expected = LowRankSketch(7, 5, rank=3, dtype=torch.float64)
    expected.update(image[valid], text[valid])
    torch.testing.assert_close(got.cross_cov, expected.cross_cov)
    assert int(got.num_samples) == 16
    before = got.state_dict()
    got.update(*dirty, torch.zeros(24, dtype=torch.bool))
    torch.testing.assert_close(got.cross_cov, expected.cross_cov)
    assert got.state_dict()["num_samples"] == before["num_samples"]


def test_memory_does_not_grow_with_the_stream():
    def numbers(updates):
        sketch = LowRankSketch(32, rank=4)
        for seed in range(updates):
            sketch.update(*(rows.float() for rows in pairs(16, 32, 32, seed=seed)))
        return sum(value.numel() for value in sketch.state_dict().values() if isinstance(value, torch.Tensor))

    assert numbers(1) == numbers(9) == 2 * 32 * 4 + 2 * 32 + 3


def test_state_goes_on_bit_for_bit(tmp_path):
    image, text = pairs(40)
    straight = sketch_of(image, text, [20, 20], 3, 30.0)
    first = sketch_of(image[:20], text[:20], [20], 3, 30.0)
    torch.save(first.state_dict(), tmp_path / "sketch.pt")
    resumed = LowRankSketch(7, 5, rank=3, dtype=torch.float64)
    resumed.load_state_dict(torch.load(tmp_path / "sketch.pt", weights_only=True))
    copy = resumed.clone()
    resumed.update(image[20:], text[20:])
    assert torch.equal(resumed.cross_cov, straight.cross_cov) and resumed.half_life == 30.0
    assert not torch.equal(copy.cross_cov, resumed.cross_cov)


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="image_dim=0"):
        LowRankSketch(0, rank=2)
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        LowRankSketch(3, rank=0)
    with pytest.raises(ValueError, match="half_life=-1"):
        LowRankSketch(3, rank=1, half_life=-1.0)
    sketch = LowRankSketch(3, rank=1)
    with pytest.raises(ValueError, match="widths 4 x 3 given to a sketch of 3 x 3"):
        sketch.update(torch.ones(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match="with the same n"):
        sketch.update(torch.ones(2, 3), torch.ones(1, 3))
    with pytest.raises(ValueError, match="cannot merge a sketch of widths 4 x 4"):
        sketch.merge(LowRankSketch(4, rank=1))
    with pytest.raises(ValueError, match="half_life=2"):
        sketch.merge(LowRankSketch(3, rank=1, half_life=2.0))
    with pytest.raises(ValueError, match="saved with another embedder or rank"):
        sketch.load_state_dict(LowRankSketch(3, rank=2).state_dict())
    with pytest.raises(ValueError, match="lacks"):
        sketch.load_state_dict({})
