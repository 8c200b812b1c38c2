"""One selection over the pools of all ranks, whose result does not depend on how many ranks there are.

Embeddings are gathered, not images: every rank then makes the same choice from the same global pool, put in the order
of the samples' ids, and trains an equal share of the survivors. Each keeps its own as far as its share allows; only
those that are left over on one rank and missing on another travel. At filter_ratio 0.8, 512 survivors and 4 ranks that
is some 5% of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
from composer.devices import Device
from composer.utils import dist
from torch import Tensor, nn

from clipcov_stream.fused import brought
from clipcov_stream.pool import Pool

SCOPES = ("local", "global")
Group = Any
"""A torch.distributed.ProcessGroup, or None for the default one."""


class Gathering:
    """All ranks' rows, of equal number, on their way while other work goes on.

    Args:
        rows: this rank's. Every rank must make its gatherings in the same order.
        group: of processes; None is the default one. Another must be gloo's (`own_group`).
    """

    def __init__(self, rows: Tensor, group: Group = None) -> None:
        self.own = rows
        self.parts: list[Tensor] = []
        self.work: Any = None
        if dist.get_world_size() > 1:
            # Not every back end moves bfloat16 and bool; their bytes it does.
            narrow = rows.dtype in (torch.bfloat16, torch.bool)
            sent = rows.contiguous().view(torch.uint8) if narrow else rows.contiguous()
            sent = sent if group is None else sent.cpu()
            self.parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
            self.work = torch.distributed.all_gather(self.parts, sent, group=group, async_op=True)

    def wait(self) -> Tensor:
        """The rows, rank after rank."""
        if self.work is None:
            return self.own
        self.work.wait()
        return torch.cat(self.parts).to(self.own.device).view(self.own.dtype)


def gathered(rows: Tensor, group: Group = None) -> Tensor:
    """All ranks' rows, of equal number, rank after rank."""
    return Gathering(rows, group).wait()


def own_group(timeout: float | None = None) -> Group:
    """A process group for a thread of its own, whose collectives may not mix with the training thread's.

    Args:
        timeout: seconds that a rank waits for the others; None is PyTorch's default.

    It is gloo's, on GPUs too: NCCL deadlocks if two groups' collectives start in different orders on two GPUs. Every
    rank must call this; None if there is but one.
    """
    if dist.get_world_size() == 1:
        return None
    limit = None if timeout is None else timedelta(seconds=timeout)
    return torch.distributed.new_group(backend="gloo", timeout=limit)


def on_all_ranks(flag: bool, group: Group = None) -> bool:
    """Whether a flag is set on every rank; each must ask."""
    count = torch.tensor([int(flag)])
    sum_over_ranks(count, group)
    return int(count) == dist.get_world_size()


def sum_over_ranks(tensor: Tensor, group: Group = None) -> None:
    """Sum over ranks, in place; `group` as for `Gathering`."""
    if dist.get_world_size() == 1:
        return
    moved = tensor if group is None else tensor.cpu()
    dist.all_reduce(moved, reduce_operation="SUM", group=group)
    if moved is not tensor:
        tensor.copy_(moved)


def on_every_rank(number: int, device: Device) -> list[int]:
    """A number of every rank; each must ask."""
    numbers = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    numbers[dist.get_global_rank()] = number
    sum_over_ranks(numbers := device.tensor_to_device(numbers))
    return numbers.tolist()


def share_buffers(model: nn.Module) -> None:
    """Give every rank rank 0's buffers (batch norm's statistics differ by rank), so that all embed alike.

    DistributedDataParallel would do the same at the start of the next step.
    """
    if dist.get_world_size() > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.broadcast(buffer, 0)


def travelling(rows: Tensor) -> Tensor:
    """Embeddings as they travel, on a single rank too: as bfloat16."""
    return rows.to(torch.bfloat16)


@dataclass(frozen=True)
class Placement:
    """Where the samples of a global pool are, which is in the order of their ids.

    Args:
        origin: (global pool,) int64, the place of each in all ranks' pools, rank after rank; of equal ids the lower
            rank's and then the earlier comes first.
        pool_size: per rank.
        group: as for `Gathering`.
    """

    origin: Tensor
    pool_size: int
    group: Group = None

    @classmethod
    def of(cls, ids: Tensor, group: Group = None) -> Placement:
        """From this rank's ids, which every rank must call with as many."""
        return cls(torch.sort(gathered(ids, group), stable=True).indices, len(ids), group)

    def whole(self, rows: Tensor) -> Tensor:
        """This rank's rows and all others', in the global pool's order."""
        return gathered(rows, self.group).index_select(0, self.origin)

    def own_rows(self, rows: Tensor) -> Tensor:
        """Of the global pool's rows this rank's, in the order of its own pool."""
        at = dist.get_global_rank() * self.pool_size
        return rows.index_select(0, self.origin.argsort()[at : at + self.pool_size])

    def own_of(self, parts: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
        """For each of several parts of the global pool, on the CPU: which of it are this rank's, as places in its own
        pool, and how many of it any rank has. Reads `origin` from the device, once."""
        origin = self.origin.cpu()
        found = []
        for part in parts:
            rank, own = origin[part] // self.pool_size, origin[part] % self.pool_size
            found.append((own[rank == dist.get_global_rank()], int(rank.bincount().max())))
        return found

    def whole_pool(self, pool: Pool, image: Gathering | None = None) -> Pool:
        """The global pool. Embeddings travel as bfloat16, and are rounded to it on a single rank too.

        Args:
            pool: this rank's.
            image: the gathering of its image rows (`travelling`), if it has begun.
        """

        def rows(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            if name == "image" and image is not None:
                return image.wait().index_select(0, self.origin).to(value.dtype)
            return self.whole(travelling(value)).to(value.dtype) if value.is_floating_point() else self.whole(value)

        if pool.concepts is not None:
            pool = replace(pool, concepts=padded(pool.concepts, self.group))
        return replace(pool, **{name: rows(name, value) for name, value in vars(pool).items()})


def padded(concepts: Tensor, group: Group = None) -> Tensor:
    """Concepts of the width of the widest rank's, padded with -1."""
    width = torch.tensor([concepts.shape[1]], device="cpu" if group is not None else concepts.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(width, reduce_operation="MAX", group=group)
    return torch.nn.functional.pad(concepts, (0, int(width) - concepts.shape[1]), value=-1)


@dataclass(frozen=True)
class Shares:
    """Who trains which survivor.

    Args:
        owner: (K,) rank that has each survivor, in the order chosen.
        place: (K,) its place in that rank's pool.
        trainer: (K,) rank that trains it; K / ranks each.
        group: for `exchange`, as for `Gathering`.
    """

    owner: list[int]
    place: list[int]
    trainer: list[int]
    group: Group = None

    @classmethod
    def of(cls, origin: list[int], pool_size: int, num_ranks: int, group: Group = None) -> Shares:
        """From the survivors' places in all ranks' pools. A rank trains its own, the first chosen first, up to its
        share; those left over go to the lowest ranks with room."""
        owner, place = [at // pool_size for at in origin], [at % pool_size for at in origin]
        room = [len(origin) // num_ranks] * num_ranks
        trainer = [-1] * len(origin)
        for number, rank in enumerate(owner):
            if room[rank]:
                trainer[number], room[rank] = rank, room[rank] - 1
        free = [rank for rank in range(num_ranks) for _ in range(room[rank])]
        for number, rank in enumerate(trainer):
            if rank < 0:
                trainer[number] = free.pop(0)
        return cls(owner, place, trainer, group)

    def of_rank(self, rank: int) -> list[int]:
        """Numbers of the survivors that a rank trains, in the order chosen."""
        return [number for number, trainer in enumerate(self.trainer) if trainer == rank]

    def exchange(self, batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """This rank's survivors' rows of every entry of the batch, its own and those that other ranks had left over.

        Args:
            batch: this rank's pool; tensors on any device, or lists.
            device: where the back end moves tensors.
        """
        rank, num_ranks = dist.get_global_rank(), dist.get_world_size()
        leaving: list[list[int]] = [[] for _ in range(num_ranks)]
        for number, (owner, trainer) in enumerate(zip(self.owner, self.trainer, strict=True)):
            if owner != trainer:
                leaving[owner].append(number)
        most = max(map(len, leaving), default=0)
        mine = self.of_rank(rank)
        # Place of every travelling survivor in the gathered rows.
        arrived = {number: owner * most + at for owner, sent in enumerate(leaving) for at, number in enumerate(sent)}
        source = [arrived[number] if self.owner[number] != rank else -1 for number in mine]
        own = [self.place[number] if self.owner[number] == rank else 0 for number in mine]
        sent = [self.place[number] for number in leaving[rank]]
        sent += [0] * (most - len(sent))  # all ranks send as many
        taken = {}
        for key, value in batch.items():
            if isinstance(value, Tensor):
                taken[key] = rows_of(value, own, source, sent, device, self.group)
            else:
                travelled = dist.all_gather_object([value[at] for at in sent], group=self.group) if most else []
                flat = [row for rows in travelled for row in rows]
                taken[key] = [value[at] if there < 0 else flat[there] for at, there in zip(own, source, strict=True)]
        return taken

    def in_order(self, rows: Tensor) -> Tensor:
        """All survivors' rows, in the order chosen, from those of the survivors that this rank trains."""
        numbers = [number for rank in range(dist.get_world_size()) for number in self.of_rank(rank)]
        return gathered(rows).index_select(0, brought(torch.tensor(numbers).argsort(), rows.device))


def rows_of(
    value: Tensor, own: list[int], source: list[int], sent: list[int], device: torch.device, group: Group = None
) -> Tensor:
    """Rows of the places `own`, but where `source` is a place in what all ranks `sent`, that one."""

    def index(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=value.device)

    rows = value.index_select(0, index(own))
    if sent:
        arrived = gathered(value.index_select(0, index(sent)).to(device), group).to(value.device)
        foreign = [number for number, there in enumerate(source) if there >= 0]
        rows.index_copy_(0, index(foreign), arrived.index_select(0, index([source[number] for number in foreign])))
    return rows
