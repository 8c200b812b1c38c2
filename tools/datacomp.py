"""DataComp's metadata: which row of which .npz embeds a sample, found by the sample's uid.

DataComp names its metadata by hash: NAME.parquet (uid, url, text, ...) and NAME.npz, whose arrays b32_img, b32_txt,
l14_img and l14_txt (float16, OpenAI's ViT-B/32 and ViT-L/14) have a row for each row of the parquet. img2dataset reads
the parquets in order and makes tars of 10,000 rows, so names of tars say nothing of metadata, the uid in KEY.json does.

A metadata file that cannot be used is rejected, never fatal: metadata_damaged, metadata_misaligned, npz_missing,
npz_damaged; so is a sample without an embedding in those that can: embedding_missing, embedding_malformed.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from mds_folder import Found, Rejection, write_json
from tqdm import tqdm

COLUMNS = ("image_embedding", "text_embedding")
ARRAYS = {"b32": ("b32_img", "b32_txt"), "l14": ("l14_img", "l14_txt")}
WIDTHS = {"b32": 512, "l14": 768}
MODELS = {"b32": "ViT-B-32-quickgelu", "l14": "ViT-L-14-quickgelu"}  # as OpenAI trained them
OPENAI_LOGIT_SCALE = 100.0  # both models ended at the bound that their training clipped it to
UID_BYTES = 16
NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


class NoEmbedding(LookupError):
    """A sample has no usable embedding; the arguments are the reason and the detail of its rejection."""


def write_embedder(folder: Path, kind: str) -> None:
    """Write folder/embedder.json: what made the embeddings that DataComp ships.

    The weights are not at hand, so the fingerprint is of the model's name: other than that of `tools/embed_mds.py` with
    the same weights, whose embeddings differ in rounding.
    """
    # Here, not above: they load open_clip, which takes seconds and which no worker process needs.
    from clipcov_stream.materialize import ImageTransform
    from clipcov_stream.sidecar import EMBEDDER_FILE

    record = {
        "model": MODELS[kind],
        "pretrained": "openai",
        "fingerprint": zlib.crc32(f"datacomp:{kind}".encode()),
        "transform": asdict(ImageTransform(224)),
        "logit_scale": OPENAI_LOGIT_SCALE,
        "precision": "fp16",
        "columns": list(COLUMNS),
    }
    write_json(folder / EMBEDDER_FILE, record)


def embedding_encodings(kind: str) -> dict[str, str]:
    """The MDS columns of one pair of embeddings."""
    return dict.fromkeys(COLUMNS, f"ndarray:float16:{WIDTHS[kind]}")


def find_metadata(given: str | None, tars: Sequence[Path]) -> Path:
    """The folder with metadata: the one given, else the tars' own or the `metadata` that DataComp's download puts near.

    Raises: ValueError when there is none, or when it holds no .parquet with an .npz; the text lists the places.
    """
    shards = tars[0].absolute().parent
    near = [shards, shards.parent / "metadata", shards.parent.parent / "metadata" / shards.name]
    places = [Path(given).expanduser()] if given else near
    for place in places:
        if any(parquet.with_suffix(".npz").is_file() for parquet in place.rglob("*.parquet")):
            return place
    raise ValueError(
        f"no NAME.parquet beside a NAME.npz in {' or '.join(str(place) for place in places)}; give the folder with "
        "DataComp's metadata as --metadata (its download_upstream.py fetches the .npz with --download_npz)"
    )


@dataclass
class Metadata:
    """Where each uid's embeddings are: sorted keys with the file and row of each.

    Args:
        kind: b32 or l14.
        files: stems of the parquets, in order of their names.
        keys: (n,) 16-byte digests of the uids, ascending; `file` and `row` are aligned with it.
        problems: what is wrong with a file as a whole, by its number.
        rejected: those problems, and rows without a uid, as rejections.
    Costs: 24 bytes of memory for each row; two .npz of one pair of embeddings, 2 kB (b32) or 3 kB (l14) a row. Samples
        that jump between more metadata files than two load one for each jump.
    """

    kind: str
    files: list[Path]
    keys: np.ndarray
    file: np.ndarray
    row: np.ndarray
    problems: dict[int, str] = field(default_factory=dict)
    rejected: list[Rejection] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, kind: str) -> Metadata:
        """The metadata of a folder and the folders below. A uid that repeats means its first row.

        Raises: ValueError without pyarrow, or when no file can be used; the text has the first problem.
        """
        files = [path for path in sorted(folder.rglob("*.parquet")) if not _is_of_a_tar(path)]
        nothing = np.empty(0, np.int32)
        metadata = cls(kind, files, np.empty(0, f"S{UID_BYTES}"), nothing, nothing)
        numbers = tqdm(range(len(files)), "metadata", unit=" files", file=sys.stderr)
        parts = [metadata._read_file(number) for number in numbers]
        keys, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        owners = np.repeat(np.arange(len(files), dtype=np.int32), [len(part[0]) for part in parts])
        if len(metadata.problems) == len(files):
            raise ValueError(f"no file of {folder} can be used: {metadata.rejected[0].detail}")
        order = np.argsort(keys, kind="stable")
        metadata.keys, metadata.file, metadata.row = keys[order], owners[order], rows[order]
        return metadata

    def _read_file(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(keys, rows) of one parquet; a problem of the file as a whole is noted."""
        path = self.files[number]
        npz = path.with_suffix(".npz")
        try:
            uids = read_uids(path)
        except OSError as error:  # pyarrow's errors of form and of disk alike
            self._note(number, "metadata_damaged", path, f"cannot be read: {error}")
            return np.empty(0, f"S{UID_BYTES}"), np.empty(0, np.int32)
        if not npz.is_file():
            self._note(number, "npz_missing", npz, "no such file")
        else:
            try:
                for name, shape in npz_shapes(npz, self.kind).items():
                    if shape != (len(uids), WIDTHS[self.kind]):
                        detail = f"{name} has shape {shape}; {path.name}'s rows want ({len(uids)}, {WIDTHS[self.kind]})"
                        self._note(number, "metadata_misaligned", npz, detail)
                        break
            except NPZ_ERRORS as error:
                self._note(number, "npz_damaged", npz, f"cannot be read: {error}")
        rows = [row for row, uid in enumerate(uids) if isinstance(uid, str) and uid]
        for row in sorted(set(range(len(uids))) - set(rows)) if len(rows) < len(uids) else []:
            self.rejected.append(Rejection(row, path.name, "metadata_row_malformed", f"its uid is {uids[row]!r}"))
        keys = np.frombuffer(b"".join(_key(uids[row]) for row in rows), f"S{UID_BYTES}")
        return keys, np.array(rows, np.int32)

    def save(self, folder: Path) -> None:
        """Write the index to `folder`, so that processes can share its memory."""
        for name in ("keys", "file", "row"):
            np.save(folder / f"{name}.npy", getattr(self, name))
        nothing = np.empty(0)
        small = replace(self, keys=nothing, file=nothing, row=nothing, rejected=[])
        (folder / "metadata.pickle").write_bytes(pickle.dumps(small))

    @staticmethod
    def load(folder: Path) -> Metadata:
        """What `save` wrote, mapped and not read."""
        small = pickle.loads((folder / "metadata.pickle").read_bytes())
        return replace(
            small, **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("keys", "file", "row")}
        )

    def _note(self, number: int, reason: str, path: Path, detail: str) -> None:
        self.problems.setdefault(number, f"{path.name}: {detail}")
        self.rejected.append(Rejection(None, path.name, reason, f"{path.name}: {detail}"))

    def find(self, uid: str) -> tuple[np.ndarray, np.ndarray]:
        """The image's and the text's embedding of a sample. Raises: NoEmbedding."""
        # NumPy leaves out a string's last zero bytes when it reads one, and so must we.
        key = np.bytes_(_key(uid).rstrip(b"\0"))
        at = int(np.searchsorted(self.keys, key))
        if at == len(self.keys) or self.keys[at] != key:
            raise NoEmbedding("embedding_missing", f"no metadata has the uid {uid!r}")
        number, row = int(self.file[at]), int(self.row[at])
        npz = self.files[number].with_suffix(".npz")
        if number not in self.problems:
            try:
                image, text = (table[row] for table in load_pair(npz, self.kind))
            except NPZ_ERRORS as error:  # what its headers did not tell
                self.problems[number] = f"{npz.name} cannot be read: {error}"
            else:
                if all(np.isfinite(value).all() and value.any() for value in (image, text)):
                    return image, text
                raise NoEmbedding("embedding_malformed", f"row {row} of {npz.name} is zero or not finite")
        raise NoEmbedding("embedding_missing", self.problems[number])

    def attach(self, items: Iterable[Found | Rejection]) -> Iterator[Found | Rejection]:
        """The items with their embeddings; a sample without becomes a rejection."""
        for item in items:
            if isinstance(item, Found):
                (row,) = item.rows
                try:
                    row.embeddings = self.find(row.uid)
                except NoEmbedding as error:
                    item = Rejection(row.number, item.image, *error.args)
            yield item


def _is_of_a_tar(parquet: Path) -> bool:
    """Whether it is what img2dataset writes beside each tar, which is no metadata with embeddings."""
    return parquet.with_suffix(".tar").is_file() and not parquet.with_suffix(".npz").is_file()


def read_uids(parquet: Path) -> list[Any]:
    """The column uid of a parquet.

    Raises: OSError when it cannot be read or has no such column. ValueError without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet as reader
    except ImportError as error:
        raise ValueError("reading .parquet needs pyarrow: pip install 'clipcov-stream[data]'") from error
    try:
        with reader.ParquetFile(parquet) as file:
            return file.read(columns=["uid"])["uid"].to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def npz_shapes(path: Path, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of one pair of arrays, from their headers alone."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for name in ARRAYS[kind]:
            with archive.open(f"{name}.npy") as file:
                version = np.lib.format.read_magic(file)
                form = np.lib.format
                read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
                shapes[name] = read(file)[0]
    return shapes


@lru_cache(maxsize=2)
def load_pair(path: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The image and text embeddings of a .npz, in float16."""
    with np.load(path, allow_pickle=False) as arrays, np.errstate(over="ignore"):
        image, text = (arrays[name].astype(np.float16, copy=False) for name in ARRAYS[kind])
    return image, text


def _key(uid: str) -> bytes:
    return blake2b(uid.encode("utf-8", "surrogatepass"), digest_size=UID_BYTES).digest()
