"""tools/verify_mds.py finds what was spoilt, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import verify_mds
from PIL import Image
from runs import synthetic_bytes
from streaming import MDSWriter
from streaming.base.compression import compress, decompress
from test_guard import ROWS, copied, damage, shard_of, write_shards

if TYPE_CHECKING:
    from s3 import Bucket


@pytest.fixture(scope="module", params=[None, "zstd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("whole") / "mds", compression=request.param)


def picture() -> bytes:
    return synthetic_bytes(1)[0]


def verified(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, dict[str, Any]]:
    """Exit code, what was printed, and the account in its last line."""
    code = verify_mds.main([str(argument) for argument in arguments])
    said = capsys.readouterr().out
    return code, said, json.loads(said.splitlines()[-1])


def test_a_whole_folder_is_whole(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
    code, said, account = verified(capsys, folder)
    assert (code, account["bad"], len(said.splitlines())) == (0, {}, 1)
    assert (account["shards"], account["samples"], account["samples_read"]) == (len(shards), ROWS, len(shards))
    code, _, account = verified(capsys, folder, "--all")
    assert (code, account["samples_read"], account["undecodable"]) == (0, ROWS, 0)


@pytest.mark.parametrize("trouble", ["damaged", "missing", "truncated"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_bad_shard_is_found(
    tmp_path: Path,
    folder: Path,
    bucket: Bucket,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
    remote: bool,
) -> None:
    monkeypatch.setattr("clipcov_stream.remote.FIRST_PAUSE", 0.001)
    own = copied(folder, tmp_path / "own")
    for number in (2, 5):
        path = shard_of(own, number)
        if trouble == "damaged":
            damage(path)
        elif trouble == "missing":
            path.unlink()
            path.with_name(f"{path.name}.gone").touch()  # so that the others keep their numbers
        else:
            path.write_bytes(path.read_bytes()[:-1])
    names = {shard_of(folder, number).name.removesuffix(".zstd") for number in (2, 5)}
    code, said, account = verified(capsys, bucket.upload(own, "mds") if remote else own)
    assert code == 1 and set(account["bad"]) == names
    assert said.count("  repair: ") == 2 and ("upload it again" in said) == remote


def test_samples_that_cannot_be_used_are_found_with_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"image": "bytes", "caption": "str", "embedding": "ndarray", "uid": "str"}
    with MDSWriter(out=str(tmp_path / "mds"), columns=columns) as writer:
        for row in range(6):
            embedding = np.full(4, np.nan if row == 3 else 1.0, np.float16)
            writer.write({"image": b"no image", "caption": "c", "embedding": embedding, "uid": f"u{row % 5}"})
    code, said, account = verified(capsys, tmp_path / "mds", "--all")
    assert (code, account["undecodable"], account["repeated_uids"], account["without_hash"]) == (1, 6, 1, 1)
    problems = account["bad"]["shard.00000.mds"]
    assert len(problems) == 7 and "sample 3: column 'embedding' has NaN or inf" in problems
    assert "and 2 more" in said and "damage within samples cannot be seen" in said and "num_invalid" in said


def test_a_compressed_shard_without_a_name_is_a_problem(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(folder, tmp_path / "own")
    index = json.loads((own / "index.json").read_text(encoding="utf-8"))
    index["shards"][0] |= {"zip_data": {"basename": None, "bytes": 1, "hashes": {}}, "compression": "gz"}
    (own / "index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, account = verified(capsys, own)
    assert code == 1 and index["shards"][0]["raw_data"]["basename"] in account["bad"]


def test_a_compressed_shard_outside_of_the_folder_is_not_followed(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(folder, tmp_path / "own")
    index = json.loads((own / "index.json").read_text(encoding="utf-8"))
    shard = index["shards"][0]
    # Sound bytes, so that following the name would find nothing wrong.
    data = zlib.compress(b"")
    (tmp_path / "outside.mds.gz").write_bytes(data)
    shard["zip_data"] = {"basename": "../outside.mds.gz", "bytes": len(data), "hashes": {}}
    shard["compression"] = "gz"
    (own / "index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, account = verified(capsys, own)
    assert code == 1
    assert account["bad"][shard["raw_data"]["basename"]] == ["../outside.mds.gz leads out of the folder"]


def test_what_the_index_itself_gets_wrong_is_found(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = copied(folder, tmp_path / "own")
    index = json.loads((own / "index.json").read_text(encoding="utf-8"))
    shards = index["shards"]
    (tmp_path / "outside.mds").write_bytes(b"secret")
    shards[0]["raw_data"]["basename"] = "../outside.mds"
    shards[1]["column_names"] = ["caption", "image", "image_embedding", "other"]
    shards[2]["samples"] += 1
    shards[3] = shards[4]
    (own / "index.json").write_text(json.dumps(index), encoding="utf-8")
    code, _, account = verified(capsys, own)
    bad = account["bad"]
    assert code == 1 and bad["../outside.mds"] == ["its name leads out of the folder"]
    assert any("its columns are" in problem for problem in bad[shards[1]["raw_data"]["basename"]])
    assert any("samples, the index says" in problem for problem in bad[shards[2]["raw_data"]["basename"]])
    assert bad[shards[4]["raw_data"]["basename"]] == ["the index names it more than once"]


def test_an_index_of_many_shards_takes_little_time(folder: Path) -> None:
    shard = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"][0]
    shards = [{**shard, "raw_data": {"basename": f"shard.{number}.mds"}} for number in range(30_000)]
    begin = time.perf_counter()
    assert list(verify_mds.index_problems(shards)) == []
    assert time.perf_counter() - begin < 4  # 0.2 s; 20 s if every name is looked for among all


def test_an_empty_shard_is_a_remark_and_the_others_are_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"columns": {"image": "bytes", "caption": "str"}, "size_limit": 100, "hashes": ["sha1"]}
    with MDSWriter(out=str(tmp_path / "mds"), **options) as writer:  # whose first shard is empty, as a sample is larger
        for image in (picture(), b"no image"):
            writer.write({"image": image, "caption": "c"})
    shards = json.loads((tmp_path / "mds" / "index.json").read_text(encoding="utf-8"))["shards"]
    assert [shard["samples"] for shard in shards] == [0, 1, 1]
    code, said, account = verified(capsys, tmp_path / "mds")
    assert code == 1 and list(account["bad"]) == ["shard.00002.mds"] and account["samples_read"] == 2
    assert "note: 1 shards have no samples (shard.00000.mds, ...)" in said
    damage(tmp_path / "mds" / "shard.00000.mds")
    assert list(verified(capsys, tmp_path / "mds")[2]["bad"]) == ["shard.00000.mds", "shard.00002.mds"]


@pytest.mark.parametrize("encoding", ["bytes", "pil"])
def test_images_of_another_column_and_encoding_are_decoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    folder, columns = tmp_path / "mds", {"photo": encoding, "caption": "str"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for _ in range(3):
            image = Image.new("RGB", (8, 8)) if encoding == "pil" else picture()
            writer.write({"photo": image, "caption": "c"})
    code, said, account = verified(capsys, folder, "--all")
    assert (code, account["images_decoded"]) == (0, 0)
    assert (
        "note: no column is called 'image', so no image was decoded; give --image, one of ['caption', 'photo']" in said
    )
    code, said, account = verified(capsys, folder, "--all", "--image", "photo")
    assert (code, account["images_decoded"], "note: no column" in said) == (0, 3, False)
    code, _, account = verified(capsys, folder, "--all", "--image", "picture")
    assert code == 1 and "--image 'picture' is not a column of" in account["error"] and "'photo']" in account["error"]
    path = folder / "shard.00000.mds"
    data = path.read_bytes()
    at = int.from_bytes(data[4:8], "little") + 9  # the first image, behind two sizes and a caption
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])  # a pil image of no pixels; bytes that begin as no format
    code, _, account = verified(capsys, folder, "--all", "--image", "photo")
    assert (code, account["undecodable"], account["images_decoded"]) == (1, 1, 2)


def test_a_compressed_form_is_checked_beside_the_uncompressed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_shards(tmp_path / "own", compression="zstd")
    shard = json.loads((own / "index.json").read_text(encoding="utf-8"))["shards"][2]
    zipped, raw = own / shard["zip_data"]["basename"], own / shard["raw_data"]["basename"]
    raw.write_bytes(decompress("zstd", zipped.read_bytes()))
    assert verified(capsys, own)[0] == 0
    zipped.write_bytes(b"x" * zipped.stat().st_size)
    code, said, account = verified(capsys, own)
    assert code == 1 and list(account["bad"]) == [raw.name] and f"{zipped.name}: its sha1 is not the index's" in said
    zipped.unlink()  # as Streaming does once it is unpacked
    assert verified(capsys, own)[0] == 0


def test_a_shard_is_unpacked_to_the_size_that_the_index_says_and_no_further(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write_shards(tmp_path / "own", hashes=(), compression="zstd")
    index = json.loads((own / "index.json").read_text(encoding="utf-8"))
    shard = index["shards"][2]
    bomb = compress("zstd", bytes(1 << 24))
    (own / shard["zip_data"]["basename"]).write_bytes(bomb)
    shard["zip_data"]["bytes"] = len(bomb)
    (own / "index.json").write_text(json.dumps(index), encoding="utf-8")
    code, said, account = verified(capsys, own)
    assert code == 1 and list(account["bad"]) == [shard["raw_data"]["basename"]]
    assert f"to the {shard['raw_data']['bytes']} bytes that the index says" in said


def test_a_pickled_column_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "run").touch, ())

    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": "pkl"}, hashes=["sha1"]) as writer:
        writer.write({"x": Evil()})
    assert verified(capsys, tmp_path / "mds", "--all")[0] == 0
    assert not (tmp_path / "run").exists()


def test_a_column_of_no_images_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_mds.main([str(folder), "--image", "caption"]) == 1
    said = capsys.readouterr().err
    assert "--image 'caption' of" in said and "is encoded as 'str'; an image column is one of bytes, jpeg, png" in said


def test_a_folder_of_tars_is_told_how_to_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "00000.tar").touch()
    assert verify_mds.main([str(tmp_path)]) == 1
    assert f"tools/make_mds.py writes one: make_mds.py pairs {tmp_path} OUT" in capsys.readouterr().err


def test_the_command_says_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    command = [sys.executable, verify_mds.__file__, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and "has no readable index.json" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["folder"] == str(tmp_path / "none")
