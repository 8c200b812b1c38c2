"""What ranks remember together, when all that they have is a sum: each is a thread with a Selector of its own."""

import threading
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pools import assert_same_state, close, draw

from clipcov_stream.objective import LAG_DECAY, SelectionState, Settings
from clipcov_stream.selection import SELECTORS, select
from clipcov_stream.selector import Selector
from clipcov_stream.trained import from_digits, in_digits


def on_ranks(num_ranks, work):
    """What `work(rank, all_reduce)` returns on every rank; each is a thread."""
    barrier, slots, results = threading.Barrier(num_ranks), [None] * num_ranks, [None] * num_ranks

    def run(rank):
        def all_reduce(tensor):
            slots[rank] = tensor.clone()
            barrier.wait(30)
            total = sum(slots)
            barrier.wait(30)
            tensor.copy_(total)

        try:
            results[rank] = work(rank, all_reduce)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("name", ["clipcov", "random"])
@pytest.mark.parametrize("numbers", [[0, 0], [1, 2], [1, 1, 1], [-1, 0], [1, 1, 2, 2, 3, 6], [0, 0, 3, 4, 4, 5, 5]])
def test_ranks_without_a_number_of_their_own_are_refused(name, numbers):
    def work(rank, all_reduce):
        return Selector(name, rank=numbers[rank], all_reduce=all_reduce)(draw(16, 4, rank), 4)

    for number, error in zip(numbers, on_ranks(len(numbers), work), strict=True):
        assert isinstance(error, ValueError) and f"rank={number} with an all_reduce over {len(numbers)}" in str(error)


@pytest.mark.parametrize("name", ["clipcov", "sem_dedup"])
def test_what_ranks_remember_needs_their_numbers_too(name):
    def work(rank, all_reduce):
        state = SelectionState.initial(4, Settings(), rank=0)
        return select(state, draw(16, 4, rank), 4, SELECTORS[name], all_reduce)

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError) and "rank=0 with an all_reduce over 2 ranks" in str(error)


def test_sem_dedup_remembers_ranks_of_other_numbers_of_survivors():
    def work(rank, all_reduce):
        selector = Selector("sem_dedup", rank=rank, all_reduce=all_reduce)
        return selector(draw(12, 4, rank), 2 + 2 * rank), selector.state.own["recent"]

    (few, rows), (many, others) = on_ranks(2, work)
    assert torch.equal(rows, others)
    # Three of each in the mean.
    places = [few[[0, 0, 1]], many[[0, 1, 2]]]
    want = [oracle.unit(draw(12, 4, rank).image)[of] for rank, of in enumerate(places)]
    close(rows, np.concatenate(want))


def test_of_many_ranks_some_stand_for_all():
    # 16 / 8 places a step for 5 ranks: two of these speak, others at the next step.
    def work(rank, all_reduce):
        selector = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=Settings(recent=16))
        found = []
        for step in range(5):
            rows = draw(12, 4, 5 * step + rank)
            found.append(oracle.unit(rows.image)[selector(rows, 3)[0]])
        return selector.state, found

    results = on_ranks(5, work)
    state = results[0][0]
    for other, _ in results[1:]:
        assert_same_state(state, other)
    speak = [[0, 2], [1, 3], [2, 4], [3, 0], [4, 1]]
    assert state.recent_weight.tolist() == [0.0] * 6 + [7.5] * 10
    close(state.recent_image[6:], [results[rank][1][step] for step in range(5) for rank in speak[step]])


def test_ranks_may_have_other_numbers_of_survivors():
    def work(rank, all_reduce):
        selector = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=Settings(recent=32))
        return selector(draw(12, 4, rank), 2 + 2 * rank), selector.state

    (few, state), (many, other) = on_ranks(2, work)
    assert_same_state(state, other)
    # Three of each in the mean, but places for two: they stand for two and for four.
    assert state.recent_weight.tolist() == [0.0] * 28 + [1.0, 1.0, 2.0, 2.0]
    want = [oracle.unit(draw(12, 4, rank).text)[of] for rank, of in enumerate((few, many[[0, 2]]))]
    close(state.recent_text[-4:], np.concatenate(want))


@pytest.mark.parametrize("novelty", [0.0, 3.0])
def test_ranks_count_what_all_of_them_trained_on(novelty):
    def work(rank, all_reduce):
        settings = Settings(recent=32, novelty=novelty)
        selector, ids = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=settings, dataset_size=99), []
        for step in range(3):
            pool = replace(draw(12, 4, 3 * step + rank), ids=33 * rank + torch.arange(12) + step)
            ids.append(pool.ids[selector(pool, 4)])
        return selector.state, torch.cat(ids)

    results = on_ranks(3, work)
    for state, _ in results[1:]:
        assert_same_state(results[0][0], state)
    every = torch.cat([ids for _, ids in results])
    assert results[0][0].times.tolist() == np.bincount(every, minlength=99).tolist()


def test_ranks_with_other_numbers_of_survivors_count_the_same_and_a_sample_of_two_ranks_once():
    def work(rank, all_reduce):
        selector = Selector("clipcov", rank=rank, all_reduce=all_reduce, dataset_size=9)
        pool = replace(draw(12, 4, rank), ids=torch.arange(12) % 9)
        return selector(pool, 3 + 4 * rank), selector.state

    (few, state), (many, other) = on_ranks(2, work)
    assert_same_state(state, other)
    # Five of each in the mean, evenly spaced: two of the three twice.
    chosen = {*(few[[0, 0, 1, 1, 2]] % 9).tolist(), *(many[[0, 1, 2, 4, 5]] % 9).tolist()}
    assert state.times.tolist() == [int(number in chosen) for number in range(9)]


@pytest.mark.parametrize("without", [{0}, {1, 2}, {0, 1, 2}])
def test_a_rank_whose_pools_have_no_ids_keeps_no_other_waiting_and_has_its_survivors_uncounted(without):
    def work(rank, all_reduce):
        selector = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=Settings(recent=32), dataset_size=99)
        pool = replace(draw(12, 4, rank), ids=33 * rank + torch.arange(12))
        survivors = selector(replace(pool, ids=None) if rank in without else pool, 4)
        return selector.state, pool.ids[survivors].tolist()

    results = on_ranks(3, work)
    for state, _ in results[1:]:
        assert_same_state(results[0][0], state)
    known = {number for rank, (_, ids) in enumerate(results) if rank not in without for number in ids}
    assert results[0][0].times.tolist() == [int(number in known) for number in range(99)]


def test_ranks_must_know_of_the_same_data_set():
    def work(rank, all_reduce):
        return Selector("clipcov", rank=rank, all_reduce=all_reduce, dataset_size=99 + rank)(draw(12, 4, rank), 4)

    for error in on_ranks(2, work):
        assert isinstance(error, ValueError) and "dataset_size must be the same on all ranks, not [99, 100]" in str(
            error
        )


@given(st.lists(st.integers(-1, 2**38 - 1), min_size=1))
def test_numbers_travel_exactly(numbers):
    digits = in_digits(torch.tensor(numbers))
    assert {part.dtype for part in digits} == {torch.float32} and from_digits(*digits).tolist() == numbers


def test_ranks_share_sketches_and_lag_but_not_survivors():
    def work(rank, all_reduce):
        selector = Selector("clipcov", rank=rank, all_reduce=all_reduce, settings=Settings(recent=32))
        for step in range(2):
            survivors = selector(draw(16, 4, 2 * step + rank), 4)
            learner = draw(4, 6, 2 * step + rank)
            selector.learned(learner.image, learner.text, 5.0)
        return selector.state, survivors

    results = on_ranks(2, work)
    (first, chosen), (second, others) = results
    assert_same_state(first, second)
    assert int(first.stream.num_samples) == 64 and int(first.kept.num_samples) == 16
    assert float(first.lag_weight) == pytest.approx(8 * (1 + LAG_DECAY)) and first.lag.any()
    assert not torch.equal(chosen, others)
    # Two of four survivors of each rank a step, in the ranks' order, each for two.
    assert first.recent_weight.tolist() == [0.0] * 24 + [2.0] * 8
    last = [oracle.unit(draw(16, 4, 2 + rank).text)[of[[0, 2]]] for rank, of in enumerate((chosen, others))]
    close(first.recent_text[-4:], np.concatenate(last))
    rows = [draw(16, 4, seed) for seed in range(4)]
    expected = oracle.moments(*(oracle.unit(torch.cat([getattr(p, f) for p in rows])) for f in ("image", "text")))
    close(first.stream.cross_cov, expected.cross_cov)


@pytest.mark.parametrize("name", ["clipcov", "sem_dedup"])
def test_too_few_on_one_rank_are_too_few_on_all(name):
    def work(rank, all_reduce):
        selector = Selector(name, rank=rank, all_reduce=all_reduce)
        pools = [draw(16, 4, 10 * rank + step) for step in range(3)]
        if rank:
            pools[1].image[:14] = torch.nan
        errors = []
        for pool in pools:
            try:
                selector(pool, 4)
            except RuntimeError as error:
                errors.append(str(error))
        return errors, selector.state

    (_, state), (said, other) = on_ranks(2, work)
    assert len(said) == 1 and said[0].startswith("only 2 of the pool's 16 samples can be used, 4 are needed")
    assert state.step == other.step == 2
    close(state.stream.cross_scatter, other.stream.cross_scatter)
    assert int(state.stream.num_samples) == 4 * 16
