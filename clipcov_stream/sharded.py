"""The learner's weights, gradients and moments divided among ranks: FSDP2, as Composer has it, for open_clip models.

For a model too large for every rank to hold its weights, gradients and both moments. A block's weights are gathered
where its forward or backward pass begins and let go after it; what is in no block is gathered with the model's forward
pass and let go after the next backward pass. Selection is none the wiser: embeddings come out whole, and an online
proxy, which is small, is every rank's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from composer.algorithms import EMA, GradientClipping
from composer.core import Algorithm, Callback, State
from composer.loggers import Logger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

CHOICES: dict[str, tuple[Any, ...]] = {
    "activation_checkpointing": (False, True),
    "activation_cpu_offload": (False, True),
    "mixed_precision": ("FULL", "DEFAULT", "PURE"),
    "reshard_after_forward": (True, False),
    "state_dict_type": ("full", "sharded"),
    "verbose": (False, True),
}
"""Keys of a recipe's `fsdp_config`, and what each may be, the default first: those of Composer's FSDP2Config but its
mesh, and load_monolith_rank0_only, with which a resumed run differed from one that was not stopped (Composer 0.32).

Composer's own defaults of two are others. State of type sharded is pieces that few tools read. With DEFAULT weights
travel in `precision`, the logarithm of the logit scale too, which in bfloat16 has steps of 1/64 to 1/32: up to 3% of
the scale. With FULL a sharded run has the numbers of one that is not."""

SCALARS = ("logit_scale", "logit_bias")


def check_sharding(
    given: Mapping[str, Any], embed: str, activation_chunk: int | None, algorithms: Sequence[Algorithm]
) -> None:
    """Raise ValueError unless a recipe's `fsdp_config` is one of FSDP2, and of a run that can be sharded."""
    for key, value in given.items():
        if key not in CHOICES:
            raise ValueError(f"fsdp_config.{key} is not one of FSDP2's {sorted(CHOICES)}")
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in CHOICES[key]):
            raise ValueError(f"fsdp_config.{key}={value!r} is not one of {list(CHOICES[key])}")
    if embed == "teacher":
        raise ValueError(
            "selection.embed='teacher' cannot copy a model sharded by fsdp_config; use embed='online', 'proxy' or "
            "'columns'"
        )
    if activation_chunk is not None:
        raise ValueError(
            f"model.activation_chunk={activation_chunk} does not go with fsdp_config; set it to null, and "
            "fsdp_config.activation_checkpointing=true, which saves memory block by block"
        )
    if any(isinstance(each, GradientClipping) and each.clipping_type == "adaptive" for each in algorithms):
        # Measured: vectors' gradients stay as they are, in silence.
        raise ValueError(
            "algorithms.gradient_clipping.clipping_type='adaptive' does not clip what fsdp_config shards; use 'norm'"
        )
    if any(isinstance(each, EMA) for each in algorithms):
        # Its averages are no DTensors, and the first evaluation ends in an error of torch's.
        raise ValueError("algorithms.ema cannot average what fsdp_config shards; leave one of them out")


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: given.get(key, choices[0]) for key, choices in CHOICES.items()}


def saves_in_full(given: Mapping[str, Any] | None) -> bool:
    """Whether checkpoints of a recipe with this `fsdp_config` are one file each."""
    return given is None or complete(given)["state_dict_type"] == "full"


def fsdp_of(given: Mapping[str, Any] | None) -> FSDP2Config | None:
    """Composer's configuration, of a recipe's `fsdp_config` that was checked; None if it has none. An empty one is one
    of defaults. Composer warns that its FSDP2 is experimental."""
    return None if given is None else FSDP2Config(**complete(given))


def make_shardable(towers: nn.Module, config: FSDP2Config) -> None:
    """Prepare towers, before there is an optimizer, so that Composer shards them block by block.

    Their logit scale and bias become vectors of one number, because FSDP takes no scalars; they load no checkpoint in
    which they are not.

    Raises:
        ValueError: with batch norm, activations that are to be computed twice, which it would count twice, or weights
            in a precision that its statistics are not in.
    """
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in towers.modules()):
        if config.activation_checkpointing:
            raise ValueError("fsdp_config.activation_checkpointing=True is not exact with batch norm; set it to false")
        if (kind := config.mixed_precision) != "FULL":
            raise ValueError(f"fsdp_config.mixed_precision={kind!r} does not go with batch norm; set it to 'FULL'")
    for name in SCALARS:
        parameter = getattr(towers, name, None)
        if isinstance(parameter, nn.Parameter) and parameter.ndim == 0:
            setattr(towers, name, nn.Parameter(parameter.detach()[None], parameter.requires_grad))
    towers.register_load_state_dict_pre_hook(check_loaded)
    blocks = blocks_of(towers)
    # Composer asks these of every module.
    for name in ("fsdp_wrap_fn", "activation_checkpointing_fn"):
        setattr(towers, name, blocks.__contains__)


def check_loaded(towers: nn.Module, weights: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError if a checkpoint is of a run that was not sharded: its moments would not fit either."""
    scale = weights.get(f"{prefix}logit_scale")
    if isinstance(scale, Tensor) and scale.ndim == 0:
        raise ValueError(unlike(now=True))


def unlike(now: bool) -> str:
    """What to say of a checkpoint that was sharded if this run, `now`, is not, or the other way round."""
    was, key = ("without", "to null") if now else ("with", "as it was")
    return (
        f"the checkpoint's run was {was} fsdp_config: to go on, set it {key}; to begin with its weights alone, set "
        "model.pretrained to the file"
    )


def blocks_of(towers: nn.Module) -> set[nn.Module]:
    """Modules of one kind in a row, as transformers' layers and the blocks of a ResNet's stages are; where such are
    within such, as blocks within stages, the inner ones."""
    found: set[nn.Module] = set()
    for row in towers.modules():
        if isinstance(row, (nn.ModuleList, nn.Sequential)) and len(row) > 1 and len({type(each) for each in row}) == 1:
            found.update(each for each in row if is_unit(each))
    return {block for block in found if found.isdisjoint(part for part in block.modules() if part is not block)}


def is_unit(module: nn.Module) -> bool:
    """Whether a module is called as one, is more than a single layer, and has weights."""
    called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return called and any(True for _ in module.children()) and any(True for _ in module.parameters())


class AverageGradients(Callback):
    """Has sharded gradients be the mean over ranks with every backend.

    torch 2.7's gloo adds up where FSDP asks it for the mean, and says nothing: on CPUs gradients would be as many times
    too large as there are ranks. What the backend makes of ones tells; NCCL averages. It divides after every backward
    pass, and so is for steps of one, as recipes' are.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def fit_start(self, state: State, logger: Logger) -> None:
        found = state.device.tensor_to_device(torch.zeros(1))
        distributed.reduce_scatter_tensor(found, found.new_ones(dist.get_world_size()), distributed.ReduceOp.AVG)
        self.factor = float(found)

    def after_backward(self, state: State, logger: Logger) -> None:
        if self.factor != 1.0:
            for parameter in state.model.parameters():
                if isinstance(parameter.grad, DTensor):
                    parameter.grad.to_local().div_(self.factor)


def whole(tensor: Tensor) -> Tensor:
    """A parameter in full; of one that is sharded every rank must ask at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshaped(weights: Mapping[str, Any], towers: nn.Module) -> dict[str, Any]:
    """Weights by name, their logit scale and bias in the shape that the towers have."""
    found = dict(weights)
    for name in SCALARS:
        own, given = getattr(towers, name, None), found.get(name)
        if isinstance(own, Tensor) and isinstance(given, Tensor) and own.numel() == given.numel() == 1:
            found[name] = given.reshape(own.shape)
    return found
