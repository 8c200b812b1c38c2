"""tools/verify_mds.py finds what was spoilt, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import verify_mds
from streaming import MDSWriter
from test_guard import ROWS, copied, damage, shard_of, write_shards

if TYPE_CHECKING:
    from s3 import Bucket


@pytest.fixture(scope="module", params=[None, "zstd"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("whole") / "mds", compression=request.param)


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


def test_a_pickled_column_is_not_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "run").touch, ())

    with MDSWriter(out=str(tmp_path / "mds"), columns={"x": "pkl"}, hashes=["sha1"]) as writer:
        writer.write({"x": Evil()})
    assert verified(capsys, tmp_path / "mds", "--all")[0] == 0
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    command = [sys.executable, verify_mds.__file__, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and "has no readable index.json" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["folder"] == str(tmp_path / "none")
