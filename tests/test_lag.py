"""The lag: what the learner makes of its survivors, and who reads it."""

from dataclasses import replace
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from pools import NAMES, after, close, draw, rows_of, trained_on

from clipcov_stream.herding import along
from clipcov_stream.objective import (
    LAG_DECAY,
    Frame,
    SelectionState,
    Settings,
)
from clipcov_stream.pool import Pool, prepared
from clipcov_stream.selection import SELECTORS, learn, reads_lag, select
from clipcov_stream.selector import Selector


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
