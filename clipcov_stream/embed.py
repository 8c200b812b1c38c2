"""A pool -> image and text embeddings, from columns, a proxy or the learner's moving average.

An embedder is anything with `encode_image`, `encode_text` and a `logit_scale` kept as a logarithm: every open_clip
model is one, and so is ClipModel. Passes run in eval mode, without gradients, in chunks, so that a pool five times the
batch needs no more memory than the batch.
"""

from __future__ import annotations

import copy
import math
import numbers
import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from clipcov_stream.folded import folded
from clipcov_stream.fused import brought
from clipcov_stream.patches import fewer_patches
from clipcov_stream.pool import as_rows
from clipcov_stream.sharded import whole
from clipcov_stream.sketch import sync_is_free
from clipcov_stream.towers import SmallTowers

EMBED_SOURCES = ("teacher", "proxy", "online", "columns")
IN_TRAINING = ("teacher", "online")
"""Sources whose embeddings change from step to step."""

EMBED_PRECISIONS = {"fp32": torch.float32, "amp_fp16": torch.float16, "amp_bf16": torch.bfloat16}
"""Composer's names."""

Function = TypeVar("Function", bound=Callable[..., Any])

Embeddings = tuple[Tensor, Tensor, float | Tensor]
"""(pool, dim) image, (pool, dim) text, logit scale (exponentiated)."""

LENGTH_STEP = 8
"""Captions are cut at multiples of it, so that few shapes occur."""

AT_ONCE = 2048
"""Rows that SmallTowers read in one forward pass on a GPU."""


def is_native(dtype: torch.dtype, device: str) -> bool:
    """Whether a device has instructions for products of such numbers; where it has none, they take several times as
    long as float32's.

    As far as torch says, which is False only if it is certain: of a CPU with AVX-512 it says True, though older ones of
    these have no bfloat16 and gain nothing, and of other processors than x86 it does not know of float16.

    Args:
        device: torch's name of its type.
    """
    if device == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu" or dtype == torch.float32 or (dtype == torch.float16 and not on_x86()):
        return True
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    try:
        return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")())
    except (AttributeError, RuntimeError):  # a torch that does not say
        return True


def on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def check_precision(embed_precision: str | None, device: str) -> None:
    """Warn of an `embed_precision` that a device, torch's name of its type, has no instructions for."""
    if embed_precision is not None and not is_native(EMBED_PRECISIONS[embed_precision], device):
        warnings.warn(
            f"selection.embed_precision={embed_precision}: this {device} device has no instructions for it, and the "
            "embedding pass will take several times as long as with fp32",
            stacklevel=2,
        )


def check_towers(model: Any, what: str) -> None:
    """Raise ValueError unless a model can embed images and captions."""
    missing = [name for name in ("encode_image", "encode_text") if not callable(getattr(model, name, None))]
    if missing:
        raise ValueError(
            f"{what} {type(model).__name__} has no {' and no '.join(missing)}; selection needs both towers "
            "(encode_image(images), encode_text(tokens), and logit_scale as a logarithm)"
        )
    scale = getattr(model, "logit_scale", None)
    if scale is not None and not (isinstance(scale, Tensor) and scale.numel() <= 1):  # of none on some ranks, with FSDP
        found = f" of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else f"={scale!r}"
        raise ValueError(
            f"{what} {type(model).__name__} has logit_scale{found}; selection reads it as a tensor of one number that "
            "holds its logarithm, or takes 100 where there is none"
        )


def check_embedder(
    embed: str,
    proxy: nn.Module | None,
    embed_resolution: int | None,
    embed_precision: str | None,
    embed_patch_dropout: float | None,
) -> None:
    """Raise ValueError unless these arguments of `ClipCov` say how to embed a pool."""
    if embed not in EMBED_SOURCES:
        raise ValueError(f"selection.embed={embed!r} is not one of {list(EMBED_SOURCES)}")
    if proxy is not None and embed not in ("proxy", "online"):
        raise ValueError(f"embed={embed!r} takes no proxy model")
    if proxy is None and embed == "proxy":
        raise ValueError(
            f"embed={embed!r} needs a proxy model: selection.proxy.name and .pretrained in a recipe, proxy=MODEL of "
            "ClipCov"
        )
    if isinstance(proxy, type):
        raise ValueError(f"selection.proxy={proxy.__name__} is a class; give ClipCov a model made of it, proxy=MODEL")
    if proxy is not None:
        check_towers(proxy, "proxy")
    options = {
        "embed_resolution": embed_resolution,
        "embed_precision": embed_precision,
        "embed_patch_dropout": embed_patch_dropout,
    }
    for name, value in options.items():
        if value is not None and embed == "columns":
            raise ValueError(f"selection.{name}={value} has no effect with embed='columns', which has no pass")
    for name in ("embed_resolution", "embed_patch_dropout"):
        if options[name] is not None and embed == "online":
            raise ValueError(
                f"selection.{name}={options[name]}: an online proxy embeds images as it learns from them; give it "
                "another model (selection.proxy), or use embed='teacher' or 'proxy'"
            )
    if embed_precision not in (None, *EMBED_PRECISIONS):
        raise ValueError(
            f"selection.embed_precision={embed_precision!r} is not one of {list(EMBED_PRECISIONS)}, nor null"
        )


@torch.no_grad()
def embed_with_towers(
    model: Any,
    image: Tensor,
    text: Tensor,
    chunk: int,
    precision: AbstractContextManager[Any],
    resolution: int | None = None,
    plain: bool = False,
    on_images: Callable[[Tensor], None] | None = None,
    patch_dropout: float | None = None,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> Embeddings:
    """Embeddings of a pool by a model's two towers.

    Args:
        model: with `encode_image`, `encode_text`, `logit_scale`; the train or eval mode of all its parts is left as it
            was.
        image: (pool, ...) images, on the model's device.
        text: (pool, context) tokens, there or on the CPU.
        chunk: rows per forward pass; the training batch's shape avoids recompilation.
        precision: an autocast context, or a null one.
        resolution: side in pixels of the images the model sees; position embeddings are resized with them. None: as
            they come.
        plain: call the model as it is. Otherwise images are laid out channels last, on a CPU open_clip's ResNets run
            with their batch norms folded in (`folded`), and an open_clip text tower reads captions no further than to
            their end token, all of which changes rounding alone.
        patch_dropout: share of the patches that an open_clip image transformer does not look at (`patches`).
        on_images: told the image embeddings before captions are read, to send them meanwhile.
        normalize: of images, before the model sees them, a chunk at a time; None: they are as it reads them.

    Raises:
        ValueError: a resolution that the model cannot read, or a patch dropout for one without such patches.

    Costs: one forward of both towers on the pool: pool / (3 * survivors) training steps, less what `resolution`,
        `patch_dropout` and short captions save.
    """
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with precision, fewer_patches(model, patch_dropout) if patch_dropout else nullcontext():
            images = encoded_images(model, image, chunk, resolution, plain, normalize).float()
            if on_images is not None:
                on_images(images)
            short = None if plain or not sync_is_free(text) else reads_to_end(model)
            if short is None:
                parts = brought(text, image.device).split(chunk)
                texts = torch.cat([call_with(model, {}, "encode_text", part) for part in parts])
            else:
                texts = encoded_captions(model, text, chunk, *short, image.device)
    finally:
        for part in training:
            part.training = True  # not model.train(), which would wake parts their owner put to sleep
    return images, texts.float(), scale_of(model)


def rows_at_once(model: nn.Module, image: Tensor, chunk: int) -> int:
    """Rows per forward pass of an embedder over a pool: `chunk`, but of `SmallTowers` on a GPU as many as AT_ONCE.

    Their operations end before a GPU is told of the next, so there a pass costs as much as it has operations.
    """
    small = isinstance(model.towers if isinstance(model, Proxy) else model, SmallTowers)
    if not small or sync_is_free(image):
        return chunk
    return max(chunk, -(-len(image) // -(-len(image) // AT_ONCE)))


class Call(nn.Module):
    """Lets `functional_call` call any method of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, value: Tensor) -> Tensor:
        return getattr(self.model, method)(value)


def call_with(model: nn.Module, tensors: dict[str, Tensor], method: str, value: Tensor) -> Tensor:
    """A method's result with some parameters or buffers replaced during the call.

    Raises:
        ValueError: it is no tensor, or a model of half-precision weights cannot read the value.
    """
    try:
        if not tensors:
            return checked_rows(model, method, getattr(model, method)(value))
        call = Call(model)
        call.training = model.training
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return checked_rows(model, method, functional_call(call, named, (method, value)))
    except RuntimeError as error:
        kinds = sorted({str(p.dtype) for p in model.parameters() if p.dtype in HALVES})
        if not kinds or isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            f"{named_model(model)}.{method} with weights of {' and '.join(kinds)} failed ({error}). If it cannot read "
            f"{value.dtype}, convert it, model.float(), or set selection.embed_precision to 'amp_fp16' or 'amp_bf16'"
        ) from error


def named_model(model: nn.Module) -> str:
    """What messages call a model: a Proxy's towers are a user's own."""
    return type(model.towers if isinstance(model, Proxy) else model).__name__


def checked_rows(model: nn.Module, method: str, rows: Any) -> Tensor:
    """Embeddings, as a tower returned them. Raises ValueError unless these are a tensor."""
    if not isinstance(rows, Tensor):
        raise ValueError(
            f"{named_model(model)}.{method} returned a {type(rows).__name__}; selection needs a tensor of embeddings, "
            "(n, dim). Have it return that, or use embed='online' with a proxy=MODEL whose towers do, or "
            "embed='columns'"
        )
    return rows


def encoded_images(
    model: Any,
    image: Tensor,
    chunk: int,
    resolution: int | None,
    plain: bool,
    normalize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(pool, dim) image embeddings; arguments as in `embed_with_towers`."""
    tensors: dict[str, Tensor] = {}
    smaller = False
    if resolution is not None:
        tensors = positions_at(model, resolution)
        if isinstance(model, Proxy):
            model = model.reading(image_size=resolution)
        else:
            smaller = image.shape[-2:] != (resolution, resolution)

    def encoded(part: Tensor) -> Tensor:
        if normalize is not None:
            part = normalize(part)
        if smaller:
            part = F.interpolate(resizable(part), size=(resolution, resolution), mode="bicubic", antialias=True)
        if not plain and part.ndim == 4:
            part = part.contiguous(memory_format=torch.channels_last)
        return call_with(model, tensors, "encode_image", part)

    faster = folded(model) if not plain and sync_is_free(image) else nullcontext()
    try:
        with faster:
            return torch.cat([encoded(part) for part in image.split(chunk)])
    except (RuntimeError, AssertionError) as error:
        if resolution is None:
            raise
        raise ValueError(
            f"selection.embed_resolution={resolution}: the embedder cannot read images of {resolution} x {resolution} "
            f"pixels ({error}); of transformers, open_clip's own can, in multiples of the patch size"
        ) from error


def resizable(image: Tensor) -> Tensor:
    """Images of a type that every device resizes: of halves a CPU's antialiasing has none, of bytes a GPU's."""
    return image if image.dtype in (torch.float32, torch.float64) else image.float()


@torch.no_grad()
def check_resolution(model: nn.Module, resolution: int | None) -> None:
    """Raise ValueError unless an embedder, in float32, can read images of `resolution` pixels: it is given one."""
    if resolution is None:
        return
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        device = next((tensor.device for tensor in model.parameters()), None)
        encoded_images(model, torch.zeros(1, 3, resolution, resolution, device=device), 1, resolution, plain=True)
    finally:
        for part in training:
            part.training = True


def positions_at(model: nn.Module, resolution: int) -> dict[str, Tensor]:
    """The position embeddings of open_clip's image towers for images of another size, by name; none if they fit.

    Raises:
        ValueError: a size that is not whole in the tower's patches, or in the 32 pixels of a ResNet's cell.
    """
    tensors = {}
    for name, part in model.named_modules():
        if isinstance(part, VisionTransformer):
            patch: Any = part.patch_size
            cell, owner, key = int(patch[0]), part, f"{name}.positional_embedding"
        elif isinstance(part, ModifiedResNet):
            cell, owner, key = 32, part.attnpool, f"{name}.attnpool.positional_embedding"
        else:
            continue
        if resolution % cell:
            raise ValueError(f"selection.embed_resolution={resolution} must be a multiple of {cell} for this embedder")
        positions = owner.positional_embedding
        assert isinstance(positions, Tensor)
        side, wanted = math.isqrt(len(positions) - 1), resolution // cell
        if side != wanted:
            grid = positions[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
            grid = F.interpolate(grid, size=(wanted, wanted), mode="bicubic", antialias=True)
            grid = grid.permute(0, 2, 3, 1).reshape(wanted * wanted, -1).to(positions.dtype)
            tensors[key] = torch.cat([positions[:1], grid])
    return tensors


def reads_to_end(model: Any) -> tuple[str, nn.Module] | None:
    """Name and module of an open_clip text tower in which what follows a caption's end token changes nothing.

    That is a causal one, read at the end token, and the model reads captions by it and by nothing else: an own
    `encode_text` may do anything.
    """
    path = []
    while part := getattr(getattr(type(model), "encode_text", None), PASSES_ON, None):
        path.append(part)
        model = getattr(model, part)
    if isinstance(model, CLIP) and type(model).encode_text is CLIP.encode_text:
        pooled_at = model.text_pool_type
    elif isinstance(model, CustomTextCLIP) and type(model).encode_text is CustomTextCLIP.encode_text:
        path.append("text")
        model = model.text
        if type(model) is not TextTransformer or model.cls_emb is not None:
            return None
        pooled_at = model.pool_type
    else:
        return None
    causal = isinstance(getattr(model, "attn_mask", None), Tensor)
    return (".".join(path), model) if causal and pooled_at in ("argmax", "eos") else None


PASSES_ON = "passes_on_to"


def passes_on(part: str) -> Callable[[Function], Function]:
    """Says of a method `encode_text` that it is that of a part of its object, by name: `reads_to_end` looks there."""

    def told(method: Function) -> Function:
        setattr(method, PASSES_ON, part)
        return method

    return told


def encoded_captions(model: nn.Module, text: Tensor, chunk: int, name: str, tower: Any, device: torch.device) -> Tensor:
    """(pool, dim) caption embeddings, each chunk as long as its longest caption; the tower from `reads_to_end`."""
    eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
    pooled_at = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    length = ((text == eos).int() if pooled_at == "eos" else text).argmax(1) + 1
    order = length.argsort(stable=True)
    prefix = f"{name}." if name else ""
    positions, mask = tower.positional_embedding, tower.attn_mask
    found = []
    for rows in order.split(chunk):
        longest = int(length[rows[-1]])
        reads, tensors = model, {}
        if longest <= len(positions):
            longest = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, len(positions), text.shape[1])
            tensors[f"{prefix}positional_embedding"] = positions[:longest]
            tensors[f"{prefix}attn_mask"] = mask[:longest, :longest]
            reads = model.reading(context_length=longest) if isinstance(model, Proxy) else model
        found.append(call_with(reads, tensors, "encode_text", brought(text[rows, :longest], device)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    return torch.cat(found).index_select(0, brought(place, device))


def scale_of(model: Any) -> float | Tensor:
    """The model's logit scale, exponentiated; CLIP's 100 if it has none. Raises ValueError as `check_towers`."""
    scale = getattr(model, "logit_scale", None)
    if isinstance(scale, Tensor) and scale.numel() > 1:
        check_towers(model, "selection reads the logit scale of the Trainer's model:")
    return whole(scale.detach()).float().exp().reshape(()) if isinstance(scale, Tensor) else 100.0


def scale_in(outputs: Mapping[str, Any]) -> float | Tensor:
    """The `logit_scale` that a model's outputs hold, exponentiated.

    Raises:
        ValueError: it is not one number.
    """
    scale = outputs["logit_scale"]
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return scale.reshape(())
    if isinstance(scale, Tensor) or not isinstance(scale, numbers.Real):
        found = f"shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else repr(scale)
        raise ValueError(f"the model's output logit_scale must be one number, exponentiated, not {found}")
    return float(scale)


def embed_from_columns(batch: Mapping[str, Any], image_key: str, text_key: str, logit_scale: float) -> Embeddings:
    """Embeddings that came with the pool, of the type they came in; of lists and arrays, as tensors.

    Raises:
        ValueError: a column that is not in the batch, or is not one of numbers.
    """
    for key in (image_key, text_key):
        if key not in batch:
            raise ValueError(
                f"embed='columns' needs {key!r} in the batch, which has {sorted(batch)}; set stream.columns."
                "image_embedding and stream.columns.text_embedding, or use embed='online'"
            )
    image, text = (as_rows(f"the batch's {key!r}", batch[key]) for key in (image_key, text_key))
    return image, text, logit_scale


HALVES = (torch.bfloat16, torch.float16)
EXACT = "float32."
"""What a Teacher's state has before the names of averages of half-precision weights."""


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model.

    A `forward` that was compiled, as Composer's `compile_config` has it, is the model's own function, and a copy of it
    still passes through the model: the copy has the class's. (A module that `torch.compile` made has no other, and is
    copied whole.)
    """
    found = copy.deepcopy(model)
    for module in found.modules():
        is_compiled = hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
        if is_compiled and type(module).forward is not nn.Module.forward:
            del module.__dict__["forward"]
    return found


def is_continuous(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


class Teacher:
    """Moving average of the learner's weights: an embedder that needs no reference model.

    Its embeddings are steadier than the learner's, which is what a running sketch needs (mean teacher: Tarvainen and
    Valpola, NeurIPS 2017).

    Args:
        learner: model to follow.
        momentum: weight of the old average per step. It warms up as (1 + t) / (10 + t), so that the random initial
            weights are forgotten at once.

    Raises:
        ValueError: a learner that cannot be copied.

    Costs: a second copy of the weights, of those in half precision one in float32 too; one multiply-add per weight and
        step.
    """

    def __init__(self, learner: nn.Module, momentum: float) -> None:
        try:
            self.model = copied(learner).eval().requires_grad_(False)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of tensors that a hook computes, as torch.nn.utils.weight_norm's
            raise ValueError(
                f"embed='teacher' cannot copy {type(learner).__name__}: {error}. Use embed='online', 'proxy' or "
                "'columns'"
            ) from error
        self.momentum = momentum
        self.exact = {name: p.float() for name, p in self.model.named_parameters() if p.dtype in HALVES}
        """The average of half-precision weights: there a step of it would be rounded to none."""

    @torch.no_grad()
    def update(self, learner: nn.Module, step: int) -> None:
        """Move towards the learner, after optimizer step number `step`."""
        weight = 1 - min(self.momentum, (1 + step) / (10 + step))
        average = [self.exact.get(name, p) for name, p in self.model.named_parameters()]
        pairs = list(zip(average, (p.detach() for p in learner.parameters()), strict=True))
        moving = [(mine, theirs.to(mine.dtype)) for mine, theirs in pairs if is_continuous(mine)]
        if moving:
            torch._foreach_lerp_([mine for mine, _ in moving], [theirs for _, theirs in moving], weight)
        for mine, theirs in pairs:
            if not is_continuous(mine):  # quantized, say: of whole numbers there is no average
                mine.copy_(theirs)
        self._round()
        for mine, theirs in zip(self.model.buffers(), learner.buffers(), strict=True):
            mine.copy_(theirs)

    def _round(self) -> None:
        for name, value in self.exact.items():
            self.model.get_parameter(name).copy_(value)

    def state_dict(self) -> dict[str, Tensor]:
        named = {**self.model.state_dict(), **{f"{EXACT}{name}": value for name, value in self.exact.items()}}
        return {name: value.clone() for name, value in named.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({name: value for name, value in state.items() if not name.startswith(EXACT)})
        for name, value in self.exact.items():
            value.copy_(state.get(f"{EXACT}{name}", self.model.get_parameter(name)))
        self._round()


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
        one = torch.ones(1, 3, 1, 1, dtype=torch.float32)
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

    def reading(self, image_size: int | None = None, context_length: int | None = None) -> Proxy:
        """The same proxy, weights shared, that reads images or captions of another size."""
        other = copy.copy(self)
        other.image_size = self.image_size if image_size is None else image_size
        other.context_length = self.context_length if context_length is None else context_length
        return other

    def encode_image(self, image: Tensor) -> Tensor:
        """Raises ValueError for what are no images of three channels."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(
                f"the proxy reads images of shape (n, 3, height, width), not {tuple(image.shape)}: give ClipCov a "
                "proxy=MODEL that reads these, or embed='teacher'"
            )
        if self.image_size is not None and image.shape[-1] != self.image_size:
            image = F.interpolate(resizable(image), size=(self.image_size,) * 2, mode="bicubic", antialias=True)
        return self.towers.encode_image(image * self.gain + self.shift)  # pyright: ignore

    @passes_on("towers")
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
