"""Images and captions from real tables and tars of every accepted layout, through the tools, read back from MDS."""

import io
import json
import os
import random
import threading
from collections import Counter

import parallel
import pytest
import tar_source
from held_out import key_of
from mds_folder import check_image
from PIL import Image
from sources import (
    CAPTIONS,
    IMAGES,
    ROWS,
    assert_all_there,
    make,
    picture,
    png_header,
    read,
    rejected,
    table,
    wds,
    write_files,
    write_tar,
)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("place", ["folder", "inside x.tar", "inside x.tar.gz", "beside x.tar.gz"])
def test_pairs_come_back_as_they_went_in(tmp_path, kind, place):
    captions = {f"captions.{kind}": table(kind, ROWS)}
    where, _, name = place.partition(" ")
    if where == "folder":
        source = write_files(tmp_path / "in", IMAGES | captions)
    else:
        write_files(tmp_path / "in", captions if where == "beside" else {"readme.txt": b""})
        source = write_tar(tmp_path / "in" / name, IMAGES | (captions if where == "inside" else {}))
    make("pairs", source, tmp_path / "out")
    assert_all_there(tmp_path / "out")


def test_a_table_may_come_first_or_be_named(tmp_path):
    write_files(tmp_path / "in", IMAGES)
    write_files(tmp_path, {"a.csv": b"\xef\xbb\xbf" + table("csv", ROWS), "b.csv": b"file,caption\n"})
    make("pairs", tmp_path / "a.csv", tmp_path / "1", "--images", tmp_path / "in")
    make("pairs", tmp_path / "in", tmp_path / "2", "--captions", tmp_path / "a.csv")
    absolute = table("tsv", [(tmp_path / "in" / name, caption) for name, caption in ROWS])
    write_files(tmp_path / "in", {"absolute.tsv": absolute})
    make("pairs", tmp_path / "in" / "absolute.tsv", tmp_path / "3")
    for out in "123":
        assert_all_there(tmp_path / out)


def test_several_captions_of_an_image_are_several_samples(tmp_path):
    rows = [("000.jpg", "x", "p"), ("001.jpg", "y", "q"), ("000.jpg", "z", "p")]
    write_tar(tmp_path / "x.tar", {"t.csv": table("csv", rows, ("Image", "TEXT", "id")), **IMAGES})
    make("pairs", tmp_path / "x.tar", tmp_path / "1")
    samples = [(s["uid"], s["caption"]) for s in read(tmp_path / "1")]
    assert samples == [("000.jpg#1", "x"), ("000.jpg#2", "z"), ("001.jpg", "y")]
    make("pairs", tmp_path / "x.tar", tmp_path / "2", "--uid-column", "id", "--caption-column", "id")
    assert [(s["uid"], s["caption"]) for s in read(tmp_path / "2")] == [("p#1", "p"), ("p#2", "p"), ("q", "q")]


def test_the_number_of_a_repeated_uid_is_no_other_rows_uid(tmp_path):
    rows = [("000.jpg", "x", "p"), ("001.jpg", "y", "p"), ("002.jpg", "z", "p#1"), ("003.jpg", "w", "p#1#1")]
    write_files(tmp_path / "in", {"t.csv": table("csv", [*rows, rows[2]], ("file", "caption", "uid")), **IMAGES})
    make("pairs", tmp_path / "in", tmp_path / "out")
    assert [s["uid"] for s in read(tmp_path / "out")] == ["p#2", "p#3", "p#1#2", "p#1#1", "p#1#3"]


BAD_FILES = {
    "empty.jpg": b"",
    "text.jpg": b"<html>404</html>",
    "cut.jpg": picture(3)[:-200],
    "cut.png": picture(3, "PNG")[:-60],
    "bomb.png": png_header(30_000, 30_000),
    "large.png": png_header(11_000, 11_000),
    "left over.jpg": picture(99),
}
BAD_ROWS = [
    (b"gone.jpg,x", "image_missing"),
    (b"../secret.jpg,x", "image_missing"),
    (b"/etc/passwd,x", "image_missing"),
    (b",x", "image_missing"),
    (b"empty.jpg,x", "image_empty"),
    (b"text.jpg,x", "not_an_image"),
    (b"cut.jpg,x", "not_an_image"),
    (b"cut.png,x", "not_an_image"),
    (b"bomb.png,x", "image_too_large"),
    (b"large.png,x", "image_too_large"),
    (b"000.jpg,", "caption_empty"),
    (b"000.jpg, \t", "caption_empty"),
    (b"000.jpg,caf\xe9", "caption_encoding"),
    (b"caf\xe9.jpg,x", "image_missing|row_malformed"),
    (b"000.jpg", "row_malformed"),
    (b"000.jpg,a,b", "row_malformed"),
    (b'000.jpg,"never closed', "row_malformed"),
    (b'000.jpg,"half" quoted', "row_malformed"),
]


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_a_bad_row_costs_itself_only_and_is_listed(tmp_path, kind):
    good = table("csv", ROWS).split(b"\r\n", 1)
    lines = [good[0], *(line for line, _ in BAD_ROWS), good[1]]
    files = IMAGES | BAD_FILES | {"captions.csv": b"\n".join(lines)}
    write_files(tmp_path, {"secret.jpg": picture(1)})
    source = write_files(tmp_path / "in", files) if kind == "folder" else write_tar(tmp_path / "x.tar.gz", files)
    make("pairs", source, tmp_path / "out")
    assert [s["caption"] for s in read(tmp_path / "out")] == CAPTIONS
    log = {entry["row"]: entry for entry in rejected(tmp_path / "out")}
    for number, (line, reason) in enumerate(BAD_ROWS, 2):
        assert log.pop(number)["reason"] in reason.split("|"), line
    assert log == {}
    counts = json.loads((tmp_path / "out" / "source.json").read_text())["counts"]
    assert counts["written"] == len(CAPTIONS)
    assert counts["rejected"] == Counter(entry["reason"] for entry in rejected(tmp_path / "out"))
    assert counts["image_unreferenced"] == 1


def test_bad_lines_of_jsonl(tmp_path):
    lines = [
        (b'{"file": "000.jpg"}', "row_malformed"),
        (b'{"file": "000.jpg", "caption": null}', "caption_empty"),
        (b'{"file": "000.jpg", "caption": ["x"]}', "row_malformed"),
        (b'{"file": "000.jpg", "caption": "\\ud83d"}', "caption_encoding"),
        (b'{"file": "000.jpg", "caption": "\xff"}', "caption_encoding"),
        (b'{"file": "000.jpg", "caption"', "row_malformed"),
        (b"[1, 2]", "row_malformed"),
        (b'{"file": "a\\u0000.jpg", "caption": "x"}', "image_missing"),
    ]
    write_files(tmp_path / "in", IMAGES | {"x.jsonl": b"\n".join([line for line, _ in lines] + [table("jsonl", ROWS)])})
    make("pairs", tmp_path / "in", tmp_path / "out")
    assert [s["caption"] for s in read(tmp_path / "out")] == CAPTIONS
    log = {entry["row"]: entry["reason"] for entry in rejected(tmp_path / "out")}
    assert log == dict(enumerate((reason for _, reason in lines), 1))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "I;16"), ("WEBP", "RGB"), ("GIF", "P")],
)
def test_every_usual_image_is_usable(kind, mode):
    assert check_image(picture(1, kind, mode) if mode != "I;16" else sixteen_bits()) is None


def sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (8, 8), 40_000).save(buffer, "PNG")
    return buffer.getvalue()


def test_floats_without_a_contrast_are_no_image():
    buffer = io.BytesIO()
    Image.new("F", (8, 8), 0.5).save(buffer, "TIFF")
    assert (check_image(buffer.getvalue()) or [None])[0] == "not_an_image"


def test_nothing_usable_is_an_error_that_says_why(tmp_path):
    tar = write_tar(tmp_path / "x.tar", {"deep/000.jpg": picture(0), "captions.csv": table("csv", ROWS)})
    with pytest.raises(ValueError, match=r"(?s)no usable sample.*image_missing: 8.*begins with 'deep/000.jpg'"):
        make("pairs", tar, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tar]


def test_what_cannot_be_guessed_is_an_error_that_lists_the_choices(tmp_path):
    source = write_files(tmp_path / "in", IMAGES)
    cases: list[tuple[dict, list, str]] = [
        ({}, [], r"no table \(.csv, .tsv, .jsonl\) in 'in' or "),
        ({"a.csv": b"", "b.tsv": b""}, [], "'in' holds several tables: a.csv, b.tsv; choose one with --captions"),
        ({"captions.csv": b"url,caption\nx,y\n"}, [], r"no column called file or .* \['url', 'caption'\]"),
        ({}, ["--caption-column", "c"], r"'c' is not a column of captions.csv; its columns are \['url', 'caption'\]"),
        ({"captions.csv": b"file,caption,caption\nx,y,z\n"}, [], r"several columns called \['caption'\]"),
        ({}, ["--captions", source / "nope.csv"], "does not exist here"),
        ({}, ["--images", source], "--images .* goes with a SOURCE that is a table"),
        ({}, ["--format", "webdataset"], "--format webdataset reads tars"),
    ]
    for files, options, message in cases:
        write_files(source, files)
        with pytest.raises(ValueError, match=message):
            make("pairs", source, tmp_path / "out", *options)
    for out in (source, tmp_path):
        with pytest.raises(ValueError, match="is or holds the source"):
            make("pairs", source, out, "--captions", source / "captions.csv", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_limit_and_shuffle(tmp_path):
    tar = write_tar(tmp_path / "x.tar", IMAGES | {"captions.csv": table("csv", ROWS)})
    orders = {}
    for name, options in {
        "first": ["--limit", 3],
        "all": ["--shuffle-seed", 1],
        "again": ["--shuffle-seed", 1],
        "other": ["--shuffle-seed", 2],
        "some": ["--shuffle-seed", 1, "--limit", 3],
    }.items():
        make("pairs", tar, tmp_path / name, *options)
        orders[name] = [s["uid"] for s in read(tmp_path / name)]
        assert all(IMAGES[s["uid"]] == s["image"] for s in read(tmp_path / name))
    assert orders["first"] == list(IMAGES)[:3]
    assert sorted(orders["all"]) == sorted(orders["other"]) == list(IMAGES)
    assert orders["all"] == orders["again"] != orders["other"] != list(IMAGES)
    assert orders["some"] == orders["all"][:3]


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_pairs_are_held_out_once_each_and_drawn_anew_by_another_seed(tmp_path, seed, capsys):
    rows = [*ROWS, ("000.jpg", "the first once more")]
    tar = write_tar(tmp_path / "x.tar", IMAGES | {"captions.csv": table("csv", rows)})
    options = [] if seed is None else ["--shuffle-seed", seed]
    for out in ("1", "2"):
        make("pairs", tar, tmp_path / out, "--hold-out", 3, *options)
    assert "held out in" in capsys.readouterr().out
    kept, held = read(tmp_path / "1"), read(tmp_path / "1" / "held")
    assert (kept, held) == (read(tmp_path / "2"), read(tmp_path / "2" / "held"))
    assert sorted(s["caption"] for s in (*kept, *held)) == sorted(caption for _, caption in rows)
    assert not {s["image"] for s in kept} & {s["image"] for s in held} and len(held) in (3, 4)
    files = {place: [path.name for path in sorted((tmp_path / "1" / place).glob("*.json"))] for place in ("", "held")}
    assert files == {"": ["index.json", "source.json"], "held": ["index.json", "source.json"]}
    make("pairs", tar, tmp_path / "some", "--hold-out", 2, "--limit", 3, *options)
    assert len(read(tmp_path / "some")) == 3 - (len(read(tmp_path / "some" / "held")) - 2) * (seed is None)
    make("pairs", tar, tmp_path / "1", "--overwrite", "--hold-out", 1, "--shuffle-seed", 7)
    others = {key_of(s["image"], 7) for s in read(tmp_path / "1")}
    assert all(key_of(s["image"], 7) < min(others) for s in read(tmp_path / "1" / "held"))


def test_what_is_held_out_must_leave_something(tmp_path):
    write_files(tmp_path / "in", IMAGES | {"captions.csv": table("csv", ROWS)})
    with pytest.raises(ValueError, match="--hold-out 8 leaves none of the 8 usable pairs"):
        make("pairs", tmp_path / "in", tmp_path / "out", "--hold-out", 8)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["table", "tars"])
def test_repeated_uids_are_counted(tmp_path, layout, capsys):
    uids = ["a", "b", "a", "c", "a"]
    pairs = list(zip(uids, IMAGES, strict=False))
    if layout == "table":
        rows = [(name, "x", uid) for uid, name in pairs]
        write_files(tmp_path / "in", {"t.csv": table("csv", rows, ("file", "caption", "uid")), **IMAGES})
    else:
        files = [wds(name[:3], IMAGES[name], b"x", {"uid": uid}) for uid, name in pairs]
        write_files(tmp_path / "in", {})
        (tmp_path / "in").mkdir()
        write_tar(tmp_path / "in" / "0.tar", {name: data for some in files for name, data in some.items()})
    make("pairs", tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "source.json").read_text())["counts"]["uids_repeated"] == 2
    assert "uids_repeated: 2 rows" in capsys.readouterr().out
    assert len({s["uid"] for s in read(tmp_path / "out")}) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://b/cc12m", "is remote, .* copy it here first and give the copy: aws s3 sync s3://b/cc12m FOLDER$"),
        ("s3://b/cc12m/*.tar", "aws s3 sync s3://b/cc12m FOLDER$"),
        ("gs://b/cc12m/0.tar", "gcloud storage rsync -r gs://b/cc12m FOLDER$"),
        ("hf://datasets/a/b", "copy it here first and give the copy$"),
    ],
)
def test_a_source_in_a_store_is_to_be_copied_first(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        make("pairs", source, tmp_path / "out")


def test_a_tar_is_read_from_front_to_back(tmp_path):
    source = write_tar(tmp_path / "x.tar.gz", IMAGES)
    os.mkfifo(tmp_path / "pipe")  # which cannot seek
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(source.read_bytes()))
    writer.start()
    members = dict(tar_source.tar_members(tmp_path / "pipe", lambda name: name != "003.jpg"))
    writer.join()
    assert members == IMAGES | {"003.jpg": None}


def test_webdataset_tars(tmp_path):
    first = wds("000", IMAGES["000.jpg"], CAPTIONS[2].encode(), {"uid": "u0", "alt": "other"})
    first |= wds("a/001", IMAGES["001.jpg"], None, {"key": 17, "caption": "from json", "alt": "more"})
    first |= wds("002", IMAGES["002.jpg"], b"by key") | {"002.seg.npy": b"?"}
    bad = [
        (wds("b0", picture(0), None, {"uid": "x"}), "caption_missing"),
        (wds("b1", picture(0), b" \n"), "caption_empty"),
        (wds("b2", picture(0), b"caf\xe9"), "caption_encoding"),
        (wds("b3", picture(0), b"x", b"{"), "row_malformed"),
        (wds("b4", None, b"x"), "image_missing"),
        (wds("b5", b"", b"x"), "image_empty"),
        (wds("b6", picture(0)[:-200], b"x"), "not_an_image"),
        (wds("b7", picture(0), b"x") | {"b7.png": picture(0, "PNG")}, "row_malformed"),
        (wds("b8", picture(0), None, {"caption": 5}), "row_malformed"),
    ]
    second = {name: data for files, _ in bad for name, data in files.items()} | wds("002", IMAGES["003.jpg"], b"again")
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "00000.tar", first)
    write_tar(tmp_path / "in" / "00001.tar", second)
    third = wds("x", picture(1), b"kept") | wds("y", picture(2), b"perhaps whole") | wds("z", picture(3), b"lost")
    whole = write_tar(tmp_path / "whole.tar", third).read_bytes()
    (tmp_path / "in" / "00002.tar").write_bytes(whole[: whole.index(b"z.jpg") + 40])  # in the midst of a header
    for number, source in enumerate(
        ([tmp_path / "in"], [tmp_path / "in" / "*.tar"], sorted((tmp_path / "in").iterdir()))
    ):
        out = tmp_path / str(number)
        make("pairs", *source, out)
        assert [(s["uid"], s["caption"], s["image"]) for s in read(out)] == [
            ("u0", CAPTIONS[2], IMAGES["000.jpg"]),
            ("17", "from json", IMAGES["001.jpg"]),
            ("002", "by key", IMAGES["002.jpg"]),
            ("002#2", "again", IMAGES["003.jpg"]),
            ("x", "kept", picture(1)),
        ]
        assert [entry["reason"] for entry in rejected(out)] == [reason for _, reason in bad] + ["tar_damaged"]
    make("pairs", tmp_path / "in" / "00000.tar", tmp_path / "alt", "--caption-column", "alt")
    assert [s["caption"] for s in read(tmp_path / "alt")] == ["other", "more"]
    write_files(tmp_path / "in", {"list.csv": table("csv", [("002.jpg", "of the table")])})
    with pytest.raises(ValueError, match="--format webdataset or --format table"):
        make("pairs", tmp_path / "in" / "00000.tar", tmp_path / "out")
    make("pairs", tmp_path / "in" / "00000.tar", tmp_path / "table", "--format", "table")
    assert [s["caption"] for s in read(tmp_path / "table")] == ["of the table"]


@pytest.mark.parametrize("seed", range(20))
def test_numbers_of_repeated_uids_never_meet(seed):
    draw = random.Random(seed)
    uids = draw.choices(["a", "a#2", "a#3", "a#2#2", "a#02", "", "#2", "2", "3"], k=40)
    rows = [tar_source.Row(number, "x.jpg", "c", uid) for number, uid in enumerate(uids)]
    list(tar_source.number_repeats([tar_source.Found("x.jpg", b"", [row]) for row in rows]))
    names = [row.uid for row in rows]
    assert len(set(names)) == len(names) and all(map(str.startswith, names, uids))
    # What only comes once, and is no other's name so far, stays as it is.
    for at, (uid, name) in enumerate(zip(uids, names, strict=True)):
        assert name == uid or uid in uids[:at] or uid in names[:at]
    ends = sorted(draw.choices(range(41), k=3))
    tars = [uids[begin:end] for begin, end in zip([0, *ends], [*ends, 40], strict=True)]
    again = parallel._repeats(tars)
    alone = []
    for own in tars:
        numbers = Counter()
        alone.append([tar_source.numbered(uid, numbers) for uid in own])
    assert [name for at, own in enumerate(alone) for name in again.get(at, own)] == names


def test_rows_that_img2dataset_could_not_download_are_counted(tmp_path):
    source = tmp_path / "cc"
    source.mkdir()
    write_tar(source / "00000.tar", wds("000000001", IMAGES["001.jpg"], b"one", {"key": "000000001"}))
    write_tar(source / "00001.tar", wds("000010000", IMAGES["002.jpg"], b"two", {"key": "000010000"}))
    stats = {"count": 4, "successes": 1, "failed_to_download": 2, "failed_to_resize": 1}
    write_files(
        source, {"00000_stats.json": json.dumps(stats).encode(), "00001_stats.json": b"{", "00000.parquet": b""}
    )
    make("pairs", source, tmp_path / "out")
    assert [sample["caption"] for sample in read(tmp_path / "out")] == ["one", "two"]
    counts = json.loads((tmp_path / "out" / "source.json").read_text())["counts"]
    assert counts == {"written": 2, "rejected": {}, "image_unreferenced": 0, "not_downloaded": 3}


@pytest.mark.parametrize("first", ["no bytes", "no members", "cut off"])
def test_the_first_tar_that_can_tell_tells_the_layout(tmp_path, first):
    """Where it stands among the tars, a bad one costs what it costs elsewhere: its own samples."""
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "00001.tar", wds("001", IMAGES["001.jpg"], b"one"))
    bad = write_tar(source / "00000.tar", {} if first == "no members" else {"000.jpg": picture(0)})
    if first != "no members":
        bad.write_bytes(b"" if first == "no bytes" else bad.read_bytes()[:700])
    make("pairs", source, tmp_path / "out")
    assert [sample["caption"] for sample in read(tmp_path / "out")] == ["one"]
    assert [entry["reason"] for entry in rejected(tmp_path / "out")] == ["tar_damaged"] * (first != "no members")
    if first != "no members":
        with pytest.raises(ValueError, match=r"00000.tar cannot be read beyond"):
            make("pairs", bad, tmp_path / "alone")


def test_a_table_in_a_tar_is_found_behind_an_empty_one(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "0.tar", {})
    write_tar(source / "1.tar", {**IMAGES, "captions.csv": table("csv", ROWS)})
    make("pairs", source, tmp_path / "out")
    assert [sample["caption"] for sample in read(tmp_path / "out")] == CAPTIONS


def test_a_tsv_loses_no_row_to_a_quote_or_a_carriage_return_unsaid(tmp_path):
    lines = [
        "file\tcaption",
        '0.jpg\t"best day',
        '1.jpg\tpipe, 5"',
        '2.jpg\t"two',
        'lines"',
        "3.jpg\tfoo\rbar",
        "4.jpg\tx",
    ]
    files = {f"{i}.jpg": picture(i) for i in range(5)}
    for number, end in enumerate(("\n", "\r\n")):
        source = write_files(tmp_path / str(number), files | {"t.tsv": (end.join(lines) + end).encode()})
        make("pairs", source / "t.tsv", tmp_path / f"out{number}")
        assert [s["caption"] for s in read(tmp_path / f"out{number}")] == ['pipe, 5"', f"two{end}lines", "x"]
        details = [(entry["reason"], entry["detail"].split(":")[0]) for entry in rejected(tmp_path / f"out{number}")]
        assert details == [
            ("row_malformed", "bad quoting"),
            ("row_malformed", "bad quoting or a carriage return within a field"),
        ]
    source = write_files(tmp_path / "mac", files | {"t.csv": b"file,caption\r0.jpg,one\r1.jpg,two\r"})
    make("pairs", source / "t.csv", tmp_path / "out")
    assert [s["caption"] for s in read(tmp_path / "out")] == ["one", "two"]


def test_a_stray_image_beside_tars_is_not_the_source(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_tar(source / "00000.tar", wds("001", IMAGES["001.jpg"], b"one"))
    write_files(source, {"preview.png": picture(9, "PNG")})
    make("pairs", source, tmp_path / "out")
    assert [sample["caption"] for sample in read(tmp_path / "out")] == ["one"]
    # A table chooses, by the images that it names.
    write_tar(source / "00000.tar", IMAGES)
    write_files(source, {"captions.csv": table("csv", ROWS)})
    for number, given in enumerate(([source], [source / "captions.csv"], [source, "--captions"])):
        more = [source / "captions.csv"] if given[-1] == "--captions" else []
        make("pairs", given[0], tmp_path / f"tars{number}", *given[1:], *more)
        assert [sample["caption"] for sample in read(tmp_path / f"tars{number}")] == CAPTIONS
    write_files(source, {"captions.csv": table("csv", [("preview.png", "loose")])})
    make("pairs", source, tmp_path / "loose")
    assert [sample["caption"] for sample in read(tmp_path / "loose")] == ["loose"]


def test_a_damaged_tar_under_a_table_is_an_error(tmp_path):
    tar = write_tar(tmp_path / "x.tar.gz", IMAGES)
    tar.write_bytes(tar.read_bytes()[:-2000])
    write_files(tmp_path, {"captions.csv": table("csv", ROWS)})
    with pytest.raises(ValueError, match=r"x.tar.gz cannot be read beyond '00\d.jpg'"):
        make("pairs", tar, tmp_path / "out", "--captions", tmp_path / "captions.csv")
    assert not (tmp_path / "out").exists()
