"""Small proxies, pools and recipes for tests of online proxies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from corpora import recipe
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


class Linear(nn.Module):
    """Two linear towers and a scale, and perhaps a batch norm."""

    def __init__(self, seed: int = 0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False) if norm else nn.Identity()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.norm(self.image(image))

    def encode_text(self, text: Tensor) -> Tensor:
        return self.text(text)


def drawn_pool(size: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(size, 6, generator=generator)
    return image, image[:, :5] + 0.1 * torch.randn(size, 5, generator=generator), torch.ones(size, dtype=torch.bool)


EQUAL = torch.ones(40)


def online_recipe(corpus: Path, **sections: Any) -> dict[str, Any]:
    selection = {"embed": "online", "proxy": {"config": SMALL}, "proxy_lr": 1e-2, **sections.pop("selection", {})}
    return recipe(corpus, selection=selection, **sections)


def shared_pool(num_ranks: int) -> list[tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]]:
    """Three pools of 8 candidates a rank, in parts of which ranks have unlike shares: of one a rank has none, of one
    it has none that is valid, of one there is none at all, and of one two ranks have one each."""
    size, generator = 8 * num_ranks, torch.Generator().manual_seed(5)
    pools = []
    for _ in range(3):
        image = torch.randn(size, 6, generator=generator)
        text = image[:, :5] + 0.1 * torch.randn(size, 5, generator=generator)
        valid = torch.ones(size, dtype=torch.bool)
        valid[[1, 6, 7]] = False
        others = torch.cat([torch.tensor([0, 2]), 8 + torch.randperm(size - 8, generator=generator)])
        most, one, rest = others.split([size - 11, 1, 4])
        parts = [most, torch.cat([torch.tensor([6, 7]), rest]), torch.tensor([1]), torch.tensor([3, 4])]
        parts.append(torch.cat([torch.tensor([5]), one]))
        pools.append((image, text, valid, 2 * torch.rand(size, generator=generator), parts))
    return pools
