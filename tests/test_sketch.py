"""CrossCovSketch against exact covariances, and the laws of a sum over a stream."""

import inspect
import itertools
import math
import subprocess
import sys

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ports import free_port, leave_group

from clipcov_stream.sketch import CrossCovSketch

NAMES = ("image_mean", "text_mean", "image_cov", "text_cov", "cross_cov")


def pairs(n, image_dim=5, text_dim=5, seed=0, dtype=torch.float64):
    """Correlated pairs with means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    latent = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    image_map = torch.randn(3, image_dim, generator=generator, dtype=torch.float64)
    text_map = torch.randn(3, text_dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, image_dim + text_dim, generator=generator, dtype=torch.float64)
    image = latent @ image_map + 0.3 * noise[:, :image_dim] + 0.7
    text = latent @ text_map + 0.3 * noise[:, image_dim:] - 0.4
    return image.to(dtype), text.to(dtype)


def sketch_of(image, text, sizes=None, **options):
    sketch = CrossCovSketch(image.shape[1], text.shape[1], **{"dtype": torch.float64, **options})
    sizes = [len(image)] if sizes is None else sizes
    assert sum(sizes) == len(image)
    for x, y in zip(image.split(sizes), text.split(sizes), strict=True):
        sketch.update(x, y)
    return sketch


def assert_matches(sketch, expected, tolerance=1e-10):
    """`expected` is an oracle's Moments or another sketch."""
    for name in (*NAMES, "weight", "effective_size"):
        got, want = np.asarray(getattr(sketch, name), np.float64), np.asarray(getattr(expected, name), np.float64)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance, err_msg=name)


def assert_finite(sketch):
    for name in (*NAMES, "weight", "weight_sq", "effective_size"):
        assert torch.isfinite(getattr(sketch, name)).all(), f"{name}: {getattr(sketch, name)}"


# The oracle


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [1, 39], [39, 1], [7, 0, 13, 20]])
def test_any_split_gives_the_exact_covariances(sizes):
    image, text = pairs(40)
    sketch = sketch_of(image, text, sizes)
    assert_matches(sketch, oracle.moments(image, text))
    assert int(sketch.num_samples) == 40


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(cuts=st.lists(st.integers(0, 24), max_size=6), seed=st.integers(0, 99))
def test_any_split_property(cuts, seed):
    image, text = pairs(24, 3, 4, seed)
    edges = [0, *sorted(cuts), 24]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    assert_matches(sketch_of(image, text, sizes), oracle.moments(image, text))


def test_order_of_the_stream_does_not_matter_without_half_life():
    image, text = pairs(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert_matches(sketch_of(image[order], text[order], [4, 6, 20]), sketch_of(image, text))


@pytest.mark.parametrize("half_life", [0.5, 7.0, 1e4])
@pytest.mark.parametrize("sizes", [[12, 18, 3, 7], [1] * 40])
def test_half_life_weighs_by_later_samples(half_life, sizes):
    image, text = pairs(40)
    sketch = sketch_of(image, text, sizes, half_life=half_life)
    assert_matches(sketch, oracle.moments(image, text, oracle.half_life_weights(sizes, half_life)))
    assert int(sketch.num_samples) == 40


def test_elapsed_replaces_the_clock():
    image, text = pairs(30)
    sizes, clock = [10, 12, 8], [50, 20, 0]
    sketch = CrossCovSketch(5, half_life=25.0, dtype=torch.float64)
    for x, y, elapsed in zip(image.split(sizes), text.split(sizes), clock, strict=True):
        sketch.update(x, y, elapsed=torch.tensor(elapsed))
    weights = oracle.half_life_weights(sizes, 25.0, clock)
    assert not np.allclose(weights, oracle.half_life_weights(sizes, 25.0))
    assert_matches(sketch, oracle.moments(image, text, weights))


def test_different_widths_and_the_scalar_case():
    for image_dim, text_dim in [(2, 7), (7, 2), (1, 1)]:
        image, text = pairs(20, image_dim, text_dim)
        sketch = sketch_of(image, text, [5, 15])
        assert sketch.cross_cov.shape == (image_dim, text_dim)
        assert_matches(sketch, oracle.moments(image, text))


def test_cross_cov_about_other_centres():
    image, text = pairs(20, 3, 4)
    a, b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 3.0, 1.0, -1.0]).double()
    expected = (image - a).T @ (text - b) / 20
    torch.testing.assert_close(sketch_of(image, text, [9, 11]).cross_cov_about(a, b), expected)


# Merging


@pytest.mark.parametrize("half_life", [math.inf, 9.0])
def test_merge_appends_a_stream_and_is_associative(half_life):
    image, text = pairs(36, 3, 4)
    sizes = [10, 6, 20]
    whole = sketch_of(image, text, sizes, half_life=half_life)

    def parts():
        blocks = zip(image.split(sizes), text.split(sizes), strict=True)
        return [sketch_of(x, y, half_life=half_life) for x, y in blocks]

    left, b, c = parts()
    left.merge(b)
    left.merge(c)
    right, b, c = parts()
    b.merge(c)
    right.merge(b)
    for merged in (left, right):
        assert_matches(merged, whole)
        assert int(merged.num_samples) == 36


def test_merge_leaves_the_other_alone_and_an_empty_one_changes_nothing():
    image, text = pairs(20)
    first, second = sketch_of(image[:8], text[:8]), sketch_of(image[8:], text[8:])
    before = second.state_dict()
    first.merge(second)
    assert all(torch.equal(before[name], value) for name, value in second.state_dict().items() if name != "half_life")
    whole = first.clone()
    first.merge(CrossCovSketch(5, dtype=torch.float64))
    assert_matches(first, whole)
    empty = CrossCovSketch(5, dtype=torch.float64)
    empty.merge(whole)
    assert_matches(empty, whole)


# Invalid rows


@pytest.mark.parametrize("junk", [0.0, 1e30, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half_life", [math.inf, 9.0])
def test_invalid_rows_are_as_if_never_streamed(junk, half_life):
    image, text = pairs(24)
    valid = torch.arange(24) % 3 != 0
    dirty_image, dirty_text = image.clone(), text.clone()
    dirty_image[~valid] = junk
    dirty_text[~valid, 0] = junk
    sketch = CrossCovSketch(5, half_life=half_life, dtype=torch.float64)
    for rows in torch.arange(24).split(8):
        sketch.update(dirty_image[rows], dirty_text[rows], valid[rows])
    sizes = [int(valid[rows].sum()) for rows in torch.arange(24).split(8)]
    expected = oracle.moments(image[valid], text[valid], oracle.half_life_weights(sizes, half_life))
    assert_matches(sketch, expected)
    assert int(sketch.num_samples) == int(valid.sum())


def test_an_update_without_valid_rows_changes_nothing():
    image, text = pairs(12)
    sketch = sketch_of(image, text, half_life=5.0)
    before = sketch.clone()
    sketch.update(torch.full((4, 5), math.nan).double(), text[:4], torch.zeros(4, dtype=torch.bool))
    sketch.update(image[:0], text[:0])
    assert_matches(sketch, before, 0)


# Precision


def test_a_large_mean_does_not_cancel():
    """Offsets of 1e3 about a spread of 1: second moments about zero would lose all but one digit in float32."""
    image, text = pairs(4096, 4, 3, dtype=torch.float32)
    image, text = image + 1e3, text - 1e3
    sketch = sketch_of(image, text, [64] * 64, dtype=torch.float32)
    expected = oracle.moments(image, text)
    for name in ("image_cov", "text_cov", "cross_cov"):
        want = getattr(expected, name)
        error = np.abs(getattr(sketch, name).numpy() - want).max() / np.abs(want).max()
        assert error < 1e-3, f"{name} is off by {error:.1e} of its largest entry"


def test_a_jump_of_the_distribution():
    image, text = pairs(200)
    image[100:] += 30.0
    text[100:] *= -4.0
    assert_matches(sketch_of(image, text, [25] * 8), oracle.moments(image, text))
    recent = sketch_of(image, text, [25] * 8, half_life=2.0)
    assert_matches(recent, oracle.moments(image[175:], text[175:]), 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_keep_float32_accumulators(dtype):
    # Many more samples than fp16 can count (2048), or bf16 (256).
    image, text = pairs(6000, dtype=dtype)
    sketch = sketch_of(image, text, [600] * 10, dtype=torch.float32)
    assert sketch.cross_cov.dtype == torch.float32
    assert int(sketch.num_samples) == 6000
    assert_matches(sketch, oracle.moments(image.double(), text.double()), 1e-4)


def test_zero_variance():
    sketch = sketch_of(torch.ones(10, 3), torch.full((10, 3), -2.0), [3, 7], dtype=torch.float32)
    assert_finite(sketch)
    for name in ("image_cov", "text_cov", "cross_cov"):
        torch.testing.assert_close(getattr(sketch, name), torch.zeros(3, 3))
    torch.testing.assert_close(sketch.text_mean, torch.full((3,), -2.0))


def test_empty_sketch_is_zero_not_nan():
    sketch = CrossCovSketch(3, 2)
    assert_finite(sketch)
    assert not sketch.cross_cov.any() and float(sketch.effective_size) == 0


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    batches=st.lists(
        st.tuples(
            st.integers(0, 5), st.sampled_from([0.0, 1e-30, 1.0, 1e6]), st.booleans(), st.sampled_from([0, 3, 10**6])
        ),
        max_size=6,
    ),
    half_life=st.sampled_from([1e-3, 1.0, 1e3, math.inf]),
    seed=st.integers(0, 99),
)
def test_never_nan(batches, half_life, seed):
    """Empty, tiny, huge, partly NaN batches, and clocks that run far ahead of the samples."""
    generator = torch.Generator().manual_seed(seed)
    sketch = CrossCovSketch(3, 2, half_life=half_life)
    for n, scale, dirty, elapsed in batches:
        image, text = (scale * torch.randn(n, dim, generator=generator) + scale for dim in (3, 2))
        valid = torch.rand(n, generator=generator) < 0.5 if dirty else torch.ones(n, dtype=torch.bool)
        image[~valid] = math.nan
        sketch.update(image, text, valid, elapsed=torch.tensor(elapsed) if elapsed else None)
        assert_finite(sketch)


# State


def test_state_survives_a_weights_only_file_and_goes_on_bit_for_bit(tmp_path):
    image, text = pairs(30, 3, 4, dtype=torch.float32)
    straight = sketch_of(image[:20], text[:20], [8, 12], half_life=11.0, dtype=torch.float32)
    torch.save(straight.state_dict(), tmp_path / "sketch.pt")
    resumed = CrossCovSketch(3, 4)
    resumed.load_state_dict(torch.load(tmp_path / "sketch.pt", weights_only=True))
    assert resumed.half_life == 11.0
    before = straight.cross_cov
    for sketch in (straight, resumed):
        sketch.update(image[20:], text[20:])
    assert not torch.equal(before, straight.cross_cov)
    saved = resumed.state_dict()
    assert all(torch.equal(torch.as_tensor(saved[k]), torch.as_tensor(v)) for k, v in straight.state_dict().items())


def test_a_state_and_a_clone_share_no_memory():
    image, text = pairs(10)
    sketch = sketch_of(image, text)
    state, copy = sketch.state_dict(), sketch.clone()
    kept = {name: torch.as_tensor(value).clone() for name, value in state.items()}
    other = CrossCovSketch(5, dtype=torch.float64)
    other.load_state_dict(state)
    for grown in (sketch, other):
        grown.update(image, text + image)
    for unchanged in (state, copy.state_dict()):
        assert all(torch.equal(torch.as_tensor(unchanged[name]), value) for name, value in kept.items())


# Errors


def test_a_forks_updates_leave_the_first_alone():
    image, text = pairs(30)
    sketch = sketch_of(image[:20], text[:20], half_life=9.0)
    before = {name: value.clone() for name, value in sketch.state_dict().items() if name != "half_life"}
    fork = sketch.fork()
    fork.update(image[20:], text[20:])
    fork.merge(sketch)
    assert all(torch.equal(value, sketch.state_dict()[name]) for name, value in before.items())
    expected = sketch.clone()
    expected.update(image[20:], text[20:])
    expected.merge(sketch)
    assert_matches(fork, expected)
    fork.load_state_dict(sketch.state_dict())
    assert_matches(fork, sketch)


def test_errors_name_the_values_and_the_knob():
    with pytest.raises(ValueError, match=r"image_dim=0, text_dim=3"):
        CrossCovSketch(0, 3)
    for half_life in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"half_life={half_life} must be a positive number"):
            CrossCovSketch(3, half_life=half_life)
    sketch = CrossCovSketch(3, 4)
    with pytest.raises(ValueError, match=r"4 x 4 given to a sketch of 3 x 4"):
        sketch.update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"widths 3 x 3 into one of 3 x 4"):
        sketch.merge(CrossCovSketch(3))
    with pytest.raises(ValueError, match=r"half_life=5.0 into half_life=inf"):
        sketch.merge(CrossCovSketch(3, 4, half_life=5.0))
    with pytest.raises(ValueError, match=r"5 x 5 wide.* 3 x 4.*another embedder"):
        sketch.load_state_dict(CrossCovSketch(5).state_dict())
    state = sketch.state_dict()
    del state["weight_sq"]
    with pytest.raises(ValueError, match=r"lacks \['weight_sq'\]"):
        sketch.load_state_dict(state)


def test_ragged_rows_are_an_error_without_shape_checks_too():
    update = inspect.unwrap(CrossCovSketch.update)
    with pytest.raises(ValueError, match=r"same n; got \(2, 3\) and \(3, 3\)"):
        update(CrossCovSketch(3), torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        update(CrossCovSketch(3), torch.zeros(3), torch.zeros(3))


# Ranks

RANK_SIZES = ((9, 6), (5, 11), (0, 7))
"""Samples that rank 0 and rank 1 see in every update."""


def rank_batches():
    """For every update, each rank's (image, text, valid)."""
    image, text = pairs(sum(map(sum, RANK_SIZES)), 3, 4, dtype=torch.float32)
    valid = torch.arange(len(image)) % 5 != 0
    image[~valid] = math.nan
    sizes = [n for step in RANK_SIZES for n in step]
    flat = list(zip(image.split(sizes), text.split(sizes), valid.split(sizes), strict=True))
    return [flat[at : at + 2] for at in range(0, len(flat), 2)]


def run_rank(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    sketch = CrossCovSketch(3, 4, half_life=20.0)
    for step in rank_batches():
        sketch.update(*step[rank], all_reduce=lambda tensor: dist.all_reduce(tensor))
    torch.save(sketch.state_dict(), f"{folder}/{rank}.pt")
    leave_group()


def test_two_ranks_agree_bit_for_bit_and_with_one_process(tmp_path):
    code = f"import sys; sys.path[:] = {sys.path!r}; from test_sketch import run_rank; run_rank"
    port = free_port()
    calls = [f"{code}({rank}, {port}, {str(tmp_path)!r})" for rank in (0, 1)]
    ranks = [subprocess.Popen([sys.executable, "-c", call]) for call in calls]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(second[name])) for name in first)
    together, alone = CrossCovSketch(3, 4), CrossCovSketch(3, 4, half_life=20.0)
    together.load_state_dict(first)
    for step in rank_batches():
        alone.update(*(torch.cat(parts) for parts in zip(*step, strict=True)))
    assert int(together.num_samples) == int(alone.num_samples) > 0
    assert_matches(together, alone, 1e-5)


# What one update added, and sketches without covariances


def test_an_update_returns_its_own_pairs_moments():
    image, text = pairs(30, 3, 4)
    valid = torch.arange(30) % 4 != 1
    sketch = CrossCovSketch(3, 4, dtype=torch.float64)
    sketch.update(image[:10] + 3, text[:10])
    batch = sketch.update(image[10:], text[10:], valid[10:])
    expected = oracle.moments(image[10:][valid[10:]], text[10:][valid[10:]])
    assert float(batch.count) == int(valid[10:].sum())
    for name in ("image_mean", "text_mean", "cross_cov"):
        np.testing.assert_allclose(getattr(batch, name), getattr(expected, name), atol=1e-12)
    centres = torch.ones(3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    x, y = (rows[10:][valid[10:]].numpy() - 1 for rows in (image, text))
    np.testing.assert_allclose(batch.cross_cov_about(*centres), x.T @ y / len(x), atol=1e-12)


def test_an_update_without_valid_rows_has_no_moments():
    sketch = CrossCovSketch(3)
    batch = sketch.update(torch.ones(4, 3), torch.ones(4, 3), torch.zeros(4, dtype=torch.bool))
    assert not batch.cross_cov_about(torch.ones(3), torch.ones(3)).any()


def test_ranks_return_their_own_moments():
    """Two ranks by hand: each sum is what both put in."""
    image, text = pairs(12, 3, 3)
    sums = []
    for half in (slice(0, 5), slice(5, 12)):
        CrossCovSketch(3, dtype=torch.float64).update(
            image[half], text[half], None, lambda part: sums.append(part.clone())
        )
    first = sums[0] + sums[2]  # counts and sums of both ranks
    for half in (slice(0, 5), slice(5, 12)):
        batch = CrossCovSketch(3, dtype=torch.float64).update(
            image[half], text[half], None, lambda part: part.copy_(first) if part.shape == first.shape else None
        )
        expected = oracle.moments(image[half], text[half])
        np.testing.assert_allclose(batch.image_mean, expected.image_mean, atol=1e-12)
        np.testing.assert_allclose(batch.cross_cov, expected.cross_cov, atol=1e-12)


def test_covariances_can_be_left_out():
    image, text = pairs(20)
    whole, lean = (CrossCovSketch(5, dtype=torch.float64, half_life=9.0, covariances=c) for c in (True, False))
    for part in (slice(0, 12), slice(12, 20)):
        whole.update(image[part], text[part])
        lean.update(image[part], text[part])
    assert torch.equal(lean.cross_cov, whole.cross_cov) and torch.equal(lean.image_mean, whole.image_mean)
    with pytest.raises(AttributeError, match="covariances=False"):
        _ = lean.image_cov
    again = CrossCovSketch(5, dtype=torch.float64, covariances=False)
    again.load_state_dict(lean.state_dict())
    again.merge(lean.clone())
    assert not lean.state_dict().keys() & {"image_scatter", "text_scatter"}
    with pytest.raises(ValueError, match="covariances=False"):
        whole.merge(lean)


@pytest.mark.parametrize("rows", [40, 300])
def test_a_few_rows_stand_for_all_in_the_covariances(rows):
    image, text = pairs(3000)
    valid = torch.arange(3000) % 6 != 1
    whole, sparse = (CrossCovSketch(5, dtype=torch.float64, covariance_rows=most) for most in (None, rows))
    for sketch in (whole, sparse):
        sketch.update(image, text, valid)
    for name in ("cross_cov", "image_mean", "weight"):
        torch.testing.assert_close(getattr(sparse, name), getattr(whole, name))
    stride = 3000 // rows
    used = torch.arange(0, 3000, stride)
    used = used[valid[used]]
    x = image[used].numpy() - oracle.moments(image[valid], text[valid]).image_mean
    np.testing.assert_allclose(sparse.image_cov, x.T @ x / len(x), atol=1e-10)
    # Standard error of a covariance's entry: at most sqrt(2 / used) times the variances.
    assert float((sparse.text_cov - whole.text_cov).abs().max()) < 5 * math.sqrt(2 / len(used)) * float(
        whole.text_cov.diagonal().max()
    )
