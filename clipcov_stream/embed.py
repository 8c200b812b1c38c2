"""A pool -> image and text embeddings, from columns, a frozen proxy or the learner's moving average.

An embedder is anything with `encode_image`, `encode_text` and a `logit_scale` kept as a logarithm: every open_clip
model is one, and so is ClipModel. Passes run in eval mode, without gradients, in chunks, so that a pool five times the
batch needs no more memory than the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED_SOURCES = ("teacher", "proxy", "columns")
Embeddings = tuple[Tensor, Tensor, float | Tensor]
"""(pool, dim) image, (pool, dim) text, logit scale (exponentiated)."""


def check_towers(model: Any, what: str) -> None:
    """Raise ValueError unless a model can embed images and captions."""
    missing = [name for name in ("encode_image", "encode_text") if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"{what} {type(model).__name__} has no {' and no '.join(missing)}; selection needs both towers "
            "(encode_image(images), encode_text(tokens), and logit_scale as a logarithm)"
        )
    scale = getattr(model, "logit_scale", None)
    if scale is not None and not isinstance(scale, Tensor):
        raise ValueError(
            f"{what} {type(model).__name__} has logit_scale={scale!r}; selection reads it as a tensor that holds its "
            "logarithm, or takes 100 where there is none"
        )


@torch.no_grad()
def embed_with_towers(
    model: Any, image: Tensor, text: Tensor, chunk: int, precision: AbstractContextManager[Any]
) -> Embeddings:
    """Embeddings of a pool by a model's two towers.

    Args:
        model: with `encode_image`, `encode_text`, `logit_scale`; the train or eval mode of all its parts is left as it
            was.
        image, text: (pool, ...) inputs of the towers, on the model's device.
        chunk: rows per forward pass; the training batch's shape avoids recompilation.
        precision: an autocast context, or a null one.

    Costs: one forward of both towers on the pool: pool / (3 * survivors) training steps.
    """
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with precision:
            images = torch.cat([model.encode_image(part) for part in image.split(chunk)])
            texts = torch.cat([model.encode_text(part) for part in text.split(chunk)])
    finally:
        for part in training:
            part.training = True  # not model.train(), which would wake parts their owner put to sleep
    return images.float(), texts.float(), scale_of(model)


def scale_of(model: Any) -> float | Tensor:
    """The model's logit scale, exponentiated; CLIP's 100 if it has none."""
    scale = getattr(model, "logit_scale", None)
    return scale.detach().float().exp().reshape(()) if isinstance(scale, Tensor) else 100.0


def embed_from_columns(batch: Mapping[str, Any], image_key: str, text_key: str, logit_scale: float) -> Embeddings:
    """Embeddings that came with the pool.

    Raises:
        ValueError: a column that is not in the batch.
    """
    for key in (image_key, text_key):
        if key not in batch:
            raise ValueError(
                f"embed='columns' needs {key!r} in the batch, which has {sorted(batch)}; set stream.columns."
                f"image_embedding and stream.columns.text_embedding, or use embed='teacher' or 'proxy'"
            )
    return batch[image_key].float(), batch[text_key].float(), logit_scale


class Teacher:
    """Moving average of the learner's weights: an embedder that needs no reference model.

    Its embeddings are steadier than the learner's, which is what a running sketch needs (mean teacher: Tarvainen and
    Valpola, NeurIPS 2017).

    Args:
        learner: model to follow.
        momentum: weight of the old average per step. It warms up as (1 + t) / (10 + t), so that the random initial
            weights are forgotten at once.

    Costs: a second copy of the weights; one multiply-add per weight and step.
    """

    def __init__(self, learner: nn.Module, momentum: float) -> None:
        self.model = copy.deepcopy(learner).eval().requires_grad_(False)
        self.momentum = momentum

    @torch.no_grad()
    def update(self, learner: nn.Module, step: int) -> None:
        """Move towards the learner, after optimizer step number `step`."""
        weight = 1 - min(self.momentum, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in learner.parameters()], weight)
        for mine, theirs in zip(self.model.buffers(), learner.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)


class Proxy(nn.Module):
    """A frozen embedder that reads the learner's pools.

    Args:
        towers: an open_clip model.
        image_size: side of the images it reads; the pool's are resized to it. None: no resizing.
        mean, std: of its own normalization; pool_mean, pool_std: of the pool's images.
        context_length: of its tokenizer. The captions' tokens are the learner's, so the two tokenizers must agree;
            `build.build_proxy` checks it.

    Raises:
        ValueError: a model without both towers.
    """

    def __init__(
        self,
        towers: nn.Module,
        image_size: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        pool_mean: tuple[float, ...] | None = None,
        pool_std: tuple[float, ...] | None = None,
        context_length: int | None = None,
    ) -> None:
        super().__init__()
        check_towers(towers, "proxy")
        self.towers = towers.eval().requires_grad_(False)
        self.image_size = image_size
        self.context_length = context_length
        one = torch.ones(1, 3, 1, 1)
        own = [one * 0 if mean is None else channels(mean), one if std is None else channels(std)]
        pool = [
            own[0] if pool_mean is None else channels(pool_mean),
            own[1] if pool_std is None else channels(pool_std),
        ]
        # (p * pool_std + pool_mean - mean) / std, as one multiply-add.
        self.register_buffer("gain", pool[1] / own[1], persistent=False)
        self.register_buffer("shift", (pool[0] - own[0]) / own[1], persistent=False)

    @property
    def logit_scale(self) -> Any:
        return getattr(self.towers, "logit_scale", None)

    def encode_image(self, image: Tensor) -> Tensor:
        if self.image_size is not None and image.shape[-1] != self.image_size:
            image = F.interpolate(image, size=(self.image_size,) * 2, mode="bicubic", antialias=True)
        return self.towers.encode_image(image * self.gain + self.shift)  # pyright: ignore

    def encode_text(self, text: Tensor) -> Tensor:
        """Raises ValueError for captions cut longer or shorter than the proxy's context can take."""
        if self.context_length is not None and text.shape[1] != self.context_length:
            if text.shape[1] > self.context_length:
                raise ValueError(
                    f"the proxy reads {self.context_length} tokens, the learner's captions have {text.shape[1]}: "
                    "cutting them would lose the end token; choose a proxy with a context at least as long"
                )
            text = F.pad(text, (0, self.context_length - text.shape[1]))
        return self.towers.encode_text(text)  # pyright: ignore


def channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)
