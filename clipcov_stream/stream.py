"""MDS shards -> candidate pools: a loader whose batch IS one pool.

Composer resumes a StreamingDataset by the number of samples its clock has counted, and that clock counts what the
loader yields. So the pool is the loader's batch, and selection happens after it (research in mosaicml/streaming #800:
filtering inside the dataset breaks resumption).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from streaming import StreamingDataLoader
from streaming.base.distributed import get_world_size
from streaming.base.format.mds.encodings import is_mds_encoding_safe, mds_decode
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from clipcov_stream.ahead import Ahead
from clipcov_stream.batch import Normalize
from clipcov_stream.captions import caption_of
from clipcov_stream.checked import BadShard, CheckedStream
from clipcov_stream.decode import MAX_PIXELS, MOST_PIXELS, UndecodableImage, decode_image, raw_image
from clipcov_stream.guard import GuardedDataset, check_least, complete, named
from clipcov_stream.identity import check_same_data
from clipcov_stream.materialize import ImageTransform, Materializer, Tokenizer
from clipcov_stream.mds_index import checked_index, pickled_columns, read_index
from clipcov_stream.objective import mix
from clipcov_stream.ranges import Ranges, Source, Span, sidecar_of
from clipcov_stream.reader import bounded
from clipcov_stream.redact import check_url, redacted
from clipcov_stream.remote import is_remote, read_agreed, read_remote
from clipcov_stream.shared_memory import agreeing, await_dying, clean_dead, opening, turn
from clipcov_stream.sidecar import SPAN_COLUMN, Sidecar
from clipcov_stream.workers import begin_worker, held_signals

STUCK = 2
"""Timeouts of the data set after which a worker counts as stuck that has said nothing."""
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


HOW_TO_GET = {
    "image_embedding": "; tools/embed_mds.py writes a folder, or a sidecar, that has it",
    "text_embedding": "; tools/embed_mds.py writes a folder, or a sidecar, that has it",
    "label": "; where it is evaluated as pairs, which have no classes, ask for tasks=[retrieval]",
}
"""What to do about a column that is missing, by its role."""


class PairDataset(GuardedDataset):
    """Image-caption pairs, decoded and tokenized.

    A sample is a dict of `image` (3, s, s) uint8, normalized later, many at a time; `text` (context,) int64; `id` its
    index in the folder, `valid`, and the embedding or label columns asked for. An image that cannot be decoded becomes
    zeros with `valid` False: it is counted and never selected, and one bad file does not end a run.

    If deferred, `image` is still encoded, `text` the caption and `augmentation` the seed of the crop: `Materializer`
    makes of them what would otherwise stand there.

    Args:
        local, remote, split: as Streaming's. `local` is the folder itself or, with `remote`, where its shards are kept;
            only `range_reads` does without, and then keeps its sidecar in the folder for temporary files.
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
        allow_pickle: names of pickled columns (`pkl`) that the folder may have. One that is read runs code of whoever
            wrote the shard; all others stay bytes. None is any column that is not read.
        max_pixels: an image of more counts as undecodable.
        timeout, on_bad_shard, max_bad_shards: as GuardedDataset's. A skipped sample is blank and not valid.
        section: of the recipe, by which errors name its columns and its loader's numbers.
        kwargs: Streaming's other arguments (batch_size, shuffle, shuffle_seed, num_canonical_nodes, predownload, ...).

    Attributes:
        selected: set by `ClipCov` when it trains on survivors of this; kept in checkpoints, so that a run resumed
            without it stops.

    Raises:
        ValueError: a remote folder without a local one; a folder without index.json, without samples, or without a
            column that is asked for; a sidecar of another folder; a folder that cannot be read by ranges.
    """

    selected, was_selected = False, False

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
        allow_pickle: Collection[str] | None = (),
        max_pixels: int = MAX_PIXELS,
        timeout: float = 600,
        on_bad_shard: str = "raise",
        max_bad_shards: int = 10,
        section: str = "stream",
        **kwargs: Any,
    ) -> None:
        if not 1 <= max_pixels <= MOST_PIXELS:
            raise ValueError(f"stream.max_pixels={max_pixels} must be from 1 to {MOST_PIXELS}")
        if remote and not local and not range_reads:
            # Streaming would make a folder for temporary files, and refuse to find it there the next time.
            raise ValueError(redacted(f"stream.remote={remote!r} needs stream.local, the folder where shards are kept"))
        index = folder_index(local, remote, split, kwargs.get("download_timeout", 60))
        cache = Path(local, split or "") if local and remote else None
        pickled = pickled_columns(checked_index(index, repr(remote or local), allow_pickle, cache))
        where: dict[str, Any] = {"local": local, "remote": remote, "split": split, "index": index}
        self.source, self.allow_pickle = None, allow_pickle
        if range_reads:
            self.source = Source.of(index, local, remote, split, columns.image, allow_pickle)
            where = sidecar_of(self.source, sidecar, local, columns.image)
            if where["remote"] is None:
                kwargs.pop("cache_limit", None)  # Streaming would evict the sidecar itself
        guards: dict[str, Any] = {"timeout": timeout, "on_bad_shard": on_bad_shard, "max_bad_shards": max_bad_shards}
        guards["allow_unsafe_types"] = bool(pickled) and not range_reads
        open_ = super().__init__
        await_dying()
        try:
            with turn():
                clean_dead()  # before this process says that it opens the folder: what died opening it would be let be
                with opening(where.get("local"), where.get("split")), agreeing():
                    open_(CheckedStream(**where, timeout=timeout), **guards, **kwargs)
        except RuntimeError as error:
            if "contains no samples" not in str(error):
                raise
            raise ValueError(f"stream {remote or local!r} is an MDS folder without samples") from error
        for stream in self.streams:
            # What Streaming has read, should a store have told it another index than us. Nothing was fetched by it yet.
            read = Path(stream.local, stream.split or "", "index.json").read_bytes()
            if read != where["index"]:
                checked_index(read, repr(stream.local), allow_pickle, Path(stream.local, stream.split or ""))
        self.columns, self.section = columns, section
        self.transform = transform
        self.max_pixels = max_pixels
        self.crop = transform.crop()
        self.tokenizer = tokenizer
        self.seed = seed
        self.sidecar = None
        if sidecar is not None and not range_reads:
            folder = Path(self.stream.local)
            self.sidecar = Sidecar(sidecar, folder)
            self.sidecar.check_source(index)
        self.deferred = deferred or range_reads
        self.identify = identify
        self.scoring_size = scoring_size
        self.scoring_crop = None if scoring_size is None else transform.small(scoring_size).crop()
        self._blank: dict[str, Any] | None = None
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
                    f"stream {where!r} has no column {name!r} ({self.section}.columns.{role}); it has {sorted(present)}"
                    + HOW_TO_GET.get(role, "")
                )
        encoding = self.image_encoding = present[self.columns.image]
        if encoding not in IMAGE_ENCODINGS:
            raise ValueError(
                f"column {self.columns.image!r} of {where!r} ({self.section}.columns.image) is encoded as "
                f"{encoding!r}; an image column is one of {', '.join(IMAGE_ENCODINGS)}"
            )
        for role, kind in (("caption", "str"), ("image_embedding", "ndarray"), ("text_embedding", "ndarray")):
            name = getattr(self.columns, role)
            if name is not None and present[name].partition(":")[0] != kind:
                raise ValueError(
                    f"column {name!r} of {where!r} ({self.section}.columns.{role}) is encoded as {present[name]!r}; it "
                    f"must be {kind!r}"
                )
        label = self.columns.label
        if label is not None and present[label] in ("str", *IMAGE_ENCODINGS):
            raise ValueError(
                f"column {label!r} of {where!r} ({self.section}.columns.label) is encoded as {present[label]!r}; it "
                "must be 'int', the index of a class"
            )
        self._leave_encoded(where)

    def _leave_encoded(self, where: str) -> None:
        """Have Streaming hand out as bytes what it need not decode: inside its reader a bad file or a caption that is
        not UTF-8 would be an error of the whole epoch, and a pickled column that nobody asked for would run its code.

        Raises:
            ValueError: a shard whose columns are not the first one's; a pickled column that would be read, where none
                is allowed by name.
        """
        first: Any = self.shards[0]
        names, kinds = list(first.column_names), list(first.column_encodings)
        read = {getattr(self.columns, role) for role in ("image_embedding", "text_embedding", "label", "concepts")}
        read.add(SPAN_COLUMN)
        for name, kind in zip(names, kinds, strict=True):
            if self.allow_pickle is None and name in read and not is_mds_encoding_safe(kind):
                raise ValueError(
                    f"column {name!r} of {where!r} is pickled ({kind}): to load it runs code of whoever wrote the "
                    "folder, so none that is read may be; write it in another encoding (a label as int)"
                )
        encodings = [kind if name in read else "bytes" for name, kind in zip(names, kinds, strict=True)]
        shards: list[Any] = self.shards
        for number, shard in enumerate(shards):
            if (shard.column_names, shard.column_encodings) != (names, kinds):
                raise ValueError(
                    f"shard {number} of {where!r} has the columns "
                    f"{dict(zip(shard.column_names, shard.column_encodings, strict=True))}, the first one has "
                    f"{dict(zip(names, kinds, strict=True))}; one folder needs one set of columns"
                )
        for shard in map(bounded, shards):
            shard.column_encodings = encodings
        self.left_encoded = {name: kind for name, kind in zip(names, kinds, strict=True) if name not in read}

    def readable(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """A sample as it is stored, its texts and whole numbers decoded; images and pickles are left as bytes."""
        found = dict(sample)
        for name, kind in self.left_encoded.items():
            if kind == "str":
                found[name] = caption_of(found[name])
            elif re.fullmatch(r"u?int\d*", kind):
                found[name] = mds_decode(kind, found[name])
        return found

    def encoded_image(self, sample: dict[str, Any]) -> Any:
        """A sample's image as `decode_image` takes it; no bytes for raw pixels that are none."""
        data = sample[self.columns.image]
        if self.image_encoding != "pil":
            return data
        try:
            return raw_image(data, self.max_pixels)
        except UndecodableImage:
            return b""

    def _data(self) -> dict[str, Any]:
        names, roles = self.columns.names(), ("image", "caption", "image_embedding", "text_embedding")
        order = {"num_samples": self.num_samples, "shuffle": self.shuffle, "shuffle_algo": self.shuffle_algo}
        return {"columns": {role: names.get(role) for role in roles}, "order": order}

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        return {**super().state_dict(num_samples, from_beginning), **self._data(), "selected": self.selected}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        check_same_data(obj, self._data())
        self.was_selected = bool(obj.get("selected"))
        super().load_state_dict(obj)

    def check_selected(self) -> None:
        """Raise RuntimeError if the checkpoint's run selected, and this one does not."""
        if self.was_selected and not self.selected:
            raise RuntimeError(
                "the checkpoint's run trained on survivors, but ClipCov is not among the Trainer's algorithms: whole "
                "pools would be trained on. Add it; or take the weights alone, load_path=... and load_weights_only=true"
            )

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, Any]:
        sample = super().get_item(sample_id, retry)
        return self._skipped(sample_id) if sample is None else self._item(sample_id, sample)

    def _skipped(self, sample_id: int) -> dict[str, Any]:
        """What stands for a sample of a shard that is skipped: of the same form as any other, and not valid."""
        if self._blank is None:
            for first in self.sample_offset_per_shard.tolist():
                self.prepare_shard(int(self.spanner[first][0]))
                sample = super().get_item(first)
                if sample is not None:
                    self._blank = {key: blank(value) for key, value in self._item(first, sample).items()}
                    break
            else:
                raise BadShard(f"no shard of {self.stream.where} can be used; the log above says why of each")
        return {**self._blank, "id": int(sample_id), "valid": False}

    def _item(self, sample_id: int, sample: dict[str, Any]) -> dict[str, Any]:
        columns = self.columns
        item: dict[str, Any] = {"id": int(sample_id), "valid": True}
        seed = mix(self.seed, self.next_epoch, int(sample_id))
        tokenizer, caption = self.tokenizer, None if columns.caption is None else caption_of(sample[columns.caption])
        if self.deferred:
            image = self.encoded_image(sample) if self.source is None else Span(*sample[SPAN_COLUMN].tolist())
            item |= {"image": image, "augmentation": seed}
            if tokenizer is not None and caption is not None:
                item["text"] = caption if self.scoring_crop is None else tokenizer(caption)
            if self.scoring_crop is not None and self.scoring_size is not None:
                try:
                    item["scoring_image"] = self.scoring_crop(decode_image(image, self.scoring_size, self.max_pixels))
                except UndecodableImage:
                    item["scoring_image"] = torch.zeros(3, *2 * [self.scoring_size], dtype=torch.uint8)
                    item["valid"] = False
        else:
            try:
                image = decode_image(self.encoded_image(sample), max_pixels=self.max_pixels)
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


def blank(value: Any) -> Any:
    """A value of the same form with nothing in it; encoded images become bytes that no image comes out of."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if isinstance(value, Span):
        return Span(0, 0, 0)
    return value if isinstance(value, int) else "" if isinstance(value, str) else b""


def content_id(image: bytes) -> int:
    """63 bits of the hash of an image's bytes."""
    return int.from_bytes(hashlib.sha1(image).digest()[:8], "big") >> 1


def folder_index(local: str | None, remote: str | None, split: str | None, timeout: float = 60) -> bytes:
    """A folder's index.json.

    A remote folder is asked for it on every rank, so that all say what is wrong and none waits for another; but not
    where `local` has it already, because Streaming then works from that.

    Raises:
        ValueError: there is none, or it cannot be read; a URL with credentials in it.
    """
    if not local and not remote:
        raise ValueError("stream: neither local nor remote is set; stream.local names an MDS folder")
    key = "remote" if remote else "local"
    check_url(remote, "stream.remote")
    folder = os.path.join(remote or local or "", split or "").rstrip("/")
    index = f"{folder}/index.json"
    copy = os.path.join(local or "", split or "", "index.json")
    is_here = not is_remote(remote) or bool(local and os.path.isfile(copy))
    try:
        if is_here:
            return read_index(Path(copy if is_remote(remote) else index))
        return read_agreed(index, timeout)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(
            f"stream.{key} {folder!r} has no index.json (checked {index}); is it an MDS folder? tools/make_mds.py "
            "writes one"
        ) from error
    except OSError as error:
        raise ValueError(redacted(f"stream.{key} {folder!r}: cannot read {index}: {error}")) from error


class PoolCollate:
    """Stacks samples into a pool and normalizes its images (`with_normalized`); what is still encoded, and captions,
    become lists.

    Attributes:
        normalizes: if not, images stay uint8.
    """

    def __init__(self, transform: ImageTransform) -> None:
        self.normalize, self.normalizes = transform.normalize(), True

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        pool = {key: stacked([s[key] for s in samples]) for key in samples[0] if key != "concepts"}
        if "concepts" in samples[0]:
            pool["concepts"] = pad_sequence([s["concepts"] for s in samples], batch_first=True, padding_value=-1)
        return with_normalized(pool, self.normalize) if self.normalizes else pool


def with_normalized(pool: Mapping[str, Any], normalize: Normalize) -> dict[str, Any]:
    """The pool, its images normalized where they are not yet; those that could not be decoded stay zeros."""
    valid = pool["valid"][:, None, None, None]
    images = {key: pool.get(key) for key in ("image", "scoring_image")}
    raw = {key: image for key, image in images.items() if isinstance(image, Tensor) and image.dtype == torch.uint8}
    return {**pool, **{key: normalize(image) * valid for key, image in raw.items()}}


def stacked(values: list[Any]) -> Tensor | list[Any]:
    """One tensor of tensors or numbers; anything else stays a list."""
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values) if isinstance(values[0], (bool, int)) else values


class PoolLoader(StreamingDataLoader):
    """A StreamingDataLoader whose batch is one pool.

    Args:
        collate_fn: a `PoolCollate`.
        materialize: makes tensors of a deferred pool's rows; None if the pool is made of tensors already.

    Attributes:
        normalizes: whether pools come with their images normalized. `ClipCov` sets it to False while it trains and does
            so itself, for a chunk at a time and for survivors, on the device: uint8 is a quarter as much between
            processes.
        as_bytes: whether `ClipCov` may.
        run_ahead: set by `ClipCov`. An epoch's pools, and how many of them were yielded -> what is yielded in place of
            the others, which a thread gets ready; None if it may not begin yet.
    """

    run_ahead: Callable[[Iterator[Any], int], Ahead[Any, Any, Any] | None] | None = None

    def __init__(
        self,
        *args: Any,
        collate_fn: PoolCollate,
        materialize: Materializer | None = None,
        as_bytes: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, collate_fn=collate_fn, **kwargs)
        self._collate = collate_fn
        self.normalizes, self.as_bytes = True, as_bytes
        self.materialize = materialize
        # Weak: once the consumer has dropped it, its thread ends.
        self._ahead: Callable[[], Ahead[Any, Any, Any] | None] = lambda: None

    @property
    def normalize(self) -> Normalize:
        return self._collate.normalize

    @property
    def leaves_bytes(self) -> bool:
        """Whether images that are decoded come as uint8."""
        return not (self.normalizes or self._collate.normalizes)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.dataset, PairDataset):
            self.dataset.check_selected()
        if not (self.persistent_workers and self._iterator is not None):  # else workers go on as they began
            self._collate.normalizes = self.normalizes
        self._end_ahead()
        dataset: Any = self.dataset
        promise = dataset.promise(len(self))  # before workers move on to the next epoch
        # Here, not in a generator or a thread: this may fork the workers.
        pools = self._running_ahead(DataLoader.__iter__(self), self.run_ahead)
        return named(complete(pools, promise, dataset.stream.where), dataset)

    def _get_iterator(self) -> Any:
        # No longer than this: an epoch that goes on with its workers may wait for them.
        with held_signals():
            return super()._get_iterator()

    def _running_ahead(
        self, pools: Iterator[Any], run_ahead: Callable[[Iterator[Any], int], Ahead[Any, Any, Any] | None] | None
    ) -> Iterator[Any]:
        """Pools until `run_ahead` may begin, and then what it makes of them; counted as StreamingDataLoader does."""
        self.num_samples_yielded = 0
        num_yielded = 0
        while run_ahead is None or (ahead := run_ahead(pools, num_yielded)) is None:
            batch = next(pools, None)
            if batch is None:
                return
            self.num_samples_yielded += self._get_batch_size(batch)
            yield with_normalized(batch, self.normalize) if self.normalizes else batch
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
        self.run_ahead, self.normalizes = None, True
        if self.materialize is not None:
            self.materialize.close()


def pool_loader(
    dataset: PairDataset,
    pool_size: int,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    drop_last: bool = True,
    decode_threads: int | None = None,
    range_cache: int | str | None = None,
    decode_device: torch.device | None = None,
    as_bytes: bool = True,
) -> PoolLoader:
    """Batches of `pool_size` samples of this rank.

    Args:
        pool_size: must be the dataset's batch_size, or shards are assigned for other batches than are read.
        decode_threads: that decode a deferred pool's survivors; None is the number of CPUs, at most 8.
        range_cache: bytes of images read by ranges that are kept on this machine's disk, a number or "20gb"; None keeps
            none.
        decode_device: a CUDA device that decodes a deferred pool's JPEGs; None leaves them to the threads.
        as_bytes: leave images as uint8 where `ClipCov` selects, which normalizes what it needs. Without it, and by
            itself, the loader normalizes: for a batch transform, or an algorithm before ClipCov, that reads them so.

    Raises:
        ValueError: a pool size that differs from the dataset's, or fewer samples than one pool per rank; a number out
            of range; a cache of what is not fetched.
    """
    numbers = {"num_workers": (num_workers, 0), "prefetch_factor": (prefetch_factor, 1)}
    for name, (value, least) in {**numbers, "decode_threads": (decode_threads, 1)}.items():
        check_least(f"{dataset.section}.{name}", value, least, ", or null" * (name == "decode_threads"))
    if dataset.batch_size != pool_size:
        raise ValueError(f"pool_size={pool_size} differs from the dataset's batch_size={dataset.batch_size}")
    if drop_last and len(dataset) < pool_size:
        raise ValueError(
            f"the stream has {len(dataset)} samples per rank, one pool needs {pool_size}; lower "
            f"stream.global_pool_size to {len(dataset) * get_world_size()} or less"
        )
    workers: dict[str, Any] = {}
    if num_workers > 0:
        # A worker itself says what it waits for, once the data set's time is up; this is for one that cannot.
        patience = STUCK * dataset.timeout
        workers = {"prefetch_factor": prefetch_factor, "persistent_workers": True, "timeout": patience}
        workers["worker_init_fn"] = begin_worker
    transform, tokenizer, source = dataset.transform, dataset.tokenizer, dataset.source
    if range_cache is not None and source is None:
        raise ValueError(f"stream.range_cache={range_cache!r} needs stream.range_reads=true")
    ranges = None
    if source is not None:
        limits = {"timeout": dataset.stream.download_timeout, "patience": dataset.timeout}
        ranges = Ranges(source, **limits, cache=source.cache(range_cache), max_pixels=dataset.max_pixels)
    materialize = None
    if dataset.deferred:
        materialize = Materializer(transform, tokenizer, decode_threads, ranges, dataset.max_pixels, decode_device)
    return PoolLoader(
        dataset,
        materialize=materialize,
        as_bytes=as_bytes,
        batch_size=pool_size,
        num_workers=num_workers,
        collate_fn=PoolCollate(transform),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        # Else torch's own is drawn from, once an epoch or once in all as there are workers or not.
        generator=torch.Generator().manual_seed(dataset.seed),
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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(redacted(f"cannot read {where}: {error}")) from error
