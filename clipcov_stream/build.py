"""Config section -> object. Every function takes plain arguments and raises ValueError for what cannot work."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import torch
from composer import algorithms as composer_algorithms
from composer import callbacks as composer_callbacks
from composer import loggers as composer_loggers
from composer import optim
from composer.core import Time, TimeUnit
from composer.optim import ComposerScheduler
from composer.utils import dist
from open_clip.tokenizer import HFTokenizer
from torch import nn

from clipcov_stream.ahead import ENOUGH
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.batch import count_survivors
from clipcov_stream.captions import first_of
from clipcov_stream.config import (
    ModelConfig,
    OptimizerConfig,
    ProxyConfig,
    SchedulerConfig,
    SelectionConfig,
    StreamConfig,
    given,
)
from clipcov_stream.device_decode import check_decoder
from clipcov_stream.embed import Proxy
from clipcov_stream.materialize import OPENAI_MEAN, OPENAI_STD, ImageTransform, Tokenizer
from clipcov_stream.model import ClipModel, build_towers, forward_flops, parameter_groups
from clipcov_stream.sidecar import EMBEDDER_FILE
from clipcov_stream.stream import Columns, PairDataset, PoolLoader, pool_loader, read_json_beside
from clipcov_stream.towers import SmallTowers, side_for
from clipcov_stream.zeroshot import metrics_for

SCHEDULERS: dict[str, type[ComposerScheduler]] = {
    "cosine": optim.CosineAnnealingWithWarmupScheduler,
    "linear": optim.LinearWithWarmupScheduler,
    "constant": optim.ConstantWithWarmupScheduler,
}

WIDTHS = (8, 16, 24, 32, 48, 64)
"""Channels of a default online proxy's first convolution."""

SHARE = 0.02
"""Of a training step's multiply-adds, what a default online proxy may take if it is not the narrowest."""


def image_size_of(towers: Any) -> int:
    """Side of the square images a model reads."""
    size = towers.visual.image_size
    return int(size[0] if isinstance(size, (tuple, list)) else size)


def tokenizer_of(towers: Any, config: ModelConfig | ProxyConfig) -> Tokenizer:
    """open_clip's tokenizer of a model, as str -> (context,) token ids.

    An inline config gets the tokenizer that open_clip would give a model file with the same `text_cfg`.

    Raises:
        ValueError: a tokenizer that cannot be had, or a vocabulary smaller than its own.
    """
    context = int(getattr(towers, "context_length", 77))
    text = {} if config.config is None else config.config.get("text_cfg") or {}
    from_hub = text.get("hf_tokenizer_name")
    try:
        if config.name is not None:
            tokenizer = open_clip.get_tokenizer(config.name, context_length=context)
        elif from_hub:
            options = dict(text.get("tokenizer_kwargs") or {})
            tokenizer = HFTokenizer(from_hub, context_length=context, **options)
        else:
            tokenizer = open_clip.SimpleTokenizer(context_length=context)
    except Exception as error:  # Hugging Face tokenizers raise their own kinds when they cannot be fetched
        raise ValueError(f"no tokenizer for {config.name or from_hub or 'model.config'!r}: {error}") from error
    vocab_size = getattr(towers, "vocab_size", None)
    own_size = getattr(tokenizer, "vocab_size", None)
    if isinstance(vocab_size, int) and isinstance(own_size, int) and vocab_size < own_size:
        raise ValueError(f"model text_cfg.vocab_size={vocab_size} is smaller than the tokenizer's, {own_size}")
    return partial(first_of, tokenizer, context)


def transform_of(towers: nn.Module, min_scale: float = 1.0) -> ImageTransform:
    """The image transform a model was made for: size, mean, std, and how images that are not augmented are resized.

    Raises:
        ValueError: a share out of range, or a way of resizing that is not known here.
    """
    if not 0 < min_scale <= 1:
        raise ValueError(f"stream.min_scale={min_scale} must be in (0, 1]; 1 turns augmentation off")
    config = getattr(getattr(towers, "visual", None), "preprocess_cfg", None) or {}
    mean, std = config.get("mean", OPENAI_MEAN), config.get("std", OPENAI_STD)
    resize, interpolation = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if resize not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise ValueError(
            f"the model's images are resized by {resize!r} and {interpolation!r}; 'shortest' or 'squash' and 'bicubic' "
            "or 'bilinear' are known here"
        )
    return ImageTransform(image_size_of(towers), tuple(mean), tuple(std), min_scale, resize, interpolation)


def build_model(config: ModelConfig, num_survivors: int | None, tasks: set[str]) -> ClipModel:
    """Towers, loss and the metrics of the evaluation tasks."""
    towers = build_towers(config.name, config.config, config.pretrained, config.loss)
    metrics = {name: metric for task in sorted(tasks) for name, metric in metrics_for(task).items()}
    return ClipModel(towers, config.loss, config.activation_chunk, num_survivors, metrics)


def pool_size_per_rank(global_pool_size: int) -> int:
    """Candidates of one step on this rank.

    Raises:
        ValueError: not a multiple of the number of ranks.
    """
    ranks = dist.get_world_size()
    if global_pool_size < 1 or global_pool_size % ranks:
        raise ValueError(
            f"stream.global_pool_size={global_pool_size} must be a positive multiple of the number of ranks, {ranks}"
        )
    return global_pool_size // ranks


def defers(config: StreamConfig, selection: ClipCov, image_size: int) -> bool:
    """Whether the stream leaves candidates encoded, for survivors alone to be decoded in full: where that is less work.

    Args:
        image_size: of the learner.

    Raises:
        ValueError: `stream.deferred` or `stream.range_reads` true where selection reads pixels, or only the latter.
    """
    reads_pixels = selection.needs_pixels or selection.scoring_size is not None
    if config.range_reads and (reads_pixels or config.deferred is False):
        reason = "stream.deferred=false"
        if reads_pixels:
            reason = f"selection.embed={selection.embed!r} with selection.selector={selection.selector!r}"
        raise ValueError(
            f"stream.range_reads=true fetches survivors' images alone, but {reason} decodes every candidate's; use "
            "embed='columns' and leave stream.deferred out, or leave stream.range_reads out"
        )
    if config.deferred and selection.needs_pixels:
        raise ValueError(
            f"stream.deferred=true leaves candidates encoded, but selection.embed={selection.embed!r} with "
            f"selection.selector={selection.selector!r} embeds their pixels; leave it out, or use embed='columns'"
        )
    if config.deferred is not None:
        return config.deferred
    return not selection.needs_pixels and (selection.scoring_size or 0) < image_size


def decode_device_of(name: str, deferred: bool) -> torch.device | None:
    """The GPU that decodes this rank's JPEGs; None if its CPUs do.

    Raises:
        ValueError: another name, a machine without a GPU, or a stream whose workers decode every candidate.
    """
    if name == "cpu":
        return None
    if name != "gpu":
        raise ValueError(f"stream.decode_device={name!r} must be 'cpu' or 'gpu'")
    if not deferred:
        raise ValueError(
            "stream.decode_device='gpu' decodes survivors, but this stream's workers decode every candidate; leave "
            "stream.deferred out and use selection.embed='columns', or stream.decode_device='cpu'"
        )
    if not torch.cuda.is_available():
        raise ValueError("stream.decode_device='gpu' needs a CUDA device, and there is none; use 'cpu'")
    device = torch.device("cuda", dist.get_local_rank())
    try:
        check_decoder(device)
    except RuntimeError as error:
        raise ValueError(f"stream.decode_device='gpu' cannot decode on {device}: {error}; use 'cpu'") from error
    return device


def build_stream(
    config: StreamConfig,
    towers: nn.Module,
    tokenizer: Tokenizer,
    with_embeddings: bool,
    seed: int,
    deferred: bool = False,
    scoring_size: int | None = None,
) -> PoolLoader:
    """The training loader, whose batch is this rank's pool."""
    pool_size = pool_size_per_rank(config.global_pool_size)
    columns = Columns(
        image=config.columns.image,
        caption=config.columns.caption,
        image_embedding=config.columns.image_embedding if with_embeddings else None,
        text_embedding=config.columns.text_embedding if with_embeddings else None,
        concepts=config.columns.concepts,
    )
    try:
        dataset = PairDataset(
            **given(config, "predownload", "cache_limit", "validate_hash"),
            local=config.local,
            remote=config.remote,
            split=config.split,
            **{name: getattr(config, name) for name in ("download_retry", "download_timeout", "num_canonical_nodes")},
            **{name: getattr(config, name) for name in ("timeout", "on_bad_shard", "max_bad_shards")},
            columns=columns,
            transform=transform_of(towers, config.min_scale),
            tokenizer=tokenizer,
            batch_size=pool_size,
            shuffle=config.shuffle,
            shuffle_seed=9176 if config.shuffle_seed is None else config.shuffle_seed,
            seed=seed,
            sidecar=config.sidecar if with_embeddings or config.range_reads else None,
            deferred=deferred,
            scoring_size=scoring_size if deferred else None,
            range_reads=config.range_reads,
            allow_pickle=config.allow_pickle,
            max_pixels=config.max_pixels,
        )
    except (ValueError, FileNotFoundError) as error:
        have = config.local is not None and Path(config.local, config.split or "", "index.json").is_file()
        if config.how_to_get and not have:
            raise ValueError(f"{error}\n{config.how_to_get.strip()}") from error
        raise
    options = {name: getattr(config, name) for name in ("decode_threads", "range_cache")}
    options["decode_device"] = decode_device_of(config.decode_device, deferred)
    return pool_loader(dataset, pool_size, config.num_workers, config.prefetch_factor, **options)


def build_proxy(
    config: ProxyConfig, learner: ImageTransform, learner_tokenizer: Tokenizer, online: bool = False
) -> Proxy:
    """An embedder that takes the learner's images and tokens, frozen or, if it is `online`, to be trained.

    An online one that has neither name nor config is `towers.SmallTowers`, of the narrowest unless a width is given;
    recipes give theirs one beforehand (`with_online_proxy`).

    Raises:
        ValueError: a model that cannot be built, a frozen one whose weights nobody gave, one that reads other tokens,
            or a width for one that has its own.
    """
    described = config.name is not None or config.config is not None
    if config.width is not None and (described or not online):
        raise ValueError(
            f"selection.proxy.width={config.width} is for an online proxy (selection.embed=online) without "
            "selection.proxy.name and .config"
        )
    if config.pretrained is None and not online:
        raise ValueError(
            "selection.proxy.pretrained is missing: a proxy with random weights selects nothing, unless it is trained "
            "along (selection.embed=online)"
        )
    if online and not described:
        if config.pretrained is not None:
            raise ValueError(
                f"selection.proxy.pretrained={config.pretrained!r} needs the selection.proxy.name or .config that its "
                "weights are of"
            )
        small = SmallTowers(WIDTHS[0] if config.width is None else config.width, side_for(learner.size))
        return Proxy(small, small.image_size)
    try:
        towers = build_towers(config.name, config.config, config.pretrained, config.loss)
    except ValueError as error:
        raise ValueError(f"selection.proxy cannot be loaded: {error}") from error
    own = transform_of(towers)
    context = int(getattr(towers, "context_length", 77))
    check_same_tokens(tokenizer_of(towers, config), learner_tokenizer)
    return Proxy(towers, own.size, own.mean, own.std, learner.mean, learner.std, context)


def check_same_tokens(proxy: Tokenizer, learner: Tokenizer) -> None:
    """Raise ValueError unless two tokenizers agree on captions short enough for both, but for the padding's length."""
    for caption in ("dog", "caf\u00e9", "a photo of a red dog", "Zebra-striped mug, 12oz"):
        ours, theirs = proxy(caption), learner(caption)
        length = min(len(ours), len(theirs))
        if ours[length - 1] != proxy("")[-1] or theirs[length - 1] != learner("")[-1]:
            continue  # it fills the shorter context, whose last token is then the end's and not padding
        if not torch.equal(ours[:length], theirs[:length]):
            raise ValueError(
                f"selection.proxy reads {caption!r} as tokens {ours[:12].tolist()}, the learner as "
                f"{theirs[:12].tolist()}: a proxy gets the learner's tokens, so both need one tokenizer. Use "
                "embed='online' without a proxy, which reads any, or embed the captions beforehand and use "
                "embed='columns'"
            )


def columns_embedder(config: StreamConfig) -> dict[str, Any] | None:
    """What embedder.json says of a stream's embedding columns, or its sidecar's; None where there is no such file.

    Raises:
        ValueError: a file that says something else.
    """
    at = (config.local, config.remote, config.split) if config.sidecar is None else (None, config.sidecar, None)
    try:
        record = read_json_beside(*at, EMBEDDER_FILE)
    except ValueError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None  # no such file: columns of another tool's making
        raise
    if not (isinstance(record, dict) and {"fingerprint", "logit_scale"} <= record.keys()):
        raise ValueError(
            f"{EMBEDDER_FILE} of {config.sidecar or config.remote or config.local} has no fingerprint and logit_scale"
        )
    return record


def affordable_width(learner: nn.Module, filter_ratio: float) -> int:
    """Of an online proxy: the largest of WIDTHS that takes no more than SHARE of a training step; if none does, the
    smallest.

    In multiply-adds: a survivor costs the learner three forward passes, and each of its 1 / (1 - filter_ratio)
    candidates costs the proxy one to be judged and three to be learned from.

    Args:
        learner: the towers in training, open_clip's.
        filter_ratio: as `ClipCov`'s.
    """
    size, context = image_size_of(learner), int(getattr(learner, "context_length", 77))
    most = SHARE * 3 * forward_flops(learner, size, context) * (1 - filter_ratio) / 4
    side = side_for(size)
    with torch.device("meta"):
        costs = {width: forward_flops(SmallTowers(width, side), side, context) for width in WIDTHS}
    return max((width for width, cost in costs.items() if cost <= most), default=WIDTHS[0])


def with_online_proxy(config: SelectionConfig, learner: nn.Module) -> SelectionConfig:
    """The section with an online proxy's width, if it asks for one and does not describe it: `affordable_width`."""
    proxy = ProxyConfig() if config.proxy is None else config.proxy
    if config.embed != "online" or proxy.name is not None or proxy.config is not None or proxy.width is not None:
        return config
    return replace(config, proxy=replace(proxy, width=affordable_width(learner, config.filter_ratio)))


def build_selection(
    config: SelectionConfig,
    learner: ImageTransform,
    tokenizer: Tokenizer,
    embedder: Mapping[str, Any] | None = None,
) -> ClipCov:
    """The algorithm of a selection section.

    Args:
        config: the section.
        learner: the image transform of the model in training.
        tokenizer: of the same.
        embedder: what made the columns, from `columns_embedder`.

    Raises:
        ValueError: a logit scale that is not the embedder's, and whatever `ClipCov` refuses.
    """
    scale = config.logit_scale
    if embedder is not None:
        own = float(embedder["logit_scale"])
        if scale is not None and not math.isclose(scale, own, rel_tol=1e-2):
            raise ValueError(
                f"selection.logit_scale={scale} is not that of the columns' embedder, {own:.4g} ({EMBEDDER_FILE}); "
                "leave it out"
            )
        scale = own
    elif config.embed == "columns" and scale is None and config.selector != "random":
        scale = 100.0
        warnings.warn(
            f"the embedding columns have no {EMBEDDER_FILE} beside them: the logit scale of the model that made them "
            f"is taken for a trained CLIP's, selection.logit_scale={scale:g}; set it to that model's, exponentiated",
            stacklevel=2,
        )
    if config.copies and config.embed == "columns":
        raise ValueError(
            f"selection.copies={config.copies}: with embed='columns' no image is decoded before there are survivors, "
            "and copies cannot be told; set it to 0"
        )
    augmented = learner.min_scale < 1 and (config.embed == "teacher" or config.embed_resolution is None)
    if config.copies and config.embed != "online" and augmented:
        warnings.warn(
            f"selection.copies={config.copies} tells copies by coarse pixels, and stream.min_scale={learner.min_scale} "
            "crops them at random: some pass for other pictures. Set stream.min_scale=1",
            stacklevel=2,
        )
    online = config.embed == "online"
    given_proxy = ProxyConfig() if online and config.proxy is None else config.proxy
    proxy = None if given_proxy is None else build_proxy(given_proxy, learner, tokenizer, online)
    knobs = ("coverage", "learnability", "gate", "balance", "unevenness", "quality")
    knobs = (*knobs, "novelty", "copies", "recent", "repeats")
    knobs = (*knobs, "overshoot", "memory", "ridge", "references", "soft_start")
    passes = ("embed_chunk", "embed_resolution", "embed_precision", "embed_patch_dropout")
    optional = given(config, *knobs, "teacher_momentum", "proxy_lr", *passes)
    # Whatever the selector: a run and its random twin are to have one recipe.
    lag_delay = ENOUGH * (config.embed != "teacher") if config.lag_delay is None else config.lag_delay
    selection = ClipCov(
        filter_ratio=config.filter_ratio,
        embed=config.embed,
        scope=config.scope,
        selector=config.selector,
        warmup=config.warmup,
        half_life=config.half_life,
        seed=config.seed or 0,
        proxy=proxy,
        logit_scale=100.0 if scale is None else scale,
        embedder=None if embedder is None else embedder["fingerprint"],
        run_ahead=config.run_ahead or 0,
        lag_delay=lag_delay,
        max_invalid_ratio=config.max_invalid_ratio,
        **optional,
    )
    if config.run_ahead is None and not selection.follows_learner:
        selection.run_ahead = min(lag_delay, ENOUGH)
    return selection


UNUSED = {"adamw": ("momentum",), "decoupled_adamw": ("momentum",), "sgd": ("betas", "eps")}
"""Keys of `optimizer` that one of a name does not read."""

MOST_DECOUPLED = 1e-3
"""The largest weight decay of decoupled_adamw; Composer calls it high from here on."""


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over the two weight-decay groups.

    Raises:
        ValueError: an unknown name, a number out of range, or one that this optimizer has no use for.
    """
    decay = config.weight_decay
    assert decay is not None
    for name, value in (("lr", config.lr), ("weight_decay", decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"optimizer.{name}={value} must be a finite number, at least 0")
    for name in UNUSED.get(config.name, ()):
        if getattr(config, name) != getattr(OptimizerConfig(), name):
            raise ValueError(f"optimizer.{name}={getattr(config, name)} has no effect with name={config.name!r}")
    if config.name == "decoupled_adamw" and decay > MOST_DECOUPLED:
        raise ValueError(
            f"optimizer.weight_decay={decay} must be at most {MOST_DECOUPLED} with name='decoupled_adamw', which does "
            f"not scale it by lr: every step would multiply weights by {1 - decay:g}. Leave it out for 1e-05, or give "
            "adamw's lr * weight_decay"
        )
    groups = parameter_groups(model, decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    if config.name == "decoupled_adamw":
        return optim.DecoupledAdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    raise ValueError(f"optimizer.name={config.name!r} is not one of ['adamw', 'decoupled_adamw', 'sgd']")


def build_scheduler(config: SchedulerConfig, max_duration: str) -> ComposerScheduler:
    """A learning-rate schedule with linear warm-up.

    Raises:
        ValueError: an unknown name, a warm-up that is not a Composer time in units of the run's or `dur`, or an end for
            a constant rate.
    """
    if config.name not in SCHEDULERS:
        raise ValueError(f"scheduler.name={config.name!r} is not one of {sorted(SCHEDULERS)}")
    try:
        unit = Time.from_timestring(config.t_warmup).unit
    except (ValueError, TypeError) as error:
        raise ValueError(f"scheduler.t_warmup={config.t_warmup!r} is not a Composer time such as '0.05dur'") from error
    if unit not in (TimeUnit.DURATION, Time.from_timestring(max_duration).unit):
        raise ValueError(f"scheduler.t_warmup={config.t_warmup!r} must be in 'dur' or as max_duration={max_duration!r}")
    if config.name == "constant" and config.alpha_f:
        raise ValueError(f"scheduler.alpha_f={config.alpha_f} has no effect with name='constant'")
    end = {"alpha_f": config.alpha_f} if config.name != "constant" else {}
    return SCHEDULERS[config.name](t_warmup=config.t_warmup, **end)  # pyright: ignore[reportCallIssue]


def build_named(section: str, configs: Mapping[str, Mapping[str, Any] | None]) -> list[Any]:
    """Composer's own algorithms, callbacks or loggers, by snake_case class name with keyword arguments.

    Raises:
        ValueError: an unknown name, or arguments its constructor does not take.
    """
    module = {"algorithms": composer_algorithms, "callbacks": composer_callbacks, "loggers": composer_loggers}[section]
    found = []
    known = classes_of(module)
    for name, kwargs in configs.items():
        plain = name.replace("_", "").lower()
        kind = known.get(plain) or known.get(plain + "logger")
        if kind is None:
            near = difflib.get_close_matches(plain, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{section}.{name} is not one of Composer's {section}{hint}")
        try:
            found.append(kind(**(kwargs or {})))
        except (TypeError, ImportError) as error:
            raise ValueError(f"{section}.{name}: {error}") from error
    return found


def classes_of(module: ModuleType) -> dict[str, type]:
    """Public classes of a module, by name without case."""
    return {name.lower(): kind for name, kind in vars(module).items() if inspect.isclass(kind)}


def check_compile(config: Mapping[str, Any] | None) -> None:
    """Raise ValueError for what torch.compile does not take; nothing is compiled yet."""
    if config is None:
        return
    try:
        torch.compile(nn.Identity(), **config)
    except Exception as error:  # of Dynamo's kinds, and of each backend's
        raise ValueError(f"compile_config={dict(config)} is not for torch.compile: {str(error)[:300]}") from error


def check_microbatch(value: int | str | None, num_survivors: int) -> int:
    """Survivors per rank, unless the recipe asks for something else, which is an error."""
    if value is None or value == num_survivors:
        return num_survivors
    if value == "auto":
        raise ValueError(
            "device_train_microbatch_size='auto' changes a contrastive loss's negatives; leave it out (it is the "
            f"survivors per rank, {num_survivors}) and save memory with model.activation_chunk"
        )
    raise ValueError(
        f"device_train_microbatch_size={value!r} must be the survivors per rank, {num_survivors}: a contrastive loss "
        "over parts of a batch has other negatives. Leave it out, and save memory with model.activation_chunk"
    )


def survivors_per_rank(stream: StreamConfig, selection: SelectionConfig) -> int:
    """Rows per rank that the model trains on."""
    return count_survivors(pool_size_per_rank(stream.global_pool_size), selection.filter_ratio)
