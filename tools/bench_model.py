"""CLIPs small enough to train hundreds of times on a CPU, and one of ViT-S's size for a GPU."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipcov_stream.embed import is_native

LEARNING_RATES = {"tiny": 2e-3, "wide": 1e-3, "resnet": 2e-3, "vit-tiny": 1e-3, "vit": 5e-4}
"""Of the learners that benchmarks know."""

WIDTHS = {"tiny": 24, "wide": 72}
"""Of the first convolution."""

VITS = {"vit-tiny": (4, 96, 3, 96, 2, 32, 64), "vit": (8, 384, 12, 256, 4, 64, 256)}
"""Side of a patch, width and layers of both transformers, width of a head, width of the embeddings."""


class TinyTowers(nn.Module):
    """Three strided convolutions, and the mean of word embeddings through one hidden layer.

    Called and attributed as an open_clip model with `output_dict=True` is.

    Args:
        vocab_size: token ids are below it; id 0 is padding and does not count.
        dim: width of the embeddings.
        width: channels of the first convolution.
    """

    def __init__(self, vocab_size: int, dim: int = 64, width: int = 24) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 4 * width)
        self.convolutions = nn.Sequential(
            *(
                layer
                for inner, outer in itertools.pairwise(channels)
                for layer in (nn.Conv2d(inner, outer, 3, 2, 1, bias=False), nn.BatchNorm2d(outer), nn.ReLU())
            )
        )
        self.image_head = nn.Linear(4 * width, dim)
        self.words = nn.Embedding(vocab_size, dim)
        self.text_head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.words.weight, std=0.1)

    def encode_image(self, image: Tensor) -> Tensor:
        """(n, dim) unit-norm image embeddings."""
        # Half the time of a run is convolution, and bfloat16 in this layout takes a third of float32's; or ten times
        # as long, on a CPU that has no instructions for it.
        kind = image.device.type
        with torch.autocast(kind, torch.bfloat16) if is_native(torch.bfloat16, kind) else nullcontext():
            features = self.convolutions(image.contiguous(memory_format=torch.channels_last)).float()
        return F.normalize(self.image_head(features.mean((2, 3)) + features.amax((2, 3))), dim=1)

    def encode_text(self, text: Tensor) -> Tensor:
        """(n, dim) unit-norm caption embeddings."""
        counts = (text > 0)[..., None]
        mean = (self.words(text) * counts).sum(1) / counts.sum(1).clamp_min(1)
        return F.normalize(self.text_head(mean), dim=1)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Any]:
        return {
            "image_features": None if image is None else self.encode_image(image),
            "text_features": None if text is None else self.encode_text(text),
            "logit_scale": self.logit_scale.exp(),
        }


def towers_of(kind: str, vocab_size: int, image_size: int, context: int) -> nn.Module:
    """The learner of that name, with weights of torch's generator: TinyTowers, or a model of open_clip's.

    resnet is the quickstart's, four blocks from 16 channels on, and one layer of width 64 reads the caption. vit-tiny
    has 3 layers of width 96 on patches of 4 x 4 pixels, and 2 read the caption; vit is ViT-S, 12 layers of width 384 on
    patches of 8 x 8, and 4 of width 256.
    """
    if kind in WIDTHS:
        return TinyTowers(vocab_size, width=WIDTHS[kind])
    if kind == "resnet":
        vision: dict[str, Any] = {"image_size": image_size, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}
        text_width, text_layers, head, dim = 64, 1, 32, 64
    else:
        patch, width, layers, text_width, text_layers, head, dim = VITS[kind]
        vision = {"image_size": image_size, "patch_size": patch, "width": width, "layers": layers, "head_width": head}
    text = {"context_length": context, "vocab_size": vocab_size, "width": text_width, "layers": text_layers}
    text |= {"heads": text_width // head}
    return open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text, output_dict=True)  # pyright: ignore
