"""No epoch that ends early and no wait without end: Streaming's dataset, watched where its samples are read.

Streaming fetches shards in background threads. One that fails there ends the epoch without an error, or, with worker
processes, leaves the others waiting for ever. Here shards are fetched by a `CheckedStream`, which notes what it cannot
get instead of failing; the note is raised, or its samples are skipped, in the foreground, from where an error reaches
the training loop. The foreground waits for a shard at most `timeout` seconds, never takes a dead thread for the end of
the epoch, and counts the pools that the epoch promised.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from streaming import StreamingDataset
from streaming.base.constant import TICK
from streaming.base.dataset import _ShardState

from clipcov_stream.checked import BadShard, CheckedStream
from clipcov_stream.shared_memory import claim

log = logging.getLogger(__name__)

ON_BAD_SHARD = ("raise", "skip")


class GuardedDataset(StreamingDataset):
    """A StreamingDataset of one `CheckedStream` that yields all its samples or raises.

    Args:
        stream: what to read.
        timeout: seconds that a sample may be waited for; 0 for ever.
        on_bad_shard: `raise`, or `skip`: `get_item` then returns None for its samples, on all ranks of the machine.
        max_bad_shards: that may be skipped in one run.
        options: StreamingDataset's.

    Raises:
        ValueError: an unknown choice, a number out of range, or a cache_limit where there is no other copy.
    """

    def __init__(
        self,
        stream: CheckedStream,
        *,
        timeout: float = 0,
        on_bad_shard: str = "raise",
        max_bad_shards: int = 10,
        **options: Any,
    ) -> None:
        check_guards(timeout, on_bad_shard, max_bad_shards)
        check_least("stream.num_canonical_nodes", options.get("num_canonical_nodes"), 0, ", Streaming's own number")
        if options.get("cache_limit") is not None and not stream.can_fetch:
            raise ValueError(
                f"stream.cache_limit={options['cache_limit']!r} deletes shards that can be fetched again, but "
                f"{stream.where} is the only copy; set stream.remote, or leave it out"
            )
        super().__init__(streams=[stream], **options)
        self.stream = stream
        self.timeout, self.on_bad_shard, self.max_bad_shards = timeout, on_bad_shard, max_bad_shards
        self.resumed: tuple[int, int] = (-1, 0)
        self._failure: BaseException | None = None
        self._sound: set[int] = set()
        """Shards that this process knows to be in order."""
        self._unseen: Iterator[int] = iter(range(self.num_shards))
        stream.notes = claim(self)
        if self._unique_rank_world.is_local_leader:
            if stream.notes.exists():  # an earlier run's, where there is no /dev/shm
                shutil.rmtree(stream.notes)
            # What lies in the cache is looked at like what comes from the store, before anything reads it.
            states = self._shard_states.numpy()
            states[states == _ShardState.LOCAL] = _ShardState.REMOTE
        check_same_index(stream)

    def bad_shards(self) -> dict[str, str]:
        """What was wrong with each shard that could not be used on this machine so far."""
        return {name: note["error"] for name, note in self.stream.noted().items()}

    def awaited(self) -> list[str]:
        """Names of the shards that some process of this machine is fetching."""
        preparing = np.flatnonzero(self._shard_states.numpy() == _ShardState.PREPARING)
        return [self.shards[shard].raw_data.basename for shard in preparing.tolist()]  # pyright: ignore

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """A sample as it is stored; None where its shard is skipped.

        Raises:
            BadShard: its shard cannot be used, or too many cannot.
        """
        shard_id, row = self.spanner[sample_id]
        shard: Any = self.shards[shard_id]
        for _ in range(1 + retry):
            if shard_id not in self._sound:
                # Read before its turn, it has not been looked at yet.
                self.prepare_shard(shard_id)
                if self._is_skipped(shard.raw_data.basename):
                    return None
                self._sound.add(shard_id)
            try:
                sample = shard[row]
                self._shard_access_times[shard_id] = time.time_ns()
                return sample
            except FileNotFoundError:  # not there yet, or evicted
                self._sound.discard(shard_id)
                self.prepare_shard(shard_id)
            except Exception as error:  # what damage that no hash has shown makes a decoder say
                message = f"sample {row} of shard {shard.raw_data.basename} of {self.stream.where} cannot be read"
                if self.on_bad_shard == "skip" and not isinstance(error, (OSError, MemoryError)):
                    log.error("%s: %r", message, error)
                    return None
                raise BadShard(f"{message}: {error!r}; {self._help()}") from error
        raise RuntimeError(
            f"shard {shard.raw_data.basename} of {self.stream.where} was evicted {1 + retry} times before it was read; "
            f"raise stream.cache_limit={self.cache_limit!r}"
        )

    def _is_skipped(self, basename: str) -> bool:
        """Whether a shard is bad and may be skipped.

        Raises:
            BadShard: it is bad, and may not.
        """
        note = self.stream.note_of(basename)
        if note is None:
            return False
        if self.on_bad_shard == "raise" or note["is_fatal"]:
            raise BadShard(f"shard {basename} of {self.stream.where} cannot be used: {note['error']}; {self._help()}")
        bad = self.bad_shards()
        if len(bad) > self.max_bad_shards:
            listed = "; ".join(f"{name}: {error}" for name, error in bad.items())
            raise BadShard(
                f"{len(bad)} shards of {self.stream.where} cannot be used, more than stream.max_bad_shards="
                f"{self.max_bad_shards} ({listed})"
            )
        return True

    def _help(self) -> str:
        skip = "" if self.on_bad_shard == "skip" else "; stream.on_bad_shard=skip trains without it"
        full = "; stream.cache_limit bounds the cache" if self.stream.can_fetch and self.cache_limit is None else ""
        return f"python tools/verify_mds.py {self.stream.where} says what else is bad, and how to repair it{skip}{full}"

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Streaming's, which waits for another process no longer than `timeout`, and for room in the cache at all."""
        since = time.monotonic()
        while True:
            self._try_to_prepare(shard_id)
            if not blocking or self._shard_states[shard_id] == _ShardState.LOCAL:
                return
            self._check_wait(since, shard_id)
            time.sleep(TICK)

    def _try_to_prepare(self, shard_id: int) -> None:
        try:
            super().prepare_shard(shard_id, False)
        except ValueError as error:
            if "no shards present locally to evict" not in str(error):
                raise
            # All that fills the cache is on its way itself. Streaming leaves the lock taken and the shard as begun.
            self._shard_states[shard_id] = _ShardState.REMOTE
            self._cache_filelock.release()

    def _check_wait(self, since: float, shard_id: int) -> None:
        if self.timeout and time.monotonic() - since > self.timeout:
            name = self.shards[shard_id].raw_data.basename  # pyright: ignore[reportAttributeAccessIssue]
            raise BadShard(
                f"nothing came for stream.timeout={self.timeout:g} s while waiting for shard {name} of "
                f"{self.stream.where} (being fetched: {', '.join(self.awaited()) or 'none'}); raise stream.timeout if "
                f"the store is merely slow, or stream.cache_limit={self.cache_limit!r} if it is too low"
            )

    def _evict_coldest_shard(self) -> None:
        """Of what lies in the cache since before this run, first what was not looked at yet; Streaming sees it not."""
        for shard_id in self._unseen:
            info = self.shards[shard_id].raw_data  # pyright: ignore[reportAttributeAccessIssue]
            if self._shard_states[shard_id] == _ShardState.REMOTE and self.stream.path(info.basename).is_file():
                return self._evict_shard(shard_id)
        return super()._evict_coldest_shard()

    def on_exception(self, future: Future[Any]) -> None:
        """A background thread's error is kept for the foreground, which raises it."""
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()

    def _ready_thread(self, it: Any) -> None:
        """Streaming's, which waits for ever for a shard that is evicted before it was seen to be there."""
        while not it.should_exit() and it.ready_index < it.total and not self._event.is_set():
            sample_id = it.sample_ids[it.ready_index]
            is_far = self.predownload is not None and it.ready_index - it.yield_index > self.predownload
            shard_id = None if sample_id == -1 else self.spanner[sample_id][0]
            if not is_far and (shard_id is None or self._shard_states[shard_id] == _ShardState.LOCAL):
                it.ready_index += 1
            elif not is_far and shard_id is not None and self._shard_states[shard_id] == _ShardState.REMOTE:
                self.prepare_shard(shard_id, False)
            else:
                time.sleep(TICK)
        it.on_exit()

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        """Streaming's, which neither waits for ever nor takes a dead thread for the epoch's end."""
        since = time.monotonic()
        try:
            while not it.should_exit() and it.yield_index < it.total:
                if self._event.is_set():
                    raise RuntimeError(
                        f"the thread that fetches shards of {self.stream.where} has failed: {self._failure!r}"
                    ) from self._failure
                sample_id = it.sample_ids[it.yield_index]
                if it.ready_index <= it.yield_index:
                    if sample_id != -1:
                        self._check_wait(since, self.spanner[sample_id][0])
                    time.sleep(TICK)
                    continue
                if sample_id != -1:
                    yield sample_id
                it.yield_index += 1
                since = time.monotonic()
        except BaseException:
            it.non_blocking_exit()  # so that the threads end too
            raise
        it.on_exit()

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Streaming's, and the shards that are skipped: a resumed run skips them too, lest it choose otherwise.

        Of a checkpoint at the end of an epoch Streaming says the epoch that is over, and no sample of it: a run resumed
        from there would go through it once more.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            state["epoch"] = max(state["epoch"], self.next_epoch)  # loaded and not iterated since: the epoch loaded
        return {**state, "bad_shards": self.bad_shards()} if self.on_bad_shard == "skip" else state

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        state = {key: value for key, value in obj.items() if key != "bad_shards"}
        self.resumed = (int(state["epoch"]), int(state["sample_in_epoch"]))
        if self.on_bad_shard == "skip":
            self.skip(obj.get("bad_shards", {}))
        super().load_state_dict(state)

    def skip(self, shards: dict[str, str]) -> None:
        """Skip these shards, for the reasons given, whether or not they are in order here."""
        for name in shards.keys() - self.bad_shards().keys():
            self.stream.note(name, shards[name])

    def promise(self, pools_per_epoch: int) -> tuple[int, int, int]:
        """Number of the epoch that is iterated next, its pools, and how many of them a checkpoint has behind it."""
        epoch, sample = self.resumed
        if epoch < self.next_epoch:
            return self.next_epoch, pools_per_epoch, 0
        global_pool_size = (self.batch_size or 1) * self._parallel_rank_world.num_ranks
        return epoch, pools_per_epoch, -(-sample // global_pool_size)


def check_least(key: str, value: float | None, least: float, what: str = "") -> None:
    """Raise ValueError for a number of a recipe that is below the least it may be."""
    if value is not None and not value >= least:
        raise ValueError(f"{key}={value} must be at least {least}{what}")


def check_guards(timeout: float, on_bad_shard: str, max_bad_shards: int) -> None:
    """Raise ValueError for a knob that cannot be."""
    if not 0 <= timeout < float("inf"):
        raise ValueError(f"stream.timeout={timeout} must be a number of seconds, or 0 to wait for ever")
    if on_bad_shard not in ON_BAD_SHARD:
        raise ValueError(f"stream.on_bad_shard={on_bad_shard!r} is not one of {list(ON_BAD_SHARD)}")
    check_least("stream.max_bad_shards", max_bad_shards, 0)


def check_same_index(stream: CheckedStream) -> None:
    """Raise ValueError on every rank unless all have one index.json: two versions would be dealt out differently."""
    if not torch.distributed.is_initialized() or dist.get_world_size() == 1:
        return
    own = hashlib.sha1(stream.path("index.json").read_bytes()).hexdigest()
    found = dist.all_gather_object(own)
    if len(set(found)) > 1:
        raise ValueError(
            f"the index.json of {stream.where} is not the same on all ranks (sha1 {sorted(set(found))}): it was "
            "rewritten meanwhile, or a cache (stream.local) has an old one; delete the caches"
        )


def complete(pools: Iterable[Any], promise: tuple[int, int, int], where: str) -> Iterator[Any]:
    """The pools of an epoch, of which `GuardedDataset.promise` says how many there are.

    Raises:
        RuntimeError: there were fewer.
    """
    epoch, promised, num_pools = promise
    for pool in pools:
        yield pool
        num_pools += 1
    if num_pools < promised:
        raise RuntimeError(
            f"epoch {epoch} ended after {num_pools} of {promised} pools of {where}: it was cut short, on this rank or "
            "another; see the log above"
        )


def named(pools: Iterator[Any], dataset: GuardedDataset) -> Iterator[Any]:
    """Pools; a DataLoader's complaint that its time is up says what is waited for, too."""
    try:
        yield from pools
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        shards = ", ".join(dataset.awaited())
        raise RuntimeError(
            f"no pool came from the workers for a multiple of stream.timeout={dataset.timeout:g} s "
            f"({'being fetched: ' + shards if shards else 'no shard is being fetched: a worker is stuck'}); "
            "stream.num_workers=0 shows where"
        ) from error


class SkippedShards(Callback):
    """Logs how many shards are skipped, and tells every machine what the others skip.

    Needed with `on_bad_shard="skip"`: rank 0's list goes into checkpoints, and a resumed run skips all of it. A machine
    that has begun to read a shard which another could not get goes on until it is evicted: each sample is one rank's
    alone, and no rank falls out of step. With several ranks it costs one reduction of a number per step.
    """

    def __init__(self) -> None:
        self.num_known = 0

    def batch_end(self, state: State, logger: Logger) -> None:
        dataset = getattr(state.train_dataloader, "dataset", None)
        if not isinstance(dataset, GuardedDataset) or dataset.on_bad_shard != "skip":
            return
        bad = dataset.bad_shards()
        if dist.get_world_size() > 1:
            most = state.device.tensor_to_device(torch.tensor([len(bad)]))
            dist.all_reduce(most, "MAX")
            if int(most) != self.num_known:
                for others in dist.all_gather_object(bad):
                    bad = {**others, **bad}
                dataset.skip(bad)
                self.num_known = len(bad)
        logger.log_metrics({"stream/bad_shards": len(bad)})
