"""Adds image and text embeddings to an MDS folder, for `selection.embed: columns`.

    python tools/embed_mds.py data/pairs data/pairs_b32 --name ViT-B-32 --pretrained laion2b_s34b_b79k
    python tools/embed_mds.py data/pairs data/own --pretrained runs/NAME       # a run, or a checkpoint, of this project
    python tools/embed_mds.py data/pairs data/pairs_b32 --sidecar ...          # without copying the images
    composer -n 8 tools/embed_mds.py ...                        # shards are shared out over ranks

FOLDER's samples are copied as they are stored, with two columns more: `image_embedding` and `text_embedding`, float16,
unit-norm. With --sidecar only the caption and the uid are copied, and `image_span` says where in FOLDER's uncompressed
shards the image lies: shard number, offset, length. Such an OUT is for `stream.sidecar`, beside FOLDER itself, which
embedder.json names by the hash of its index.json; another folder's is an error.

A sample whose image cannot be decoded gets NaN in both, so that training counts it and never selects it.
OUT/embedder.json says what made them: model, a fingerprint of its weights, image size and transform, logit scale.
Training takes the logit scale from it and refuses to resume on columns of another embedder.

OUT is complete or absent. What is finished waits shard by shard in a hidden folder beside it; the same command goes on
from there after an interruption and makes the same bytes; another --batch-size or number of threads may round
otherwise. With several ranks all need to see OUT's disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import checkpoint_of, model_in, state_of
from composer.utils import dist, get_device
from mds_folder import write_json
from streaming.base.format.mds.encodings import mds_encode
from subset_folder import PairFolder, VerbatimWriter
from torch import Tensor, nn
from tqdm import tqdm

from clipcov_stream.build import tokenizer_of, transform_of
from clipcov_stream.captions import caption_of
from clipcov_stream.config import ProxyConfig, load_config
from clipcov_stream.decode import UndecodableImage, decode_image, raw_image
from clipcov_stream.embed import EMBED_PRECISIONS, embed_with_towers
from clipcov_stream.identity import fingerprint
from clipcov_stream.materialize import ImageTransform
from clipcov_stream.model import build_towers, check_name
from clipcov_stream.remote import is_remote
from clipcov_stream.sidecar import EMBEDDER_FILE, SPAN_COLUMN
from clipcov_stream.stream import Tokenizer

COLUMNS = ("image_embedding", "text_embedding")
IMAGE_ENCODINGS = ("bytes", "jpeg", "png", "pil")


@dataclass(frozen=True)
class Embedder:
    """A frozen model with what it takes to feed it; `record` is what embedder.json says of it."""

    towers: nn.Module
    transform: ImageTransform
    tokenizer: Tokenizer
    device: torch.device
    precision: str
    record: dict[str, Any]

    @classmethod
    def of(cls, config: ProxyConfig, device: torch.device, precision: str) -> Embedder:
        """Raises ValueError for a model that cannot be built or has no weights."""
        if config.pretrained is None:
            raise ValueError("--pretrained is missing: a model with random weights says nothing about a pair")
        towers = build_towers(config.name, config.config, config.pretrained, config.loss)
        towers = towers.eval().requires_grad_(False).to(device)
        transform = transform_of(towers)
        tag = config.pretrained if not Path(config.pretrained).exists() else Path(config.pretrained).name
        scale: Any = towers.logit_scale
        record = {
            "model": config.name or config.config,
            "pretrained": tag,
            "fingerprint": fingerprint(towers),
            "transform": asdict(transform),
            "logit_scale": float(scale.detach().exp()),
            "precision": precision,
        }
        return cls(towers, transform, tokenizer_of(towers, config), device, precision, record)

    def __call__(self, images: Tensor, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(n, dim) float16 unit-norm image and text embeddings of uint8 images and token ids."""
        pixels = self.transform.normalize()(images.to(self.device))
        dtype = EMBED_PRECISIONS[self.precision]
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        image, text, _ = embed_with_towers(self.towers, pixels, tokens, len(images), autocast)
        normalize = torch.nn.functional.normalize
        return tuple(normalize(rows, dim=1).half().cpu().numpy() for rows in (image, text))  # pyright: ignore


class Decoder:
    """A sample's stored bytes -> a cropped image and a caption's tokens."""

    def __init__(self, pairs: PairFolder, image: str, caption: str, embedder: Embedder, sidecar: bool) -> None:
        for option, name, kinds in (("--image", image, IMAGE_ENCODINGS), ("--caption", caption, ("str",))):
            if pairs.columns.get(name) not in kinds:
                raise ValueError(
                    f"{option} {name!r} is not a column of {pairs.path} encoded as one of {list(kinds)}; it has "
                    f"{pairs.columns}"
                )
        taken = sorted(set(COLUMNS) & set(pairs.columns))
        if taken and not sidecar:
            raise ValueError(f"{pairs.path} has columns {taken} already; embed the folder that it was made from")
        self.is_pil = pairs.columns[image] == "pil"
        self.image, self.caption = image, caption
        self.crop, self.tokenizer = embedder.transform.crop(), embedder.tokenizer
        self.size = embedder.transform.size

    def __call__(self, sample: dict[str, bytes]) -> tuple[Tensor, Tensor, bool]:
        """The image, zeros if it cannot be decoded; the tokens; whether it could."""
        tokens = self.tokenizer(caption_of(sample[self.caption]))
        try:
            data = sample[self.image]
            return self.crop(decode_image(raw_image(data) if self.is_pil else data)), tokens, True
        except UndecodableImage:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), tokens, False


class Kept:
    """What OUT has of each sample beside its embeddings: all of it, or what a sidecar needs."""

    def __init__(self, pairs: PairFolder, args: argparse.Namespace) -> None:
        self.pairs, self.image = pairs, args.image
        self.columns = dict(pairs.columns)
        self.compression = pairs.compression
        self.has_spans = args.sidecar and pairs.compression is None
        if args.sidecar:
            is_kept = {args.caption, *(["uid"] if pairs.columns.get("uid") == "str" else [])}
            self.columns = {name: kind for name, kind in pairs.columns.items() if name in is_kept}
            self.compression = None  # of embeddings it gains little, and it would have to be undone for each sample
        if self.has_spans:
            for name, kind in pairs.compressed.items():
                raise ValueError(
                    f"--sidecar: {name} of {pairs.path} is compressed ({kind}), and the first shard is not: its images "
                    "have no place to be told. Write the folder anew in one form, or leave out --sidecar"
                )
            self.columns[SPAN_COLUMN] = "ndarray:int64:4"

    def samples_of(self, number: int) -> Iterator[dict[str, bytes]]:
        """The samples of a shard with all their values as they are stored, and the span with the image's checksum."""
        spans = self.pairs.spans_of(number, self.image) if self.has_spans else None
        for row, sample in enumerate(self.pairs.samples_of(number)):
            if spans is None:
                yield sample
                continue
            span = np.array([*spans[row], zlib.crc32(sample[self.image])], np.int64)
            yield {**sample, SPAN_COLUMN: span.tobytes()}

    def values(self, sample: dict[str, bytes]) -> dict[str, bytes]:
        """Those that go to OUT."""
        return {name: sample[name] for name in self.columns}


def batches(samples: Iterator[dict[str, bytes]], size: int) -> Iterator[list[dict[str, bytes]]]:
    while batch := list(islice(samples, size)):
        yield batch


def write_part(
    kept: Kept,
    number: int,
    folder: Path,
    embedder: Embedder,
    decoder: Decoder,
    args: argparse.Namespace,
    bar: Any,
) -> None:
    """Shard `number` with embeddings, as a folder that appears when it is complete."""
    rough = folder.with_name(f"{folder.name}.rough")
    shutil.rmtree(rough, ignore_errors=True)
    undecodable = 0
    with ThreadPoolExecutor(args.threads) as threads:

        def begun(batch: list[dict[str, bytes]]) -> tuple[list[dict[str, bytes]], Any]:
            return batch, threads.map(decoder, batch)

        writer: VerbatimWriter | None = None
        kinds: dict[str, str] = {}
        groups = batches(kept.samples_of(number), args.batch_size)
        waiting = [begun(batch) for batch in islice(groups, 1)]
        while waiting:
            batch, decoding = waiting.pop()
            images, tokens, good = zip(*decoding, strict=True)
            waiting = [begun(batch) for batch in islice(groups, 1)]  # decoded while the model reads this one
            rows = dict(zip(COLUMNS, embedder(torch.stack(images), torch.stack(tokens)), strict=True))
            if writer is None:
                kinds = {name: f"ndarray:float16:{table.shape[1]}" for name, table in rows.items()}
                writer = VerbatimWriter(
                    columns={**kept.columns, **kinds},
                    out=str(rough),
                    hashes=["sha1", "xxh64"],
                    compression=kept.compression,
                    size_limit=None,
                )
            for at, sample in enumerate(batch):
                values = {
                    name: table[at] if good[at] else np.full_like(table[at], np.nan) for name, table in rows.items()
                }
                encoded = {name: mds_encode(kinds[name], value) for name, value in values.items()}
                writer.write({**kept.values(sample), **encoded})
            undecodable += len(good) - sum(good)
            bar.update(len(batch))
        if writer is not None:
            writer.finish()
    rough.mkdir(exist_ok=True)  # of an empty shard
    write_json(rough / "counts.json", {"undecodable": undecodable})
    rough.rename(folder)


def assemble(pairs: PairFolder, parts: list[Path], staging: Path, record: dict[str, Any]) -> dict[str, int]:
    """Make the parts one MDS folder inside of `staging`/whole; what lies beside the source's shards is copied.

    Not for a sidecar, which is no data set of its own.
    """
    whole = staging / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    known = {"index.json", EMBEDDER_FILE}
    shards, undecodable = [], 0
    for part in parts:
        undecodable += json.loads((part / "counts.json").read_text(encoding="utf-8"))["undecodable"]
        index = part / "index.json"
        for shard in json.loads(index.read_text(encoding="utf-8"))["shards"] if index.is_file() else []:
            for kind in ("raw_data", "zip_data"):
                if shard[kind] is None:
                    continue
                old = shard[kind]["basename"]
                shard[kind]["basename"] = old.replace("shard.00000", f"shard.{len(shards):05d}")
                if (part / old).is_file():
                    # A link, not a move: until the end an interruption finds every part where it was.
                    (whole / shard[kind]["basename"]).hardlink_to(part / old)
            shards.append(shard)
    for path in pairs.path.iterdir():
        if not record["sidecar"] and path.is_file() and path.name not in known and not path.name.startswith("shard."):
            shutil.copyfile(path, whole / path.name)
    counts = {"samples": len(pairs), "undecodable": undecodable}
    write_json(whole / EMBEDDER_FILE, {**record, "counts": counts})
    write_json(whole / "index.json", {"version": 2, "shards": shards})
    return counts


def check_staging(staging: Path, record: dict[str, Any], restart: bool) -> None:
    """Raise ValueError if `staging` was begun with another model or source; make it if there is none."""
    if restart:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True, exist_ok=True)
    begun = staging / "begun.json"
    if not begun.is_file():
        write_json(begun, record)
        return
    before = json.loads(begun.read_text(encoding="utf-8"))
    other = sorted(key for key in record if before.get(key) != json.loads(json.dumps(record[key])))
    if other:
        raise ValueError(
            f"{staging} was begun with other settings ({', '.join(other)}): give the same ones, or --restart"
        )


@contextmanager
def config_of(args: argparse.Namespace) -> Iterator[ProxyConfig]:
    """The model asked for. Of a run, and of a checkpoint without --name and --recipe, the one that it records.

    Raises: ValueError where that is none or several, or unknown.
    """
    if args.name is not None and args.recipe is not None:
        raise ValueError("give --name, an open_clip model, or --recipe, whose model it is")
    if args.name is not None:
        try:
            check_name(args.name)
        except ValueError as error:
            raise ValueError(str(error).replace("model.name=", "--name ")) from error
        yield ProxyConfig(name=args.name, pretrained=args.pretrained)
        return
    if args.pretrained is None:
        raise ValueError(
            "--pretrained is missing: a run's folder or a checkpoint, or open_clip's weights with --name or --recipe"
        )
    if args.recipe is not None and not (is_remote(args.pretrained) or Path(args.pretrained).expanduser().is_dir()):
        model = load_config(args.recipe).model
        yield ProxyConfig(name=model.name, config=model.config, pretrained=args.pretrained, loss=model.loss)
        return
    with checkpoint_of(args.pretrained) as (file, where):
        model, _ = model_in(state_of(file, where), where, args.recipe)
        yield ProxyConfig(name=model.name, config=model.config, pretrained=str(file), loss=model.loss)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Embed FOLDER into OUT; returns embedder.json's contents."""
    if "://" in args.out:
        raise ValueError(f"OUT={args.out!r} is remote; write to a local folder, then upload the finished folder there")
    out = Path(args.out).expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT={args.out!r} exists already; give another folder")
    for name in ("batch_size", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    pairs = PairFolder(args.folder)
    device = get_device(args.device)
    with config_of(args) as config:
        embedder = Embedder.of(config, torch.device(str(device.name).replace("gpu", "cuda")), args.precision)
    decoder = Decoder(pairs, args.image, args.caption, embedder, args.sidecar)
    kept = Kept(pairs, args)
    source = hashlib.sha1((pairs.path / "index.json").read_bytes()).hexdigest()
    record = {
        **embedder.record,
        "columns": list(COLUMNS),
        "embedded": {"image": args.image, "caption": args.caption},
        "source_index_sha1": source,
        "sidecar": args.sidecar,
    }
    if any(each != record for each in dist.all_gather_object(record)):
        raise ValueError(
            f"--pretrained {args.pretrained!r} is not the same model on all ranks: give one checkpoint's file, a run "
            "in training saves newer ones"
        )
    staging = out.with_name(f".{out.name}.embedding")
    if dist.get_global_rank() == 0:
        check_staging(staging, record, args.restart)
    dist.barrier()
    numbers = range(len(pairs.shard_sizes))
    parts = [staging / f"part.{number:05d}" for number in numbers]
    own = [number for number in numbers if number % dist.get_world_size() == dist.get_global_rank()]
    done = [number for number in own if parts[number].is_dir()]
    total, initial = (sum(pairs.shard_sizes[number] for number in some) for some in (own, done))
    with tqdm(total=total, initial=initial, unit=" samples", file=sys.stderr) as bar:
        for number in sorted(set(own) - set(done)):
            write_part(kept, number, parts[number], embedder, decoder, args, bar)
    dist.barrier()
    counts = {}
    if dist.get_global_rank() == 0:
        counts = assemble(pairs, parts, staging, record)
        if out.is_dir():
            out.rmdir()
        (staging / "whole").rename(out)
        shutil.rmtree(staging)
        print(f"{out.name}: {counts['samples']:,} samples embedded, {counts['undecodable']:,} images undecodable")
    dist.barrier()
    return {**record, "counts": counts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="local MDS folder with images and captions")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--name", help="an open_clip model")
    parser.add_argument("--recipe", help="a recipe whose model to use, instead of --name; of runs their own")
    parser.add_argument("--pretrained", help="open_clip tag, a checkpoint, or a run or its URL")
    parser.add_argument("--image", default="image", help="image column")
    parser.add_argument("--caption", default="caption", help="caption column")
    parser.add_argument("--sidecar", action="store_true", help="leave the images where they are: for stream.sidecar")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=4, help="that decode images, per rank")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="default: a GPU if there is one")
    parser.add_argument("--precision", default="fp32", choices=list(EMBED_PRECISIONS))
    parser.add_argument("--restart", action="store_true", help="forget what an interrupted run had finished")
    args = parser.parse_args(argv)
    if args.device == "gpu" and not torch.cuda.is_available():
        parser.error("--device gpu needs a CUDA device, and there is none; use cpu")
    dist.initialize_dist(get_device(args.device), timeout=3600)
    try:
        run(args)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
