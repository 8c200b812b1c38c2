"""The loader's batch, which is a pool: how many of it survive, what it must look like, and its survivors' rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SubsetRandomSampler

from clipcov_stream.arguments import real_number
from clipcov_stream.fused import brought
from clipcov_stream.pool import flags, whole_numbers

NOT_TRAINED_ON = ("valid", "id", "concepts", "scoring_image", "image_embedding", "text_embedding", "thumbnail")
"""Keys of a pool that the model does not need; Composer copies every microbatch, so they are dropped."""


def checked_ratio(name: str, value: float) -> float:
    """A share of a pool. Raises ValueError for what is none."""
    return real_number(f"selection.{name}", value, "in [0, 1)", lambda ratio: 0 <= ratio < 1)


def count_survivors(pool_size: int, filter_ratio: float) -> int:
    """pool_size * (1 - filter_ratio), checked; see `ClipCov.num_survivors`."""
    filter_ratio = checked_ratio("filter_ratio", filter_ratio)
    exact = pool_size * (1 - filter_ratio)
    count = round(exact)
    if abs(exact - count) > 1e-6 * pool_size:
        raise ValueError(
            f"selection: pool_size={pool_size} * (1 - filter_ratio={filter_ratio}) = {exact:.1f} survivors; it must be "
            f"a whole number{whole_nearby(pool_size, filter_ratio)}"
        )
    if count < 2:
        raise ValueError(
            f"selection: pool_size={pool_size} * (1 - filter_ratio={filter_ratio}) = {count} survivors per rank; a "
            "contrastive loss needs at least 2"
        )
    return count


def whole_nearby(pool_size: int, filter_ratio: float) -> str:
    """The next smaller and larger pools with whole survivors, as the end of a message; empty if there is none near."""
    kept = 1 - filter_ratio
    found = []
    for way in (-1, 1):
        sizes = (pool_size + way * by for by in range(1, 1000) if (pool_size + way * by) * kept >= 2 - 1e-6)
        whole = (size for size in sizes if abs(size * kept - round(size * kept)) <= 1e-6 * size)
        found += [str(size) for size in itertools.islice(whole, 1)]
    return f", as of a pool of {' or '.join(found)} per rank" if found else ""


def check_last_pool(loader: Any, filter_ratio: float, num_pools: int) -> None:
    """Raise ValueError if training comes to an epoch's last pool, and that is a shorter one without whole survivors.

    Args:
        num_pools: of an epoch that training comes to.

    So it can be with torch's DataLoader over a data set with a length, without drop_last; of others nobody knows.
    """
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler or batches.drop_last:
        return
    try:
        num_samples, per_epoch = len(batches.sampler), len(batches)  # pyright: ignore[reportArgumentType]
    except Exception:  # an IterableDataset's has none, and a stranger's may raise anything
        return
    if (last := num_samples % batches.batch_size) and num_pools >= per_epoch:
        try:
            count_survivors(last, filter_ratio)
        except ValueError as error:
            raise ValueError(
                f"an epoch of {num_samples} samples ends in a pool of {last}: {error}. Make the DataLoader with "
                "drop_last=True"
            ) from error


def check_batch(batch: Any, image_key: str) -> dict[str, Any]:
    """The batch, if it is a dict whose entries all have one row per candidate; `valid` as bools, `id` as a tensor where
    it is of numbers.

    Raises:
        ValueError: anything else; Composer would train on misaligned rows in silence.
    """
    if not isinstance(batch, Mapping) or image_key not in batch:
        found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(f"ClipCov reads a dict with the key {image_key!r} (image_key); the batch is {found}")
    single = [key for key, value in batch.items() if not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0]
    if single:
        raise ValueError(f"entries {single} of the batch have no rows; ClipCov needs one row per candidate in each")
    sizes = {key: len(value) for key, value in batch.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"entries of the batch differ in length: {sizes}")
    known: dict[str, Any] = {"id": ids_in(batch)} if "id" in batch else {}
    if "valid" in batch:
        known["valid"] = valid = flags("the batch's 'valid'", batch["valid"])
        if valid.ndim != 1:
            raise ValueError(f"the batch's 'valid' has shape {tuple(valid.shape)}, the pool has {len(valid)} samples")
    return {**batch, **known}


def ids_in(batch: Any) -> Any:
    """A batch's `id`, as a tensor if these are whole numbers, of a list or an array too; None if it has none."""
    ids = batch.get("id") if isinstance(batch, Mapping) else None
    try:
        return None if ids is None else whole_numbers("id", ids)
    except ValueError:  # names, say, which are a user's own
        return ids


def trained_on(batch: Mapping[str, Any], *read: str) -> dict[str, Any]:
    """The entries that a model may train on; those that it is known to `read` whatever they are called."""
    return {key: value for key, value in batch.items() if key in read or key not in NOT_TRAINED_ON}


def inputs_of(batch: Mapping[str, Any], image_key: str, text_key: str) -> tuple[Tensor, Tensor]:
    """Images and captions of survivors that the model in training embeds once more, for their lag.

    Raises:
        ValueError: an entry that is missing, or not a tensor.
    """
    for name, key in (("image_key", image_key), ("text_key", text_key)):
        if not isinstance(batch.get(key), Tensor):
            found = type(batch[key]).__name__ if key in batch else f"in a batch of {sorted(batch)}"
            raise ValueError(
                "the model's outputs have no image_features and text_features, so that learnability above 0 "
                f"(selection.learnability) embeds survivors once more: it reads {key!r} ({name}) as a tensor, not "
                f"{found}. Set {name} to the model's own input, or selection.learnability=0"
            )
    return batch[image_key], batch[text_key]


def rows_of(value: Any, survivors: Tensor) -> Any:
    """The survivors' rows of a tensor or a list."""
    if isinstance(value, Tensor):
        return value.index_select(0, brought(survivors, value.device))
    return [value[i] for i in survivors.tolist()]


Normalize = Callable[[Tensor], Tensor]
"""(n, 3, s, s) uint8 images -> what a model reads."""


def normalizing(loader: Any, image: Any) -> Normalize | None:
    """What a pool's images still need; None for nothing, as of any loader but a `stream.PoolLoader`.

    Raises:
        ValueError: a PoolLoader left them as bytes, and something has made numbers of them: whether these are
            normalized nobody knows.
    """
    if not hasattr(loader, "leaves_bytes") or not isinstance(image, Tensor):
        return None
    if image.dtype == torch.uint8:
        return loader.normalize
    if loader.leaves_bytes:
        raise ValueError(
            f"the pool's images came to ClipCov as {image.dtype}, though the loader leaves them as uint8 and ClipCov "
            "normalizes them: a batch transform or an algorithm before it has changed them. Let that run after it, or "
            "have the loader normalize: pool_loader(..., as_bytes=False)"
        )
    return None


def size_of(loader: Any) -> int:
    """Samples of a loader's data set, which their ids number from 0; 0 if it does not say.

    What is read in order says so as `num_samples`, as a StreamingDataset does: its length is one rank's, of one epoch,
    or a number of batches. So is that of a data set whose items are pools, which a loader does not put together.
    """
    dataset = getattr(loader, "dataset", None)
    try:
        of_all = getattr(dataset, "num_samples", None)
        if isinstance(of_all, Integral) and of_all:
            return int(of_all)
        if isinstance(dataset, IterableDataset) or (isinstance(loader, DataLoader) and loader.batch_sampler is None):
            return 0
        return len(dataset)  # pyright: ignore[reportArgumentType]
    except Exception:  # whatever a stranger's __len__ raises, it does not say
        return 0


def num_drawn(loader: Any) -> int:
    """Samples of a loader's data set that its sampler draws, every epoch the same; 0 if that is not said, or all."""
    sampler = getattr(loader, "sampler", None)
    return len(sampler) if isinstance(sampler, SubsetRandomSampler) else 0
