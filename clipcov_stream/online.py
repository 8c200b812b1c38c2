"""An online proxy: a small model that judges every pool of candidates and then learns from all of it.

The learner sees a fifth of the stream; a model of a hundredth of its cost can afford to learn from the whole of it, and
so is ahead of the learner in what it knows, without a reference model, a pass over the data beforehand or a forward
pass of the learner over the pool. From a pair it learns the more, the likelier the pair is to match, as its
moving average judges before the update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from composer.utils import dist
from torch import Tensor, nn

from clipcov_stream.collectives import summed
from clipcov_stream.copies import MEMORY, THUMBNAIL, log_copies, remembered
from clipcov_stream.embed import Proxy, copied, named_model
from clipcov_stream.evidence import matching
from clipcov_stream.fused import brought
from clipcov_stream.pool import Pool, prepared, valid_of
from clipcov_stream.ranks import Group, gathered, sum_over_ranks

if TYPE_CHECKING:
    from jaxtyping import Float

WARMUP = 20
"""Updates over which the learning rate rises."""

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.98)
"""Of AdamW, as CLIP was trained with (Radford et al., ICML 2021, table 18), but for the decay."""

LARGEST_LOG_SCALE = math.log(100)
"""Of the logits, as in CLIP's training."""

LARGEST_NORM = 1.0
"""Of an update's gradient."""

SHARPEST = 3.0
"""Largest power of `learning_weights`."""

LARGE = 1 << 18
"""Numbers in a table, from which on it is worth while to ask which rows are not zero."""

VERSION = "all ranks are negatives"
"""In a state: how its proxy learned, which is also from small images."""

COUNTS = ("updates", "samples_streamed", "dataset_size")
"""Of an OnlineProxy, in its state: updates made, candidates learned from or left out, and samples of a pass."""

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter. Steps may be fewer than updates: one that is not finite does not count."""


def learning_weights(
    pool: Pool, references: int, passes: float = 0.0, recurs: Float[Tensor, " pool"] | None = None
) -> Float[Tensor, " pool"]:
    """How much an online proxy learns from each pair: p, its chance to match (`evidence.Matching.posterior`), in the
    first pass over the data; p to a power that rises evenly over the second and third to SHARPEST, and stays there.
    Where copies are counted, divided by 1 + n, n of the last candidates having shown its picture. Scaled to 1 in the
    mean of the valid pairs, 0 for the others.

    What is probably mismatched teaches little, as where noisy correspondences are divided from clean ones before they
    are learned from (Huang et al., NeurIPS 2021), but nothing is left out: an embedder that knows little yet gives most
    of them much the same weight, while one that kept to what it takes for matches would stay with the few that it began
    with. In the first pass every pair is judged before it was learned from. Later the proxy has seen them: of a
    mismatched pair that it took for a match it has learned something, takes it for one the sooner, and in some tens of
    passes has many by heart. So doubt weighs more then. And a picture that is copied over and over with a caption that
    is wrong comes as often in one pass: all its copies together teach about as much as one (all measured in
    tools/LOG.md).

    Args:
        pool: as the embedder sees it, before it learns from it.
        references: as `objective.Settings`'.
        passes: over the data, complete before this pool, with their fraction (`OnlineProxy.passes`).
        recurs: (pool,) log(1 + n), `OnlineProxy.recurring`; None: copies are not counted.

    Costs: as `evidence.matching`.
    """
    with torch.autocast(pool.image.device.type, enabled=False):
        pool = prepared(pool)
        valid = valid_of(pool)
        chance = matching(pool, references).posterior(valid).pow(min(max(passes, 1.0), SHARPEST))
        if recurs is not None:
            chance = chance * recurs.neg().exp()
        return chance * (valid.sum() / chance.sum().clamp_min(1e-12))


@dataclass(frozen=True)
class Part:
    """Candidates that an online proxy learns from in one update.

    Args:
        index: (rows,) int64 on the CPU, the places of those that are this rank's, in its pool.
        most: rows that any rank has of the part.
    """

    index: Tensor
    most: int


def parts_in_turn(pool_size: int, rows: int) -> list[Part]:
    """Every rank's own pool in parts of so many candidates, as they come."""
    return [Part(index, len(index)) for index in torch.arange(pool_size).split(rows)]


class OnlineProxy:
    """A proxy in training, and the moving average of its weights, which is what embeds pools.

    Every pool is judged and then learned from, in parts of as many candidates as survive, one update of AdamW each, by
    the contrastive loss within the part (InfoNCE: van den Oord et al., arXiv 1807.03748; Radford et al., ICML 2021),
    each pair's terms weighted (`learning_weights`). Over ranks a part is what all have of it: embeddings are gathered,
    every candidate is a negative of every other, and weights are the same on all ranks. On another number of ranks they
    are those of the same parts up to the order of sums, but for batch norm, whose statistics are each rank's own.

    Args:
        proxy: the model, with `encode_image`, `encode_text` and, to be learned, `logit_scale` as a logarithm. Its
            parameters are trained in place: all of them if it is a `Proxy` or wholly frozen, else those that require
            gradients.
        lr: of AdamW, after WARMUP updates.
        momentum: of the moving average, per update; it warms up as the teacher's does (`embed.Teacher`).
        counts_copies: whether the last candidates are remembered by their thumbnails (`recurring`).

    Raises:
        ValueError: a proxy of other weights than float32, or one that cannot be copied.

    Costs: a forward and a backward pass of the proxy over the pool, beside embedding it; three copies of its
        weights. With several ranks, per update, a gathering of embeddings, all ranks' squared logits and a sum (by gloo
        two), and per pool one. Where copies are counted, per pool, a pass over its pixels, `copies.log_copies` and a
        gathering.
    """

    def __init__(self, proxy: nn.Module, lr: float, momentum: float, counts_copies: bool = False) -> None:
        # On a CPU convolutions take three quarters of the time in this layout; it changes nothing for other layers.
        for tensor in (*proxy.parameters(), *proxy.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
        kinds = {str(p.dtype) for p in proxy.parameters() if p.dtype != torch.float32}
        if kinds:
            raise ValueError(
                f"an online proxy is trained in float32, this one has {sorted(kinds)}: proxy.float() makes it so; "
                "selection.embed_precision says what its passes are in"
            )
        if isinstance(proxy, Proxy) or not any(p.requires_grad for p in proxy.parameters()):
            proxy.requires_grad_(True)  # frozen as a whole, as what is only to embed is; parts are its owner's matter
        self.trained: Any = proxy.train()
        self.learned = [p for p in proxy.parameters() if p.requires_grad]
        for tensor in proxy.state_dict().values():
            dist.broadcast(tensor, 0)  # where somebody built it without a seed, ranks would have others
        try:
            self.model = copied(proxy).eval().requires_grad_(False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # tensors that a hook computes, locks, handles of files
            raise ValueError(
                f"embed='online' cannot copy {named_model(proxy)} (selection.proxy), of which it keeps a moving "
                f"average: {error}. Give ClipCov another proxy=MODEL, or this one with embed='proxy'"
            ) from error
        self.lr, self.momentum = lr, momentum
        self.updates, self.samples_streamed, self.dataset_size = 0, 0, 0
        self.pictures = (
            torch.zeros(MEMORY, THUMBNAIL, dtype=torch.float32, device=next(proxy.parameters()).device)
            if counts_copies
            else None
        )
        """Thumbnails of the last candidates of all ranks, the newest last; zeros where there were none yet. None where
        copies are not counted."""
        batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in proxy.modules())
        self.fewest = 2 if batch_norm else 1
        """Rows of a part that a rank can learn from."""
        matrices = [p for p in self.learned if p.ndim >= 2]
        others = [p for p in self.learned if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        # Fused: beside a small model's passes an update of many small operations takes half of the time.
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, fused=True)

    def learn(
        self,
        image: Tensor,
        text: Tensor,
        valid: Tensor,
        weights: Tensor,
        parts: Sequence[Part],
        width: int,
        precision: Callable[[], AbstractContextManager[Any]],
        normalize: Callable[[Tensor], Tensor] | None = None,
        group: Group = None,
    ) -> None:
        """Train on a pool.

        Args:
            image: (pool, ...) images, on the proxy's device.
            text: (pool, context) tokens, there or on the CPU.
            valid: (pool,) mask, on the CPU; other samples are left out.
            weights: (pool,) of each sample's terms of the loss, `learning_weights`, on the proxy's device.
            parts: one per update, on every rank as many.
            width: of an embedding.
            precision: makes an autocast context, or a null one.
            normalize: of images, before the proxy sees them; None: they are as it reads them.
            group: of processes, as for `ranks.sum_over_ranks`.
        """
        self.samples_streamed += len(valid) * dist.get_world_size()
        text = brought(text, image.device)
        for part in parts:
            # Every rank makes as many updates, whatever it has to leave out.
            index = part.index[valid[part.index]]
            index = index if len(index) >= self.fewest else index[:0]
            pixels = image.index_select(0, brought(index, image.device))
            tokens = text.index_select(0, brought(index, text.device))
            if normalize is not None and len(index):
                pixels = normalize(pixels)
            own_weights = weights.index_select(0, brought(index, weights.device))
            self.optimizer.zero_grad()
            loss = self._loss(pixels, tokens, own_weights, part.most, width, precision, group)
            if loss.requires_grad:
                loss.backward()
            self._update(group)
        self._share_buffers(group)

    def recurring(self, pictures: Float[Tensor, "pool thumbnail"]) -> Float[Tensor, " pool"]:
        """How often each picture was a candidate lately, as `copies.log_copies`, of which these then are some.

        Args:
            pictures: `thumbnails` of all ranks' pools; zeros of samples that are not valid.
        """
        assert self.pictures is not None
        pictures = pictures.nan_to_num(0.0, 0.0, 0.0)  # one that is not finite would be like every other
        found = log_copies(pictures, self.pictures)
        self.pictures = remembered(self.pictures, pictures).contiguous()
        return found

    def begin(self, dataset_size: int) -> None:
        """Train on a data set of so many samples, of all ranks, 0 if that is not known: then every pass counts as the
        first. One of another size than before begins its first pass."""
        if dataset_size != self.dataset_size:
            self.dataset_size, self.samples_streamed = dataset_size, 0

    @property
    def passes(self) -> float:
        """Over the data, so far; 0 where their size is not known."""
        return self.samples_streamed / self.dataset_size if self.dataset_size else 0.0

    def _loss(
        self,
        image: Tensor,
        text: Tensor,
        weights: Tensor,
        most: int,
        width: int,
        precision: Callable[[], AbstractContextManager[Any]],
        group: Group = None,
    ) -> Tensor:
        """Of a part, of which this rank has these rows, perhaps none, and any rank at most `most`."""
        x, y = weights.new_zeros(2, 0, width)
        if len(image):
            with precision():
                x, y = self.trained.encode_image(image), self.trained.encode_text(text)
            if not (x.requires_grad or y.requires_grad):
                raise ValueError(
                    f"an online proxy learns by gradients, and neither encode_image nor encode_text of this "
                    f"{named_model(self.trained)} has any: take torch.no_grad and the like out of them, or use "
                    "embed='proxy'"
                )
        scale, there = getattr(self.trained, "logit_scale", None), None
        # In bfloat16 the logits would be off by a third at a scale of 100.
        with torch.autocast(weights.device.type, enabled=False):
            x, y = F.normalize(x.float(), dim=1), F.normalize(y.float(), dim=1)
            if dist.get_world_size() > 1:
                x, y, weights, there = of_all_ranks(x, y, weights, most, group)
            return contrastive(x, y, scale.exp() if isinstance(scale, Tensor) else 100.0, weights, there)

    def _update(self, group: Group = None) -> None:
        """A step of AdamW on all ranks' gradients, and one of the moving average."""
        self.updates += 1
        for parameter in self.learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = average_over_ranks([p.grad for p in self.learned if p.grad is not None], group)
        norm = torch.nn.utils.get_total_norm(gradients).float()
        # What a gradient scaler tells a fused optimizer: to divide by so much, and whether to leave the step out. Of a
        # part whose gradient is not finite nothing is learned: one NaN would stay for good.
        self.optimizer.grad_scale = (norm / LARGEST_NORM).clamp_min(1.0)  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.found_inf = (~norm.isfinite()).float()  # pyright: ignore[reportAttributeAccessIssue]
        for of_optimizer in self.optimizer.param_groups:
            of_optimizer["lr"] = self.lr * min(1.0, self.updates / WARMUP)
        self.optimizer.step()
        self._follow()

    @torch.no_grad()
    def _follow(self) -> None:
        scale = getattr(self.trained, "logit_scale", None)
        if isinstance(scale, nn.Parameter):
            scale.clamp_(0, LARGEST_LOG_SCALE)
        weight = 1 - min(self.momentum, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in self.trained.parameters()], weight)

    @torch.no_grad()
    def _share_buffers(self, group: Group = None) -> None:
        """Give the average the buffers of the model, on all ranks rank 0's: batch norm's statistics differ by rank.

        What is not finite in them, of a candidate that was not, is as it was.
        """
        pairs = list(zip(self.model.buffers(), self.trained.buffers(), strict=True))
        for mine, theirs in pairs:
            if theirs.is_floating_point():
                theirs.copy_(torch.where(theirs.isfinite(), theirs, mine))
        if pairs and dist.get_world_size() > 1:
            # As bytes, to which the other ranks add zeros: counts and masks are buffers too, and masks have -inf.
            own = [theirs.reshape(-1).view(torch.uint8) for _, theirs in pairs]
            own = [torch.zeros_like(theirs) for theirs in own] if dist.get_global_rank() else own
            of_first = summed(own, functools.partial(sum_over_ranks, group=group))
            for (_, theirs), value in zip(pairs, of_first, strict=True):
                theirs.copy_(value.clone().view(theirs.dtype).view_as(theirs))
        for mine, theirs in pairs:
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of weights, moving average, moments, pictures and COUNTS, by name."""
        counts = {name: getattr(self, name) for name in COUNTS} | {VERSION: True}
        state = {name: torch.tensor(count) for name, count in counts.items()}
        if self.pictures is not None:
            state["pictures"] = self.pictures.clone()
        for kind, model in (("trained", self.trained), ("average", self.model)):
            state |= {f"{kind}.{name}": value.clone() for name, value in model.state_dict().items()}
        for name, parameter in self.trained.named_parameters():
            own = self.optimizer.state.get(parameter, {})
            state |= {f"{moment}.{name}": own[moment].clone() for moment in MOMENTS if moment in own}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError for the state of an older version's online proxy, which learned otherwise."""
        pictures = state.get("pictures", torch.zeros(0))
        if VERSION not in state or (self.pictures is not None and pictures.shape != self.pictures.shape):
            raise ValueError(
                "the checkpoint's online proxy is of an older version, which learned from other images of the "
                "candidates, weighted them otherwise, counted no copies or had other negatives, and cannot be gone on "
                "with. Take the model's weights alone: load_path=... and load_weights_only=true"
            )
        self.updates, self.samples_streamed, self.dataset_size = (int(state[name]) for name in COUNTS)
        if self.pictures is not None:
            self.pictures = state["pictures"].to(self.pictures, copy=True)
        for kind, model in (("trained", self.trained), ("average", self.model)):
            own = {name.partition(".")[2]: value for name, value in state.items() if name.startswith(f"{kind}.")}
            model.load_state_dict(own)
        for name, parameter in self.trained.named_parameters():
            if f"{MOMENTS[0]}.{name}" in state:
                step, *moments = (state[f"{moment}.{name}"] for moment in MOMENTS)
                # In the parameter's layout, whatever theirs is: the fused step takes numbers in the order of memory.
                own = [torch.empty_like(parameter, requires_grad=False).copy_(moment) for moment in moments]
                values = (step.to(parameter.device, copy=True), *own)
                self.optimizer.state[parameter] = dict(zip(MOMENTS, values, strict=True))


def contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, weights: Tensor, there: Tensor | None = None
) -> Tensor:
    """Weighted mean of both directions' cross-entropies; all rows are one another's negatives.

    Args:
        x, y: (rows, width) float32 unit-norm embeddings of images and captions.
        logit_scale: exponentiated.
        weights: (rows,).
        there: (rows,) mask; other rows are nobody's negatives and count for nothing. None: all are.
    """
    logits = logit_scale * x @ y.T
    own = torch.arange(len(logits), device=logits.device)
    tables, num = (logits, logits.T), max(len(logits), 1)
    if there is not None:
        # Without reading the mask: nothing waits for the device. The rows of those left out are zeros, for of -inf the
        # cross-entropy would be NaN, and times a weight of 0 still.
        tables = tuple(table.masked_fill(~there, -math.inf).masked_fill(~there[:, None], 0.0) for table in tables)
        weights, num = weights * there, there.sum().clamp_min(1)
    both = (F.cross_entropy(table, own, reduction="none") for table in tables)
    return (weights * sum(both)).sum() / num / 2


def of_all_ranks(
    x: Tensor, y: Tensor, weights: Tensor, most: int, group: Group = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All ranks' rows of a part, rank after rank, `most` of each, and which of them there are.

    Every rank then computes the loss of the whole part. Of its gradient what goes through the rank's own rows is
    multiplied by the number of ranks, so that after `average_over_ranks` parameters have the whole loss's; the logit
    scale, which is not behind a rank's own rows alone, has it without.

    Args:
        x, y: (rows, width) float32 embeddings, `most` rows or fewer.
        weights: (rows,).
        most: rows of any rank, on all the same.
        group: as for `ranks.Gathering`.
    """
    rank, num_ranks, width = dist.get_global_rank(), dist.get_world_size(), x.shape[1]
    columns = torch.cat([x, y, weights[:, None], torch.ones_like(weights)[:, None]], dim=1)
    own = F.pad(columns, (0, 0, 0, most - len(columns)))
    whole = gathered(own.detach(), group)
    if own.requires_grad:
        own.register_hook(lambda gradient: gradient * num_ranks)
        whole = torch.cat([whole[: rank * most], own, whole[(rank + 1) * most :]])
    x, y, weights, there = whole.split([width, width, 1, 1], dim=1)
    return x, y, weights.detach()[:, 0], there.detach()[:, 0] > 0


def average_over_ranks(tensors: list[Tensor], group: Group = None) -> list[Tensor]:
    """Gradients' means over ranks, in the tensors themselves.

    Of a table of words a part of a pool reads few rows, and the gradient of the others is zero. By gloo, which is slow,
    only the rows travel that some rank has read. NCCL gets all, and nothing waits to learn how many rows there are.
    """
    if dist.get_world_size() == 1:
        return tensors
    all_reduce = functools.partial(sum_over_ranks, group=group)
    by_gloo = group is not None or not tensors[0].is_cuda
    tables = [tensor for tensor in tensors if by_gloo and tensor.ndim == 2 and tensor.numel() >= LARGE]
    read = summed([(table != 0).any(1).int() for table in tables], all_reduce) if tables else []
    rows = {id(table): part.nonzero().squeeze(1) for table, part in zip(tables, read, strict=True)}
    sent = [tensor[rows[id(tensor)]] if id(tensor) in rows else tensor for tensor in tensors]
    for tensor, total in zip(tensors, summed(sent, all_reduce), strict=True):
        mean = total.div_(dist.get_world_size())
        if id(tensor) in rows:
            tensor.index_copy_(0, rows[id(tensor)], mean)
        else:
            tensor.copy_(mean)
    return tensors
