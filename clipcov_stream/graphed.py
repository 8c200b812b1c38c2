"""`select` on a GPU as one launch: a CUDA graph.

Selection is some hundreds of short operations. Launched one by one from Python they take longer to launch than to run;
recorded once and replayed they take their own time. What is recorded is `select` itself, so there is nothing here to
agree with it: inputs are copied to where the recording reads them, and results out of it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipcov_stream.collectives import AllReduce
from clipcov_stream.objective import RECENT, SKETCHES, SelectionState
from clipcov_stream.pool import Pool
from clipcov_stream.rivals import SelectorFn, plain
from clipcov_stream.selection import Selected, clipcov, select
from clipcov_stream.sketch import STATE

OTHERS = ("lag", "lag_weight", *RECENT, "looks", "times")
"""What `clipcov` remembers beside its sketches."""

OF_POOL = ("ids", "valid", "thumbnail")
"""What `clipcov` reads of a pool beside embeddings, where there is any."""

WARMUP = 3
"""Pools selected from without a graph first: kernels compile and libraries make their handles, which no graph can
hold; and the shapes of a run's first steps are not always those of the rest."""


class GraphedSelect:
    """`select`, replayed from a CUDA graph where it can be: `clipcov`, on a GPU, in the main thread, with
    nothing to sum over ranks.

    Everything else, and the first WARMUP pools of any one size, goes to `select` itself. If recording fails it warns
    once and leaves it at that. Its kernels and their order are those of `select`.

    Costs: beside `select`, a copy of the pool's embeddings and of the state, with its counts of repeats, each way;
    memory for one recording, which keeps what `select` allocates, some four times the embeddings.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._calls = 0
        self._recording: Recording | None = None
        self._failed = False

    def __call__(
        self,
        state: SelectionState,
        pool: Pool,
        num_survivors: int,
        selector: SelectorFn = clipcov,
        all_reduce: AllReduce | None = None,
    ) -> Selected:
        """Arguments, result and errors as of `select`."""
        can = pool.image.is_cuda and plain(selector) is clipcov and all_reduce is None and pool.learner_image is None
        if self._failed or not (can and alone()):
            return select(state, pool, num_survivors, selector, all_reduce)
        # Only what it reads is copied for it.
        looks = pool.thumbnail if state.settings.copies > 0 else None
        pool = replace(pool, ids=state.places(pool.ids), concepts=None, thumbnail=looks)
        layouts = [(value.shape, value.dtype, value.device) for value in inputs_of(state, pool)]
        key = (state.settings, num_survivors, torch.get_float32_matmul_precision(), *layouts)
        if key != self._key:
            self._key, self._calls, self._recording = key, 0, None
        self._calls += 1
        if self._calls <= WARMUP:
            return select(state, pool, num_survivors, selector)
        if self._recording is None:
            try:
                self._recording = Recording.of(state, pool, num_survivors)
            except RuntimeError as error:
                warnings.warn(f"selection runs without a CUDA graph, and slower: {error}", stacklevel=2)
                self._failed = True
                return select(state, pool, num_survivors, selector)
        return self._recording.replayed(state, pool)


def alone() -> bool:
    """Whether this is the main thread: another would record while training allocates, which recording forbids."""
    return threading.current_thread() is threading.main_thread()


@dataclass(frozen=True)
class Recording:
    """`select` of one shape.

    Args:
        graph: replays it.
        inputs: where it reads; of the state, then of the pool.
        state, survivors, gain, figures: where it writes; the figures' values in the order of `names`.
    """

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    state: SelectionState
    survivors: Tensor
    gain: Tensor
    names: tuple[str, ...]
    figures: Tensor

    @classmethod
    def of(cls, state: SelectionState, pool: Pool, num_survivors: int) -> Recording:
        inputs = [value.clone() for value in inputs_of(state, pool)]
        own_state, own_pool = with_inputs(state, pool, inputs)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Only this thread's calls: a loader's thread may pin memory meanwhile, which the stricter mode forbids it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            after, survivors, report, gain = select(own_state, own_pool, num_survivors)
            figures = torch.stack([value.float() for value in report.values()])
        return cls(graph, inputs, after, survivors, gain, tuple(report), figures)

    def replayed(self, state: SelectionState, pool: Pool) -> Selected:
        copy_all(self.inputs, inputs_of(state, pool))
        self.graph.replay()
        sources = [*of_state(self.state), self.survivors, self.gain, self.figures]
        *values, survivors, gain, figures = copy_all([torch.empty_like(source) for source in sources], sources)
        after = replace(with_values(self.state, values), step=state.step + 1, rank=state.rank, own=state.own)
        return Selected(after, survivors, dict(zip(self.names, figures.unbind(), strict=True)), gain)


def of_state(state: SelectionState) -> list[Tensor]:
    """Every tensor that `clipcov` remembers, in an order of its own."""
    sketches = [getattr(getattr(state, sketch), name) for sketch in SKETCHES for name in STATE]
    rest = [getattr(state, name) for name in OTHERS]
    return [value for value in (*sketches, *rest) if value.numel()]


def with_values(state: SelectionState, values: Iterable[Tensor]) -> SelectionState:
    """The state with other tensors, in the order of `of_state`."""
    values = iter(values)
    sketches = {}
    for sketch in SKETCHES:
        sketches[sketch] = getattr(state, sketch).fork()
        for name in STATE:
            if getattr(sketches[sketch], name).numel():
                setattr(sketches[sketch], name, next(values))
    rest = [name for name in OTHERS if getattr(state, name).numel()]
    return replace(state, **sketches, **{name: next(values) for name in rest})


def inputs_of(state: SelectionState, pool: Pool) -> list[Tensor]:
    """All that `select` reads, on the pool's device: a number on the CPU would be recorded, and not read again."""
    scale, device = pool.logit_scale, pool.image.device
    if not (isinstance(scale, Tensor) and scale.device == device):
        scale = torch.full((), float(scale), dtype=torch.float32, device=device)  # written without a wait
    rest = [value.to(device) for name in OF_POOL if (value := getattr(pool, name)) is not None]
    return [*of_state(state), pool.image, pool.text, scale, *rest]


def with_inputs(state: SelectionState, pool: Pool, inputs: list[Tensor]) -> tuple[SelectionState, Pool]:
    """Inverse of `inputs_of`."""
    num = len(of_state(state))
    image, text, scale, *rest = inputs[num:]
    names = [name for name in OF_POOL if getattr(pool, name) is not None]
    own_pool = Pool(image, text, scale, **dict(zip(names, rest, strict=True)))
    return with_values(state, inputs[:num]), own_pool


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> list[Tensor]:
    """Copy every source to its target, those of one type in one launch; returns the targets."""
    kinds: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, from_ = kinds.setdefault(target.dtype, ([], []))
        to.append(target)
        from_.append(source)
    for to, from_ in kinds.values():
        torch._foreach_copy_(to, from_)
    return targets
