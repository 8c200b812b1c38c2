"""ClipModel: an open_clip model as a ComposerModel, with a contrastive loss that is exact over ranks.

Two traps make a contrastive loss silently wrong, and both are closed here. Splitting a batch into microbatches drops
negatives (a microbatch of 4 in 16 leaves a gradient of cosine 0.80 with the right one), so memory is saved inside
`forward`, by recomputing chunks of the towers, and the loss always sees the whole batch. And gathering without
gradients scales them by the number of ranks, so the loss gathers with gradients.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as torch_dist
from composer.core import Callback, State
from composer.loggers import Logger
from composer.models import ComposerModel
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics import Metric

from clipcov_stream.embed import passes_on
from clipcov_stream.sharded import reshaped
from clipcov_stream.weights import load_inert

MAX_LOG_SCALE = math.log(100)
LOSSES = ("clip", "siglip")


def build_towers(
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    pretrained: str | None = None,
    loss: str = "clip",
) -> nn.Module:
    """An open_clip model with both towers.

    Args:
        name: a name from `open_clip.list_models()`, or one of open_clip's schemas (`local-dir:...`, `hf-hub:...`).
        config: instead of a name, an open_clip model config: embed_dim, vision_cfg, text_cfg.
        pretrained: a tag of open_clip's for that name, or the path of a checkpoint: open_clip's, or one of Composer's
            written by this project.
        loss: "siglip" starts from SigLIP's logit scale and bias (Zhai et al., ICCV 2023, sec. 3.3) unless the config
            gives its own.

    Raises:
        ValueError: an unknown name, a config open_clip does not accept, a checkpoint that cannot be loaded.
    """
    if (name is None) == (config is None):
        raise ValueError(f"model: give either a name or a config; got name={name!r}, config={config!r}")
    if loss not in LOSSES:
        raise ValueError(f"model.loss={loss!r} is not one of {list(LOSSES)}")
    bias = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if loss == "siglip" else {}
    try:
        if config is not None:
            kwargs = {**bias, **config, "output_dict": True}
            custom = kwargs.pop("custom_text", False)
            towers: nn.Module = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**kwargs)
        else:
            assert name is not None
            check_name(name)
            tag = None if pretrained is None or Path(pretrained).exists() else pretrained
            if tag is not None:
                check_activation(name, tag)
            towers = open_clip.create_model(name, pretrained=tag, output_dict=True, **bias)  # pyright: ignore
    except (TypeError, KeyError, RuntimeError, OSError, AssertionError) as error:
        reason = str(error) or repr(error)  # timm's assertions are not all worded
        raise ValueError(f"model: open_clip cannot build {name or dict(config or {})}: {reason}") from error
    if pretrained is not None and (config is not None or Path(pretrained).exists()):
        load_towers(towers, pretrained)
    return towers


def check_activation(name: str, tag: str) -> None:
    """Raise ValueError if a tag's weights were trained with QuickGELU and the model has none, or the other way round.

    open_clip only warns, and the model's outputs are then worth little.
    """
    known = open_clip.get_pretrained_cfg(name, tag)
    own, theirs = ((config or {}).get("quick_gelu", False) for config in (open_clip.get_model_config(name), known))
    if not known or own == theirs:
        return
    other = name.removesuffix("-quickgelu") if own else f"{name}-quickgelu"
    have, lack = ("without", "with") if own else ("with", "without")
    raise ValueError(
        f"model: the weights {tag!r} were trained {have} QuickGELU, {name!r} is {lack} it; use the name {other!r}"
    )


def check_name(name: str) -> None:
    """Raise ValueError unless open_clip knows the model, with near names as a suggestion."""
    import difflib

    if ":" in name or name in open_clip.list_models():
        return
    near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see open_clip.list_models()"
    raise ValueError(f"model.name={name!r} is not an open_clip model{hint}")


def forward_flops(towers: nn.Module, image_size: int, context_length: int) -> int:
    """Floating-point operations, twice the multiply-adds, that one image and one caption cost, forward.

    Counted on copies without data: it takes no memory and half a second, and where there are values the fused attention
    of an evaluation pass is left out of the count.

    Args:
        towers: with `encode_image` and `encode_text`.
        image_size: side of the image.
        context_length: tokens of the caption.
    """
    known: dict[int, Any] = {id(of): torch.empty_like(of, device="meta") for of in towers.buffers()}
    # The counter refuses a module whose input is a view of a parameter in training, as an attention pool's is.
    known |= {
        id(of): nn.Parameter(torch.empty_like(of, device="meta"), requires_grad=False) for of in towers.parameters()
    }
    copied: Any = copy.deepcopy(towers, known).eval()
    image = torch.empty(1, 3, image_size, image_size, device="meta")
    text = torch.ones(1, context_length, dtype=torch.int64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copied.encode_image(image)
        copied.encode_text(text)
    return counter.get_total_flops()


def load_towers(towers: nn.Module, path: str) -> None:
    """Load weights from an open_clip checkpoint or from a Composer checkpoint of a ClipModel; runs no code of either.

    Raises:
        ValueError: no such file, weights of another model, or a file that holds anything but data.
    """
    try:
        saved = load_inert(path)
        if "state" in saved:
            weights = {
                key.removeprefix("module.").removeprefix("towers."): value
                for key, value in saved["state"]["model"].items()
            }
        else:
            weights = saved.get("state_dict", saved)
            weights = {key.removeprefix("module."): value for key, value in weights.items()}
        weights = reshaped(weights, towers)  # those of a sharded run have one dimension more
        check_same_model(towers, weights)
        towers.load_state_dict(weights)
    except Exception as error:  # torch.load raises a dozen types; all mean the same to the user
        raise ValueError(f"checkpoint {path!r} cannot be loaded into this model: {error}") from error


def check_same_model(towers: nn.Module, weights: Mapping[str, Any]) -> None:
    """Raise ValueError if some weights have another shape than the model's: torch would list all of them."""
    own = {name: tuple(value.shape) for name, value in towers.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, Tensor)}
    others = [name for name, shape in given.items() if name in own and own[name] != shape]
    if others:
        name = others[0]
        raise ValueError(
            f"its weights are another model's: {len(others)} of {len(own)} have other shapes, {name} {given[name]} and "
            f"not {own[name]}. Name the model they are of (in a recipe name or config, of a tool --name or --recipe)"
        )


class ClipModel(ComposerModel):
    """Two towers and a contrastive loss, for the Composer Trainer.

    A batch is a dict with `image` (n, 3, s, s) and `text` (n, context). Evaluation batches may lack `text`.

    Args:
        towers: an open_clip CLIP model made with `output_dict=True`; see `build_towers`.
        loss: "clip" (softmax) or "siglip".
        activation_chunk: rows per chunk whose activations are recomputed in the backward pass instead of kept; None
            keeps all. The gradient is the same, the forward runs twice.
        num_survivors: rows per rank that every training batch must have. The loss refuses any other number, so a run
            that lost its selection algorithm stops instead of training on whole pools.
        metrics: evaluation metrics by name, each with `update(outputs, batch)`.

    Raises:
        ValueError: an unknown loss, a CoCa, a chunk below 1, or chunks with batch norm, which would see other
            statistics.
    """

    def __init__(
        self,
        towers: nn.Module,
        loss: str = "clip",
        activation_chunk: int | None = None,
        num_survivors: int | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"model.loss={loss!r} is not one of {list(LOSSES)}")
        if isinstance(towers, open_clip.CoCa):
            raise ValueError(
                "model: a CoCa, which open_clip's coca_* names are, embeds no captions without images, and its caption "
                "loss is not known here; use a model with two towers, such as model.name='ViT-B-32'"
            )
        if activation_chunk is not None:
            if activation_chunk < 1:
                raise ValueError(f"model.activation_chunk={activation_chunk} must be at least 1, or null")
            if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in towers.modules()):
                raise ValueError("model.activation_chunk is not exact with batch norm; set it to null for this model")
        self.towers = towers
        self.loss_name = loss
        self.activation_chunk = activation_chunk
        self.num_survivors = num_survivors
        self._metrics = dict(metrics or {})
        self._criterion: nn.Module | None = None

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the logit scale, as open_clip keeps it."""
        scale = self.towers.logit_scale
        assert isinstance(scale, Tensor)
        return scale

    def encode_image(self, image: Tensor) -> Tensor:
        """(n, dim) unit-norm image embeddings."""
        # Through forward, not through towers.encode_image: FSDP gathers weights in forward hooks.
        return self.towers(image=image)["image_features"]

    @passes_on("towers")
    def encode_text(self, text: Tensor) -> Tensor:
        """(n, dim) unit-norm caption embeddings."""
        return self.towers(text=text)["text_features"]

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features`, `text_features` (unit-norm), `logit_scale` and, for SigLIP, `logit_bias`.

        Raises:
            RuntimeError: a pool whose images are still encoded, because nobody selected from it.
        """
        image, text = batch.get("image"), batch.get("text")
        if not isinstance(image, Tensor):
            raise RuntimeError(
                "the model got a pool whose images are still encoded: is ClipCov among the Trainer's algorithms?"
            )
        chunk = self.activation_chunk
        if chunk is None or not torch.is_grad_enabled() or text is None or len(image) <= chunk:
            outputs = self.towers(image=image, text=text)
        else:
            parts: list[Any] = [
                checkpoint(self.towers, i, t, use_reentrant=False)
                for i, t in zip(image.split(chunk), text.split(chunk), strict=True)
            ]
            outputs = dict(parts[0])
            for key in ("image_features", "text_features"):
                outputs[key] = torch.cat([part[key] for part in parts])
        return {key: value for key, value in outputs.items() if value is not None}

    def loss(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Contrastive loss over the survivors of all ranks, in float32.

        Raises:
            RuntimeError: a batch that is not `num_survivors` rows long, or part of a pool that nobody selected from.
        """
        num_rows = len(outputs["image_features"])
        # Selection drops `valid`. Without this mark a forgotten ClipCov would pass unseen: Composer would split the
        # pool into microbatches that each have the expected number of rows.
        if self.num_survivors is not None and (num_rows != self.num_survivors or "valid" in batch):
            raise RuntimeError(
                f"the loss got {num_rows} samples{' of an unselected pool' if 'valid' in batch else ''} where "
                f"{self.num_survivors} survivors were expected: is ClipCov among the Trainer's algorithms, and "
                "device_train_microbatch_size equal to the survivors per rank?"
            )
        # Autocast would run the logits' matmul in bf16, whose 8 bits blur similarities times a scale of 100.
        with torch.autocast(outputs["image_features"].device.type, enabled=False):
            return self._loss_module()(**{key: value.float() for key, value in outputs.items()})

    def _loss_module(self) -> nn.Module:
        if self._criterion is None:
            several = torch_dist.is_available() and torch_dist.is_initialized()
            rank = torch_dist.get_rank() if several else 0
            world_size = torch_dist.get_world_size() if several else 1
            if self.loss_name == "siglip":
                self._criterion = SigLipLoss(rank=rank, world_size=world_size)
            else:
                self._criterion = ClipLoss(
                    local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size
                )
        return self._criterion

    def eval_forward(self, batch: Mapping[str, Tensor], outputs: Any = None) -> dict[str, Tensor]:
        """Outputs of an evaluation batch, whose `text` may be (n, captions, context): of n * captions captions then."""
        if outputs is not None:
            return outputs
        text = batch.get("text")
        return self.forward(batch if text is None or text.ndim == 2 else {**batch, "text": text.flatten(0, 1)})

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else dict(self._metrics)

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        metric.update(outputs, batch)


class ClampLogitScale(Callback):
    """Keeps the logit scale in [1, 100] after every step (Radford et al., ICML 2021, sec. 2.5)."""

    def batch_end(self, state: State, logger: Logger) -> None:
        for name, parameter in state.model.named_parameters():
            if name.endswith("logit_scale"):
                with torch.no_grad():
                    parameter.clamp_(0, MAX_LOG_SCALE)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups: matrices decay; gains, biases, logit scale and bias do not."""

    def named() -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.endswith(("logit_scale", "logit_bias"))

    return [
        {"params": [p for name, p in named() if decays(name, p)], "weight_decay": weight_decay},
        {"params": [p for name, p in named() if not decays(name, p)], "weight_decay": 0.0},
    ]
