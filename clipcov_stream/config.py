"""A recipe: YAML and `key.sub=value` overrides, checked into one frozen dataclass per section.

Keys are constructor arguments. There is no interpolation and there are no Python paths: a recipe cannot run code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clipcov_stream.decode import MAX_PIXELS
from clipcov_stream.plain_yaml import check_plain, check_yaml
from clipcov_stream.redact import check_tree, redacted

Section = TypeVar("Section", bound=Any)


@dataclass(frozen=True)
class ModelConfig:
    """An open_clip model, by name or inline; see `model.build_towers` and `model.ClipModel`."""

    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: str | None = None
    loss: str = "clip"
    activation_chunk: int | None = None


@dataclass(frozen=True)
class ProxyConfig:
    """The model that embeds pools: open_clip's (`model.build_towers`), frozen or, with `embed: online`, in training.

    An online one that has neither name nor config is `towers.SmallTowers`, `width` channels wide; without a width,
    as wide as `build.affordable_width` says.
    """

    width: int | None = None
    name: str | None = None
    config: dict[str, Any] | None = None
    pretrained: str | None = None
    loss: str = "clip"


@dataclass(frozen=True)
class ColumnsConfig:
    """Names of the training stream's MDS columns; see `stream.Columns`."""

    image: str = "image"
    caption: str = "caption"
    image_embedding: str = "image_embedding"
    text_embedding: str = "text_embedding"
    concepts: str | None = None


@dataclass(frozen=True)
class EvalColumnsConfig:
    """Names of an evaluation split's MDS columns."""

    image: str = "image"
    caption: str = "caption"
    label: str = "label"


@dataclass(frozen=True)
class StreamConfig:
    """The training stream. `global_pool_size` is the candidates of one step over all ranks. `local` is an MDS folder,
    or, with `remote`, where its shards are kept.

    `shuffle_seed` follows the recipe's `seed` unless given. `sidecar` is a folder or URL with the embeddings that
    `selection.embed: columns` reads, when the stream itself has none; see `sidecar.Sidecar`. `deferred` leaves
    candidates encoded, and decodes survivors alone, in `decode_threads` threads; it is on wherever selection reads no
    pixels, unless given. With `decode_device: gpu` survivors' JPEGs are decoded and cropped by each rank's GPU
    instead; see `device_decode`. `range_reads` streams the sidecar alone and fetches survivors' images by byte ranges;
    of what it fetched from `remote`, `range_cache` bytes ("20gb") stay in a file in `local`; see `ranges`.

    A shard that does not match the index's hash and size is fetched again, `download_retry` times; if it stays bad,
    `on_bad_shard` is `raise`, or `skip`: at most `max_bad_shards` are left out, counted as `num_invalid` and logged.
    After `timeout` seconds without the next sample the run ends and names the shard; 0 waits for ever. See `guard`.
    `allow_pickle` names the pickled columns that may be there, which are refused otherwise: to load them runs code of
    whoever wrote them. An image of more than `max_pixels` counts as undecodable; see `decode`.
    """

    global_pool_size: int
    local: str | None = None
    remote: str | None = None
    split: str | None = None
    sidecar: str | None = None
    range_reads: bool = False
    range_cache: str | int | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    min_scale: float = 0.9
    shuffle: bool = True
    shuffle_seed: int | None = None
    num_workers: int = 2
    prefetch_factor: int = 2
    timeout: float = 600
    on_bad_shard: str = "raise"
    max_bad_shards: int = 10
    deferred: bool | None = None
    decode_threads: int | None = None
    decode_device: str = "cpu"
    num_canonical_nodes: int = 1
    predownload: int | None = None
    cache_limit: str | int | None = None
    download_retry: int = 5
    download_timeout: float = 60
    validate_hash: str | None = None
    allow_pickle: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    how_to_get: str = ""


@dataclass(frozen=True)
class SelectionConfig:
    """Online selection; see `algorithm.ClipCov`. `seed` is the recipe's unless given.

    `lag_delay` is `ahead.ENOUGH` unless given, and 0 with `embed: teacher`. Where no `run_ahead` is given, selection
    runs ahead of training if it may, `lag_delay` steps and at most `ahead.ENOUGH`.
    """

    selector: str = "clipcov"
    filter_ratio: float = 0.8
    embed: str = "online"
    scope: str = "local"
    warmup: str | int | None = None
    half_life: float | None = None
    coverage: float | None = None
    learnability: float | None = None
    gate: float | None = None
    balance: float | None = None
    unevenness: float | None = None
    quality: float | None = None
    novelty: float | None = None
    copies: float | None = None
    recent: int | None = None
    repeats: float | None = None
    overshoot: float | None = None
    memory: float | None = None
    ridge: float | None = None
    references: int | None = None
    soft_start: float | None = None
    seed: int | None = None
    proxy: ProxyConfig | None = None
    proxy_lr: float | None = None
    teacher_momentum: float | None = None
    logit_scale: float | None = None
    embed_chunk: int | None = None
    embed_resolution: int | None = None
    embed_precision: str | None = None
    embed_patch_dropout: float | None = None
    run_ahead: int | None = None
    lag_delay: int | None = None
    max_invalid_ratio: float = 0.05


@dataclass(frozen=True)
class OptimizerConfig:
    """adamw, decoupled_adamw or sgd. Gains, biases and the logit scale never decay.

    `weight_decay` is 0.1 unless given, and takes `lr` times itself off a weight at every step. Composer's
    decoupled_adamw does not scale it by `lr`: there it is 1e-5 unless given, and at the peak of `lr` takes just that
    off. So adamw's `lr * weight_decay` is its counterpart.
    """

    name: str = "adamw"
    lr: float = 5e-4
    weight_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.weight_decay is None:  # here, so that a run's records have the number
            object.__setattr__(self, "weight_decay", 1e-5 if self.name == "decoupled_adamw" else 0.1)


@dataclass(frozen=True)
class SchedulerConfig:
    """cosine, linear or constant, after a linear warm-up of `t_warmup` (Composer time); ends at lr * alpha_f."""

    name: str = "cosine"
    t_warmup: str = "0.05dur"
    alpha_f: float = 0.0


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation split, a Composer Evaluator.

    Either an MDS folder, by `local`, `remote`, `split` as in `StreamConfig`, with the tasks zeroshot (needs labels and
    classes.json; the default) and retrieval; or a `dataset` at `root`, whose task is its own: a set of `suite.SETS`,
    `folder` (a folder of images per class) or `captions` (root is an annotation file, `caption_sets.open_captions`;
    `images` is the folder that its paths are relative to). `split: train` opens a set's training images.
    """

    tasks: tuple[str, ...] | None = None
    dataset: str | None = None
    root: str | None = None
    images: str | None = None
    local: str | None = None
    remote: str | None = None
    split: str | None = None
    batch_size: int = 256
    num_workers: int = 0
    columns: EvalColumnsConfig = field(default_factory=EvalColumnsConfig)


@dataclass(frozen=True)
class EvalSuiteConfig:
    """The paper's evaluation sets below one root, each an Evaluator under its name in `suite.SETS`.

    `sets` must all be there; unless given, those that are there are evaluated and the others named in a warning.
    """

    root: str
    sets: tuple[str, ...] | None = None
    batch_size: int = 256
    num_workers: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """A whole recipe; keys without a section of ours are the Composer Trainer's own.

    `{selector}` and `{seed}` are filled in in `run_name`, `save_folder`, `metrics_file`, `ledger` and `gallery`, and
    `{run_name}` in the latter four, so that a recipe's twins never share a folder. A `~` that begins a path is the home
    folder, as in a shell. `ledger` is a folder, see `ledger.Ledger`; so is `gallery`, see `gallery.Gallery`, which
    records every `gallery_interval`, in ba or dur.
    """

    model: ModelConfig
    stream: StreamConfig
    max_duration: str
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    eval: dict[str, EvalConfig] = field(default_factory=dict)
    eval_suite: EvalSuiteConfig | None = None
    algorithms: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    loggers: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    run_name: str | None = None
    seed: int = 0
    device: str | None = None
    precision: str | None = None
    device_train_microbatch_size: int | str | None = None
    eval_interval: str | int = "1ep"
    eval_first: bool = False
    save_folder: str | None = None
    save_interval: str = "1ep"
    save_num_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    autoresume: bool = False
    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: str = "10ba"
    fsdp_config: dict[str, Any] | None = None
    compile_config: dict[str, Any] | None = None
    dist_timeout: float = 600
    metrics_file: str | None = None
    ledger: str | None = None
    gallery: str | None = None
    gallery_interval: str | int = "0.05dur"


def load_config(path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The recipe in a YAML file, with overrides of the form `key.sub=value`.

    Raises:
        ValueError: not YAML, or larger or deeper than a recipe is; an unknown key (with a suggestion), a value of
            another type, a key that is missing; an interpolation, or credentials in a URL.
    """
    for item in overrides:
        if "=" not in item:
            raise ValueError(redacted(f"override {item!r} is not of the form key.sub=value"))
    try:
        check_yaml(Path(path).read_text(encoding="utf-8"), f"recipe {path!r}")
        for item in overrides:
            check_yaml(item.partition("=")[2], f"override {item[:80]!r}")
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        tree = OmegaConf.to_container(merged, resolve=False)
    except FileNotFoundError as error:
        raise ValueError(f"no recipe at {path!r}") from error
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, OSError) as error:
        text = f"cannot read recipe {path!r} with overrides {list(overrides)}: {error}"
        raise ValueError(redacted(text)) from error
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ValueError(redacted(f"recipe {path!r} is not YAML: {error}")) from error
        raise
    if not isinstance(tree, dict):
        raise ValueError(f"recipe {path!r} is not a mapping of keys to values")
    tree.pop("launch", None)  # the line that lets `composer recipe.yaml` run the file as Python
    check_plain(tree)
    check_tree(tree)
    return filled(parse(TrainConfig, tree, ""))


def filled(config: TrainConfig) -> TrainConfig:
    """The recipe with names filled in, `~` expanded, and every seed that was not given taken from `seed`.

    Raises:
        ValueError: `{run_name}` in `metrics_file`, `ledger` or `gallery` where there is none.
    """
    selection, stream = config.selection, config.stream
    known = {"selector": selection.selector, "seed": str(config.seed)}
    run_name = put(config.run_name, known)
    if run_name is not None:
        known["run_name"] = run_name
    paths = {name: put(getattr(config, name), known) for name in ("metrics_file", "ledger", "gallery")}
    for name, path in paths.items():
        if path is not None and run_name is None and put(path, {"run_name": ""}) != path:
            raise ValueError(f"{name}={path!r} needs a run_name")
    # Without a run_name Composer makes one up, and fills it in here.
    paths |= {"save_folder": put(config.save_folder, known), "load_path": config.load_path}
    # 9176 is Streaming's own default.
    shuffle_seed = 9176 + config.seed if stream.shuffle_seed is None else stream.shuffle_seed
    proxy = None if selection.proxy is None else at_home(selection.proxy, "pretrained")
    seed = config.seed if selection.seed is None else selection.seed
    return dataclasses.replace(
        at_home(dataclasses.replace(config, **paths), *paths),
        run_name=run_name,
        model=at_home(config.model, "pretrained"),
        selection=dataclasses.replace(selection, seed=seed, proxy=proxy),
        stream=dataclasses.replace(at_home(stream, "local", "remote", "sidecar"), shuffle_seed=shuffle_seed),
        eval={label: at_home(section, "local", "remote") for label, section in config.eval.items()},
    )


def at_home(section: Section, *names: str) -> Section:
    """A section in which the named paths, where they begin with `~`, are below the home folder."""
    return dataclasses.replace(
        section, **{name: os.path.expanduser(path) for name, path in given(section, *names).items()}
    )


def put(text: str | None, values: Mapping[str, str]) -> str | None:
    """Every `{name}` replaced by its value."""
    if text is None:
        return None
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def parse(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`: dataclasses by key, containers by element, numbers without loss.

    Raises:
        ValueError: with the full key, the value and the type wanted.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return parse_union(args, value, where)
    if dataclasses.is_dataclass(kind):
        return parse_section(kind, value, where)
    if origin is dict and isinstance(value, Mapping):
        return {str(key): parse(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin in (tuple, list) and isinstance(value, (list, tuple)):
        element = args[0]
        if origin is tuple and args[-1] is not Ellipsis and len(args) != len(value):
            raise ValueError(f"{where}={value!r} must have {len(args)} entries")
        return origin(parse(element, item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        # A string too: YAML 1.1 reads 1e-3 as one, a float needs the dot.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    if kind in (int, str, bool, types.NoneType) and type(value) is kind:
        return value
    if kind is str and where.endswith(("duration", "save_interval")) and type(value) is int:
        raise ValueError(f"{where}={value!r} needs a unit: {value}ba for batches")
    name = getattr(kind, "__name__", str(kind)) if origin is None else origin.__name__
    raise ValueError(f"{where}={value!r} must be of type {name}")


def parse_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first alternative that fits; for sections, the section's own error."""
    if value is None and types.NoneType in kinds:
        return None
    others = [kind for kind in kinds if kind is not types.NoneType]
    if len(others) == 1:
        return parse(others[0], value, where)
    for kind in others:
        try:
            return parse(kind, value, where)
        except ValueError:
            continue
    raise ValueError(f"{where}={value!r} must be one of {', '.join(kind.__name__ for kind in others)}")


def parse_section(kind: Any, value: Any, where: str) -> Any:
    """A dataclass from a mapping of its fields."""
    title = where or "the recipe"
    if not isinstance(value, Mapping):
        raise ValueError(f"{title}={value!r} must be a section of keys")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(sorted(hints))}"
            raise ValueError(f"{prefix}{key} is not a config key; {hint}")
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in value:
            raise ValueError(f"{prefix}{item.name} is missing")
    return kind(**{key: parse(hints[key], item, f"{prefix}{key}") for key, item in value.items()})


def given(section: Any, *names: str) -> dict[str, Any]:
    """The named fields of a section that are not None: for arguments whose default stands elsewhere."""
    return {name: getattr(section, name) for name in names if getattr(section, name) is not None}
