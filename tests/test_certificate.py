"""The certificate: how well survivors preserve the cross-covariance, beside random ones."""

import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from pools import after, close, draw

from clipcov_stream.objective import (
    SelectionState,
    Settings,
    certificate,
)
from clipcov_stream.pool import Pool, prepared
from clipcov_stream.selection import SELECTORS, select
from clipcov_stream.selector import Selector
from clipcov_stream.sketch import CrossCovSketch


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
