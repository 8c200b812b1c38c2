"""Selector: selection for any training loop."""

from __future__ import annotations

from dataclasses import replace
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcov_stream.arguments import no_less_than, whole_number
from clipcov_stream.collectives import AllReduce, gathered, ranks_of
from clipcov_stream.graphed import GraphedSelect
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.pool import Pool, SharedCounts, survivors_of, with_learner
from clipcov_stream.rivals import SelectorFn, plain
from clipcov_stream.selection import checked_count, clipcov, learn, reads_lag, resolve

if TYPE_CHECKING:
    from jaxtyping import Float, Int64


class Selector:
    """Selection for any training loop: holds the state that `select` returns.

    Args:
        name: a name in SELECTORS, or a function of the same signature.
        seed: of everything random; `settings.seed` if not given.
        settings: the knobs, with the defaults of `Settings`.
        rank: of this process, if each rank draws its own pools; with `all_reduce` each must have its own.
        all_reduce: sums a tensor over ranks in place, if there are several.
        dataset_size: samples of the data set, which `Pool.ids` number from 0, the same on all ranks: `clipcov` then
            counts how often it trained on each (`Settings.repeats`). 0: not known, every pair is as good as new.

    Raises:
        ValueError: a name that is not in SELECTORS, or another argument outside its range.

    >>> import torch
    >>> selector = Selector("clipcov", seed=0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> pool = Pool(image=torch.randn(16, 4, generator=generator), text=torch.randn(16, 4, generator=generator))
    >>> selector(pool, num_survivors=4).shape
    torch.Size([4])
    """

    def __init__(
        self,
        name: str | SelectorFn = "clipcov",
        seed: int | None = None,
        *,
        settings: Settings | None = None,
        rank: int = 0,
        all_reduce: AllReduce | None = None,
        dataset_size: int = 0,
    ) -> None:
        self.function = resolve(name)
        if not isinstance(settings, (Settings, NoneType)):
            raise ValueError(f"settings={settings!r} must be a Settings, as Settings(gate=2.0)")
        self.settings = settings or Settings()
        if seed is not None:
            self.settings = replace(self.settings, seed=seed)
        self.rank = whole_number("rank", rank, "the number of this process", lambda number: True)
        self.all_reduce = all_reduce
        samples = "a number of samples, 0 if it is not known"
        dataset_size = whole_number("dataset_size", dataset_size, samples, no_less_than(0))
        self.dataset_size = dataset_size if plain(self.function) is clipcov else 0
        self.state: SelectionState | None = None
        self.report: dict[str, Tensor] = {}
        self.gain: Tensor | None = None
        self._select = GraphedSelect()
        self._shared_counts = SharedCounts()
        self._survivors: Pool | None = None
        self._pending: dict[str, Any] | None = None

    @torch.no_grad()
    def __call__(self, pool: Pool, num_survivors: int) -> Int64[Tensor, " survivors"]:
        """Indices of the survivors, in the order chosen; `report` then holds the step's figures, `gain` what each
        survivor gained when it was picked (`selection.Selected`).

        Raises:
            ValueError: as `select`; with `all_reduce`, ranks that share a number, or differ in dataset_size.
            RuntimeError: fewer valid candidates than survivors, on all ranks if on one; the state is as it was.
        """
        num_survivors = checked_count(num_survivors, len(pool))
        before = self._state_for(pool)
        if pool.ids is not None:
            self._shared_counts.check(pool.ids, self.dataset_size)
        state, survivors, report, gain = self._select(before, pool, num_survivors, self.function, self.all_reduce)
        num_valid = len(pool) - int(report["num_invalid"])
        num_short = int(num_valid < num_survivors)
        if self.all_reduce is not None:
            self.all_reduce(short := torch.tensor([float(num_short)], device=pool.image.device))
            num_short = int(short)
        if num_short:
            others = f"; on this rank, {num_short} ranks have too few" if self.all_reduce is not None else ""
            raise RuntimeError(
                f"only {num_valid} of the pool's {len(pool)} samples can be used, {num_survivors} are needed: "
                f"{int(report['num_invalid'])} are undecodable or have a NaN or inf embedding{others}"
            )
        self.state, self.report, self.gain = state, report, gain
        self._survivors = survivors_of(pool, survivors) if reads_lag(self.function, self.settings) else None
        return survivors

    def learned(self, image: Float[Tensor, "n dim"], text: Float[Tensor, "n dim"], logit_scale: float | Tensor) -> None:
        """Tell what the learner made of the last survivors, once it has embedded them to train on them.

        `clipcov` then favours what is not learned yet; without this call it selects without that. The rows are the
        survivors' in the order returned, of any width; `logit_scale` is the learner's, exponentiated. Call it before
        the next pool is selected from, and with `all_reduce` on every rank. Where nothing needs it, for a rival or with
        learnability 0, it does nothing.

        Raises:
            ValueError: another number of rows than there were survivors.
        """
        if self._survivors is not None:
            seen = with_learner(self._survivors, image, text, logit_scale)
            self.state, self._survivors = learn(self._state_for(seen), seen, self.all_reduce), None

    def _state_for(self, pool: Pool) -> SelectionState:
        """The state, where the pool is; if there is none yet, the one that was loaded, or a fresh one of the pool's
        width."""
        if self.state is not None and self.state.lag.device != pool.image.device:
            self.state, self._pending = None, self.state.state_dict()
        if self.state is None:
            device = pool.image.device
            if self.all_reduce is not None:  # what draws would draw alike on ranks of one number, and say nothing
                ranks, _ = ranks_of(0, device, self.all_reduce)
                own = torch.tensor([self.dataset_size], dtype=torch.float64, device=device)
                sizes = gathered([own], self.rank, ranks, self.all_reduce)[0].tolist()
                if len(set(sizes)) > 1:
                    raise ValueError(f"dataset_size must be the same on all ranks, not {[int(size) for size in sizes]}")
            self.state = SelectionState.initial(
                pool.image.shape[1], self.settings, self.rank, device, self.dataset_size
            )
            if self._pending is not None:
                self.state, self._pending = self.state.restored(self._pending), None
        return self.state

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; empty before the first pool."""
        if self.state is None:
            return dict(self._pending or {})
        rows = self._survivors
        waiting = {} if rows is None else {"image": rows.image, "text": rows.text, "logit_scale": rows.logit_scale}
        return {**self.state.state_dict(), "survivors": waiting, "made_by": self._made_by()}

    def _made_by(self) -> dict[str, Any]:
        function = plain(self.function)
        return {"selector": getattr(function, "__name__", type(function).__name__), "seed": self.settings.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. Errors about widths come with the next pool if this is the first.

        Raises:
            ValueError: the state of another selector, or of one with another seed.
        """
        for name, own in self._made_by().items():
            theirs = state.get("made_by", {}).get(name, own)  # older states do not say
            if theirs != own:
                raise ValueError(f"the state is of a Selector with {name}={theirs!r}, this one has {name}={own!r}")
        waiting = state.get("survivors") if state else None
        survivors = Pool(**waiting) if waiting else None
        if not state:
            self.state, self._pending = None, None
        elif self.state is None:
            self._pending = state
        else:
            self.state = self.state.restored(state)
        self._survivors = survivors  # last: a state that is refused changes nothing
