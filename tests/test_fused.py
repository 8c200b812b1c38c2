"""Functions that are compiled on a GPU: that each can be, whole, and then does what it says; and work aside."""

import copy
import inspect
import warnings

import pytest
import torch

from clipcov_stream import evidence, fused, herding, objective, pool, sketch

POOL, SURVIVORS, DIM, REFS = 96, 24, 8, 16


def drawn(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


VALID = torch.arange(POOL) % 7 != 2
COUNTS = [torch.tensor(float(number), dtype=torch.float64) for number in (5, 5, 7, 3, 3)]
CASES = {
    pool.row_norms: (drawn(POOL, DIM),),
    pool.unit_rows: (drawn(POOL, DIM).bfloat16(), drawn(POOL).abs() + 1, VALID),
    sketch.centred: (drawn(POOL, DIM), drawn(DIM), VALID),
    sketch.centred_sum: (drawn(POOL, DIM), drawn(DIM), None),
    sketch.appended: (
        *COUNTS[:2],
        torch.tensor(5),
        *COUNTS[2:],
        torch.tensor(3),
        *[drawn(DIM)] * 4,
        1e4,
        *[drawn(DIM, DIM)] * 6,
    ),
    herding.fused_dots: (drawn(POOL, DIM), drawn(POOL, DIM)),
    herding.slack_of: (
        *[drawn(SURVIVORS)] * 5,
        drawn(POOL),
        VALID,
        drawn(DIM, DIM),
        drawn(DIM, DIM),
        0.5,
        torch.tensor(float(SURVIVORS - 1)),
    ),
    herding.bound_of: (
        drawn(POOL).abs(),
        drawn(POOL),
        drawn(POOL),
        VALID,
        drawn(DIM, DIM),
        drawn(DIM, DIM),
        torch.tensor(0.1),
        1.0,
        torch.tensor(float(SURVIVORS)),
    ),
    objective.standardize: (drawn(POOL), VALID),
    herding.squares_about: (drawn(POOL, DIM), drawn(DIM)),
    objective.certified: (
        *[drawn(DIM, DIM)] * 4,
        drawn(POOL).abs(),
        drawn(POOL).abs(),
        drawn(POOL),
        VALID,
        COUNTS[0],
        COUNTS[2],
        SURVIVORS,
    ),
    evidence.beside: (
        drawn(POOL, DIM),
        drawn(REFS, DIM),
        torch.zeros(REFS),
        drawn(REFS),
        torch.arange(0, POOL, 6),
        0,
    ),
    evidence.num_reaching: (drawn(POOL, REFS), drawn(POOL)),
    evidence.exposed: (
        drawn(POOL, DIM),
        drawn(POOL, DIM) + 1,
        drawn(POOL).abs(),
        drawn(REFS, DIM),
        drawn(REFS, DIM) + 1,
        drawn(REFS),
        drawn(REFS) + 1,
    ),
    evidence.resemblance: (
        drawn(POOL, DIM),
        drawn(DIM),
        drawn(REFS, DIM),
        torch.ones(REFS),
        torch.arange(0, POOL, 6),
        0,
    ),
}


@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_every_fused_function_compiles_whole_and_agrees(function, monkeypatch):
    """Traced in one piece; the code for a GPU is another compiler's, and tested on one."""
    compiled = torch.compile(inspect.unwrap(function), fullgraph=True, dynamic=False, backend="aot_eager")
    expected = function(*copy.deepcopy(CASES[function]))
    monkeypatch.setattr(sketch, "FREE_SYNC", frozenset())  # as on a GPU: numbers stay tensors
    torch.testing.assert_close(compiled(*copy.deepcopy(CASES[function])), expected, rtol=1e-4, atol=1e-4)


def test_the_forms_for_a_gpu_do_what_those_for_a_cpu_do():
    for start in (0, 40, 90):
        one, other = (drawn(POOL, REFS) for _ in range(2))
        evidence.hide_own(one, start, torch.arange(0, POOL, 6), -7.0)
        evidence.hide_by_mask(other, start, torch.arange(0, POOL, 6), -7.0)
        assert torch.equal(one, other)
    table, threshold = drawn(POOL, REFS), drawn(POOL)
    assert torch.equal(evidence.num_by_mask(table, threshold), evidence.num_reaching(table, threshold))


def test_all_of_them_are_tried():
    modules = (evidence, herding, objective, pool, sketch)
    found = {
        value
        for module in modules
        for value in vars(module).values()
        if hasattr(value, "__wrapped__") and getattr(value, "__code__", None) is pool.unit_rows.__code__
    }
    assert {function.__name__ for function in found} == {function.__name__ for function in CASES}


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    """Said once."""

    class OnDevice:
        is_cuda = True

    def refuse(*args, **kwargs):
        def call(*args):
            raise RuntimeError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    double = fused.fused(lambda value, times: (value, times))
    value = OnDevice()
    with pytest.warns(UserWarning, match="runs uncompiled, and slower: no compiler here$"):
        assert double(value, 2) == (value, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert double(value, 3) == (value, 3)


def test_work_aside_runs_when_it_is_waited_for():
    found = []
    wait = fused.aside(lambda: found.append(1) or "done", torch.device("cpu"))
    assert found == [] and wait() == "done" and found == [1]
