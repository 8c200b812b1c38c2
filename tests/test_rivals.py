"""Every rival's rule, against what its paper says, written out in float64 NumPy or counted over many draws."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch

from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool
from clipcov_stream.rivals import MEMORY, NEEDS_LEARNER, RIVALS, jest, sem_dedup, vas
from clipcov_stream.selection import SELECTORS, select
from clipcov_stream.selector import Selector

SCALE, LEARNER_SCALE = 10.0, 5.0


def draw(n: int = 24, dim: int = 5, seed: int = 0, **named: Any) -> Pool:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, dim, generator=generator) for _ in range(4)]
    return Pool(rows[0], rows[0] + rows[1], SCALE, rows[2] + rows[0], rows[3] + rows[0], LEARNER_SCALE, **named)


def units(pool: Pool) -> list[np.ndarray]:
    return [oracle.unit(rows) for rows in (pool.image, pool.text, pool.learner_image, pool.learner_text)]


def chosen(selector: Any, pool: Pool, num: int = 6, state: SelectionState | None = None) -> list[int]:
    state = state or SelectionState.initial(pool.image.shape[1], Settings())
    return select(state, pool, num, SELECTORS.get(selector, selector))[1].tolist()


def best(score: np.ndarray, num: int = 6) -> list[int]:
    return np.argsort(-score, kind="stable")[:num].tolist()


def cosine(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    return (image * text).sum(1)


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_single_samples(seed: int) -> None:
    pool = draw(seed=seed)
    image, text, learner_image, learner_text = units(pool)
    margin = oracle.margin(image, text, SCALE)
    learner_margin = oracle.margin(learner_image, learner_text, LEARNER_SCALE)
    assert chosen("clip_score", pool) == best(cosine(image, text))
    assert chosen("neg_clip_loss", pool) == best(margin)
    assert chosen("rho", pool) == best(margin - learner_margin)
    assert chosen("c_rho", pool) == best(cosine(image, text) - cosine(learner_image, learner_text))


def test_vas_is_the_best_variance_alignment_of_the_better_half() -> None:
    pool = draw()
    image, text, *_ = units(pool)
    score = (image @ (image.T @ image / len(image)) * image).sum(1)
    half = np.argsort(-cosine(image, text))[:12]
    assert chosen("vas", pool) == [int(half[i]) for i in best(score[half])]
    assert chosen(functools.partial(vas, clip_gate=0.0), pool) == best(score)


# sem_dedup


def test_sem_dedup_takes_one_of_each_and_remembers() -> None:
    basis = torch.eye(8)
    pool = Pool(basis.repeat(3, 1), basis.repeat(3, 1))
    state = SelectionState.initial(8, Settings())
    state, survivors, *_ = select(state, pool, 8, sem_dedup)
    assert sorted(survivors.tolist()) == list(range(8))
    assert sorted(state.own["recent"].argmax(1).tolist()) == list(range(8))
    # All eight are known now, so of a pool that adds eight others, these are taken.
    fresh = torch.cat([basis, -basis])[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    survivors = select(state, Pool(fresh, fresh), 8, sem_dedup)[1]
    assert (fresh[survivors] <= 0).all()


def test_sem_dedup_draws_among_what_is_no_duplicate_and_eps_says_what_is() -> None:
    pool = draw(30, 6)
    image = units(pool)[0]
    closest = np.tril(image @ image.T, -1).max(1)
    open_ = set(np.flatnonzero(closest <= 0.5))
    draws = [set(chosen(functools.partial(sem_dedup, eps=0.5), pool, 4, state_of(seed))) for seed in range(20)]
    assert 4 < len(open_) < 30 and all(draw_ <= open_ for draw_ in draws)
    assert len(set().union(*draws)) > len(open_) / 2
    # Beyond those, the least close come first.
    more = chosen(functools.partial(sem_dedup, eps=0.5), pool, len(open_) + 3)
    rest = sorted(set(range(30)) - open_, key=lambda i: closest[i])
    assert more[len(open_) :] == rest[:3]


def state_of(seed: int, dim: int = 6) -> SelectionState:
    return SelectionState.initial(dim, Settings(seed=seed))


def test_the_memory_is_bounded() -> None:
    state = SelectionState.initial(5, Settings())
    for seed in range(4):
        state, *_ = select(state, draw(2000, seed=seed), 1500, sem_dedup)
    assert state.own["recent"].shape == (MEMORY, 5)


# jest


def loss_given(logits: np.ndarray, i: int, others: list[int]) -> float:
    """Contrastive loss of sample i with the others as its only negatives, both ways averaged."""
    by_image = np.log(sum(math.exp(logits[i, j]) for j in (i, *others)))
    by_text = np.log(sum(math.exp(logits[j, i]) for j in (i, *others)))
    return float(0.5 * (by_image + by_text) - logits[i, i])


@pytest.mark.parametrize("num", [6, 21])
def test_jest_topk_conditions_each_chunk_on_those_before(num: int) -> None:
    pool = draw()
    image, text, learner_image, learner_text = units(pool)
    reference, learner = SCALE * image @ text.T, LEARNER_SCALE * learner_image @ learner_text.T
    score = oracle.margin(image, text, SCALE) - oracle.margin(learner_image, learner_text, LEARNER_SCALE)
    expected: list[int] = []
    for size in (len(part) for part in np.array_split(np.arange(num), min(16, num))):
        if expected:
            score = np.array([loss_given(learner, i, expected) - loss_given(reference, i, expected) for i in range(24)])
        score[expected] = -np.inf
        expected += best(score, size)
    assert chosen("jest_topk", pool, num) == expected


def test_jest_draws_by_the_softmax_of_learnability() -> None:
    pool = draw(6)
    image, text, learner_image, learner_text = units(pool)
    score = oracle.margin(image, text, SCALE) - oracle.margin(learner_image, learner_text, LEARNER_SCALE)
    wanted = np.exp(score) / np.exp(score).sum()
    count = Counter(chosen("jest", pool, 1, state_of(seed, 5))[0] for seed in range(4000))
    for i in range(6):
        assert abs(count[i] / 4000 - wanted[i]) < 5 * math.sqrt(wanted[i] / 4000)
    # A cold draw is the best of each chunk.
    assert chosen(functools.partial(jest, temperature=1e-6), pool, 4) == chosen("jest_topk", pool, 4)


# high_loss


def test_high_loss_draws_by_percentile() -> None:
    pool = draw(6)
    _, _, learner_image, learner_text = units(pool)
    loss = -oracle.margin(learner_image, learner_text, LEARNER_SCALE)
    percentile = (np.argsort(np.argsort(loss)) + 0.5) / 6
    # A third survives: beta is 2. The first of two draws has these chances.
    wanted = percentile**2 / (percentile**2).sum()
    count = Counter(chosen("high_loss", pool, 2, state_of(seed, 5))[0] for seed in range(4000))
    for i in range(6):
        assert abs(count[i] / 4000 - wanted[i]) < 5 * math.sqrt(wanted[i] / 4000)


def test_high_loss_of_a_whole_pool_is_uniform() -> None:
    assert sorted(chosen("high_loss", draw(), 24)) == list(range(24))


# dissect


def test_dissect_takes_what_fell_most_below_its_own_history() -> None:
    first, second = draw(8, seed=1, ids=torch.arange(8)), draw(8, seed=2, ids=torch.arange(8).flip(0))
    state = SelectionState.initial(5, Settings())
    for pool in (first, second):
        state, *_ = select(state, pool, 3, RIVALS["dissect"])
    scores = [cosine(*units(pool)[2:]) for pool in (first, second)]
    history = 0.9 * scores[0] + 0.1 * scores[1][::-1]
    third = draw(8, seed=3, ids=torch.arange(8))
    assert chosen("dissect", third, 3, state) == best(history - cosine(*units(third)[2:]), 3)
    np.testing.assert_allclose(state.own["history"].numpy(), history, rtol=1e-5, atol=1e-6)


def test_dissect_without_history_is_a_draw_and_new_samples_stand_at_the_mean() -> None:
    pool = draw(10, ids=torch.arange(10))
    draws = {tuple(sorted(chosen("dissect", pool, 3, state_of(seed, 5)))) for seed in range(20)}
    assert len(draws) > 10
    state, *_ = select(SelectionState.initial(5, Settings()), pool, 3, RIVALS["dissect"])
    other = draw(4, seed=1, ids=torch.tensor([0, 1, 50, 51]))
    scores, now = cosine(*units(pool)[2:]), cosine(*units(other)[2:])
    fall = scores[:2] - now[:2]
    order = chosen("dissect", other, 4, state)
    assert order[0] == int(fall.argmax()) and order[3] == int(fall.argmin())


def test_dissect_without_ids_compares_with_the_embedder() -> None:
    pool = draw()
    assert sorted(chosen("dissect", pool)) == sorted(chosen("c_rho", pool))


# concept_balance


def test_concept_balance_equals_its_rule_step_by_step() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(20, 5, generator=generator).argsort(1)[:, :2]
    rows[::3, 1] = -1
    pool = draw(20, concepts=rows)
    tags = [[int(c) for c in row if c >= 0] for row in rows]
    total = Counter(c for row in tags for c in row)
    target = max(1.0, 8 * sum(total.values()) / 20 / len(total))
    count: Counter[int] = Counter()
    expected: list[int] = []
    for _ in range(8):

        def gain(i: int) -> float:
            worth = [(target - count[c]) / target + 1 / total[c] for c in tags[i] if count[c] < target]
            return sum(worth) / len(tags[i])

        left = [i for i in range(20) if i not in expected]
        # Ties go to the earlier sample, up to float32's rounding.
        new = max(left, key=lambda i: (round(gain(i), 5), -i))
        expected.append(new)
        count.update(tags[new])
    assert chosen("concept_balance", pool, 8) == expected


def test_concept_balance_counts_the_stream_and_evens_out_a_long_tail() -> None:
    concepts = torch.tensor([0] * 16 + [1] * 4 + [2] * 4)[:, None]
    state, survivors, *_ = select(
        SelectionState.initial(5, Settings()), draw(24, concepts=concepts), 9, RIVALS["concept_balance"]
    )
    assert Counter(concepts[survivors, 0].tolist()) == {0: 3, 1: 3, 2: 3}
    assert state.own["concept_count"].tolist() == [16, 4, 4]
    state, *_ = select(state, draw(24, concepts=concepts + 1), 9, RIVALS["concept_balance"])
    assert state.own["concept_count"].tolist() == [16, 20, 8, 4]
    with pytest.raises(ValueError, match=r"needs the pool's concepts: a tag column, stream\.columns\.concepts"):
        chosen("concept_balance", draw())


# All of them


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_what_needs_the_learner_says_so(name: str) -> None:
    concepts = torch.zeros(24, 1, dtype=torch.int64)
    alone = replace(draw(concepts=concepts), learner_image=None, learner_text=None, learner_logit_scale=None)
    if RIVALS[name] in NEEDS_LEARNER and name != "dissect":
        with pytest.raises(ValueError, match="needs learner_image"):
            chosen(name, alone)
    elif name != "dissect":
        assert chosen(name, alone) == chosen(name, draw(concepts=concepts))


@pytest.mark.parametrize("name", ["sem_dedup", "dissect", "concept_balance"])
def test_memories_resume(name: str) -> None:
    def pools(start: int) -> list[Pool]:
        generator = torch.Generator().manual_seed(start)
        return [
            draw(
                seed=seed,
                ids=torch.randint(30, (24,), generator=generator),
                concepts=torch.randint(9, (24, 2), generator=generator),
            )
            for seed in range(start, start + 2)
        ]

    straight, resumed = Selector(name), Selector(name)
    for pool in pools(0):
        straight(pool, 5)
    saved = straight.state_dict()
    assert saved["own"]
    resumed.load_state_dict(saved)
    for pool in pools(7):
        assert torch.equal(resumed(pool, 5), straight(pool, 5))
    for key, value in straight.state_dict()["own"].items():
        assert torch.equal(resumed.state_dict()["own"][key], value)


def test_knobs_of_a_rival_are_keyword_arguments() -> None:
    selector = Selector(functools.partial(sem_dedup, eps=0.3))
    selector(draw(), 5)
    assert selector.state is not None and len(selector.state.own["recent"]) == 5
