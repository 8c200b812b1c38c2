"""ClipCov: online selection as a Composer Algorithm.

Only wiring and metrics: what is chosen is decided in `selection`, on embeddings from `embed`. It selects at
AFTER_DATALOADER, the last moment at which Composer still trains what it is given; at BEFORE_TRAIN_BATCH the batch is
already split and a selection would be ignored in silence. At AFTER_FORWARD it notes what the model made of its
survivors, or at AFTER_LOSS, if it has to ask the model again.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from composer.core import Algorithm, Event, State
from composer.core.precision import get_precision_context
from composer.loggers import Logger
from torch import Tensor, nn

from clipcov_stream.ahead import Ahead, check_ahead
from clipcov_stream.arguments import no_less_than, real_number, whole_number
from clipcov_stream.batch import (
    check_batch,
    check_last_pool,
    checked_ratio,
    count_survivors,
    ids_in,
    inputs_of,
    normalizing,
    num_drawn,
    size_of,
)
from clipcov_stream.clock import Stopwatch, check_foreseen, in_warmup, num_pools, outlasts, parse_warmup, steps_later
from clipcov_stream.embed import (
    IN_TRAINING,
    Proxy,
    Teacher,
    check_embedder,
    check_precision,
    check_towers,
    embed_with_towers,
    scale_in,
    scale_of,
)
from clipcov_stream.graphed import GraphedSelect
from clipcov_stream.identity import check_same_run, fingerprint, name_of
from clipcov_stream.lags import Lags
from clipcov_stream.objective import SelectionState, Settings
from clipcov_stream.online import OnlineProxy
from clipcov_stream.patches import towers_with_patches
from clipcov_stream.pool import Pool, SharedCounts, with_learner
from clipcov_stream.pool_sizes import PoolSizes
from clipcov_stream.prepare import PASSED_ON, Preparation, Prepared, ReadyPool, Ticket, all_reduce_of, unwrap, with_lag
from clipcov_stream.ranks import (
    SCOPES,
    Group,
    Shares,
    on_all_ranks,
    on_every_rank,
    own_group,
    share_buffers,
)
from clipcov_stream.rivals import NEEDS_LEARNER, NEEDS_NO_EMBEDDING, SelectorFn, plain
from clipcov_stream.selection import clipcov, learn, reads_lag, resolve
from clipcov_stream.tally import Tally
from clipcov_stream.towers import SmallTowers

SOFT_START = 0.5
"""Of `ClipCov`, with an embedder in training; measured in tools/LOG.md."""

ONLINE_WIDTH = 16
"""Channels of the first convolution of an online proxy that nobody gave."""

HARD_WARMUP = "100ba"
"""Of selection that would trust an embedder in training from the first step on."""

POSITIVE = "a finite number above 0", lambda value: 0 < value < math.inf
STEPS = "at least 0 steps", no_less_than(0)
NUMBERS: dict[str, tuple[Callable[..., Any], str, Callable[[float], bool]]] = {
    "proxy_lr": (real_number, *POSITIVE),
    "logit_scale": (real_number, *POSITIVE),
    "embedder": (whole_number, "`identity.fingerprint` of the columns' model, or null", math.isfinite),
    "embed_chunk": (whole_number, "at least 1, or null", no_less_than(1)),
    "embed_resolution": (whole_number, "at least 1 pixel, or null", no_less_than(1)),
    "embed_patch_dropout": (real_number, "in [0, 1), or null", lambda value: 0 <= value < 1),
    "run_ahead": (whole_number, *STEPS),
    "lag_delay": (whole_number, *STEPS),
    "dataset_size": (whole_number, "a number of samples, 0 if it is not known, or None", no_less_than(0)),
}
"""What each of these arguments must be."""

MAY_BE_NONE = ("embedder", "embed_chunk", "embed_resolution", "embed_patch_dropout", "dataset_size")


def checked(name: str, value: Any) -> Any:
    """One of NUMBERS as Python's own; raises ValueError, naming it, for what it must not be."""
    if value is None and name in MAY_BE_NONE:
        return None
    kind, must, holds = NUMBERS[name]
    return kind(f"selection.{name}", value, must, holds)


class ClipCov(Algorithm):
    """Trains on the survivors of every candidate pool: samples that match, are rare and preserve the cross-covariance.

    The loader's batch is the pool; the model sees `num_survivors` of it. Composer's clock, and so `max_duration` in
    samples or epochs, counts candidates (samples_streamed); use `ba` durations. `device_train_microbatch_size` must be
    the number of survivors per rank, because a contrastive loss is wrong on parts of a batch.

    Args:
        filter_ratio: fraction of every pool that is discarded, in [0, 1).
        embed: where embeddings come from: "online" (a small model, `proxy`, that judges pools and learns from all of
            them, nothing to download: `online.OnlineProxy`), "teacher" (moving average of the model in training),
            "proxy" (a frozen model) or "columns" (they come with the pool: no forward pass).
        selector: a name in SELECTORS, or a function of that signature; with an attribute `reads_lag = True` the lag is
            kept up for it as for clipcov.
        warmup: steps before selection begins, as a Composer time ("100ba", "0.05dur"); survivors are random until then.
            None is "100ba" with an embedder in training (teacher, online), and none with a soft start or another.
        soft_start: share of the matching pairs that the embedder must tell from chance before all survivors are chosen;
            with less, some are random in proportion (`start.num_places`), so that selection begins when the embedder is
            ready. None is SOFT_START for embedders in training, and 0 for others. For clipcov alone, and not with a
            `gate` that asks for no evidence, inf.
        half_life: of the sketch, in samples streamed over all ranks; None is inf for columns and proxy, whose
            embeddings do not change, and 20 pools for the teacher and an online proxy, whose do.
        coverage, learnability, gate, balance, unevenness, novelty, copies, recent, repeats, quality, overshoot, memory,
            ridge, references: see `selection.Settings`. The lag behind learnability comes from the training pass: from
            the model's outputs, if they have `image_features`, `text_features` and `logit_scale` as open_clip's do, and
            else from one more forward pass over the survivors.
        seed: of everything random in selection.
        scope: with several ranks, "local": each selects from its own pool, against sketches of all ranks' pools.
            "global": embeddings are gathered (as bfloat16) for one choice from the pools of all ranks, of which each
            trains an equal share; survivors and, up to the order of sums, weights are then the same on any number of
            ranks (but for an online proxy's batch norm, whose statistics are a rank's own). It needs the samples' `id`,
            and reads the survivors' numbers back from the device once a step, with an online proxy the pool's too.
        proxy: model with `encode_image`, `encode_text` and `logit_scale`, for embed="proxy" and, to be trained from
            whatever weights it has, "online"; for that None is `towers.SmallTowers`, ONLINE_WIDTH channels wide, which
            gets images at 64 pixels.
        proxy_lr: learning rate of an online proxy.
        teacher_momentum: of the moving average, per step; of an online proxy's, per update.
        logit_scale: of the columns' model, exponentiated; CLIP models end near 100.
        embedder: a number that names the columns' model, `identity.fingerprint` of it; a checkpoint of columns of
            another one is refused.
        embed_chunk: rows per forward pass of the embedder, or of the learner; None is the number of survivors.
        embed_resolution: side in pixels of the images that the embedder sees, to spend less on candidates that are not
            trained on (Flexi-JEST: Evans et al., NeurIPS 2024, arXiv 2406.17711, sec. 4.3). None: as they come; an
            online proxy has a size of its own. At a proxy's size, if that is smaller than the learner's, a recipe's
            stream then decodes candidates (`PairDataset.scoring_size`: the middle of each image), and survivors alone
            in full.
        embed_patch_dropout: share of an image's patches, evenly spread, that the embedder does not look at; for
            open_clip's image transformers (FLIP: Li et al., CVPR 2023, arXiv 2212.00794). None: it looks at all.
        embed_precision: of the embedder's pass: "fp32", "amp_fp16" or "amp_bf16"; None is the Trainer's. A warning says
            where the device has no instructions for it, as most CPUs without AVX-512 have none for bfloat16.
        run_ahead: steps by which a thread prepares survivors ahead of training, for columns and proxies; 0 prepares
            none. Survivors and weights are the same at any number, if an online proxy draws no random numbers (and, on
            GPUs over ranks, up to the order in which its gradients are summed). It needs a loader from
            `stream.pool_loader`, and memory for that many batches and selection states more, and for `run_ahead` + 2
            times an online proxy's weights, average and moments.
        lag_delay: steps that a lag waits before selection reads it, at least `run_ahead` if learnability is above 0.
            Unlike that one it changes survivors.
        max_invalid_ratio: share of the samples streamed that may be undecodable or have non-finite embeddings. The run
            stops once they exceed it by more than three standard errors, so that a bad start is no reason to. Of pools
            that travel encoded, undecodable images are found, and counted, among those chosen alone.
        dataset_size: samples of the data set, which the pools' `id` number from 0, so that it can be counted how often
            each was trained on (`repeats`), a byte each; None asks the loader's data set (`num_samples`, or its
            length), and where that has none, ranks' data sets differ in it, or pools have no `id`, nothing is counted.
            An online proxy takes it for the length of a pass (`online.learning_weights`), with or without `id`; of
            ranks' data sets that differ in it the sum. Where all ranks have data sets of their own and of one size,
            give it their sum.
        image_key, text_key: of the pool's dict. `image_embedding`, `text_embedding`, `id`, `concepts`, `thumbnail` and,
            as a bool mask, `valid` are read where they exist, and not passed on to the model; see `Pool`.

    Raises:
        ValueError: a value outside its range, here or at the start of training.
    """

    def __init__(
        self,
        filter_ratio: float = 0.8,
        embed: str = "online",
        selector: str | SelectorFn = "clipcov",
        warmup: str | int | None = None,
        half_life: float | None = None,
        coverage: float = Settings.coverage,
        learnability: float = Settings.learnability,
        seed: int = 0,
        *,
        scope: str = "local",
        gate: float = Settings.gate,
        balance: float = Settings.balance,
        unevenness: float = Settings.unevenness,
        quality: float = Settings.quality,
        novelty: float = Settings.novelty,
        copies: float = Settings.copies,
        recent: int = Settings.recent,
        repeats: float = Settings.repeats,
        overshoot: float = Settings.overshoot,
        memory: float = Settings.memory,
        ridge: float = Settings.ridge,
        references: int = Settings.references,
        soft_start: float | None = None,
        proxy: nn.Module | None = None,
        proxy_lr: float = 1e-3,
        teacher_momentum: float = 0.99,
        logit_scale: float = 100.0,
        embedder: int | None = None,
        embed_chunk: int | None = None,
        embed_resolution: int | None = None,
        embed_precision: str | None = None,
        embed_patch_dropout: float | None = None,
        run_ahead: int = 0,
        lag_delay: int = 0,
        max_invalid_ratio: float = 0.05,
        dataset_size: int | None = None,
        image_key: str = "image",
        text_key: str = "text",
    ) -> None:
        filter_ratio = checked_ratio("filter_ratio", filter_ratio)
        max_invalid_ratio = checked_ratio("max_invalid_ratio", max_invalid_ratio)
        teacher_momentum = checked_ratio("teacher_momentum", teacher_momentum)
        proxy_lr, logit_scale = checked("proxy_lr", proxy_lr), checked("logit_scale", logit_scale)
        embed_chunk, embedder = checked("embed_chunk", embed_chunk), checked("embedder", embedder)
        embed_resolution = checked("embed_resolution", embed_resolution)
        embed_patch_dropout = checked("embed_patch_dropout", embed_patch_dropout)
        run_ahead, lag_delay = checked("run_ahead", run_ahead), checked("lag_delay", lag_delay)
        dataset_size = checked("dataset_size", dataset_size)
        check_embedder(embed, proxy, embed_resolution, embed_precision, embed_patch_dropout)
        if scope not in SCOPES:
            raise ValueError(f"selection.scope={scope!r} is not one of {list(SCOPES)}")
        self.function = resolve(selector)
        self.selector = selector if isinstance(selector, str) else name_of(selector)
        self.filter_ratio = filter_ratio
        self.embed = embed
        self.scope = scope
        self.half_life = half_life
        self.settings = Settings(
            half_life=math.inf if half_life is None else half_life,
            gate=gate,
            balance=balance,
            unevenness=unevenness,
            quality=quality,
            learnability=learnability,
            coverage=coverage,
            novelty=novelty,
            copies=copies,
            recent=recent,
            repeats=repeats,
            overshoot=overshoot,
            memory=memory,
            ridge=ridge,
            references=references,
            soft_start=(SOFT_START if embed in IN_TRAINING else 0.0) if soft_start is None else soft_start,
            seed=seed,
        )
        self.warmup = parse_warmup(self._own_warmup() if warmup is None else warmup)
        self.run_ahead, self.lag_delay = run_ahead, lag_delay
        follows = f"embed={embed!r}, selector={self.selector!r}" * self.follows_learner
        check_ahead(run_ahead, lag_delay, follows, self.uses_lag)
        if embed == "online" and proxy is None:
            # Nobody else's random numbers, nor a GPU's, are touched.
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.default_generator.manual_seed(self.settings.seed)
                small = SmallTowers(ONLINE_WIDTH).float()  # whatever torch's default is
            proxy = Proxy(small, small.image_size)
        self.proxy, self.proxy_lr = proxy, proxy_lr
        self.teacher_momentum = teacher_momentum
        self.logit_scale = logit_scale
        self.embed_chunk = embed_chunk
        self.embed_resolution, self.embed_precision = embed_resolution, embed_precision
        self.embed_patch_dropout = embed_patch_dropout or None  # 0 leaves out as little
        self.max_invalid_ratio = max_invalid_ratio
        self.dataset_size, self._given_size = dataset_size or 0, dataset_size
        self.image_key, self.text_key = image_key, text_key
        self.teacher: Teacher | OnlineProxy | None = None
        """The embedder, if it is in training; its state is in checkpoints. An online proxy's is that of a step before
        while a thread runs ahead with one of its own, until training ends."""
        self.selection: SelectionState | None = None
        self._graphed = GraphedSelect()
        self.shared_counts = SharedCounts()
        self._survivors: Pool | None = None
        self._shares: Shares | None = None
        self.dist_timeout: float | None = None
        """Seconds that run-ahead's threads wait for those of other ranks; None is PyTorch's default."""
        self.survivor_ids: Tensor | None = None
        """Ids of what this rank trains on in this step, in the batch's order; None where pools have none."""
        self.survivor_gains: Tensor | None = None
        """What each of them gained when it was picked (`selection.Selected`)."""
        self.pool_ids: Tensor | None = None
        """Ids of this rank's candidates in this step, in the pool's order; None where pools have none."""
        self.notes_alignment = False
        """Whether `alignment` is kept: the cosine of each candidate's image and caption, in the pool's order."""
        self.alignment: Tensor | None = None
        self._lags = Lags(lag_delay)
        self._newest: dict[str, Tensor] | None = None
        """State of an online proxy that is ahead of `teacher`, and of the step."""
        self._group: Group = None
        self._asked, self._begun = 0.0, False
        self._learning: Stopwatch | None = None
        self.tally = Tally()
        self._run: weakref.ref[State] | None = None
        """The Trainer's state that all of this is of, while it lives."""
        self._pools = PoolSizes(filter_ratio)
        self._scored_at: list[int | None] | None = None
        """Side in pixels of the images that the proxy gets of the stream, [None] if the learner's; None: not known."""
        self._pending: dict[str, Any] = {}
        self._identity = {
            "selector": self.selector,
            "filter_ratio": filter_ratio,
            "embed": embed,
            "scope": scope,
            "proxy": None if proxy is None else fingerprint(proxy, values=embed == "proxy"),
            "proxy_lr": proxy_lr if embed == "online" else None,
            "warmup": self.warmup.to_timestring(),
            "half_life": half_life if half_life is None else self.settings.half_life,
            **{key: value for key, value in vars(self.settings).items() if key != "half_life"},
            "teacher_momentum": teacher_momentum,
            "logit_scale": logit_scale,
            "embedder": embedder,
            "embed_resolution": embed_resolution,
            "embed_precision": embed_precision,
            "embed_patch_dropout": self.embed_patch_dropout,
            "lag_delay": lag_delay,
        }
        """The arguments that make a run what it is; resuming with others would mix two runs in silence."""

    def __repr__(self) -> str:
        return (
            f"ClipCov(filter_ratio={self.filter_ratio}, embed={self.embed!r}, selector={self.selector!r}, "
            f"warmup={self.warmup.to_timestring()!r}, settings={self.settings})"
        )

    def _own_warmup(self) -> str:
        softly = plain(self.function) is clipcov and self.settings.starts_softly
        return HARD_WARMUP if self.uses_embeddings and self.embed in IN_TRAINING and not softly else "0ba"

    @property
    def samples_seen(self) -> int:
        """Survivors so far, over all ranks."""
        return self.tally.samples_seen

    @property
    def num_invalid(self) -> int:
        """Candidates so far that could not be used, over all ranks."""
        return self.tally.num_invalid

    @property
    def uses_embeddings(self) -> bool:
        return plain(self.function) not in NEEDS_NO_EMBEDDING

    @property
    def uses_learner(self) -> bool:
        """Whether the model in training embeds whole pools, beside the embedder."""
        return plain(self.function) in NEEDS_LEARNER

    @property
    def follows_learner(self) -> bool:
        """Whether selection needs the model in training as it is at that step, and so cannot run ahead of it."""
        return self.uses_embeddings and (self.embed == "teacher" or self.uses_learner)

    @property
    def needs_pixels(self) -> bool:
        """Whether candidates must be decoded before there are survivors."""
        return self.uses_embeddings and (self.embed != "columns" or self.uses_learner) and self.scoring_size is None

    @property
    def scoring_size(self) -> int | None:
        """Side in pixels of images that can be for the proxy alone; None if it reads those trained on, or if the
        learner embeds pools too."""
        if self.uses_learner or not self.uses_embeddings:
            return None
        if self.embed == "online":
            return self.proxy.image_size if isinstance(self.proxy, Proxy) else None
        return self.embed_resolution if self.embed == "proxy" else None

    @property
    def uses_lag(self) -> bool:
        """Whether what the model in training makes of its survivors is noted."""
        return self.uses_embeddings and reads_lag(self.function, self.settings)

    def num_survivors(self, pool_size: int) -> int:
        """Survivors of a pool per rank.

        Raises:
            ValueError: not a whole number, or fewer than 2, which leaves a contrastive loss no negatives.
        """
        return count_survivors(pool_size, self.filter_ratio)

    def match(self, event: Event, state: State) -> bool:
        return event in (
            Event.FIT_START,
            Event.BEFORE_DATALOADER,
            Event.AFTER_DATALOADER,
            Event.AFTER_FORWARD,
            Event.AFTER_LOSS,
            Event.BATCH_END,
            Event.FIT_END,
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._start(state)
        elif event == Event.BEFORE_DATALOADER:
            self._asked = time.perf_counter()
        elif event == Event.AFTER_DATALOADER:
            self._keep_survivors(state, logger)
        elif event in (Event.AFTER_FORWARD, Event.AFTER_LOSS):
            # A pass of one's own before the loss would take the place of what the model keeps of its training pass on
            # itself, such as a layer's part of the loss, and nothing would be learned of that.
            if event == Event.AFTER_LOSS or has_features(state.outputs):
                self._learn(state)
        elif event == Event.FIT_END:
            self._catch_up()
            if getattr(loader := state.dataloader, "as_bytes", False):
                loader.normalizes = True  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        else:
            self._end_step(state)
            figures = {"selection/step_ms": 1e3 * (time.perf_counter() - self._asked)}
            if self._learning is not None:
                # Now that Composer has read the loss: after the forward pass a GPU would stand still for it.
                figures["selection/learn_ms"] = self._learning.milliseconds()
                self._learning = None
            logger.log_metrics(figures)

    def _end_step(self, state: State) -> None:
        if self.uses_lag and self.selection is not None:
            self._lags.note((self.selection.lag, self.selection.lag_weight))
        if state.fsdp_config_version != 1:  # whose buffers may be on another device than its group's
            share_buffers(unwrap(state.model))
        if isinstance(self.teacher, Teacher):
            self.teacher.update(unwrap(state.model), int(state.timestamp.batch))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; the same on all ranks, because Composer saves rank 0's and gives it to all."""
        return {
            **super().state_dict(),
            "arguments": {**self._identity, "global_pool_size": self._pools.everywhere, "scored_at": self._scored_at},
            **vars(self.tally),
            "selection": self._pending.get("selection", {}) if self.selection is None else self.selection.state_dict(),
            "lags": self._lags.waiting(),
            "teacher": self._pending.get("teacher", {}) if self.teacher is None else self._teacher_state(),
        }

    def _teacher_state(self) -> dict[str, Tensor]:
        assert self.teacher is not None
        return self.teacher.state_dict() if self._newest is None else self._newest

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called by Composer before training; the models to restore into exist only at its start.

        Raises:
            ValueError: the state of another run (another selector, embedder, seed or knob), or of another version.
        """
        missing = {"arguments", "samples_seen", "num_invalid", "selection", "lags", "teacher"} - state.keys()
        if missing:
            raise ValueError(f"the checkpoint's ClipCov state lacks {sorted(missing)}: another version wrote it")
        check_same_run(state["arguments"], self._identity)
        self._pools.everywhere = state["arguments"]["global_pool_size"]
        self._scored_at = state["arguments"].get("scored_at")
        # Before it had a count of its own, the clock's was as good.
        streamed = int(state.get("samples_streamed", -1))
        self.tally = Tally(streamed, int(state["samples_seen"]), int(state["num_invalid"]))
        self._run = None
        self._pending = copy.deepcopy({"selection": state["selection"], "teacher": state["teacher"]})
        self.selection, self.teacher, self._survivors, self._newest = None, None, None, None
        selection = self._pending["selection"] if self.uses_lag else {}
        newest = (selection["lag"], selection["lag_weight"]) if selection else None
        self._lags.load(copy.deepcopy(state["lags"]), newest)

    def _start(self, state: State) -> None:
        """Check what can be checked before the first step, and make the embedder.

        Raises:
            ValueError: training goes on from a step before which there was no ClipCov, or this one is another run's.
        """
        self._belong_to(state)
        step = int(state.timestamp.batch)
        if self.tally.samples_streamed < 0:
            self.tally.samples_streamed = int(state.timestamp.sample)
        if step and not self.samples_seen:
            raise ValueError(
                f"training goes on from step {step} of a run without ClipCov: its checkpoint has no state of it. To "
                "begin selection here, take its weights alone: load_path=... and load_weights_only=true"
            )
        if hasattr(dataset := getattr(state.dataloader, "dataset", None), "check_selected"):
            dataset.selected = True  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        scored_at = [getattr(dataset, "scoring_size", None)]
        if self._scored_at not in (None, scored_at):
            raise ValueError(
                f"the checkpoint's run scored images of {self._scored_at[0] or 'the size trained on'}, this one of "
                f"{scored_at[0] or 'the size trained on'}; set stream.deferred as it was, or begin anew"
            )
        self._scored_at = scored_at
        self.dataset_size, size_of_pass = self._sizes(state)
        if plain(self.function) is not clipcov:
            self.dataset_size = 0  # rivals do not count
        if self.selection is not None:
            self.selection = self.selection.counting(self.dataset_size)
        self._pools.begin()
        pool_size = getattr(state.dataloader, "batch_size", None)
        if pool_size is not None:
            self._check_pool(state, pool_size)
            check_last_pool(state.dataloader, self.filter_ratio, num_pools(state))
        if self.needs_pixels and getattr(state.dataloader, "materialize", None) is not None:
            raise ValueError(
                f"the stream leaves candidates encoded, but selection.embed={self.embed!r} with selection.selector="
                f"{self.selector!r} embeds their pixels; set stream.deferred=false, or use embed='columns'"
            )
        if getattr(loader := state.dataloader, "as_bytes", False):
            loader.normalizes = False  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        self._start_ahead(state)
        if not self.uses_embeddings:
            return
        if outlasts(self.warmup, state):
            warnings.warn(
                f"selection.warmup={self.warmup.to_timestring()} is as long as max_duration={state.max_duration}: "
                "every survivor will be random",
                stacklevel=2,
            )
        if self.embed == "teacher" or self.uses_learner:
            check_towers(unwrap(state.model), "the Trainer's model")
        if self.embed != "columns":
            check_precision(self.embed_precision, state.device.name.replace("gpu", "cuda"))
        towers_with_patches(unwrap(state.model) if self.proxy is None else self.proxy, self.embed_patch_dropout)
        if self.embed == "teacher" and self.teacher is None:
            if state.fsdp_enabled:
                raise ValueError("embed='teacher' cannot copy a model sharded by FSDP; use another of selection.embed")
            self.teacher = Teacher(unwrap(state.model), self.teacher_momentum)
        if self.proxy is not None:
            if self.embed == "online" and self.proxy is unwrap(state.model):
                raise ValueError(
                    "embed='online' trains its proxy with an optimizer of its own, and this proxy is the Trainer's "
                    "model: give it a model of its own, or none"
                )
            state.device.module_to_device(self.proxy)
            if self.embed == "online" and self.teacher is None:
                counts = self.settings.copies > 0 and plain(self.function) is clipcov
                self.teacher = OnlineProxy(self.proxy, self.proxy_lr, self.teacher_momentum, counts)
        if self.teacher is not None and self._pending.get("teacher"):
            self.teacher.load_state_dict(self._pending.pop("teacher"))
        if isinstance(self.teacher, OnlineProxy):
            self.teacher.begin(size_of_pass)

    def _belong_to(self, state: State) -> None:
        """Raise ValueError if this is another Trainer's, of which all that is remembered would be."""
        if self._run is not None and self._run() is not state:
            if self.samples_seen:
                raise ValueError(
                    "this ClipCov has selected for another Trainer, its embedder, sketch and counts are that run's: "
                    "give each Trainer a ClipCov of its own"
                )
            self.teacher = None  # of a start that came to nothing
        self._run = weakref.ref(state)

    def _sizes(self, state: State) -> tuple[int, int]:
        """Samples of the data set that ids number, and of a pass over all that ranks read; 0 for what is not known."""
        given = self._given_size
        own = size_of(state.dataloader) if given is None else given
        sizes = on_every_rank(own, state.device)
        drawn = sum(on_every_rank(num_drawn(state.dataloader), state.device))
        if len(set(sizes)) == 1:
            return own, own if given is not None else min(own, drawn or own)
        if given is not None:
            raise ValueError(f"dataset_size must be the same on all ranks, not {sizes}")
        # Ranks with data sets of different sizes have one each, of ids of its own.
        return 0, sum(sizes) if all(sizes) else 0

    def _start_ahead(self, state: State) -> None:
        """Have the loader run ahead, or not."""
        loader: Any = state.dataloader
        if not self.run_ahead:
            if getattr(loader, "run_ahead", None) is not None:
                loader.run_ahead = None
            return
        if not hasattr(loader, "run_ahead"):
            raise ValueError(
                f"selection.run_ahead={self.run_ahead} needs a loader from clipcov_stream.stream.pool_loader, not "
                f"{type(loader).__name__}; set it to 0"
            )
        check_foreseen(self.warmup, state.max_duration, self.run_ahead)
        if self._group is None:
            self._group = own_group(self.dist_timeout)
        loader.run_ahead = partial(self._ahead, state)

    def _ahead(self, state: State, pools: Iterator[Any], num_yielded: int) -> Ahead[Any, Ticket, ReadyPool] | None:
        """The rest of an epoch's pools, prepared in a thread of their own; None before one of them was trained on.

        An epoch that is entered midway may be one that Composer reads from its start and throws away as far as it has
        been trained on, and only afterwards is seen whether it did. Any other epoch runs ahead from its first pool.
        """
        if num_yielded == 0:
            self._begun = int(state.timestamp.batch_in_epoch) == 0
        if not self._begun:
            return None
        preparation, before = self._preparation(state), self.selection
        if (online := preparation.online) is not None:
            # One of the thread's own, ahead of what checkpoints may have: what it has learned by each step is handed
            # over with the step's survivors, and if some are not trained on nothing has to be taken back.
            online = copy.deepcopy(online)
            preparation = replace(preparation, online=online, embedder=online.model)

        def work(batch: Any, ticket: Ticket) -> ReadyPool:
            nonlocal before
            prepared = preparation(batch, ticket, before)
            before = before if prepared.selection is None else prepared.selection
            if online is not None:
                prepared = replace(prepared, online=online.state_dict())
            return ReadyPool(batch["id"], prepared)

        together = None if self._group is None else partial(on_all_ranks, group=self._group)
        ticket = partial(self._ticket, state)
        return Ahead(pools, self.run_ahead, ticket, work, finishes=together is not None, all_have=together)

    def _ticket(self, state: State, ahead: int) -> Ticket | None:
        """Of the step that comes `ahead` steps after the next one; None if training ends before."""
        then = state.timestamp
        if ahead:
            then = steps_later(then, ahead, self._pools.everywhere or 0)
            if state.max_duration is not None and then >= state.max_duration:
                return None
        # A share of a max_duration that was raised since would begin anew.
        has_selected = self.selection is not None or bool(self._pending.get("selection"))
        selects = self.uses_embeddings and (has_selected or not in_warmup(self.warmup, then, state.max_duration))
        return Ticket(int(then.batch), selects, self._lags.read_by(ahead) if self.uses_lag else None)

    def _check_pool(self, state: State, pool_size: int) -> None:
        """Raise ValueError, as `PoolSizes.check`."""
        self._pools.check(state, pool_size)
        if self.half_life is None and self.embed in IN_TRAINING:
            half_life = 20.0 * (self._pools.everywhere or math.inf)
            if half_life != self.settings.half_life:
                self.settings = replace(self.settings, half_life=half_life)

    def _keep_survivors(self, state: State, logger: Logger) -> None:
        """Replace the pool in `state.batch` by its survivors, and log the step's figures."""
        self._survivors, self._shares, self._begun = None, None, True
        self.pool_ids = ids_in(state.batch)
        prepared = self._prepared(state)
        self.alignment = prepared.alignment
        counts = (prepared.pool_size, len(prepared), prepared.num_invalid)
        self.tally.count(state, self.scope, *counts, self.max_invalid_ratio)
        if prepared.selection is not None:
            self.selection = prepared.selection
            if self.uses_lag:
                self.selection = with_lag(self.selection, self._lags.newest)
            self._pending.pop("selection", None)
        self._newest = prepared.online
        self._survivors, self._shares = prepared.survivors, prepared.shares
        state.batch, self.survivor_ids, self.survivor_gains = prepared.batch, prepared.ids, prepared.gains
        image = state.batch[self.image_key]
        if (normalize := normalizing(state.dataloader, image)) is not None:
            # Here and not by the loader's workers: bytes are a quarter of what floats are to move and to keep.
            state.batch = {**state.batch, self.image_key: normalize(state.device.tensor_to_device(image))}
        figures = {
            **prepared.figures,
            "wait_ms": 1e3 * (time.perf_counter() - self._asked),
            "filter_ratio": 1 - len(prepared) / prepared.pool_size,
            **vars(self.tally),
        }
        logger.log_metrics({f"selection/{name}": value for name, value in figures.items()})

    def _prepared(self, state: State) -> Prepared:
        """This step's survivors: prepared now, or by the loader's thread."""
        step = int(state.timestamp.batch)
        if not isinstance(state.batch, ReadyPool):
            batch = check_batch(state.batch, self.image_key)
            self._check_pool(state, len(batch[self.image_key]))
            ticket = self._ticket(state, 0)
            assert ticket is not None
            return self._preparation(state)(batch, ticket, self.selection)
        prepared = state.batch.prepared
        self._check_pool(state, prepared.pool_size)
        if prepared.step != step:
            raise RuntimeError(
                f"step {step} got survivors that were prepared for step {prepared.step}: pools were thrown away after "
                "they were read. Set selection.run_ahead=0 if that is as it should be"
            )
        return prepared

    def _preparation(self, state: State) -> Preparation:
        """What makes survivors of a pool."""
        self._catch_up()
        return Preparation(
            state,
            embedder=self.teacher.model if self.teacher is not None else self.proxy,
            online=self.teacher if isinstance(self.teacher, OnlineProxy) else None,
            selecting=self._graphed,
            saved=self._pending.get("selection"),
            # Now: while training evaluates, the state has another loader, and a thread may be at work.
            loader=state.dataloader,
            materialize=getattr(state.dataloader, "materialize", None),
            group=self._group,
            **{name: getattr(self, name) for name in PASSED_ON},
        )

    def _catch_up(self) -> None:
        """Have the online proxy know what one of a thread's own has learned by the last step trained on."""
        if self._newest is not None and self.teacher is not None:
            self.teacher.load_state_dict(self._newest)
            self._newest = None

    def _learn(self, state: State) -> None:
        """Note what the model makes of the survivors, of which it has just made its training pass."""
        if self._survivors is None or self.selection is None:
            return
        outputs: Any = state.outputs
        model = unwrap(state.model)
        with Stopwatch(state) as self._learning:
            if has_features(outputs):
                image, text = outputs["image_features"], outputs["text_features"]
                # Not the parameter, if it can be helped: FSDP leaves some ranks without it.
                scale = scale_in(outputs) if "logit_scale" in outputs else scale_of(model)
            else:
                check_towers(model, "learnability above 0 (selection.learnability): the Trainer's model")
                inputs = inputs_of(state.batch, self.image_key, self.text_key)
                precision = get_precision_context(state.precision, state.precision_config)
                chunk = self.embed_chunk or len(inputs[0])
                image, text, scale = embed_with_towers(model, *inputs, chunk, precision, plain=True)
            if self._shares is not None:
                # All ranks' survivors in the order chosen: one lag, whatever the number of ranks.
                image, text = (self._shares.in_order(rows.detach().float()) for rows in (image, text))
            seen = with_learner(self._survivors, image, text, scale)
            self.selection = learn(self.selection, seen, all_reduce_of(self.scope))
        self._survivors = None


def has_features(outputs: Any) -> bool:
    """Whether a model's outputs have the embeddings of its training pass, as open_clip's."""
    return isinstance(outputs, Mapping) and {"image_features", "text_features"} <= outputs.keys()
