"""The objective: what selection remembers, what a sample is worth by it, and how good a choice was.

Pure functions of a pool and of the state. How picks are made from worths and an aim is `herding`'s.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clipcov_stream.arguments import no_less_than, real_number, whole_number
from clipcov_stream.collectives import AllReduce
from clipcov_stream.copies import MEMORY, THUMBNAIL
from clipcov_stream.fused import brought, fused
from clipcov_stream.herding import centred_squares, row_dots, top
from clipcov_stream.pool import Pool, log_sum_exp, softmax, valid_of
from clipcov_stream.products import product
from clipcov_stream.sketch import (
    BatchMoments,
    CrossCovSketch,
    all_hold,
    at_least,
    number,
    root,
    scalar,
    sync_is_free,
)

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64, Integer, UInt8

SKETCHES = ("stream", "opened", "kept")
LAG_DECAY = 0.9
"""Per step: the learner moves, so its lag is forgotten within some ten steps whatever the sketch's half-life."""

RECENT = ("recent_image", "recent_text", "recent_weight")
RECENT_STEPS = 8
"""Steps whose survivors are remembered one by one."""

MOST_COUNTS = 1 << 27
"""Samples that are counted one by one, a byte each; of a larger data set some share a count."""

COVARIANCE_ROWS = 4
"""Per dimension: what whitening learns of a pool. Rows of one pool say little that the next pool's do not say too."""


WEIGHTS = ("balance", "unevenness", "novelty", "copies", "quality", "learnability", "coverage", "overshoot", "memory")
REAL: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
    (("half_life",), "a positive number of samples, or inf", lambda value: value > 0),
    (("gate",), "above 0; inf opens every candidate", lambda value: value > 0),
    (WEIGHTS, "a finite number, at least 0", lambda value: 0 <= value < math.inf),
    (("repeats",), "at least 0; inf lets no pair wear out", no_less_than(0)),
    (("soft_start",), "from 0 to 1, a share of the matching pairs", lambda value: 0 <= value <= 1),
    (("ridge",), "a finite number above 0", lambda value: 0 < value < math.inf),
)
"""What numbers of `Settings` must be."""

WHOLE: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    ("references", "at least 2", no_less_than(2)),
    ("recent", f"at least {RECENT_STEPS}", no_less_than(RECENT_STEPS)),
    ("seed", "from -2**63 to 2**64 - 1", lambda value: -(1 << 63) <= value < 1 << 64),
)
"""And what its whole numbers."""


@dataclass(frozen=True)
class Settings:
    """Knobs of selection. The defaults are measured in tools/LOG.md.

    Args:
        half_life: of the sketches, in samples streamed; inf for embeddings that do not change (columns, proxy).
        gate: candidates that stay open, best matches first, for each that is estimated to match its caption
            (`evidence.matching`); below 1 leaves the doubtful ones out, inf opens all. At least `num_survivors` stay.
        balance: what a pair is worth per unit of -log density, the density of its image times that of its caption
            (`evidence.log_density`): 0 keeps the stream's own shares, more favours the rare.
        unevenness: of the open pairs (`evidence.unevenness`), from which on `balance` counts in full; below it, by the
            square of their ratio, because where nothing is popular the rare are outliers. 0: always in full.
        novelty: what a pair loses per unit of log exposure, which is how often its like was among recent survivors
            (`evidence.log_exposure`); like `balance` as far as the pool is uneven.
        copies: what a pair loses per unit of log copies, which is how often its picture, told by coarse pixels, was
            among the last `copies.MEMORY` survivors (`copies.log_copies`); like `balance` as far as the pool is uneven,
            and only where pools have thumbnails. 0: nobody looks. 1 to 3 for a stream with pictures that recur with
            their faults; an online proxy then learns from all copies of a picture about as much as from one, too.
        recent: survivors that stand for all of the last RECENT_STEPS steps' there, those of more steps if a batch is
            smaller than recent / RECENT_STEPS.
        repeats: how often a pair may be trained on before it wears out: once it was `repeats` + n times, its chance to
            match counts 1 / (1 + n), what one more adds to a log of counts (`evidence.log_exposure`). The gate opens
            the pairs that have most left (`evidence.Matching`): over many passes the doubtful get their turn, the
            sooner the less sure the embedder is. inf: nothing wears out.
        quality: worth per standard deviation of the margin over the open candidates.
        learnability: worth per standard deviation of the lag over the open candidates.
        coverage: weight of the distance to the target, beside what pairs are worth.
        overshoot: multiple of the target T that each batch aims at. 1 preserves it; more filters mismatched pairs,
            which shrink it but do not rotate it (Pareek, Oh and Du, NeurIPS 2025, Thm 1); 0 leaves the aim to `memory`.
        memory: weight of T - M, what earlier survivors (M) still miss of the target. With overshoot 1, 0 preserves each
            batch by itself and more brings the survivors of all steps together closer to the target.
        ridge: added to both covariances before whitening, as a fraction of their mean variance.
        references: samples of the pool that every candidate is compared with, for its match and its density; a pool
            that has no more is compared with all of itself.
        soft_start: share of the matching pairs that the embedder must tell from chance before selection has the choice
            of all survivors; with less, survivors are random in proportion (`start.num_places`). For an embedder that
            is still in training; 0 trusts it from the first pool on, and so does a `gate` of inf, which asks for no
            evidence.
        seed: of everything random: rivals that draw, and the survivors of a warm-up. clipcov draws nothing.

    Raises:
        ValueError: a value outside its range.
    """

    half_life: float = math.inf
    gate: float = 1.0
    balance: float = 1.0
    unevenness: float = 0.05
    novelty: float = 3.0
    copies: float = 0.0
    recent: int = 256
    repeats: float = 2.0
    quality: float = 0.0
    learnability: float = 0.5
    coverage: float = 1.0
    overshoot: float = 1.0
    memory: float = 1.0
    ridge: float = 0.1
    references: int = 256
    soft_start: float = 0.0
    seed: int = 0

    @property
    def starts_softly(self) -> bool:
        return self.soft_start > 0 and self.gate < math.inf

    def __post_init__(self) -> None:
        for names, must, holds in REAL:
            for name in names:
                object.__setattr__(self, name, real_number(f"selection.{name}", getattr(self, name), must, holds))
        for name, must, holds in WHOLE:
            object.__setattr__(self, name, whole_number(f"selection.{name}", getattr(self, name), must, holds))


@dataclass(frozen=True)
class SelectionState:
    """Everything selection remembers between steps; replaced, never changed, by `select` and `learn`.

    Args:
        settings: the knobs.
        step: pools selected from so far.
        rank: of this process; local random draws differ by it.
        stream: sketch of all candidates.
        opened: sketch of the candidates that the gate let through: the target.
        kept: sketch of all survivors, decayed on the stream's clock. It is the memory, and the certificate.
        lag: what the learner does not reproduce yet of its survivors' cross-covariance, summed over steps.
        lag_weight: sum of the decayed weights in `lag`.
        recent_image, recent_text: embeddings of recent survivors, over all ranks, the latest last.
        recent_weight: how many survivors each of these rows stands for; 0 in a place that is not filled yet.
        looks: thumbnails of the last survivors, over all ranks, the latest last; rows of zeros are not filled yet.
        times: how often each of the data set's samples was trained on since selection began, 255 at most, by id modulo
            its length, which must be the same on all ranks; empty where the number of samples is not known.
        own: what this selector alone remembers (`rivals.REMEMBER`).
    """

    settings: Settings
    step: int
    rank: int
    stream: CrossCovSketch
    opened: CrossCovSketch
    kept: CrossCovSketch
    lag: Float[Tensor, "dim dim"]
    lag_weight: Float[Tensor, ""]
    recent_image: Float[Tensor, "recent dim"]
    recent_text: Float[Tensor, "recent dim"]
    recent_weight: Float[Tensor, " recent"]
    looks: Float[Tensor, "memory thumbnail"]
    times: UInt8[Tensor, " samples"]
    own: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def initial(
        cls,
        dim: int,
        settings: Settings,
        rank: int = 0,
        device: torch.device | str = "cpu",
        dataset_size: int = 0,
    ) -> SelectionState:
        """State before the first pool of embeddings `dim` wide, of a data set of that many samples; 0 if not known."""

        num_recent = settings.recent if settings.novelty > 0 else 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_recent, *shape, dtype=torch.float32, device=device)

        stream, opened, kept = (
            CrossCovSketch(
                dim,
                half_life=settings.half_life,
                covariances=name == "stream",
                covariance_rows=COVARIANCE_ROWS * dim,
                device=device,
            )
            for name in SKETCHES
        )
        return cls(
            settings=settings,
            step=0,
            rank=rank,
            stream=stream,
            opened=opened,
            kept=kept,
            lag=torch.zeros(dim, dim, dtype=torch.float32, device=device),
            lag_weight=torch.zeros((), dtype=torch.float32, device=device),
            recent_image=zeros(dim),
            recent_text=zeros(dim),
            recent_weight=zeros(),
            looks=torch.zeros(MEMORY if settings.copies > 0 else 0, THUMBNAIL, dtype=torch.float32, device=device),
            times=torch.zeros(
                min(dataset_size, MOST_COUNTS) if settings.repeats < math.inf else 0, dtype=torch.uint8, device=device
            ),
        )

    def counting(self, dataset_size: int) -> SelectionState:
        """This state for a data set of that many samples: one of another size is another's, whose counts begin at 0."""
        fresh = self.times.new_zeros(min(dataset_size, MOST_COUNTS) if self.settings.repeats < math.inf else 0)
        if len(fresh) == len(self.times):
            return self
        if bool(self.times.any()):
            warnings.warn(
                f"the data set has {dataset_size} samples now, and had {len(self.times)}: how often each was trained "
                "on is counted anew",
                stacklevel=2,
            )
        return replace(self, times=fresh)

    @property
    def counts_times(self) -> bool:
        """Whether `times` are counted, of samples whose ids are known; on all ranks alike."""
        return len(self.times) > 0 and self.settings.repeats < math.inf

    def times_of(self, ids: Integer[Tensor, " n"] | None) -> Float[Tensor, " n"] | None:
        """How often samples were trained on; None if that is not counted."""
        places = self.places(ids)
        return None if places is None else self.times.index_select(0, places).float()

    def places(self, ids: Integer[Tensor, " n"] | None) -> Int64[Tensor, " n"] | None:
        """Where in `times` samples are counted; None if they are not."""
        if ids is None or not self.counts_times:
            return None
        return ids.to(self.times.device, torch.int64) % len(self.times)

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (seed, step, rank) alone."""
        return torch.Generator().manual_seed(mix(self.settings.seed, self.step, self.rank))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **{name: getattr(self, name).state_dict() for name in SKETCHES},
            "lag": self.lag.clone(),
            "lag_weight": self.lag_weight.clone(),
            **{name: getattr(self, name).clone() for name in RECENT},
            "looks": self.looks.clone(),
            "times": self.times.clone(),
            "own": {name: value.clone() for name, value in self.own.items()},
        }

    def restored(self, state: dict[str, Any]) -> SelectionState:
        """This state with another's memories, from `state_dict`; settings, half-life included, and rank stay.

        Of samples that the data set no longer has counts are dropped, with a warning, and new ones begin at 0.

        Raises:
            ValueError: keys missing, or sketches of other widths.
        """
        # Without novelty there are none, and states from before there were any are as good.
        state = state if self.settings.novelty > 0 else {**state, **{name: getattr(self, name) for name in RECENT}}
        state = state if len(self.times) else {"times": self.times, **state}
        # Nor without thumbnails: what has not looked yet has seen nothing.
        looks = state.get("looks", ())
        state = state if len(self.looks) and len(looks) else {**state, "looks": self.looks}
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"selection state lacks {sorted(missing)}; it has {sorted(state)}")
        if len(state["recent_weight"]) != len(self.recent_weight):
            raise ValueError(
                f"selection state holds {len(state['recent_weight'])} recent survivors, not "
                f"selection.recent={len(self.recent_weight)}"
            )
        if state["looks"].shape != self.looks.shape:
            raise ValueError(
                f"selection state holds thumbnails of shape {tuple(state['looks'].shape)}, not "
                f"{tuple(self.looks.shape)}: another version wrote it; selection.copies=0 goes on without"
            )
        if self.settings.repeats < math.inf and bool(state["times"][len(self.times) :].any()):
            warnings.warn(
                f"selection state counts what was trained on of {len(state['times'])} samples, the data set has "
                f"{len(self.times)} (dataset_size): the other counts are dropped",
                stacklevel=2,
            )
        sketches = {name: getattr(self, name).clone() for name in SKETCHES}
        for name, sketch in sketches.items():
            sketch.load_state_dict({**state[name], "half_life": self.settings.half_life})
        return replace(
            self,
            step=int(state["step"]),
            **sketches,
            lag=state["lag"].to(self.lag, copy=True),
            lag_weight=state["lag_weight"].to(self.lag_weight, copy=True),
            **{name: state[name].to(self.lag, copy=True) for name in RECENT},
            looks=state["looks"].to(self.looks, copy=True),
            times=resized(state["times"].to(self.times.device), len(self.times)),
            own={name: value.to(self.lag.device, copy=True) for name, value in state["own"].items()},
        )


def resized(counts: Tensor, num: int) -> Tensor:
    """A copy of the first `num` counts, with zeros for those that there are not."""
    whole = counts.new_zeros(num)
    whole[: len(counts)] = counts[:num]
    return whole


def mix(*numbers: int) -> int:
    """A 63-bit seed from whole numbers, by chained splitmix64 steps (Steele, Lea and Flood, OOPSLA 2014)."""
    mask, value = (1 << 64) - 1, 0
    for each in numbers:
        value = (value + each + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1


def random_survivors(
    valid: Bool[Tensor, " pool"], num_survivors: int, generator: torch.Generator
) -> Int64[Tensor, " survivors"]:
    """A uniform draw without replacement from the valid samples."""
    keys = brought(torch.rand(len(valid), generator=generator, dtype=torch.float32), valid.device)
    return top(keys.masked_fill(~valid, -torch.inf), num_survivors)


def alignment(pool: Pool) -> Float[Tensor, " pool"]:
    """Cosine of each image and its own caption (F_self of the paper)."""
    return row_dots(pool.image, pool.text)


def margin(pool: Pool) -> Float[Tensor, " pool"]:
    """s x_i.y_i - 1/2 log sum_j exp(s x_i.y_j) - 1/2 log sum_j exp(s x_j.y_i): minus the contrastive loss per sample.

    What is left of the alignment once what any caption would get is taken off (negCLIPLoss: Wang et al., NeurIPS 2024,
    arXiv 2405.19547, with the pool as the batch). It stands for the paper's F_inter.
    """
    return contrastive_margin(pool.image, pool.text, pool.logit_scale, valid_of(pool))


def contrastive_margin(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    scale: float | Tensor,
    valid: Bool[Tensor, " pool"],
) -> Float[Tensor, " pool"]:
    """`margin`, of any two towers; 0 for samples that are not valid, which are nobody's negatives."""
    logits = product(scale * image, text)
    invalid = ~valid
    by_image = log_sum_exp(logits.masked_fill(invalid[None, :], -torch.inf), 1)
    by_text = log_sum_exp(logits.masked_fill(invalid[:, None], -torch.inf), 0)
    return (logits.diagonal() - 0.5 * by_image - 0.5 * by_text).masked_fill(invalid, 0.0)


@fused
def standardize(score: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"]) -> Float[Tensor, " pool"]:
    """Zero mean and unit standard deviation over the valid samples; zeros if all are equal."""
    if sync_is_free(valid) and bool(valid.all()):
        centred = score - score.mean()
        return centred / at_least(root(number(centred.square().mean())), 1e-6)
    count = valid.sum().clamp_min(1)
    centred = (score - score.masked_fill(~valid, 0.0).sum() / count).masked_fill(~valid, 0.0)
    return centred / (centred.square().sum() / count).sqrt().clamp_min(1e-6)


@dataclass(frozen=True)
class Frame:
    """Where all directions of the stream count alike: rows are centred and whitened by the stream's covariances.

    Any square root of the inverse covariance gives the same inner products, so a Cholesky factor serves: no
    eigendecomposition. It is inverted, because a product with many rows is faster than a triangular solve.

    Args:
        image, text: W of each side, scaled so that a typical atom (W_x x)(W_y y)^T of the stream has norm 1.
        image_mean, text_mean: of the stream.
    """

    image: Float[Tensor, "dim dim"]
    text: Float[Tensor, "dim dim"]
    image_mean: Float[Tensor, " dim"]
    text_mean: Float[Tensor, " dim"]

    @classmethod
    def of(cls, stream: CrossCovSketch, ridge: float) -> Frame:
        """Costs: some 2 * dim^3 flops."""
        image, text = (inverse_root(cov, ridge) for cov in (stream.image_cov, stream.text_cov))
        return cls(image, text, stream.image_mean, stream.text_mean)

    def rows(
        self, image: Float[Tensor, "pool dim"], text: Float[Tensor, "pool dim"], in_place: bool = False
    ) -> tuple[Float[Tensor, "pool dim"], Float[Tensor, "pool dim"]]:
        """Whitened rows; `in_place` writes over what is given, to spare a copy. Costs: 4 * pool * dim^2 flops."""
        image, text = (
            rows.sub_(mean) if in_place else rows - mean
            for rows, mean in ((image, self.image_mean), (text, self.text_mean))
        )
        # Over the centred rows, which are ours by now.
        return product(image, self.image, out=image), product(text, self.text, out=text)

    def matrix(self, cross: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim dim"]:
        """A cross-covariance about the stream's means, as it is among whitened rows. Costs: 4 * dim^3 flops."""
        return product(product(self.image, cross.T), self.text)


def inverse_root(cov: Float[Tensor, "dim dim"], ridge: float) -> Float[Tensor, "dim dim"]:
    """W with W (cov + ridge * mean variance * I) W^T = I, up to a factor that gives W x a mean square norm of 1."""
    lower = cholesky(cov, ridge)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(cov), dtype=cov.dtype, device=cov.device), upper=False)
    # tr(W cov W^T), the mean of |W (x - mean)|^2 over the stream.
    size = (product(inverse, cov) * inverse).sum().clamp_min(0).sqrt()  # cov is its own transpose
    return inverse / torch.where(size > 1e-6, size, 1.0)


RIDGES = 16
"""Of `cholesky`: 1e-5 at 5 dimensions, 1e-4 at 64, 1e-3 at 512, in float32."""


def cholesky(cov: Float[Tensor, "dim dim"], ridge: float) -> Float[Tensor, "dim dim"]:
    """Lower factor of cov + ridge * mean variance * I; of ridge * I where there is no variance yet.

    A ridge below `RIDGES * dim` units of rounding is taken as that: rows of low rank would have no factor at all.
    """
    ridge = max(ridge, RIDGES * len(cov) * torch.finfo(cov.dtype).eps)
    spread = cov.diagonal().mean()
    spread = torch.where(spread > 1e-12, spread, 1.0)
    ridged = cov.clone()
    ridged.diagonal().add_(ridge * spread)
    # cholesky_ex does not read its status back from the device; the ridge makes the matrix positive definite, and is
    # large enough that rounding leaves it so.
    return torch.linalg.cholesky_ex(ridged).L


def updated_lag(
    state: SelectionState, survivors: Pool, all_reduce: AllReduce | None
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, ""]]:
    """Add a step's survivors to R = E_i[x_i y_i^T] - 1/2 E_i[sum_j (p_ij + q_ij) x_i y_j^T].

    x, y are the embedder's centred embeddings, p and q the row and column softmax of the LEARNER's logits over the
    survivors: the contrastive gradient, seen in the embedder's space. Mismatched pairs cancel in the mean, so unlike a
    loss per sample it does not chase noise. It reads survivors alone, which the learner's training pass embeds anyway;
    with several ranks each adds its own, whose negatives are its own too, while the loss's are all ranks'.
    """
    scale = survivors.logit_scale if survivors.learner_logit_scale is None else survivors.learner_logit_scale
    learner_image = survivors.image if survivors.learner_image is None else survivors.learner_image
    learner_text = survivors.text if survivors.learner_text is None else survivors.learner_text
    # Of a learner that has diverged nothing is noted: one NaN would stay for good.
    valid = valid_of(survivors) & torch.as_tensor(scale, device=learner_image.device).isfinite()
    logits = product(scale * learner_image, learner_text)
    image, text = survivors.image - state.stream.image_mean, survivors.text - state.stream.text_mean
    if not all_hold(valid):
        logits = logits.masked_fill(~(valid[:, None] & valid[None, :]), -1e9)
        image, text = (rows.masked_fill(~valid[:, None], 0.0) for rows in (image, text))
    weights = softmax(logits, 1) + softmax(logits, 0)
    step_lag = image.T @ torch.addmm(text, weights, text, alpha=-0.5)
    count = valid.sum().to(step_lag)
    if all_reduce is not None:
        flat = torch.cat([step_lag.flatten(), count[None]])
        all_reduce(flat)
        step_lag, count = flat[:-1].view_as(step_lag), flat[-1]
    return state.lag * LAG_DECAY + step_lag, state.lag_weight * LAG_DECAY + count


def gated(
    score: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"], gate: float, num_survivors: int
) -> Bool[Tensor, " pool"]:
    """Valid samples without the `gate` share of lowest scores, at least `num_survivors` of them."""
    num_open = max(num_survivors, len(score) - int(gate * len(score)))
    keep = torch.zeros_like(valid)
    keep.index_fill_(0, top(score.masked_fill(~valid, -torch.inf), num_open), True)
    return keep & valid


def certificate(
    pool: Pool, survivors: Tensor, state: SelectionState, streamed: BatchMoments, kept: BatchMoments
) -> dict[str, Tensor]:
    """How well survivors preserve the cross-covariance, beside what random survivors would do; 0-dim tensors.

    residual: ||C_S - C||_F / ||C||_F of this step, C the stream's cross-covariance, C_S the survivors' about the
        stream's means. residual_random: the root of its mean square for uniform survivors without replacement,
        ||C_P - C||^2 + (sigma^2 / K)(P - K)/(P - 1), exact for this pool. residual_total and residual_total_random: the
        same for all survivors so far, the latter from the sketches' effective sizes.

    Args:
        streamed, kept: what this pool and its survivors added to the state's sketches.
    """
    stream, valid = state.stream, valid_of(pool)
    centres = (stream.image_mean, stream.text_mean)
    target = stream.cross_cov
    sizes = centred_squares(pool.image, centres[0]), centred_squares(pool.text, centres[1])
    moments = kept.cross_cov_about(*centres), streamed.cross_cov_about(*centres), state.kept.cross_cov_about(*centres)
    effective = state.kept.effective_size, stream.effective_size
    cosine = alignment(pool)
    residuals = certified(target, *moments, *sizes, cosine, valid, *effective, len(survivors))
    return {
        **dict(zip(RESIDUALS, residuals, strict=True)),
        "alignment_survivors": cosine.index_select(0, survivors).mean(),
    }


RESIDUALS = (
    "residual",
    "residual_random",
    "residual_total",
    "residual_total_random",
    "alignment_pool",
    "num_invalid",
)


@fused
def certified(
    target: Tensor,
    own: Tensor,
    pool_mean: Tensor,
    total: Tensor,
    image_size: Tensor,
    text_size: Tensor,
    cosine: Tensor,
    valid: Tensor,
    kept_size: Tensor,
    stream_size: Tensor,
    chosen: int,
) -> tuple[Tensor, ...]:
    """`certificate`'s figures, in the order of RESIDUALS."""
    num_valid = valid.sum()
    count, size = number(num_valid), at_least(number(target.norm()), 1e-12)
    spread = number(torch.where(valid, image_size * text_size, 0.0).sum()) / at_least(count, 1)
    spread = at_least(spread - number(pool_mean.square().sum()), 0)  # below by rounding, when all atoms are equal
    by_chance = spread / chosen * at_least(count - chosen, 0) / at_least(count - 1, 1)
    # An effective size is at least 1, and 0 of an empty sketch.
    inverse_sizes = (1 / at_least(number(of), 1) for of in (kept_size, stream_size))
    total_by_chance = spread * at_least(next(inverse_sizes) - next(inverse_sizes), 0)
    figures = (
        number((own - target).norm()) / size,
        root(number((pool_mean - target).square().sum()) + by_chance) / size,
        number((total - target).norm()) / size,
        root(total_by_chance) / size,
        number(cosine.sum()) / at_least(count, 1),
    )
    return *(scalar(value, target) for value in figures), len(valid) - num_valid
