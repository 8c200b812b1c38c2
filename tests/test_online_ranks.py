"""Ranks have one online proxy, which learns from all of their candidates."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from corpora import draw_corpus, write_recipe
from proxies import SMALL, Linear, online_recipe, shared_pool
from runs import (
    assert_same,
    launch,
    run_ranks,
)

from clipcov_stream.online import (
    OnlineProxy,
    Part,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus"))


OF_THEIR_OWN = """
import sys
from pathlib import Path
from composer.utils import dist
from clipcov_stream import algorithm
from clipcov_stream.config import load_config
from clipcov_stream.train import build_trainer, leave_group
trainer = build_trainer(load_config(sys.argv[1]))
own = [int(size) for size in sys.argv[2].split(",")]
algorithm.size_of = lambda loader: own[dist.get_global_rank()]
trainer.fit()
clipcov = next(of for of in trainer.state.algorithms if isinstance(of, algorithm.ClipCov))
print("passes of", clipcov.teacher.dataset_size, "and ids below", clipcov.dataset_size)
trainer.close()
leave_group()
"""


@pytest.mark.parametrize(("sizes", "known"), [("64,32", 96), ("64,0", 0)])
def test_a_pass_is_one_over_all_ranks_data_sets(tmp_path: Path, corpus: Path, sizes: str, known: int) -> None:
    script = tmp_path / "sizes.py"
    script.write_text(OF_THEIR_OWN, encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", online_recipe(corpus, max_duration="1ba"))
    said = launch(2, script, str(path), sizes)
    assert f"passes of {known} and ids below 0" in said


@pytest.mark.parametrize(
    ("proxy", "num_ranks"),
    [({"config": SMALL}, 2), ({"width": 4}, 2), ({"width": 4}, 4)],
    ids=["of open_clip", "the default one", "the default one, on four"],
)
def test_ranks_have_one_proxy(tmp_path: Path, corpus: Path, proxy: dict[str, Any], num_ranks: int) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", online_recipe(corpus, selection={"proxy": proxy}))
    ranks = run_ranks(tmp_path / "ranks", path, num_ranks)
    for other in ranks[1:]:
        assert_same(ranks[0]["algorithm"]["teacher"], other["algorithm"]["teacher"])
        assert_same(ranks[0]["model"], other["model"])
    assert int(ranks[0]["algorithm"]["teacher"]["updates"]) == 6 * 4
    assert int(ranks[0]["algorithm"]["teacher"]["samples_streamed"]) == 6 * 32  # over all ranks


AVERAGES = """
import sys
import torch
from composer.utils import dist, get_device
from clipcov_stream import online
from clipcov_stream.online import LARGE, average_over_ranks
dist.initialize_dist(get_device("cpu"))
rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
def gradients(rank):
    # Two tables of which few rows were read, one of them all zero; a matrix, and a vector.
    generator = torch.Generator().manual_seed(rank)
    table, other = torch.zeros(LARGE // 8, 8), torch.zeros(LARGE, 1)
    table[torch.randint(len(table), (30,), generator=generator)] = torch.randn(30, 8, generator=generator)
    if rank == 1:
        table[7, 3] = torch.nan
    return [table, torch.randn(5, 4, generator=generator), other, torch.randn(6, generator=generator)]
own, travelled = gradients(rank), []
if sys.argv[1] == "dense":  # what NCCL gets; here no table is large enough to be asked
    online.LARGE = 1 << 60
summed = online.sum_over_ranks
online.sum_over_ranks = lambda tensor, group=None: travelled.append(tensor.numel()) or summed(tensor, group)
average = average_over_ranks(own, torch.distributed.new_group(backend="gloo") if sys.argv[1] == "own" else None)
for got, mine, parts in zip(average, own, zip(*map(gradients, range(num_ranks)))):
    assert got is mine
    torch.testing.assert_close(got, sum(parts) / num_ranks, equal_nan=True)
if sys.argv[1] == "dense":
    assert travelled == [LARGE + 20 + LARGE + 6]
else:  # of the tables 30 rows a rank at most, and which those are
    assert travelled[0] == LARGE // 8 + LARGE and travelled[1] <= num_ranks * 30 * 8 + 8 + 20 + 6
    assert len(travelled) == 2
print("as it should be on rank", rank)
"""


@pytest.mark.parametrize(("num_ranks", "group"), [(2, "default"), (3, "own"), (2, "dense")])
def test_gradients_are_averaged_whatever_rows_were_read(tmp_path: Path, num_ranks: int, group: str) -> None:
    script = tmp_path / "averages.py"
    script.write_text(AVERAGES, encoding="utf-8")
    said = launch(num_ranks, script, group)
    assert "as it should be on rank 0" in said


LEARNS = """
import os, sys
from contextlib import nullcontext
import torch
from composer.utils import dist, get_device
sys.path += sys.argv[2].split(os.pathsep)
from proxies import Linear, shared_pool
from clipcov_stream.online import OnlineProxy, Part
dist.initialize_dist(get_device("cpu"))
rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
group = torch.distributed.new_group(backend="gloo") if sys.argv[3] == "own" else None
norm = sys.argv[4] == "norm"
online = OnlineProxy(Linear(rank, norm), lr=1e-2, momentum=0.9)  # rank 0's weights are what counts
for image, text, valid, weights, parts in shared_pool(num_ranks):
    own = slice(8 * rank, 8 * rank + 8)
    most = [max(int((part // 8 == of).sum()) for of in range(num_ranks)) for part in parts]
    mine = [Part(part[part // 8 == rank] % 8, size) for part, size in zip(parts, most)]
    online.learn(image[own], text[own], valid[own], weights[own], mine, 4, nullcontext, group=group)
if norm:  # a part of which rank 0 alone has any
    part = [Part(torch.arange(8), 8)]
    online.learn(image[own], text[own], valid[own] & (rank == 0), weights[own], part, 4, nullcontext, group=group)
torch.save(online.state_dict(), f"{sys.argv[1]}/rank{rank}.pt")
"""


@pytest.mark.parametrize(("num_ranks", "group"), [(2, "default"), (3, "own")])
def test_ranks_learn_together_what_one_learns_from_all(tmp_path: Path, num_ranks: int, group: str) -> None:
    """All candidates of a part are one another's negatives, whichever rank has them."""
    script = tmp_path / "learns.py"
    script.write_text(LEARNS, encoding="utf-8")
    paths = os.pathsep.join(sys.path)
    launch(num_ranks, script, str(tmp_path), paths, group, "plain")
    alone = OnlineProxy(Linear(), lr=1e-2, momentum=0.9)
    for image, text, valid, weights, parts in shared_pool(num_ranks):
        alone.learn(image, text, valid, weights, [Part(part, len(part)) for part in parts], 4, nullcontext)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(num_ranks)]
    assert alone.updates == 15 and not torch.equal(alone.trained.image.weight, Linear().image.weight)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(ranks[0][name], value, msg=name)
    for rank in ranks[1:]:
        assert_same(rank, ranks[0])


def test_ranks_learn_together_with_batch_norm_too(tmp_path: Path) -> None:
    """Of a part of which a rank has one row it takes none: batch norm would have no statistics."""
    script = tmp_path / "learns.py"
    script.write_text(LEARNS, encoding="utf-8")
    launch(2, script, str(tmp_path), os.pathsep.join(sys.path), "default", "norm")
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*ranks)
    assert int(ranks[0]["trained.norm.num_batches_tracked"]) == 3 * 2 + 1
    assert int(ranks[0]["updates"]) == 16 and all(value.isfinite().all() for value in ranks[0].values())
    assert ranks[0]["average.norm.running_mean"].any()
    before = OnlineProxy(Linear(norm=True), lr=1e-2, momentum=0.9).state_dict()
    assert not torch.equal(ranks[0]["trained.image.weight"], before["trained.image.weight"])
