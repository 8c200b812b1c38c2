"""One step's data work: a pool -> survivors made ready to train on.

A function of the pool, the step and the selection state before it; nothing here reads the model in training (but for
`embed="teacher"` and the selectors that ask it) or moves Composer's clock. So it gives the same survivors whether it
runs in the training thread or ahead of it, in one of its own. An online proxy alone keeps something from pool to pool,
and a thread has one of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from composer.core import Precision, State
from composer.core.precision import get_precision_context
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipcov_stream.batch import Normalize, check_batch, count_survivors, normalizing, rows_of, trained_on
from clipcov_stream.clock import Stopwatch
from clipcov_stream.collectives import AllReduce
from clipcov_stream.copies import THUMBNAIL, thumbnails
from clipcov_stream.embed import EMBED_PRECISIONS, Embeddings, embed_from_columns, embed_with_towers, rows_at_once
from clipcov_stream.fused import brought
from clipcov_stream.graphed import GraphedSelect
from clipcov_stream.lags import Lag
from clipcov_stream.materialize import Made, Materializer
from clipcov_stream.objective import SelectionState, Settings, mix, random_survivors
from clipcov_stream.online import OnlineProxy, Part, learning_weights, parts_in_turn
from clipcov_stream.pool import Pool, SharedCounts, as_rows, like, survivors_of, whole_numbers
from clipcov_stream.ranks import Gathering, Group, Placement, Shares, gathered, sum_over_ranks, travelling
from clipcov_stream.rivals import SelectorFn, concept_balance, plain
from clipcov_stream.selection import SELECTORS, clipcov


@dataclass(frozen=True)
class Ticket:
    """What the training thread says of a step before its pool may be prepared.

    Args:
        step: number of the step.
        selects: whether it selects; if not, survivors are random, and nothing is embedded but what an online proxy
            learns from.
        lag: that its selection reads, where the lag is kept up; None is a lag of zeros.
    """

    step: int
    selects: bool
    lag: Lag | None = None


@dataclass(frozen=True)
class Prepared:
    """A step's survivors, ready to train on, and what the step leaves behind.

    Args:
        step: number of the step.
        batch: this rank's survivors; images are as the loader leaves them.
        ids: theirs, where the pool has ids.
        gains: what each gained when it was picked, float32 on the CPU; NaN where nothing did (`selection.Selected`).
        pool_size: per rank.
        num_invalid: samples that could not be used, of this rank's pool or, with scope="global", of all ranks'.
        selection: the state after selection; None if the step did not select.
        survivors: the embedder's rows of the survivors chosen, where the lag is kept up.
        shares: who trains which of them, with scope="global".
        figures: of the step, by metric.
        alignment: cosine of each candidate's image and caption, float32 on the CPU, where it is noted.
        online: state of the online proxy that has learned from the pool, if a thread has one of its own.
    """

    step: int
    batch: dict[str, Any]
    ids: Tensor | None
    gains: Tensor
    pool_size: int
    num_invalid: int
    selection: SelectionState | None
    survivors: Pool | None
    shares: Shares | None
    figures: dict[str, float]
    alignment: Tensor | None = None
    online: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        """Survivors per rank."""
        return len(next(iter(self.batch.values())))


class ReadyPool(dict[str, Tensor]):
    """What a loader that runs ahead yields for a pool: its ids, which Composer counts, and its survivors."""

    def __init__(self, ids: Tensor, prepared: Prepared) -> None:
        super().__init__(id=ids)
        self.prepared = prepared


@dataclass(frozen=True)
class Chosen:
    """Survivors of a pool, by number, on the CPU, and what they leave behind; arguments as in `Prepared`."""

    index: Tensor
    gain: Tensor
    num_invalid: int
    selection: SelectionState | None = None
    survivors: Pool | None = None
    figures: dict[str, float] | None = None


@dataclass(frozen=True)
class Preparation:
    """Prepares pools; arguments as `ClipCov`'s, and:

    Args:
        state: Composer's, for the device, the precision and, where a selector asks it, the model.
        embedder: the teacher's or proxy's model; None for columns.
        online: the proxy that learns from pools once it has embedded them, if any.
        uses_learner: whether the model in training embeds pools too.
        uses_lag: whether survivors' rows are kept for the lag.
        notes_alignment: whether candidates' alignments are kept.
        selecting: `select`, in the form that is fast where the pool is.
        shared_counts: warns of ids beyond the data set.
        dataset_size: samples of the data set, whose ids are below that; 0 if not known.
        saved: the selection state of a checkpoint, to begin from.
        loader: that the pools are of.
        materialize: makes tensors of encoded survivors.
        group: of processes, for collectives.
    """

    state: State
    function: SelectorFn
    settings: Settings
    scope: str
    filter_ratio: float
    embed: str
    embedder: nn.Module | None
    online: OnlineProxy | None
    logit_scale: float
    embed_chunk: int | None
    embed_resolution: int | None
    embed_precision: str | None
    embed_patch_dropout: float | None
    image_key: str
    text_key: str
    uses_learner: bool
    uses_lag: bool
    notes_alignment: bool
    selecting: GraphedSelect
    shared_counts: SharedCounts
    dataset_size: int = 0
    saved: Mapping[str, Any] | None = None
    loader: Any = None
    materialize: Materializer | None = None
    group: Group = None

    def __call__(self, batch: Any, ticket: Ticket, before: SelectionState | None) -> Prepared:
        """A step's survivors.

        A survivor that turns out to be undecodable is marked invalid, and survivors are chosen anew from the same
        state: on all ranks, if on one.

        Args:
            batch: the loader's, one pool.
            ticket: of the step.
            before: the selection state before it; None before the first that selects.
        """
        device = self.state.device
        batch = check_batch(batch, self.image_key)
        pool_size = len(batch[self.image_key])
        num_chosen = count_survivors(pool_size, self.filter_ratio)
        chunk = self.embed_chunk or num_chosen
        valid = batch["valid"] if "valid" in batch else torch.ones(pool_size, dtype=torch.bool)
        placement = None
        if self.scope == "global":
            if self._ids(batch) is None:
                raise ValueError(
                    "selection.scope='global' needs 'id' in the batch, a tensor of whole numbers; it has "
                    f"{sorted(batch)}"
                )
            placement = Placement.of(device.tensor_to_device(batch["id"]), self.group)
            num_chosen *= dist.get_world_size()
        pool, embed_ms, alignment = None, None, None
        if ticket.selects:
            pool, embed_ms, alignment = self._embedded(batch, chunk, valid, placement)
        elif self.online is not None:  # which learns, and for that judges, whatever is made of it
            _, embed_ms, _ = self._embedded(batch, chunk, valid, placement, selects=False)
        if placement is not None:
            valid = placement.whole(device.tensor_to_device(valid)).cpu()
        made: Made = {}
        while True:
            if pool is None:
                chosen = self._at_random(valid, num_chosen, ticket.step)
            else:
                pool = replace(pool, valid=device.tensor_to_device(valid))
                chosen = self._select(pool, num_chosen, ticket, before)
            rows, shares = self._rows(batch, chosen.index, placement, pool_size)
            rows, failed = self._made(rows, shares, num_chosen, made)
            if failed is None:
                break
            bad = chosen.index[failed]
            anew = valid[bad].any().to(torch.int64).reshape(1)
            if placement is None and dist.get_world_size() > 1:
                sum_over_ranks(anew := device.tensor_to_device(anew), self.group)
            if not int(anew):
                break
            valid = valid.index_fill(0, bad, False)
        figures = dict(chosen.figures or {})
        if embed_ms is not None:
            figures["embed_ms"] = embed_ms()
        ids = rows.pop("id", None)
        gains = chosen.gain if shares is None else chosen.gain[shares.of_rank(dist.get_global_rank())]
        left = (chosen.num_invalid, chosen.selection, chosen.survivors)
        return Prepared(ticket.step, rows, ids, gains, pool_size, *left, shares, figures, alignment)

    def _at_random(self, valid: Tensor, num_chosen: int, step: int) -> Chosen:
        rank = dist.get_global_rank() if self.scope == "local" else 0
        generator = torch.Generator().manual_seed(mix(self.settings.seed, step, rank))
        index = random_survivors(valid, num_chosen, generator)
        return Chosen(index, torch.full((num_chosen,), math.nan, dtype=torch.float32), int((~valid).sum()))

    def _select(self, pool: Pool, num_chosen: int, ticket: Ticket, before: SelectionState | None) -> Chosen:
        if before is None:
            rank, width = dist.get_global_rank() if self.scope == "local" else 0, pool.image.shape[1]
            before = SelectionState.initial(width, self.settings, rank, pool.image.device, self.dataset_size)
            if self.saved:
                before = before.restored(dict(self.saved))
        state = replace(before, step=ticket.step)
        if self.uses_lag:
            state = with_lag(state, ticket.lag)
        with Stopwatch(self.state) as watch:
            all_reduce = all_reduce_of(self.scope, self.group)
            after, index, report, gain = self.selecting(state, pool, num_chosen, self.function, all_reduce)
        survivors = survivors_of(pool, index) if self.uses_lag else None
        # Read together: each by itself would wait for the device.
        values = torch.cat([torch.stack([value.float() for value in report.values()]), gain.float()])
        bits = torch.cat([values.view(torch.int32), index.int()]).cpu()
        values, index = bits[: len(values)].view(torch.float32), bits[len(values) :].long()
        figures = dict(zip(report, values.tolist(), strict=False))
        num_invalid = int(figures.pop("num_invalid"))
        figures["select_ms"] = watch.milliseconds()
        return Chosen(index, values[len(report) :].clone(), num_invalid, after, survivors, figures)

    def _rows(
        self, batch: Mapping[str, Any], index: Tensor, placement: Placement | None, pool_size: int
    ) -> tuple[dict[str, Any], Shares | None]:
        """This rank's survivors' rows, still encoded where the pool is, and who trains which."""
        rows = trained_on(batch, self.image_key, self.text_key)
        if "id" in batch:
            rows["id"] = batch["id"]
        if placement is None:
            return {key: rows_of(value, index) for key, value in rows.items()}, None
        origin = placement.origin.index_select(0, brought(index, placement.origin.device))
        shares = Shares.of(origin.tolist(), pool_size, dist.get_world_size(), self.group)
        return shares.exchange(rows, placement.origin.device), shares

    def _made(
        self, rows: dict[str, Any], shares: Shares | None, num_chosen: int, made: Made
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The rows as tensors, and which of the survivors chosen turned out to be undecodable; None if all came whole.

        The latter of this rank's own, or, where survivors are all ranks', of all.
        """
        if not self._encoded(rows):
            return rows, None
        assert self.materialize is not None
        tensors, failed = self.materialize(rows, made)
        if shares is not None:
            everywhere = torch.zeros(num_chosen, dtype=torch.int64)
            everywhere[shares.of_rank(dist.get_global_rank())] = failed.long()
            sum_over_ranks(everywhere := self.state.device.tensor_to_device(everywhere), self.group)
            failed = everywhere.cpu() > 0
        others = {key: value for key, value in rows.items() if key != "augmentation"}
        return {**others, **tensors}, failed

    def _encoded(self, batch: Mapping[str, Any]) -> bool:
        return self.materialize is not None and not isinstance(batch[self.image_key], Tensor)

    def _embedded(
        self,
        batch: Mapping[str, Any],
        chunk: int,
        valid: Tensor,
        placement: Placement | None,
        selects: bool = True,
    ) -> tuple[Pool, Callable[[], float], Tensor | None]:
        """The pool's embeddings, or all ranks', a function that tells how many milliseconds they took, and this rank's
        candidates' alignments where they are noted."""
        device = self.state.device
        sending: list[Gathering] = []  # the images' embeddings, which travel while captions are read

        @functools.cache
        def pixels() -> tuple[Tensor, Normalize | None]:
            """On the device, where they are brought once."""
            return self._pixels(batch)

        @functools.cache
        def pictures() -> Tensor:
            """Thumbnails of what the embedder reads."""
            image = pixels()[0]
            if image.ndim != 4 or image.shape[1] != 3:
                raise ValueError(
                    f"selection.copies={self.settings.copies} looks at images of shape (n, 3, height, width), not "
                    f"{tuple(image.shape)}: set selection.copies=0"
                )
            return thumbnails(image)

        def send(images: Tensor) -> None:
            sending.append(Gathering(travelling(images), self.group))

        def towers(model: nn.Module, learner: bool = False) -> Embeddings:
            (image, normalize), text = pixels(), self._tokens(batch)
            if learner:
                precision = get_precision_context(self.state.precision, self.state.precision_config)
                return embed_with_towers(model, image, text, chunk, precision, plain=True, normalize=normalize)
            rows = self.embed_chunk or rows_at_once(model, image, chunk)
            options: dict[str, Any] = {"normalize": normalize}
            options |= {"resolution": self.embed_resolution, "patch_dropout": self.embed_patch_dropout}
            options["on_images"] = None if placement is None else send
            return embed_with_towers(model, image, text, rows, self._precision(), **options)

        with Stopwatch(self.state) as watch:
            if self.embed == "columns":
                image, text, scale = embed_from_columns(batch, "image_embedding", "text_embedding", self.logit_scale)
                # As they are stored: float16 is half as much to move.
                image, text = device.tensor_to_device(image).float(), device.tensor_to_device(text).float()
            elif self.embedder is None:
                raise RuntimeError("ClipCov has no embedder: was FIT_START skipped?")
            else:
                image, text, scale = towers(self.embedder)
            named = {"valid": valid, "ids": self._ids(batch), "concepts": self._concepts(batch)}
            if selects and self.settings.copies > 0 and plain(self.function) is clipcov:
                # Of what the embedder reads; with columns nothing is decoded, and a thumbnail is a column or not there.
                reads = self.embed != "columns"
                named["thumbnail"] = pictures() if reads else self._thumbnails(batch)
            on_device = {key: device.tensor_to_device(value) for key, value in named.items() if value is not None}
            pool = Pool(image, text, scale, **on_device)
            alignment = F.cosine_similarity(image.float(), text.float()) if self.notes_alignment else None
            if self.uses_learner and selects:
                learner_image, learner_text, learner_scale = towers(unwrap(self.state.model), learner=True)
                pool = replace(
                    pool, learner_image=learner_image, learner_text=learner_text, learner_logit_scale=learner_scale
                )
            if placement is not None:
                pool = placement.whole_pool(pool, *sending)
            if self.online is not None:
                shown = pictures() if self.online.pictures is not None else None
                self._teach(self.online, *pixels(), self._tokens(batch), valid, pool, placement, shown)
        return pool, watch.milliseconds, None if alignment is None else alignment.cpu()

    def _pixels(self, batch: Mapping[str, Any]) -> tuple[Tensor, Normalize | None]:
        """The images that the embedder reads, on the device, and what they still need."""
        image = batch.get("scoring_image", batch[self.image_key])
        if not isinstance(image, Tensor) and self.materialize is None:
            raise ValueError(
                f"selection.embed={self.embed!r} reads the batch's {self.image_key!r} (image_key) as a tensor of "
                f"images, not {like(image)}: stack them in the DataLoader's collate_fn, or use embed='columns'"
            )
        if not isinstance(image, Tensor):
            raise ValueError(
                f"selection.embed={self.embed!r}, embed_resolution={self.embed_resolution}: the stream leaves "
                "candidates encoded and has no images for the proxy; set stream.deferred=false, or give the data set a "
                "scoring_size, which is that resolution or an online proxy's image_size"
            )
        return self.state.device.tensor_to_device(image), normalizing(self.loader, image)

    def _teach(
        self,
        online: OnlineProxy,
        image: Tensor,
        normalize: Normalize | None,
        text: Tensor,
        valid: Tensor,
        pool: Pool,
        placement: Placement | None,
        pictures: Tensor | None,
    ) -> None:
        """Have the online proxy learn from this rank's pool, or its share of all ranks', in parts of as many as are
        trained on. Not in float16, whose gradients would need a scale.

        Args:
            image, normalize, text, valid: this rank's, as for `OnlineProxy.learn`.
            pool: as the embedder saw it; with a placement of all ranks.
            pictures: thumbnails of the images, where copies are counted.
        """
        half = self.state.precision == Precision.AMP_FP16 if self.embed_precision is None else False
        half = half or self.embed_precision == "amp_fp16"
        rows = count_survivors(len(valid), self.filter_ratio)
        recurs = None if pictures is None else self._recurring(online, pictures, valid, placement)
        weights = learning_weights(pool, self.settings.references, online.passes, recurs)
        if placement is None:
            parts = parts_in_turn(len(valid), rows)
        else:
            # At random: the order of ids may be that of subjects.
            generator = torch.Generator().manual_seed(mix(self.settings.seed, online.updates))
            order = torch.randperm(len(placement.origin), generator=generator)
            parts = [Part(*own) for own in placement.own_of(order.split(rows * dist.get_world_size()))]
            weights = placement.own_rows(weights)
        precision = nullcontext if half else self._precision
        width = pool.image.shape[1]
        online.learn(image, text, valid.cpu(), weights, parts, width, precision, normalize, self.group)

    def _recurring(self, online: OnlineProxy, pictures: Tensor, valid: Tensor, placement: Placement | None) -> Tensor:
        """`OnlineProxy.recurring` of the pool that is learned from: this rank's, or, with a placement, all ranks'."""
        own = pictures.masked_fill(~brought(valid, pictures.device)[:, None], 0.0)
        if placement is not None:
            return online.recurring(placement.whole(own))
        at = dist.get_global_rank() * len(own)
        return online.recurring(gathered(own, self.group))[at : at + len(own)]

    def _tokens(self, batch: Mapping[str, Any]) -> Tensor:
        text = batch.get(self.text_key)
        if not isinstance(text, Tensor):
            raise ValueError(
                f"selection.embed={self.embed!r} reads the batch's {self.text_key!r} (text_key) as a tensor of tokens, "
                f"not {type(text).__name__}"
            )
        return text

    def _ids(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The samples' numbers in the data set; None where the pool has none, or keys of another kind."""
        ids = batch.get("id")
        if not (isinstance(ids, Tensor) and ids.ndim == 1 and not ids.is_floating_point()):
            return None
        self.shared_counts.check(ids, self.dataset_size)
        return ids

    def _thumbnails(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The column of them; raises ValueError for what is none."""
        if (given := batch.get("thumbnail")) is None:
            return None
        looks = as_rows("the batch's 'thumbnail'", given)
        if looks.ndim != 2 or looks.shape[1] != THUMBNAIL:
            raise ValueError(
                f"selection.copies={self.settings.copies} reads the batch's 'thumbnail' as (n, {THUMBNAIL}) numbers, "
                f"clipcov_stream.copies.thumbnails of the images, not {tuple(looks.shape)}: set selection.copies=0"
            )
        return looks

    def _concepts(self, batch: Mapping[str, Any]) -> Tensor | None:
        """The samples' concepts, for a selector that may read them: elsewhere the key is a user's own."""
        function, concepts = plain(self.function), batch.get("concepts")
        if concepts is None or (function in SELECTORS.values() and function is not concept_balance):
            return None
        if function is concept_balance:
            return whole_numbers("the batch's 'concepts'", concepts)
        return concepts if isinstance(concepts, Tensor) else None

    def _precision(self) -> AbstractContextManager[Any]:
        """Of the embedder's pass. Composer's own contexts do nothing on a CPU."""
        if self.embed_precision is None:
            return get_precision_context(self.state.precision, self.state.precision_config)
        dtype = EMBED_PRECISIONS[self.embed_precision]
        device = self.state.device.name.replace("gpu", "cuda")
        return torch.autocast(device, dtype, enabled=dtype != torch.float32)


PASSED_ON = tuple(
    name
    for name in Preparation.__annotations__
    if name not in ("state", "embedder", "online", "selecting", "saved", "loader", "materialize", "group")
)
"""Of a Preparation's arguments, those that `ClipCov` has under the same names."""


def with_lag(state: SelectionState, lag: Lag | None) -> SelectionState:
    """The state with another lag; None is one of zeros."""
    if lag is None:
        return replace(state, lag=torch.zeros_like(state.lag), lag_weight=torch.zeros_like(state.lag_weight))
    return replace(state, lag=lag[0].to(state.lag), lag_weight=lag[1].to(state.lag_weight))


def all_reduce_of(scope: str, group: Group = None) -> AllReduce | None:
    """What sums over ranks, if each has pools of its own."""
    return functools.partial(sum_over_ranks, group=group) if scope == "local" and dist.get_world_size() > 1 else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel."""
    return model.module if isinstance(model, DistributedDataParallel) else model
