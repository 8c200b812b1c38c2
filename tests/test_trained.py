"""What was trained on: recent survivors one by one, and how often each sample of the data set."""

import contextlib
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from pools import after, assert_same_state, close, draw, trained_on

from clipcov_stream.evidence import matching
from clipcov_stream.graphed import of_state, with_values
from clipcov_stream.objective import (
    RECENT,
    SelectionState,
    Settings,
)
from clipcov_stream.pool import prepared
from clipcov_stream.selection import SELECTORS, learn, select


def test_a_survivor_that_comes_again_waits_until_others_had_their_turn():
    """The same pool again and again: novelty goes round, and without it the same survive every time."""
    pool = draw(64, 5, 1)
    rounds = {}
    for novelty in (0.0, 100.0):
        knobs, chosen = Settings(novelty=novelty, unevenness=0.0, gate=math.inf, recent=64), []
        state = SelectionState.initial(5, knobs)
        for _ in range(4):
            state, survivors, *_ = select(state, pool, 8)
            chosen += survivors.tolist()
        rounds[novelty] = len(set(chosen))
    assert rounds[0.0] < 20 and rounds[100.0] > 28


def test_recent_survivors_are_spaced_evenly_and_stand_for_all():
    settings = Settings(recent=16)
    state, steps = SelectionState.initial(3, settings), []
    for seed in range(10):
        pool = draw(20, 3, seed)
        state, survivors, *_ = select(state, pool, 5)
        steps.append([oracle.unit(rows)[survivors[:4:2]] for rows in (pool.image, pool.text)])
    for rows, side in ((state.recent_image, 0), (state.recent_text, 1)):
        # Two of five a step, the latest last; of ten steps the last eight.
        close(rows, np.concatenate([step[side] for step in steps[2:]]))
    assert state.recent_weight.tolist() == [2.5] * 16
    # As many as there are, where the places are more; the others stay empty.
    few = select(SelectionState.initial(3, Settings(recent=80)), draw(20, 3), 5).state
    assert few.recent_weight.tolist() == [0.0] * 75 + [1.0] * 5
    rivals = select(SelectionState.initial(3, settings), draw(20, 3), 5, SELECTORS["random"]).state
    assert not rivals.recent_weight.any()


def counting(pools, num_survivors, dataset_size=40, **knobs):
    """The state after pools of a data set of that size, and the ids trained on."""
    state, ids = SelectionState.initial(pools[0].image.shape[1], Settings(**knobs), dataset_size=dataset_size), []
    for pool in pools:
        state, survivors, *_ = select(state, pool, num_survivors)
        ids.append(pool.ids[survivors])
    return state, ids


def test_it_is_counted_how_often_each_sample_was_trained_on():
    pools = [replace(draw(20, 3, seed), ids=torch.randperm(40)[:20]) for seed in range(9)]
    state, ids = counting(pools, 5)
    assert state.times.tolist() == np.bincount(torch.cat(ids), minlength=40).tolist()
    # A sample that a step has twice is counted once: it is one step's gradient.
    twice, ids = counting([draw(20, 3)], 20)
    assert twice.times.tolist() == [int(number in ids[0]) for number in range(40)] and len(set(ids[0].tolist())) < 20
    # Ids beyond the data set, of any sign, share places.
    shared, ids = counting([replace(pool, ids=pool.ids * 2**40 - 7) for pool in pools[:1]], 5)
    assert shared.times.nonzero().squeeze(1).tolist() == sorted(set((ids[0] % 40).tolist()))
    full, _ = counting([draw(20, 3)], 20)
    full = replace(full, times=full.times.bool() * torch.tensor(255, dtype=torch.uint8))
    assert torch.equal(select(full, draw(20, 3), 20).state.times, full.times)


@pytest.mark.parametrize("without", ["knob", "size", "ids"])
def test_what_is_not_counted_changes_nothing(without):
    pools = [draw(20, 3, seed) for seed in range(4)]
    plain_, ids = counting(pools, 5, 0, repeats=math.inf)
    if without == "ids":
        got = SelectionState.initial(3, Settings(), dataset_size=40)
        for pool in pools:
            got = select(got, replace(pool, ids=None), 5).state
    else:
        got, others = counting(pools, 5, 40 if without == "knob" else 0, repeats=math.inf if without == "knob" else 2.0)
        assert all(map(torch.equal, ids, others))
    assert (
        len(got.times) == (40 if without == "ids" else 0)
        and not got.times.any()
        and "repeats" not in select(got, replace(pools[0], ids=None), 5).report
    )
    assert_same_state(replace(got, times=plain_.times), plain_)


def test_until_a_pair_wears_out_counting_changes_no_choice():
    pools = [replace(draw(20, 3, seed), ids=torch.arange(20) + 20 * (seed % 2)) for seed in range(6)]
    # Three passes: before the last nothing was trained on more often than `repeats`, 2.
    (_, ids), (_, others) = counting(pools, 5), counting(pools, 5, 0)
    assert all(map(torch.equal, ids, others))
    assert not all(map(torch.equal, counting(pools, 5, repeats=1.0)[1], others))
    assert not all(map(torch.equal, counting(pools * 4, 12)[1], counting(pools * 4, 12, 0)[1]))


def test_the_gate_reads_how_often_each_was_trained_on():
    """Survivors by the oracle: the most worth of those that have most left to give."""
    pool, knobs = draw(60, 5, 3), {"coverage": 0.0, "balance": 0.0, "novelty": 0.0, "learnability": 0.0, "gate": 0.8}
    pool = replace(pool, ids=torch.arange(60))
    state = SelectionState.initial(5, Settings(quality=1.0, **knobs), dataset_size=60)
    state = replace(state, times=torch.randint(0, 9, (60,), dtype=torch.uint8))
    selected, unit = select(state, pool, 9), prepared(pool)
    match = matching(unit, 4096)
    left = np.asarray(match.posterior(unit.valid), np.float64) / (1 + np.maximum(state.times.numpy() - 2.0, 0.0))
    order = np.lexsort((-match.score.numpy(), -left))
    num_open = math.ceil(0.8 * float(match.share) * 60)
    among = np.zeros(60, dtype=bool)
    among[order[:num_open]] = True
    want = np.argsort(-np.where(among, match.score.numpy(), -np.inf), kind="stable")[:9]
    assert 9 < num_open < 60 and selected.survivors.tolist() == want.tolist()
    assert float(selected.report["repeats"]) == pytest.approx(state.times.numpy()[want].mean())


def test_over_many_passes_every_pair_has_its_turn():
    pool = replace(draw(64, 5, 1), ids=torch.arange(64))
    trained = {}
    for repeats in (0.0, 2.0, math.inf):  # eight are open, those with most left
        chosen = torch.cat(counting([pool] * 120, 8, 64, repeats=repeats, gate=1e-6)[1]).unique()
        trained[repeats] = len(chosen)
    assert trained == {0.0: 64, 2.0: 64, math.inf: 8}


def test_counts_go_on_with_a_data_set_that_has_grown_or_shrunk():
    state, _ = counting([draw(20, 3, seed) for seed in range(3)], 5)
    saved = state.state_dict()
    for size in (30, 40, 55):
        fresh = SelectionState.initial(3, Settings(), dataset_size=size)
        dropped = state.times[size:].any()
        with pytest.warns(UserWarning, match="has 30 .dataset_size.") if dropped else contextlib.nullcontext():
            times = fresh.restored(saved).times
        assert dropped == (size == 30)
        assert times.tolist() == [*state.times.tolist(), *[0] * 15][:size]
    del saved["times"]
    with pytest.raises(ValueError, match=r"selection state lacks .'times'."):
        SelectionState.initial(3, Settings(), dataset_size=40).restored(saved)
    for fresh in (SelectionState.initial(3, Settings(repeats=math.inf), dataset_size=40), after([draw(20, 3)])):
        assert not len(fresh.restored(saved).times)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_type_are_counted(dtype):
    pool = draw(20, 3)
    (want, _), (got, _) = counting([pool], 5), counting([replace(pool, ids=pool.ids.to(dtype))], 5)
    assert torch.equal(got.times, want.times) and want.times.any()


@pytest.mark.parametrize("novelty", [0.0, 2.0])
def test_a_recording_reads_and_writes_all_that_is_remembered(novelty):
    """On a GPU a graph's state goes through a list of tensors: none may be left out."""
    state, other = (
        learn(counting([draw(20, 3, seed)], 8, novelty=novelty)[0], trained_on(seed, dim=3)) for seed in range(2)
    )
    assert not torch.equal(state.times, other.times)
    copied = with_values(replace(other, step=state.step), of_state(state))
    assert_same_state(copied, state)


def test_a_state_of_before_there_was_novelty_is_taken_without_it_alone():
    old = after([draw(20, 3)], novelty=0.0).state_dict()
    for name in RECENT:
        assert not len(old.pop(name))
    assert SelectionState.initial(3, Settings(novelty=0.0)).restored(old).step == 1
    with pytest.raises(ValueError, match=r"selection state lacks .'recent_image', 'recent_text', 'recent_weight'."):
        SelectionState.initial(3, Settings()).restored(old)
    with pytest.raises(ValueError, match=r"selection state holds 256 recent survivors, not selection.recent=64"):
        SelectionState.initial(3, Settings(recent=64)).restored(after([draw(20, 3)]).state_dict())
