"""Selection: from a candidate pool to the survivors that training sees.

The core is a pure function, `select(state, pool, num_survivors) -> (state', survivors, report)`. The state is the
sketches, the lag and the step counter; everything random derives from (seed, step, rank), never from a global
generator. That is what makes a resumed run equal a straight one and lets selection run ahead of training.

The method, `clipcov`, lowers the distance between the survivors' whitened cross-covariance and a target

    ||C_S - T||_F^2 = const - (2/K) sum_{i in S} <T, z_i> + (1/K^2) sum_{i,j in S} <z_i, z_j>,    z_i = x_i y_i^T

greedily, beside a quality term for each sample. The inner product of two atoms is a product of two kernels,
<z_i, z_j>_F = (x_i . x_j)(y_i . y_j), so no d x d atom is ever built. This replaces the per-class sums of the paper's
offline algorithm (CLIPCov: Joshi, Jain, Payani, Mirzasoleiman, AISTATS 2024, arXiv 2403.12267), which needs a partition
of the whole data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipcov_stream.sketch import AllReduce, CrossCovSketch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


@dataclass(frozen=True)
class Pool:
    """Candidates of one step, as embeddings; rows need not be unit-norm, `select` normalizes them.

    Args:
        image, text: (pool, dim) embeddings from the embedder: the teacher, a proxy or columns. Same width.
        logit_scale: the embedder's, exponentiated (CLIP's is near 100 after training).
        learner_image, learner_text, learner_logit_scale: the same pool seen by the model in training. Without them the
            embedder stands in for the learner, which is what it is when it is the learner's moving average.
        valid: (pool,) bool, False for samples that must not be chosen (an undecodable image, say).

    Raises:
        ValueError: rows or widths that do not match.
    """

    image: Float[Tensor, "pool dim"]
    text: Float[Tensor, "pool dim"]
    logit_scale: float | Tensor = 100.0
    learner_image: Float[Tensor, "pool learner_dim"] | None = None
    learner_text: Float[Tensor, "pool learner_dim"] | None = None
    learner_logit_scale: float | Tensor | None = None
    valid: Bool[Tensor, " pool"] | None = None

    def __post_init__(self) -> None:
        check_pair(self.image, self.text, "embeddings")
        if (self.learner_image is None) != (self.learner_text is None):
            raise ValueError("a pool needs both learner_image and learner_text, or neither")
        if self.learner_image is not None and self.learner_text is not None:
            check_pair(self.learner_image, self.learner_text, "learner embeddings")
            if len(self.learner_image) != len(self.image):
                raise ValueError(f"learner embeddings of {len(self.learner_image)} samples in a pool of {len(self)}")
        if self.valid is not None and self.valid.shape != (len(self.image),):
            raise ValueError(f"valid has shape {tuple(self.valid.shape)}, the pool has {len(self)} samples")

    def __len__(self) -> int:
        return len(self.image)


def check_pair(image: Tensor, text: Tensor, what: str) -> None:
    """Raise ValueError unless image and text are (n, dim) of one shape."""
    if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
        raise ValueError(f"{what} must be (pool, dim) each; got {tuple(image.shape)} and {tuple(text.shape)}")
    if image.shape[1] != text.shape[1]:
        raise ValueError(
            f"{what} have different widths: image {image.shape[1]}, text {text.shape[1]}; "
            "are the two columns from one model?"
        )


@dataclass(frozen=True)
class Settings:
    """Knobs of selection. The defaults are measured in tools/LOG.md.

    Args:
        half_life: of the sketches, in samples streamed; inf for embeddings that do not change (columns, proxy).
        gate: fraction of the pool with the lowest margin that is never chosen, in [0, 1); capped so that at least
            `num_survivors` candidates stay.
        quality: weight of the margin, in standard deviations of the pool.
        learnability: weight of the lag, in standard deviations of the pool.
        coverage: weight of the residual; a survivor chosen twice loses `coverage`.
        overshoot: multiple of the stream's cross-covariance that is the target. 1 preserves it, noise included; more
            filters mismatched pairs, which shrink it but do not rotate it (Pareek, Oh and Du, NeurIPS 2025, Thm 1).
        ridge: added to both covariances before whitening, as a fraction of their mean variance.
        seed: of everything random.

    Raises:
        ValueError: a value outside its range.
    """

    half_life: float = math.inf
    gate: float = 0.3
    quality: float = 1.0
    learnability: float = 1.0
    coverage: float = 1.0
    overshoot: float = 1.0
    ridge: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise ValueError(f"selection.half_life={self.half_life} must be a positive number of samples, or inf")
        if not 0 <= self.gate < 1:
            raise ValueError(f"selection.gate={self.gate} must be in [0, 1)")
        for name in ("quality", "learnability", "coverage", "overshoot"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"selection.{name}={value} must be a finite number, at least 0")
        if not (self.ridge > 0 and math.isfinite(self.ridge)):
            raise ValueError(f"selection.ridge={self.ridge} must be a finite number above 0")


@dataclass(frozen=True)
class SelectionState:
    """Everything selection remembers between steps; replaced, never changed, by `select`.

    Args:
        settings: the knobs.
        step: pools selected from so far.
        rank: of this process; local random draws differ by it.
        stream: sketch of all candidates.
        kept: sketch of all survivors, decayed on the stream's clock. It is the memory, and the certificate.
        lag: what the learner does not reproduce yet of the stream's cross-covariance, summed over pools.
        lag_weight: sum of the decayed weights in `lag`.
    """

    settings: Settings
    step: int
    rank: int
    stream: CrossCovSketch
    kept: CrossCovSketch
    lag: Float[Tensor, "dim dim"]
    lag_weight: Float[Tensor, ""]

    @classmethod
    def initial(cls, dim: int, settings: Settings, rank: int = 0, device: torch.device | str = "cpu") -> SelectionState:
        """State before the first pool of embeddings `dim` wide."""
        return cls(
            settings=settings,
            step=0,
            rank=rank,
            stream=CrossCovSketch(dim, half_life=settings.half_life, device=device),
            kept=CrossCovSketch(dim, half_life=settings.half_life, device=device),
            lag=torch.zeros(dim, dim, device=device),
            lag_weight=torch.zeros((), device=device),
        )

    def generator(self) -> torch.Generator:
        """A CPU generator that depends on (seed, step, rank) alone."""
        return torch.Generator().manual_seed(mix(self.settings.seed, self.step, self.rank))

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "stream": self.stream.state_dict(),
            "kept": self.kept.state_dict(),
            "lag": self.lag.clone(),
            "lag_weight": self.lag_weight.clone(),
        }

    def restored(self, state: dict[str, Any]) -> SelectionState:
        """This state with another's memories, from `state_dict`; settings and rank stay."""
        stream, kept = self.stream.clone(), self.kept.clone()
        stream.load_state_dict(state["stream"])
        kept.load_state_dict(state["kept"])
        return replace(
            self,
            step=int(state["step"]),
            stream=stream,
            kept=kept,
            lag=state["lag"].to(self.lag, copy=True),
            lag_weight=state["lag_weight"].to(self.lag_weight, copy=True),
        )


SelectorFn = Callable[[Pool, int, SelectionState], Tensor]
"""(pool, num_survivors, state) -> LongTensor of num_survivors distinct indices into the pool.

The pool arrives normalized, with `valid` set and zeros in the rows that are not; the state's stream sketch already
holds this pool.
"""


def random(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Survivors drawn uniformly without replacement: the baseline that streams as much and sees as much."""
    return random_survivors(valid_of(pool), num_survivors, state.generator())


def clip_score(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Survivors of highest cosine between image and caption (CLIPScore: Hessel et al., EMNLP 2021)."""
    return top(alignment(pool).masked_fill(~valid_of(pool), -torch.inf), num_survivors)


def clipcov(pool: Pool, num_survivors: int, state: SelectionState) -> Int64[Tensor, " survivors"]:
    """Survivors that cover the stream's cross-covariance, among candidates that match their captions.

    gain_i = quality * margin_i + learnability * lag_i
             + coverage * (overshoot * K <T, z_i> - K <M, z_i> - sum_{j in S} <z_i, z_j>)

    with margin and lag in standard deviations of the pool, atoms z whitened and of unit typical norm, T the stream's
    cross-covariance, M that of earlier survivors. The `gate` drops the lowest margins first, because both lag and
    residual are drawn to mismatched pairs: those are always new and never learned.

    Costs: pool^2 * dim flops for the margin and pool * survivors * dim for the picks; two Cholesky factors of dim^3.
    """
    settings, valid = state.settings, valid_of(pool)
    margins = margin(pool)
    image, text, target, memory = whitened(pool, state)
    gain = settings.quality * standardize(margins, valid)
    if settings.learnability > 0:
        gain = gain + settings.learnability * standardize(lag(pool, state), valid)
    linear = settings.overshoot * target - memory
    gain = gain + settings.coverage * num_survivors * ((image @ linear) * text).sum(1)
    open_ = gated(margins, valid, settings.gate, num_survivors)
    return greedy_select(image, text, gain, settings.coverage, open_, num_survivors)


SELECTORS: dict[str, SelectorFn] = {"clipcov": clipcov, "random": random, "clip_score": clip_score}
"""Every selector by name. To add one, add a function here."""

NEEDS_NO_EMBEDDING = frozenset({"random"})
"""Selectors for which the embedding pass can be left out."""


def select(
    state: SelectionState,
    pool: Pool,
    num_survivors: int,
    selector: SelectorFn = clipcov,
    all_reduce: AllReduce | None = None,
) -> tuple[SelectionState, Int64[Tensor, " survivors"], dict[str, Tensor]]:
    """Choose the survivors of one pool and remember it.

    Args:
        state: from `SelectionState.initial` or the last call.
        pool: this rank's candidates.
        num_survivors: how many to choose, from 1 to the pool's size.
        selector: one of SELECTORS, or any function of that signature.
        all_reduce: sums over ranks in place, so that every rank's sketches hold every rank's pairs.

    Returns: the next state; distinct indices into the pool in the order chosen; a report of 0-dim tensors. Samples with
        a non-finite embedding, or `valid` False, are never chosen and never enter a sketch; `num_invalid` counts them.

    Raises:
        ValueError: num_survivors outside [1, pool], or widths that differ from the state's.
        RuntimeError: a selector that returned something else than num_survivors distinct indices.
    """
    if not 1 <= num_survivors <= len(pool):
        raise ValueError(f"num_survivors={num_survivors} must be from 1 to the pool's size, {len(pool)}")
    if pool.image.shape[1] != state.stream.image_dim:
        raise ValueError(
            f"the pool's embeddings are {pool.image.shape[1]} wide, the sketch is {state.stream.image_dim} wide; "
            "one run needs one embedder"
        )
    pool = prepared(pool)
    valid = valid_of(pool)
    stream, kept = state.stream.clone(), state.kept.clone()
    stream.update(pool.image, pool.text, valid, all_reduce)
    seen = replace(state, stream=stream)
    survivors = selector(pool, num_survivors, seen)
    check_survivors(survivors, len(pool), num_survivors, selector)
    chosen = [tensor.index_select(0, survivors) for tensor in (pool.image, pool.text, valid)]
    kept.update(*chosen, all_reduce, elapsed=stream.num_samples - state.stream.num_samples)
    lag_sum, lag_weight = updated_lag(seen, pool, all_reduce)
    after = replace(seen, step=state.step + 1, kept=kept, lag=lag_sum, lag_weight=lag_weight)
    return after, survivors, certificate(pool, survivors, after)


class Selector:
    """Selection for any training loop: holds the state that `select` returns.

    Args:
        name: a name in SELECTORS, or a function of the same signature.
        seed: of everything random; overrides `settings.seed`.
        settings: the knobs, with the defaults of `Settings`.
        rank: of this process, if each rank draws its own pools.
        all_reduce: sums a tensor over ranks in place, if there are several.

    Raises:
        ValueError: a name that is not in SELECTORS.

    >>> selector = Selector("clipcov", seed=0)
    >>> generator = torch.Generator().manual_seed(0)
    >>> pool = Pool(image=torch.randn(16, 4, generator=generator), text=torch.randn(16, 4, generator=generator))
    >>> selector(pool, num_survivors=4).shape
    torch.Size([4])
    """

    def __init__(
        self,
        name: str | SelectorFn = "clipcov",
        seed: int = 0,
        *,
        settings: Settings | None = None,
        rank: int = 0,
        all_reduce: AllReduce | None = None,
    ) -> None:
        self.function = resolve(name)
        self.settings = replace(settings or Settings(), seed=seed)
        self.rank = rank
        self.all_reduce = all_reduce
        self.state: SelectionState | None = None
        self.report: dict[str, Tensor] = {}
        self._pending: dict[str, Any] | None = None

    def __call__(self, pool: Pool, num_survivors: int) -> Int64[Tensor, " survivors"]:
        """Indices of the survivors, in the order chosen; `report` then holds the step's figures.

        Raises:
            ValueError: as `select`.
            RuntimeError: fewer valid candidates than survivors.
        """
        if self.state is None:
            self.state = SelectionState.initial(pool.image.shape[1], self.settings, self.rank, pool.image.device)
            if self._pending is not None:
                self.state, self._pending = self.state.restored(self._pending), None
        state, survivors, report = select(self.state, pool, num_survivors, self.function, self.all_reduce)
        num_valid = len(pool) - int(report["num_invalid"])
        if num_valid < num_survivors:
            raise RuntimeError(
                f"only {num_valid} of the pool's {len(pool)} samples can be used, {num_survivors} survivors are needed: "
                f"{int(report['num_invalid'])} are undecodable or have a NaN or inf embedding"
            )
        self.state, self.report = state, report
        return survivors

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives; empty before the first pool."""
        if self.state is None:
            return dict(self._pending or {})
        return self.state.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned. Errors about widths come with the next pool if this is the first."""
        if not state:
            self.state, self._pending = None, None
        elif self.state is None:
            self._pending = state
        else:
            self.state = self.state.restored(state)


def resolve(selector: str | SelectorFn) -> SelectorFn:
    """The function of a selector's name; functions pass through.

    Raises:
        ValueError: an unknown name.
    """
    if callable(selector):
        return selector
    if selector not in SELECTORS:
        raise ValueError(f"selection.selector={selector!r} is not one of {sorted(SELECTORS)}, nor a function")
    return SELECTORS[selector]


def mix(*numbers: int) -> int:
    """A 63-bit seed from whole numbers, by chained splitmix64 steps (Steele, Lea and Flood, OOPSLA 2014)."""
    mask, value = (1 << 64) - 1, 0
    for number in numbers:
        value = (value + number + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        value ^= value >> 31
    return value >> 1


def prepared(pool: Pool) -> Pool:
    """The pool with unit-norm float32 rows, zeros where a row is not valid, and `valid` set."""
    finite = torch.isfinite(pool.image).all(1) & torch.isfinite(pool.text).all(1)
    if pool.learner_image is not None and pool.learner_text is not None:
        finite &= torch.isfinite(pool.learner_image).all(1) & torch.isfinite(pool.learner_text).all(1)
    valid = finite if pool.valid is None else finite & pool.valid.to(finite.device)

    def unit(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else F.normalize(rows.float().masked_fill(~valid[:, None], 0.0), dim=1)

    return replace(
        pool,
        image=unit(pool.image),
        text=unit(pool.text),
        learner_image=unit(pool.learner_image),
        learner_text=unit(pool.learner_text),
        valid=valid,
    )


def valid_of(pool: Pool) -> Bool[Tensor, " pool"]:
    """Which samples may be chosen."""
    return torch.ones(len(pool), dtype=torch.bool, device=pool.image.device) if pool.valid is None else pool.valid


def check_survivors(survivors: Tensor, pool_size: int, num_survivors: int, selector: SelectorFn) -> None:
    """Raise RuntimeError unless a selector returned what it must."""
    name = getattr(selector, "__name__", repr(selector))
    if survivors.dtype != torch.int64 or survivors.shape != (num_survivors,):
        raise RuntimeError(
            f"selector {name} returned {tuple(survivors.shape)} of {survivors.dtype}; it must return "
            f"({num_survivors},) of torch.int64"
        )
    if selector in SELECTORS.values():
        return  # ours are tested; reading values would stall a GPU
    distinct = torch.unique(survivors)
    if len(distinct) != num_survivors or int(distinct[0]) < 0 or int(distinct[-1]) >= pool_size:
        raise RuntimeError(f"selector {name} must return distinct indices from 0 to {pool_size - 1}")


def random_survivors(
    valid: Bool[Tensor, " pool"], num_survivors: int, generator: torch.Generator
) -> Int64[Tensor, " survivors"]:
    """A uniform draw without replacement from the valid samples."""
    keys = torch.rand(len(valid), generator=generator).to(valid.device)
    return top(keys.masked_fill(~valid, -torch.inf), num_survivors)


def top(score: Float[Tensor, " pool"], num: int) -> Int64[Tensor, " num"]:
    """Indices of the `num` highest scores, best first; of equal scores the earlier sample."""
    return torch.sort(score, descending=True, stable=True).indices[:num]


def alignment(pool: Pool) -> Float[Tensor, " pool"]:
    """Cosine of each image and its own caption (F_self of the paper)."""
    return (pool.image * pool.text).sum(1)


def margin(pool: Pool) -> Float[Tensor, " pool"]:
    """s x_i.y_i - 1/2 log sum_j exp(s x_i.y_j) - 1/2 log sum_j exp(s x_j.y_i): minus the contrastive loss per sample.

    What is left of the alignment once what any caption would get is taken off (negCLIPLoss: Wang et al., NeurIPS 2024,
    arXiv 2405.19547, with the pool as the batch). It stands for the paper's F_inter.
    """
    logits = pool.logit_scale * pool.image @ pool.text.T
    invalid = ~valid_of(pool)
    by_image = logits.masked_fill(invalid[None, :], -torch.inf).logsumexp(1)
    by_text = logits.masked_fill(invalid[:, None], -torch.inf).logsumexp(0)
    return (logits.diagonal() - 0.5 * by_image - 0.5 * by_text).masked_fill(invalid, 0.0)


def standardize(score: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"]) -> Float[Tensor, " pool"]:
    """Zero mean and unit standard deviation over the valid samples; zeros if all are equal."""
    count = valid.sum().clamp_min(1)
    centred = (score - score.masked_fill(~valid, 0.0).sum() / count).masked_fill(~valid, 0.0)
    return centred / (centred.square().sum() / count).sqrt().clamp_min(1e-6)


def whitened(
    pool: Pool, state: SelectionState
) -> tuple[Float[Tensor, "pool dim"], Float[Tensor, "pool dim"], Float[Tensor, "dim dim"], Float[Tensor, "dim dim"]]:
    """Image and text centred and whitened, the stream's cross-covariance and the survivors' so far in the same frame.

    Any square root of the inverse covariance gives the same inner products, so a Cholesky factor serves: no
    eigendecomposition. Rows are scaled so that a typical atom x y^T has norm 1.
    """
    stream, kept = state.stream, state.kept
    image_root = cholesky(stream.image_cov, state.settings.ridge)
    text_root = cholesky(stream.text_cov, state.settings.ridge)
    image = solve(image_root, (pool.image - stream.image_mean).T).T
    text = solve(text_root, (pool.text - stream.text_mean).T).T
    image_size, text_size = typical_norm(image), typical_norm(text)
    size = image_size * text_size
    memory = kept.cross_cov_about(stream.image_mean, stream.text_mean) * (kept.weight > 0)
    target = solve(text_root, solve(image_root, stream.cross_cov).T).T / size
    memory = solve(text_root, solve(image_root, memory).T).T / size
    return image / image_size, text / text_size, target, memory


def cholesky(cov: Float[Tensor, "dim dim"], ridge: float) -> Float[Tensor, "dim dim"]:
    """Lower factor of cov + ridge * mean variance * I; defined for a zero matrix too."""
    eye = torch.eye(len(cov), dtype=cov.dtype, device=cov.device)
    spread = cov.diagonal().mean().clamp_min(1e-12)
    # cholesky_ex does not read its status back from the device; the ridge makes the matrix positive definite.
    return torch.linalg.cholesky_ex(cov + ridge * spread * eye).L


def solve(root: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(root, right, upper=False)


def typical_norm(rows: Float[Tensor, "pool dim"]) -> Float[Tensor, ""]:
    return rows.square().sum(1).mean().sqrt().clamp_min(1e-6)


def lag(pool: Pool, state: SelectionState) -> Float[Tensor, " pool"]:
    """x_i^T R y_i, whitened: how far sample i points where the learner still lags behind the stream.

    R is the mean over EARLIER pools (`updated_lag`); zeros before there is one. A pool's own duplicates must not vote
    for themselves.
    """
    stream = state.stream
    image_root = cholesky(stream.image_cov, state.settings.ridge)
    text_root = cholesky(stream.text_cov, state.settings.ridge)
    image = solve(image_root, (pool.image - stream.image_mean).T).T
    text = solve(text_root, (pool.text - stream.text_mean).T).T
    mean_lag = state.lag / state.lag_weight.clamp_min(1e-12)
    return ((image @ solve(text_root, solve(image_root, mean_lag).T).T) * text).sum(1)


def updated_lag(
    state: SelectionState, pool: Pool, all_reduce: AllReduce | None
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, ""]]:
    """Add a pool to R = E_i[x_i y_i^T] - 1/2 E_i[sum_j (p_ij + q_ij) x_i y_j^T].

    x, y are the embedder's centred embeddings, p and q the row and column softmax of the LEARNER's logits over the
    pool: the contrastive gradient, seen in the embedder's space. Mismatched pairs cancel in the mean, so unlike a loss
    per sample it does not chase noise.
    """
    if state.settings.learnability == 0:
        return state.lag, state.lag_weight
    scale = pool.logit_scale if pool.learner_logit_scale is None else pool.learner_logit_scale
    learner_image = pool.image if pool.learner_image is None else pool.learner_image
    learner_text = pool.text if pool.learner_text is None else pool.learner_text
    valid = valid_of(pool)
    logits = (scale * learner_image @ learner_text.T).masked_fill(~(valid[:, None] & valid[None, :]), -1e9)
    weights = 0.5 * (logits.softmax(1) + logits.softmax(0))
    image = (pool.image - state.stream.image_mean).masked_fill(~valid[:, None], 0.0)
    text = (pool.text - state.stream.text_mean).masked_fill(~valid[:, None], 0.0)
    pool_lag = image.T @ (text - weights @ text)
    count = valid.sum().to(pool_lag)
    if all_reduce is not None:
        flat = torch.cat([pool_lag.flatten(), count[None]])
        all_reduce(flat)
        pool_lag, count = flat[:-1].view_as(pool_lag), flat[-1]
    return state.lag * LAG_DECAY + pool_lag, state.lag_weight * LAG_DECAY + count


LAG_DECAY = 0.9
"""Per pool: the learner moves, so R forgets within some ten pools whatever the sketch's half-life."""


def gated(
    score: Float[Tensor, " pool"], valid: Bool[Tensor, " pool"], gate: float, num_survivors: int
) -> Bool[Tensor, " pool"]:
    """Valid samples without the `gate` share of lowest scores, at least `num_survivors` of them."""
    num_open = max(num_survivors, len(score) - int(gate * len(score)))
    keep = torch.zeros_like(valid)
    keep.index_fill_(0, top(score.masked_fill(~valid, -torch.inf), num_open), True)
    return keep & valid


def greedy_select(
    image: Float[Tensor, "pool dim"],
    text: Float[Tensor, "pool dim"],
    gain: Float[Tensor, " pool"],
    redundancy: float,
    valid: Bool[Tensor, " pool"],
    num_survivors: int,
) -> Int64[Tensor, " survivors"]:
    """Greedy maximizer of sum_{i in S} gain_i - redundancy * sum_{i < j in S} (x_i.x_j)(y_i.y_j).

    Each pick lowers the gain of candidates whose atom points the same way, so a duplicate costs its full norm.

    Returns: indices in the order chosen; of equal gains the earlier sample. No repeats.
    Costs: 4 * pool * dim * num_survivors flops, pool extra memory, no host sync.
    """
    gain = gain.masked_fill(~valid, -torch.inf)
    picks = torch.empty(num_survivors, dtype=torch.int64, device=image.device)
    for step in range(num_survivors):
        # A one-element index instead of gain[best]: a 0-dim index is read back from the device.
        best = gain.argmax().view(1)
        picks[step : step + 1] = best
        x, y = image.index_select(0, best), text.index_select(0, best)
        gain = gain - redundancy * (image @ x.T).squeeze(1) * (text @ y.T).squeeze(1)
        gain.index_fill_(0, best, -torch.inf)
    return picks


def certificate(pool: Pool, survivors: Tensor, state: SelectionState) -> dict[str, Tensor]:
    """How well survivors preserve the cross-covariance, beside what random survivors would do; 0-dim tensors.

    residual: ||C_S - C||_F / ||C||_F of this step, C the stream's cross-covariance, C_S the survivors' about the
        stream's means. residual_random: the root of its mean square for uniform survivors without replacement,
        ||C_P - C||^2 + (sigma^2 / K)(P - K)/(P - 1), exact for this pool. residual_total and residual_total_random: the
        same for all survivors so far, the latter from the sketches' effective sizes.
    """
    stream, kept, valid = state.stream, state.kept, valid_of(pool)
    image = (pool.image - stream.image_mean).masked_fill(~valid[:, None], 0.0)
    text = (pool.text - stream.text_mean).masked_fill(~valid[:, None], 0.0)
    count, chosen = valid.sum(), float(len(survivors))
    target = stream.cross_cov
    size = target.norm().clamp_min(1e-12)
    own = image.index_select(0, survivors).T @ text.index_select(0, survivors) / chosen
    pool_mean = image.T @ text / count.clamp_min(1)
    spread = (image.square().sum(1) * text.square().sum(1)).sum() / count.clamp_min(1) - pool_mean.square().sum()
    by_chance = spread / chosen * (count - chosen).clamp_min(0) / (count - 1).clamp_min(1)
    total = kept.cross_cov_about(stream.image_mean, stream.text_mean)
    total_by_chance = spread * (1 / kept.effective_size - 1 / stream.effective_size).clamp_min(0)
    cosine = alignment(pool)
    return {
        "residual": (own - target).norm() / size,
        "residual_random": ((pool_mean - target).square().sum() + by_chance.clamp_min(0)).sqrt() / size,
        "residual_total": (total - target).norm() / size,
        "residual_total_random": total_by_chance.sqrt().to(size) / size,
        "alignment_pool": cosine.sum() / count.clamp_min(1),
        "alignment_survivors": cosine.index_select(0, survivors).mean(),
        "num_invalid": len(pool) - count,
    }
