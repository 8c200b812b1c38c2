"""Pools drawn for tests of selection, and what two states are compared by."""

from dataclasses import replace

import numpy as np
import oracle
import torch

from clipcov_stream.objective import RECENT, SKETCHES, SelectionState, Settings
from clipcov_stream.pool import Pool
from clipcov_stream.rivals import NEEDS_LEARNER
from clipcov_stream.selection import SELECTORS, select

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
    """Every tensor and number of a state dict by its path."""
    items = {}
    for name, value in state.items():
        if isinstance(value, str):
            continue
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


def trained_on(seed, n=8, dim=4):
    """Survivors as the embedder and the learner, of another width, see them."""
    rows = draw(n, dim, seed)
    learner = draw(n, dim + 2, seed + 50)
    return replace(rows, learner_image=learner.image, learner_text=learner.text, learner_logit_scale=5.0)


def exposure_of(state, image, text, centres):
    """The oracle's, of rows of which the centres are not taken off yet."""
    recent = [np.asarray(getattr(state, name), np.float64) for name in RECENT]
    rows = (part - centre for part, centre in zip((image, text, *recent[:2]), (*centres, *centres), strict=True))
    return oracle.log_exposure(*rows, recent[2])
