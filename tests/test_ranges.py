"""Images by byte ranges: which ranges, their bytes from disk and from an S3 server with faults, and the cache."""

from __future__ import annotations

import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from corpora import draw_corpus
from hypothesis import given, settings
from hypothesis import strategies as st
from subset_folder import PairFolder
from test_embed_mds import in_shards

from clipcov_stream import range_cache as range_cache_module
from clipcov_stream import ranges as ranges_module
from clipcov_stream.range_cache import RangeCache
from clipcov_stream.ranges import Ranges, Source, Span, coalesce
from clipcov_stream.remote import RangeReader

if TYPE_CHECKING:
    from s3 import Bucket


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 samples in MDS shards of a few."""
    root = tmp_path_factory.mktemp("folder")
    return in_shards(draw_corpus(root / "shapes"), root / "mds", rows=160)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "FIRST_PAUSE", 0.001)


# ---------------------------------------------------------------- which ranges


@st.composite
def laid_out(draw: st.DrawFn) -> list[Span]:
    """Spans of a few shards that do not overlap, in any order, some twice and some empty."""
    spans = []
    for shard in range(draw(st.integers(1, 3))):
        at = 0
        for gap, length in draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=7)):
            spans.append(Span(shard, at + gap, length))
            at += gap + length
    spans += spans[: draw(st.integers(0, 3))]
    return draw(st.permutations(spans))


@given(laid_out(), st.integers(0, 40), st.floats(0, 2), st.integers(1, 200))
def test_requests_hold_every_span_once_and_little_else(
    spans: list[Span], max_gap: int, max_waste: float, max_request: int
) -> None:
    requests = coalesce(spans, max_gap, max_waste, max_request)
    wanted = sorted({span for span in spans if span.length})
    assert [span for request in requests for span in request.spans] == wanted
    for request in requests:
        first, last = request.spans[0], request.spans[-1]
        assert (request.begin, request.end) == (first.offset, last.offset + last.length)
        assert {span.shard for span in request.spans} == {request.shard}
        assert request.end - request.begin <= max_request or len(request.spans) == 1
        between = pairwise(request.spans)
        assert all(after.offset - before.offset - before.length <= max_gap for before, after in between)
    for before, after in pairwise(requests):
        assert before.shard < after.shard or before.end <= after.begin
    own = sum(span.length for span in wanted)
    assert sum(request.end - request.begin for request in requests) <= own * (1 + max_waste) + 1e-9
    assert len(requests) <= len(wanted)


@given(laid_out(), st.integers(0, 40), st.floats(0, 2))
def test_no_other_choice_of_gaps_leaves_fewer_requests(spans: list[Span], max_gap: int, max_waste: float) -> None:
    wanted = sorted({span for span in spans if span.length})
    gaps = [
        after.offset - before.offset - before.length
        for before, after in pairwise(wanted)
        if before.shard == after.shard
    ]
    budget = max_waste * sum(span.length for span in wanted)
    # By sums of subsets, as there are few: for every number of gaps the least that bridging so many costs.
    least = [0, *[10**9] * len(gaps)]
    for gap in (gap for gap in gaps if gap <= max_gap):
        for number in range(len(gaps), 0, -1):
            least[number] = min(least[number], least[number - 1] + gap)
    most = max(number for number, cost in enumerate(least) if cost <= budget)
    assert len(coalesce(spans, max_gap, max_waste, 10**9)) == len(wanted) - most


# ---------------------------------------------------------------- their bytes


def source_of(folder: Path, remote: str | None = None, local: Path | None = None) -> Source:
    index = (folder / "index.json").read_bytes()
    here = folder if remote is None else local
    return Source.of(index, None if here is None else str(here), remote, None, "image")


def spans_of(folder: Path) -> tuple[list[Span], list[bytes]]:
    """Of all images of a folder, and the images."""
    pairs = PairFolder(str(folder))
    spans = [pairs.spans_of(number, "image") for number in range(len(pairs.shard_sizes))]
    images = [sample["image"] for sample in pairs.samples(range(len(pairs)))]
    return [Span(*map(int, span)) for shard in spans if shard is not None for span in shard], images


def fetched(ranges: Ranges, spans: list[Span]) -> list[Any]:
    return [image.result() for image in ranges(spans)]


def test_images_come_from_disk_and_from_the_store(tmp_path: Path, folder: Path, bucket: Bucket) -> None:
    spans, images = spans_of(folder)
    chosen = np.random.default_rng(0).permutation(160)[:40].tolist()
    url = bucket.upload(folder, "mds")
    shutil.copy(folder / "shard.00001.mds", tmp_path)  # what Streaming left is read where it is
    (tmp_path / "shard.00002.mds").write_bytes(b"not whole")
    for source in (source_of(folder), source_of(folder, url), source_of(folder, url, tmp_path)):
        ranges = Ranges(source)
        wanted = [spans[row] for row in [*chosen, chosen[0]]]
        with bucket.server.asked() as asked:
            assert fetched(ranges, wanted) == [images[row] for row in [*chosen, chosen[0]]]
            ranges.close()
            assert fetched(ranges, [spans[3], Span(0, 7, 0)]) == [images[3], b""]  # it may be used again
            ranges.close()
        assert bool(asked) == (source.remote is not None)
        assert all(byte_range for _, _, byte_range in asked)
        asked_for_whole = any("shard.00001" in path for _, path, _ in asked)
        assert asked_for_whole == (source.remote is not None and source.local is None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ranges")]


def test_a_store_of_another_scheme_is_read_through_fsspec(folder: Path) -> None:
    spans, images = spans_of(folder)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/range-reads", recursive=True)
    try:
        assert fetched(Ranges(source_of(folder, "memory://range-reads")), spans[5:90:7]) == images[5:90:7]
    finally:
        memory.rm("/range-reads", recursive=True)
    for url in ("gs://bucket/x", "azure://bucket/x"):
        with pytest.raises(ValueError, match=rf"stream\.range_reads=true cannot read {url}: "):
            RangeReader(url, 4)


@pytest.mark.usefixtures("quick")
def test_a_store_that_fails_now_and_then_is_asked_again(folder: Path, bucket: Bucket) -> None:
    rng = random.Random(0)
    planned: dict[tuple[str, str], list[str]] = {}
    met: list[str | None] = []
    spans, images = spans_of(folder)
    ranges = Ranges(source_of(folder, bucket.upload(folder, "mds")), connections=4)

    def fault(method: str, path: str, byte_range: str) -> str | None:
        kinds = ["error", "short", "cut", "missing"]
        plan = planned.setdefault((path, byte_range), [rng.choice(kinds) for _ in range(rng.randrange(4))])
        met.append(plan.pop() if plan else None)
        return met[-1]

    with bucket.server.failing(fault):
        assert fetched(ranges, spans[::3]) == images[::3]
    assert {"error", "short", "cut", "missing"} <= set(met)
    assert met.count(None) == len(coalesce(spans[::3]))
    ranges.close()


def test_no_more_connections_are_open_than_asked_for(folder: Path, bucket: Bucket) -> None:
    spans, images = spans_of(folder)
    ranges, open_now, most, lock = Ranges(source_of(folder, bucket.upload(folder, "mds")), 3), 0, 0, threading.Lock()

    def held(*_: str) -> None:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
        time.sleep(0.02)
        with lock:
            open_now -= 1

    with bucket.server.failing(held):
        assert fetched(ranges, spans[::5]) == images[::5]
    assert most == 3
    ranges.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("error", "ClientError: .*500"),
        ("short", "OSError: [0-9]+ bytes came instead of"),
        ("cut", "Incomplete|Streaming"),
    ],
)
def test_a_range_that_cannot_be_had_names_shard_offset_and_url(
    folder: Path, bucket: Bucket, kind: str, words: str
) -> None:
    spans, images = spans_of(folder)
    url = bucket.upload(folder, "mds")
    ranges = Ranges(source_of(folder, url))
    bad, good = spans[40], spans[100]
    assert bad.shard != good.shard
    asked: list[str] = []

    def fault(method: str, path: str, byte_range: str) -> str | None:
        asked.append(path)
        return kind if f"{bad.shard:05d}" in path else None

    with bucket.server.failing(fault):
        image, other = ranges([bad, good])
        where = (
            rf"cannot read {bad.length} bytes at offset {bad.offset} of shard {bad.shard}, {url}/shard\.0*{bad.shard}"
        )
        with pytest.raises(OSError, match=rf"{where}\.mds, after 6 attempts: .*({words})"):
            image.result()
        assert other.result() == images[100]
    assert len(asked) == 7
    ranges.close()


@pytest.mark.usefixtures("quick")
def test_what_the_store_does_not_have_is_given_up_sooner(folder: Path, bucket: Bucket, tmp_path: Path) -> None:
    spans, _ = spans_of(folder)
    with (
        bucket.server.asked() as asked,
        pytest.raises(OSError, match=r"shard 0, .*/gone/shard\.00000\.mds, after 4 attempts: NoSuchKey"),
    ):
        fetched(Ranges(source_of(folder, f"{bucket.url}/gone")), spans[:1])
    assert len(asked) == 4
    shutil.copytree(folder, tmp_path / "mds")
    shard = tmp_path / "mds" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[: spans[0].offset + 5])
    with pytest.raises(OSError, match=rf"{shard}, after 1 attempts: OSError: 5 bytes came instead of"):
        fetched(Ranges(source_of(tmp_path / "mds")), spans[:1])


def test_closing_ends_what_waits_for_a_store(folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges_module, "FIRST_PAUSE", 1000.0)
    spans, _ = spans_of(folder)
    ranges = Ranges(source_of(folder, bucket.upload(folder, "mds")), connections=1)
    with bucket.server.failing(lambda *_: "error"):
        images = ranges([spans[0], spans[100]])
        ranges.close()
    for image in images:
        with pytest.raises(OSError, match="cannot read"):
            image.result(timeout=0)


def test_closing_does_not_wait_for_an_answer(folder: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    spans, wanted = spans_of(folder)
    ranges = Ranges(source_of(folder, bucket.upload(folder, "mds")))
    asked, answers = threading.Event(), threading.Event()

    def read(*_: Any) -> bytes:
        asked.set()
        answers.wait(20)
        return b""

    with monkeypatch.context() as patched:
        patched.setattr(ranges.reader, "read", read)
        (image,) = ranges(spans[:1])
        assert asked.wait(20)
        begun = time.monotonic()
        ranges.close()
    assert time.monotonic() - begun < 10
    with pytest.raises(OSError, match="after 1 attempts: InterruptedError: the loader was closed"):
        image.result(timeout=0)
    assert fetched(ranges, spans[:1]) == wanted[:1]
    answers.set()
    ranges.close()


# ---------------------------------------------------------------- the cache


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path, folder: Path, bucket: Bucket) -> None:
    spans, images = spans_of(folder)
    source = source_of(folder, bucket.upload(folder, "mds"), tmp_path / "local")

    def asked(rows: range) -> int:
        ranges = Ranges(source, cache=source.cache("1mb"))
        with bucket.server.asked() as found:
            assert fetched(ranges, [spans[row] for row in rows]) == [images[row] for row in rows]
            ranges.close()
        return len(found)

    assert asked(range(40)) > 0
    assert asked(range(40)) == 0  # a later run's
    assert asked(range(20, 60)) > 0
    assert asked(range(60)) == 0
    cache = source.cache(10**6)
    assert cache is not None and cache.num_bytes() == sum(map(len, images[:60]))
    cache.close()
    assert {path.name for path in (tmp_path / "local").iterdir()} <= {cache.path.name, f"{cache.path.name}.lock"}


def test_what_is_damaged_in_the_cache_is_fetched_once_more_and_replaced(
    tmp_path: Path, folder: Path, bucket: Bucket
) -> None:
    spans, images = spans_of(folder)
    spans = [Span(*span[:3], zlib.crc32(image)) for span, image in zip(spans[:8], images[:8], strict=True)]
    source = source_of(folder, bucket.upload(folder, "mds"), tmp_path / "local")
    ranges = Ranges(source, cache=source.cache("1mb"))
    assert fetched(ranges, spans) == images[:8]
    assert ranges.cache is not None
    with closing(sqlite3.connect(ranges.cache.path)) as file, file:
        file.execute("UPDATE images SET data = zeroblob(length(data)) WHERE id = 3")
    for requests in (1, 0):
        with bucket.server.asked() as asked:
            assert fetched(ranges, spans) == images[:8]
            ranges.close()  # the images are kept by then
        assert len(asked) == requests
    assert ranges.cache.num_bytes() == sum(map(len, images[:8]))
    ranges.close()


@settings(max_examples=30, deadline=None)  # it writes files
@given(st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=40), st.integers(1, 60))
def test_the_cache_keeps_what_was_used_last_and_no_more_than_its_limit(
    tmp_path_factory: pytest.TempPathFactory, uses: list[tuple[int, bool]], limit: int
) -> None:
    cache = RangeCache(tmp_path_factory.mktemp("cache") / "images.sqlite", limit)
    kept: dict[int, bytes] = {}  # in the order of use
    for number, puts in uses:
        key, data = (0, number, number), bytes([number]) * number
        if puts:
            cache.put({key: data})
            if number not in kept and number <= limit:
                while sum(kept) + number > limit:
                    del kept[next(iter(kept))]
                kept[number] = data
        else:
            found = cache.get([key, (1, number, number)])
            assert found == ({key: data} if number in kept else {})
            if number in kept:
                kept[number] = kept.pop(number)
        assert cache.num_bytes() == sum(kept) <= limit


USER = """
import importlib.util, os, random, sys, time, warnings
from pathlib import Path
spec = importlib.util.spec_from_file_location("range_cache", sys.argv[1])  # without all that the package imports
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
warnings.simplefilter("error")
seed, begin = int(sys.argv[3]), float(sys.argv[4])
rng, cache = random.Random(seed), module.RangeCache(Path(sys.argv[2]), 200_000)
time.sleep(max(0, begin - time.time()))
for turn in range(150):
    key = (0, rng.randrange(100), 3000)
    data = bytes([key[1]]) * 3000
    assert cache.get([key]) in ({}, {key: data})
    cache.put({key: data})
    if seed == 0 and turn == 60:
        os.kill(os.getpid(), 9)
"""


def test_processes_share_a_cache_though_one_is_killed(tmp_path: Path) -> None:
    path, module = tmp_path / "images.sqlite", range_cache_module.__file__
    begin = str(time.time() + 1)  # all at once, when there is no file yet
    commands = [[sys.executable, "-c", USER, module, str(path), str(seed), begin] for seed in range(5)]
    users = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [user.communicate(timeout=100)[1] for user in users]
    assert [user.returncode for user in users] == [-signal.SIGKILL, 0, 0, 0, 0], errors
    cache = RangeCache(path, 200_000)
    keys = [(0, number, 3000) for number in range(100)]
    kept = cache.get(keys)
    assert cache.num_bytes() == 3000 * len(kept) == 198_000
    assert all(data == bytes([key[1]]) * 3000 for key, data in kept.items())
    cache.close()


def test_threads_share_a_cache(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path / "images.sqlite", 3000)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            key = (0, rng.randrange(40), 100)
            assert cache.get([key]) in ({}, {key: bytes([key[1]]) * 100})
            cache.put({key: bytes([key[1]]) * 100})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert cache.num_bytes() == 3000 and not cache.broken
    cache.close()


def test_a_cache_that_cannot_be_used_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "images.sqlite").write_bytes(b"no database" * 1000)
    cache = RangeCache(tmp_path / "images.sqlite", 100)
    with pytest.warns(UserWarning, match=r"stream\.range_cache: .*images\.sqlite is not used any more"):
        assert cache.get([(0, 1, 1)]) == {}
    cache.put({(0, 1, 1): b"x"})
    assert cache.num_bytes() == 0
