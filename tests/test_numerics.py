"""Pools as bad as they come: every selector has a defined result, and what it remembers stays finite."""

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch import Tensor

from clipcov_stream.lowrank import LowRankSketch
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool, prepared, survivors_of, with_learner
from clipcov_stream.rivals import MAX_CONCEPTS, concept_balance
from clipcov_stream.selection import SELECTORS, learn, select
from clipcov_stream.selector import Selector
from clipcov_stream.sketch import CrossCovSketch

DIM = 5
KINDS = {
    "normal": lambda rows, g: torch.randn(rows, DIM, generator=g),
    "zero variance in most dimensions": lambda rows, g: torch.cat(
        [torch.randn(rows, 1, generator=g), torch.ones(rows, DIM - 1)], 1
    ),
    "rank one": lambda rows, g: torch.randn(rows, 1, generator=g) @ torch.randn(1, DIM, generator=g),
    "all equal": lambda rows, g: torch.randn(1, DIM, generator=g).expand(rows, DIM).clone(),
    "two points": lambda rows, g: torch.randn(2, DIM, generator=g)[torch.arange(rows) % 2],
    "nearly equal": lambda rows, g: 1 + 1e-7 * torch.randn(rows, DIM, generator=g),
    "zeros": lambda rows, g: torch.zeros(rows, DIM),
    "far away": lambda rows, g: 1000 + torch.randn(rows, DIM, generator=g),
    "float16, near its end": lambda rows, g: (torch.randn(rows, DIM, generator=g).sign() * 60_000).half(),
    "float16, over its end": lambda rows, g: (torch.randn(rows, DIM, generator=g) * 60_000).half(),
    "bfloat16, huge": lambda rows, g: (torch.randn(rows, DIM, generator=g) * 1e38).bfloat16(),
    "float32, square overflows": lambda rows, g: torch.randn(rows, DIM, generator=g) * 1e25,
    "float64, beyond float32": lambda rows, g: torch.randn(rows, DIM, generator=g).double() * 1e200,
    "subnormal": lambda rows, g: torch.randn(rows, DIM, generator=g) * 1e-42,
    "NaN in half": lambda rows, g: spoilt(torch.randn(rows, DIM, generator=g), math.nan, rows // 2),
    "inf in one": lambda rows, g: spoilt(torch.randn(rows, DIM, generator=g), math.inf, 1),
    "NaN in all": lambda rows, g: torch.full((rows, DIM), math.nan),
}


def spoilt(rows: Tensor, value: float, num: int) -> Tensor:
    rows[:num, 0] = value
    return rows


def not_finite(value: Any, name: str = "") -> list[str]:
    """Names of the tensors in nested dicts that hold NaN or inf."""
    if isinstance(value, dict):
        return [bad for key, item in value.items() for bad in not_finite(item, f"{name}.{key}")]
    return [name] if isinstance(value, Tensor) and not bool(value.isfinite().all()) else []


@st.composite
def streams(draw: st.DrawFn) -> tuple[int, list[tuple[str, str, int]], int, float]:
    """Pool size, the kinds and seed of one to three pools, survivors, logit scale: a stream that jumps."""
    size = draw(st.sampled_from([1, 2, 3, 4, 7, 24]))
    kinds = st.sampled_from(sorted(KINDS))
    pools = draw(st.lists(st.tuples(kinds, kinds, st.integers(0, 99)), min_size=1, max_size=3))
    survivors = draw(st.sampled_from(sorted({1, max(1, size - 1), size, max(1, size // 4)})))
    return size, pools, survivors, draw(st.sampled_from([1e-3, 1.0, 100.0, 1e4]))


def pool_of(size: int, image: str, text: str, seed: int, scale: float) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    made = [KINDS[kind](size, generator) for kind in (image, text)]
    made = [rows.double() for rows in made] if "float64" in image + text else made
    learner = [torch.randn(size, 3, generator=generator) for _ in range(2)]
    if seed % 5 == 0:
        learner[0][0] = math.nan
    valid = None if seed % 3 else torch.rand(size, generator=generator) > 0.3
    concepts = torch.randint(-1, 4, (size, 2), generator=generator)
    given_ = {"learner_image": learner[0], "learner_text": learner[1], "learner_logit_scale": 50.0}
    return Pool(*made, scale, **given_, valid=valid, ids=torch.arange(size), concepts=concepts)


def check_stream(name: str, stream: tuple[int, list[tuple[str, str, int]], int, float], knobs: Settings) -> None:
    """No exception and nothing but finite numbers; survivors are distinct and valid wherever enough are."""
    size, pools, num_survivors, scale = stream
    state = SelectionState.initial(DIM, knobs)
    selector = Selector(name, settings=knobs)
    for image, text, seed in pools:
        pool = pool_of(size, image, text, seed, scale)
        valid = prepared(pool).valid
        assert valid is not None
        after, survivors, report, gain = select(state, pool, num_survivors, SELECTORS[name])
        assert int(report["num_invalid"]) == int((~valid).sum())
        assert not_finite({"state": after.state_dict(), "report": report}) == []
        if int(valid.sum()) < num_survivors:
            before = selector.state_dict()
            with pytest.raises(RuntimeError, match=r"only \d+ of the pool's \d+ samples can be used"):
                selector(pool, num_survivors)
            assert selector.state_dict().get("step", 0) == before.get("step", 0)  # as if the pool had not come
            continue
        assert len(set(survivors.tolist())) == num_survivors and bool(valid[survivors].all())
        assert bool(gain.isfinite().all()) if name == "clipcov" else bool(gain.isnan().all())
        assert torch.equal(selector(pool, num_survivors), survivors)
        learner = torch.randn(num_survivors, 3, generator=torch.Generator().manual_seed(seed))
        odd = {0: math.nan, 1: math.inf}.get(seed % 7, 100.0)
        state = learn(after, with_learner(survivors_of(pool, survivors), learner, learner, odd))
        selector.learned(learner, learner, odd)
        assert not_finite({"state": state.state_dict()}) == []


KNOBS = st.sampled_from(
    [
        Settings(),
        Settings(half_life=1e-3),
        Settings(half_life=10.0, gate=1e-6, quality=1.0),
        Settings(gate=math.inf, ridge=1e-6, references=2),
        Settings(balance=0.0, quality=5.0, learnability=5.0, overshoot=100.0, memory=0.0),
    ]
)
QUIET = settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("name", sorted(SELECTORS))
@QUIET
@given(stream=streams(), knobs=KNOBS)
@example((7, [("float64, beyond float32", "normal", 1), ("normal", "normal", 1)], 3, 100.0), Settings())
@example((1, [("zeros", "all equal", 1), ("normal", "zeros", 2)], 1, 100.0), Settings())
@example(
    (24, [("all equal", "all equal", 1), ("far away", "normal", 2), ("normal", "NaN in half", 4)], 23, 1.0), Settings()
)
@example(
    (24, [("zeros", "all equal", 1), ("rank one", "inf in one", 67)], 1, 1e-3),
    Settings(gate=math.inf, ridge=1e-6, references=2),
)
def test_any_pool_has_a_defined_result(name: str, stream: Any, knobs: Settings) -> None:
    check_stream(name, stream, knobs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(SELECTORS))
@settings(QUIET, max_examples=500)
@given(stream=streams(), knobs=KNOBS)
def test_any_pool_has_a_defined_result_at_length(name: str, stream: Any, knobs: Settings) -> None:
    check_stream(name, stream, knobs)


@QUIET
@given(
    st.lists(st.tuples(st.sampled_from(sorted(KINDS)), st.integers(0, 99)), min_size=1, max_size=4), st.integers(1, 9)
)
def test_sketches_of_any_stream_are_the_exact_moments_and_finite(kinds: list[tuple[str, int]], rows: int) -> None:
    sketch, low = CrossCovSketch(DIM, half_life=20.0), LowRankSketch(DIM, rank=2, half_life=20.0)
    images, texts, sizes = [], [], []
    for kind, seed in kinds:
        generator = torch.Generator().manual_seed(seed)
        ready = prepared(Pool(KINDS[kind](rows, generator), KINDS[kind](rows, generator)))
        assert ready.valid is not None
        sketch.update(ready.image, ready.text, ready.valid)
        low.update(ready.image[ready.valid], ready.text[ready.valid])
        images.append(ready.image[ready.valid].numpy())
        texts.append(ready.text[ready.valid].numpy())
        sizes.append(int(ready.valid.sum()))
    assert not_finite(sketch.state_dict()) == [] and not_finite(low.state_dict()) == []
    if sum(sizes) == 0:
        assert not bool(sketch.cross_cov.any())
        return
    weights = oracle.half_life_weights(sizes, 20.0)
    exact = oracle.moments(np.concatenate(images), np.concatenate(texts), weights)
    np.testing.assert_allclose(sketch.cross_cov.numpy(), exact.cross_cov, atol=2e-6)
    np.testing.assert_allclose(sketch.image_cov.numpy(), exact.image_cov, atol=2e-6)


def test_large_float16_rows_are_valid_and_what_float32_cannot_square_is_not() -> None:
    rows = torch.tensor([[60_000.0, -60_000.0], [1.0, 0.0], [math.inf, 0.0], [math.nan, 0.0]]).half()
    ready = prepared(Pool(rows, torch.ones(4, 2)))
    assert ready.valid is not None and ready.valid.tolist() == [True, True, False, False]
    torch.testing.assert_close(ready.image[0], torch.tensor([0.5, -0.5]).sqrt().nan_to_num(-(0.5**0.5)))
    wide = torch.tensor([[1e18, 1e18], [1e20, 0.0], [3e38, 3e38]])
    ready = prepared(Pool(wide, torch.ones(3, 2)))
    assert ready.valid is not None and ready.valid.tolist() == [True, False, False]


def test_a_concept_index_that_no_table_holds_is_an_error() -> None:
    concepts = torch.tensor([[0], [1 << 60], [2], [1]])
    pool = prepared(Pool(torch.randn(4, DIM), torch.randn(4, DIM), concepts=concepts))
    with pytest.raises(ValueError, match=rf"concept {1 << 60} is too large an index.*to {MAX_CONCEPTS - 1}"):
        concept_balance(pool, 2, SelectionState.initial(DIM, Settings()))
