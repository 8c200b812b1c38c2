"""A ModifiedResNet's forward pass, on a CPU and in eval mode, in about half of its time.

CLIP's ResNets follow each convolution by a batch norm and most by a ReLU. In eval mode a batch norm is a multiply-add
per channel, which the convolution's own weights can do (Jacob et al., CVPR 2018, sec. 3.2), and a ReLU needs no pass
over memory of its own if the convolution writes its result already cut off. The attention pool computes a query and an
output for every cell of the last map and then drops all but the mean's. A pass over a pool is the larger part of what
selection costs, so here it does without all three. Up to rounding the embeddings are the tower's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from torch import Tensor, nn

Folded = tuple[Tensor, Tensor]
"""A convolution's weight and bias, its batch norm in them."""

FUSES = frozenset({torch.float32, torch.bfloat16})
"""Types in which oneDNN's convolution takes a sum and a ReLU along, bfloat16 where the CPU has what that needs."""


def fuses(dtype: torch.dtype) -> bool:
    """Whether `convolved` may ask oneDNN for all at once."""
    ops: Any = torch.ops.mkldnn
    able = dtype in FUSES and torch.backends.mkldnn.is_available()
    return able and (dtype != torch.bfloat16 or bool(ops._is_mkldnn_bf16_supported()))


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Within, the open_clip ResNets among a model's parts run as `forward` does; for eval mode, on a CPU.

    The weights are folded anew on entry: a teacher's move at every step. Costs: one copy of the convolutions' weights.
    """
    towers = [part for part in model.modules() if isinstance(part, ModifiedResNet) and can_fold(part)]
    try:
        for tower in towers:
            tower.__dict__["forward"] = partial(forward, tower, folded_weights(tower))
        yield
    finally:
        for tower in towers:
            tower.__dict__.pop("forward", None)


def can_fold(tower: ModifiedResNet) -> bool:
    """Whether a tower is what `forward` computes: open_clip's own classes, as they were made, and nothing hooked in."""
    known = (
        *(ModifiedResNet, Bottleneck, AttentionPool2d, nn.Sequential),
        *(nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.AvgPool2d, nn.Identity, nn.Linear),
    )
    parts = list(tower.modules())
    norms = [part for part in parts if isinstance(part, nn.BatchNorm2d)]
    # Identity stands for a stride of 1, before a convolution; in a norm's place it says that somebody folded already.
    pairs = [(part, i) for part in parts if isinstance(part, (ModifiedResNet, Bottleneck)) for i in (1, 2, 3)]
    sides = [part.downsample for part in parts if isinstance(part, Bottleneck) and part.downsample is not None]
    return (
        all(type(part) in known and "forward" not in vars(part) for part in parts)
        and not any(part._forward_hooks or part._forward_pre_hooks for part in parts if part is not tower)
        and all(part.bias is None for part in parts if isinstance(part, nn.Conv2d))
        and all(type(getattr(part, f"bn{i}")) is nn.BatchNorm2d for part, i in pairs)
        and all(type(side[2]) is nn.BatchNorm2d for side in sides)
        and all(norm.running_mean is not None and norm.affine for norm in norms)
        and next(tower.parameters()).device.type == "cpu"
    )


def fold(conv: Any, norm: Any) -> Folded:
    """One convolution without bias and its batch norm, as one convolution, of the type that autocast asks for."""
    # In float32 at least, as a batch norm of half precision reckons.
    kind = torch.promote_types(conv.weight.dtype, torch.float32)
    gain = norm.weight.to(kind) / (norm.running_var.to(kind) + norm.eps).sqrt()
    weight, bias = conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else conv.weight.dtype
    return weight.to(dtype, memory_format=torch.channels_last), bias.to(dtype)


def folded_weights(tower: ModifiedResNet) -> tuple[list[Folded], list[tuple[Bottleneck, list[Folded]]]]:
    """The stem's convolutions and, of every block, its own, the shortcut's last if it has one."""
    stem = [fold(getattr(tower, f"conv{i}"), getattr(tower, f"bn{i}")) for i in (1, 2, 3)]
    blocks = []
    for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        for block in layer:
            assert isinstance(block, Bottleneck)
            parts = [fold(getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3)]
            if block.downsample is not None:
                parts.append(fold(block.downsample[1], block.downsample[2]))
            blocks.append((block, parts))
    return stem, blocks


def forward(
    tower: ModifiedResNet, weights: tuple[list[Folded], list[tuple[Bottleneck, list[Folded]]]], image: Tensor
) -> Tensor:
    """(n, dim) embeddings of (n, 3, side, side) images: `ModifiedResNet.forward` in eval mode."""
    stem, blocks = weights
    x = image.to(stem[0][0].dtype, memory_format=torch.channels_last)
    for stride, part in zip((2, 1, 1), stem, strict=True):
        x = convolved(x, part, stride=stride)
    x = tower.avgpool(x)
    for block, parts in blocks:
        out = convolved(convolved(x, parts[0]), parts[1])
        shortcut = x if block.downsample is None else convolved(block.downsample[0](x), parts[3], relu=False)
        x = convolved(block.avgpool(out), parts[2], added_to=shortcut)
    return attended(tower.attnpool, x)


def convolved(x: Tensor, part: Folded, stride: int = 1, relu: bool = True, added_to: Tensor | None = None) -> Tensor:
    """A convolution that keeps the size but for its stride, plus `added_to`, which is overwritten, and then a ReLU."""
    weight, bias = part
    pad = weight.shape[2] // 2
    if fuses(x.dtype):
        geometry = (weight, bias, [pad, pad], [stride, stride], [1, 1], 1)
        ops: Any = torch.ops.mkldnn
        if added_to is not None:
            return ops._convolution_pointwise_.binary(added_to, x, *geometry, "add", 1.0, "relu", [], None)
        return ops._convolution_pointwise(x, *geometry, "relu" if relu else "none", [], "")
    found = F.conv2d(x, weight, bias, stride, pad)
    found = found if added_to is None else found.add_(added_to)
    return found.relu_() if relu else found


def attended(pool: AttentionPool2d, x: Tensor) -> Tensor:
    """`AttentionPool2d.forward`: what the mean over the cells attends to among itself and the cells.

    Tokens are the mean and the cells, each plus its position; keys and values are linear in both, so they are computed
    of the cells and of the positions alone, and their mean is the mean's.
    """
    cells, positions = x.flatten(2).permute(2, 0, 1), pool.positional_embedding.to(x.dtype)
    heads = (cells.shape[1], pool.num_heads, -1)

    def projected(proj: nn.Linear) -> Tensor:
        found = F.linear(cells, proj.weight)
        found = torch.cat([found.mean(0, keepdim=True), found]) + proj(positions)[:, None]
        return found.view(len(positions), *heads)

    query = pool.q_proj(cells.mean(0) + positions[0]).view(heads)
    weight = (query * projected(pool.k_proj)).sum(3).mul_(query.shape[2] ** -0.5).softmax(0)
    found = (weight[..., None] * projected(pool.v_proj)).sum(0)
    return pool.c_proj(found.flatten(1).to(x.dtype))
