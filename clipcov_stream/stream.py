"""MDS shards -> candidate pools: a loader whose batch IS one pool.

Composer resumes a StreamingDataset by the number of samples its clock has counted, and that clock counts what the
loader yields. So the pool is the loader's batch, and selection happens after it (research in mosaicml/streaming #800:
filtering inside the dataset breaks resumption).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader, StreamingDataset
from streaming.base.distributed import get_world_size
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from clipcov_stream.ahead import Ahead
from clipcov_stream.materialize import ImageTransform, Materializer, Tokenizer, UndecodableImage, decode_image
from clipcov_stream.objective import mix
from clipcov_stream.ranges import Ranges, Source, Span, sidecar_of
from clipcov_stream.remote import is_remote, read_remote
from clipcov_stream.sidecar import SPAN_COLUMN, Sidecar

OPEN_ATTEMPTS = 5
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")


@dataclass(frozen=True)
class Columns:
    """Names of the MDS columns that are read; all others are ignored.

    Args:
        image: encoded bytes, or one of Streaming's image encodings.
        caption: str.
        image_embedding, text_embedding: ndarray, read only if selection runs on precomputed embeddings.
        label: int class index, read only by zero-shot evaluation.
        concepts: int or ndarray of ints, the indices of the sample's concepts, read only by `concept_balance`.
    """

    image: str = "image"
    caption: str | None = "caption"
    image_embedding: str | None = None
    text_embedding: str | None = None
    label: str | None = None
    concepts: str | None = None

    def names(self) -> dict[str, str]:
        """Role -> column name of those in use."""
        return {role: name for role, name in vars(self).items() if name is not None}

    def embedding_names(self) -> set[str]:
        """The columns that a sidecar has instead."""
        return {name for name in (self.image_embedding, self.text_embedding) if name is not None}


class PairDataset(StreamingDataset):
    """Image-caption pairs, decoded and tokenized.

    A sample is a dict of `image` (3, s, s) uint8 (`PoolCollate` normalizes a pool's together), `text` (context,) int64,
    `id` its index in the folder, `valid`, and the embedding or label columns asked for. An image that cannot be decoded
    becomes zeros with `valid` False: it is counted and never selected, and one bad file does not end a run.

    If deferred, `image` is still encoded, `text` the caption and `augmentation` the seed of the crop: `Materializer`
    makes of them what would otherwise stand there.

    Args:
        local, remote, split: as Streaming's. At least one of local and remote.
        columns: what to read.
        transform: of images.
        tokenizer: str -> (context,) token ids.
        seed: of augmentation, mixed with the epoch and the sample's id.
        sidecar: a folder or URL that has the embedding columns instead of this one; see `sidecar.Sidecar`.
        scoring_size: beside what is deferred, `scoring_image` (3, r, r) uint8 for an embedder that reads images of r
            pixels: the middle of the image, decoded at a fraction of its size where it is a JPEG. Captions are then
            tokenized, because the embedder reads them, and images that cannot be decoded are not valid.
        deferred: leave images encoded and captions unread, for `ClipCov` to make survivors of them alone. A column of
            Streaming's `pil` encoding, which is not compressed, is read all the same.
        range_reads: iterate the sidecar instead of the folder, and leave in place of images their spans, for the
            loader to fetch survivors' alone; implies `deferred`. See `ranges`.
        identify: add `image_id`, a number that is the same for two samples if their images are the same bytes.
        allow_unsafe_types: let pickled columns (`pkl`) be loaded. They run code from whoever wrote the shard.
        kwargs: Streaming's other arguments (batch_size, shuffle, shuffle_seed, num_canonical_nodes, predownload, ...).

    Raises:
        ValueError: a folder without index.json, without samples, or without a column that is asked for; a sidecar of
            another folder; a folder that cannot be read by ranges.
    """

    def __init__(
        self,
        *,
        local: str | None,
        remote: str | None = None,
        split: str | None = None,
        columns: Columns,
        transform: ImageTransform,
        tokenizer: Tokenizer | None,
        seed: int = 0,
        sidecar: str | None = None,
        deferred: bool = False,
        scoring_size: int | None = None,
        range_reads: bool = False,
        identify: bool = False,
        allow_unsafe_types: bool = False,
        **kwargs: Any,
    ) -> None:
        index = folder_index(local, remote, split, kwargs.get("download_timeout", 60))
        where: dict[str, Any] = {"local": local, "remote": remote, "split": split}
        self.source = None
        if range_reads:
            self.source = Source.of(index, local, remote, split, columns.image)
            where = sidecar_of(self.source, sidecar, local, columns.image)
            if where["remote"] is None:
                kwargs.pop("cache_limit", None)  # Streaming would evict the sidecar itself
        open_ = partial(super().__init__, **where, allow_unsafe_types=allow_unsafe_types, **kwargs)
        try:
            opened(open_)
        except RuntimeError as error:
            if "contains no samples" not in str(error):
                raise
            raise ValueError(f"stream {remote or local!r} is an MDS folder without samples") from error
        self.columns = columns
        self.transform = transform
        self.crop = transform.crop()
        self.tokenizer = tokenizer
        self.seed = seed
        self.sidecar = None
        if sidecar is not None and not range_reads:
            folder = Path(self.streams[0].local)
            self.sidecar = Sidecar(sidecar, folder)
            self.sidecar.check_source(index)
        self.deferred = deferred or range_reads
        self.identify = identify
        self.scoring_size = scoring_size
        self.scoring_crop = None if scoring_size is None else transform.small(scoring_size).crop()
        self._check_columns(remote or local or "")

    def _check_columns(self, where: str) -> None:
        shard = self.shards[0]
        present = dict(zip(shard.column_names, shard.column_encodings, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
        if self.sidecar is not None:
            beside = self.sidecar.columns
            present |= {name: kind for name, kind in beside.items() if name in self.columns.embedding_names()}
        if self.source is not None:
            present[self.columns.image] = self.source.encoding
        for role, name in self.columns.names().items():
            if name not in present:
                raise ValueError(
                    f"stream {where!r} has no column {name!r} (stream.columns.{role}); it has {sorted(present)}"
                )
        for shard in self.shards:
            # Streaming decodes these two inside its reader, where one bad file would be an error of the whole epoch.
            encodings = ["bytes" if e in ("jpeg", "png") else e for e in shard.column_encodings]  # pyright: ignore
            shard.column_encodings = encodings  # pyright: ignore[reportAttributeAccessIssue]
        encoding = present[self.columns.image]
        if encoding not in IMAGE_ENCODINGS:
            raise ValueError(
                f"column {self.columns.image!r} of {where!r} is encoded as {encoding!r}; an image column is one of "
                f"{', '.join(IMAGE_ENCODINGS)}"
            )
        for role, kind in (("caption", "str"), ("image_embedding", "ndarray"), ("text_embedding", "ndarray")):
            name = getattr(self.columns, role)
            if name is not None and not present[name].startswith(kind):
                raise ValueError(
                    f"column {name!r} of {where!r} (stream.columns.{role}) is encoded as {present[name]!r}; it must be "
                    f"{kind!r}"
                )

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        sample = super().get_item(sample_id, retry)
        columns = self.columns
        item: dict[str, Any] = {"id": int(sample_id), "valid": True}
        seed = mix(self.seed, self.next_epoch, int(sample_id))
        tokenizer, caption = self.tokenizer, None if columns.caption is None else sample[columns.caption]
        if self.deferred:
            image = sample[columns.image] if self.source is None else Span(*sample[SPAN_COLUMN].tolist())
            item |= {"image": image, "augmentation": seed}
            if tokenizer is not None and caption is not None:
                item["text"] = caption if self.scoring_crop is None else tokenizer(caption)
            if self.scoring_crop is not None and self.scoring_size is not None:
                try:
                    item["scoring_image"] = self.scoring_crop(decode_image(image, self.scoring_size))
                except UndecodableImage:
                    item["scoring_image"] = torch.zeros(3, *2 * [self.scoring_size], dtype=torch.uint8)
                    item["valid"] = False
        else:
            try:
                image = decode_image(sample[columns.image])
                item["image"] = self.transform.augmented(image, seed) if self.transform.augments else self.crop(image)
            except UndecodableImage:
                item["image"] = torch.zeros(3, self.transform.size, self.transform.size, dtype=torch.uint8)
                item["valid"] = False
            if tokenizer is not None and caption is not None:
                item["text"] = tokenizer(caption)
        if self.identify:
            item["image_id"] = content_id(sample[columns.image])
        embedded = self.sidecar[int(sample_id)] if self.sidecar is not None and columns.embedding_names() else sample
        for role in ("image_embedding", "text_embedding"):
            name = getattr(columns, role)
            if name is not None:
                # MDS arrays are read-only views; torch wants to own what it may write to.
                rows = np.array(embedded[name])
                item[role] = torch.from_numpy(rows if rows.dtype.kind == "f" else rows.astype(np.float32))
        if columns.concepts is not None:
            item["concepts"] = torch.from_numpy(np.array(sample[columns.concepts], dtype=np.int64).reshape(-1))
        if columns.label is not None:
            item["label"] = int(sample[columns.label])
        return item


def content_id(image: Any) -> int:
    """63 bits of the hash of an image's bytes, or of its pixels if it is decoded already."""
    data = image if isinstance(image, bytes) else f"{image.mode}{image.size}".encode() + image.tobytes()
    return int.from_bytes(hashlib.sha1(data).digest()[:8], "big") >> 1


def opened(open_: Callable[[], None]) -> None:
    """Open a StreamingDataset, again if another process has just taken the name of its shared memory.

    Streaming looks for a number that no process uses and then takes it, so two that start at once may want the same.
    Ranks agree on a number together, and one of them alone must not try again.
    """
    for attempt in range(OPEN_ATTEMPTS):
        try:
            return open_()
        except FileExistsError:
            if get_world_size() > 1 or attempt == OPEN_ATTEMPTS - 1:
                raise
            time.sleep(0.05 * (1 + os.getpid() % 7))


def folder_index(local: str | None, remote: str | None, split: str | None, timeout: float = 60) -> bytes:
    """A folder's index.json.

    A remote folder is asked for it on every rank, so that all say what is wrong and none waits for another; but not
    where `local` has it already, because Streaming then works from that.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if not local and not remote:
        raise ValueError("stream: neither local nor remote is set; stream.local names an MDS folder")
    key = "remote" if remote else "local"
    folder = os.path.join(remote or local or "", split or "").rstrip("/")
    index = f"{folder}/index.json"
    copy = os.path.join(local or "", split or "", "index.json")
    is_here = not is_remote(remote) or bool(local and os.path.isfile(copy))
    try:
        if is_here:
            return Path(copy if is_remote(remote) else index).read_bytes()
        return read_remote(index, timeout)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(
            f"stream.{key} {folder!r} has no index.json (checked {index}); is it an MDS folder? tools/make_mds.py "
            "writes one"
        ) from error
    except OSError as error:
        raise ValueError(f"stream.{key} {folder!r}: cannot read {index}: {error}") from error


class PoolCollate:
    """Stacks samples into a pool and normalizes its images; those that could not be decoded stay zeros.

    What is still encoded, and captions, become lists.
    """

    def __init__(self, transform: ImageTransform) -> None:
        self.normalize = transform.normalize()

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        pool = {key: stacked([s[key] for s in samples]) for key in samples[0] if key != "concepts"}
        if "concepts" in samples[0]:
            pool["concepts"] = pad_sequence([s["concepts"] for s in samples], batch_first=True, padding_value=-1)
        valid = pool["valid"]
        for key in ("image", "scoring_image"):
            image = pool.get(key)
            if isinstance(image, Tensor) and isinstance(valid, Tensor):
                pool[key] = self.normalize(image) * valid[:, None, None, None]
        return pool


def stacked(values: list[Any]) -> Tensor | list[Any]:
    """One tensor of tensors or numbers; anything else stays a list."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values) if isinstance(values[0], (bool, int)) else values


class PoolLoader(StreamingDataLoader):
    """A StreamingDataLoader whose batch is one pool.

    Args:
        materialize: makes tensors of a deferred pool's rows; None if the pool is made of tensors already.

    Attributes:
        run_ahead: set by `ClipCov`. An epoch's pools, and how many of them were yielded -> what is yielded in place of
            the others, which a thread gets ready; None if it may not begin yet.
    """

    run_ahead: Callable[[Iterator[Any], int], Ahead[Any, Any, Any] | None] | None = None

    def __init__(self, *args: Any, materialize: Materializer | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.materialize = materialize
        # Weak: once the consumer has dropped it, its thread ends.
        self._ahead: Callable[[], Ahead[Any, Any, Any] | None] = lambda: None

    def __iter__(self) -> Iterator[Any]:
        self._end_ahead()
        if self.run_ahead is None:
            return super().__iter__()
        # Here, not in the thread: this may fork the workers.
        return self._running_ahead(DataLoader.__iter__(self), self.run_ahead)

    def _running_ahead(
        self, pools: Iterator[Any], run_ahead: Callable[[Iterator[Any], int], Ahead[Any, Any, Any] | None]
    ) -> Iterator[Any]:
        """Pools until `run_ahead` may begin, and then what it makes of them; counted as StreamingDataLoader does."""
        self.num_samples_yielded = 0
        num_yielded = 0
        while (ahead := run_ahead(pools, num_yielded)) is None:
            batch = next(pools, None)
            if batch is None:
                return
            self.num_samples_yielded += self._get_batch_size(batch)
            yield batch
            num_yielded += 1
        self._ahead = weakref.ref(ahead)
        for batch in ahead:
            self.num_samples_yielded += self._get_batch_size(batch)
            yield batch

    def _end_ahead(self) -> None:
        ahead = self._ahead()
        if ahead is not None:
            ahead.close()

    def close(self) -> None:
        """End the threads that work for this loader; iterated again, it yields pools."""
        self._end_ahead()
        self.run_ahead = None
        if self.materialize is not None:
            self.materialize.close()


def pool_loader(
    dataset: PairDataset,
    pool_size: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    drop_last: bool = True,
    timeout: float = 0,
    decode_threads: int | None = None,
    range_cache: int | str | None = None,
) -> PoolLoader:
    """Batches of `pool_size` samples of this rank.

    Args:
        pool_size: must be the dataset's batch_size, or shards are assigned for other batches than are read.
        timeout: seconds after which a stuck worker is an error; 0 waits for ever.
        decode_threads: that decode a deferred pool's survivors; None is the number of CPUs, at most 8.
        range_cache: bytes of images read by ranges that are kept on this machine's disk, a number or "20gb"; None keeps
            none.

    Raises:
        ValueError: a pool size that differs from the dataset's, or fewer samples than one pool per rank; a cache of
            what is not fetched.
    """
    if dataset.batch_size != pool_size:
        raise ValueError(f"pool_size={pool_size} differs from the dataset's batch_size={dataset.batch_size}")
    if drop_last and len(dataset) < pool_size:
        raise ValueError(
            f"the stream has {len(dataset)} samples per rank, one pool needs {pool_size}; lower stream.global_pool_size"
        )
    workers: dict[str, Any] = {}
    if num_workers > 0:
        workers = {"prefetch_factor": prefetch_factor, "persistent_workers": True, "timeout": timeout}
    transform, tokenizer, source = dataset.transform, dataset.tokenizer, dataset.source
    if range_cache is not None and source is None:
        raise ValueError(f"stream.range_cache={range_cache!r} needs stream.range_reads=true")
    ranges = None
    if source is not None:
        ranges = Ranges(source, timeout=dataset.streams[0].download_timeout, cache=source.cache(range_cache))
    return PoolLoader(
        dataset,
        materialize=Materializer(transform, tokenizer, decode_threads, ranges) if dataset.deferred else None,
        batch_size=pool_size,
        num_workers=num_workers,
        collate_fn=PoolCollate(transform),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )


def read_json_beside(local: str | None, remote: str | None, split: str | None, name: str) -> Any:
    """A JSON file that lies in an MDS folder, local or remote.

    Raises:
        ValueError: no such file (its cause is then a FileNotFoundError), one that cannot be read, or not JSON.
    """
    folder = os.path.join(remote or local or "", split or "")
    where = f"{folder.rstrip('/')}/{name}"
    try:
        return json.loads(read_remote(where) if is_remote(remote) else Path(where).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {where}: {error}") from error
