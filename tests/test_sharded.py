"""A learner that is sharded over ranks: real processes, gloo, Composer's FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import find_checkpoint, from_checkpoint
from corpora import TINY_MODEL, draw_corpus, recipe, write_recipe
from runs import assert_same, columns_recipe, proxy_section, run_ranks, trained_rows, trainer_of, write_columns
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from clipcov_stream.checkpoints import newest_whole
from clipcov_stream.model import build_towers
from clipcov_stream.pieces import fault_of_pieces
from clipcov_stream.sharded import blocks_of

LAYERS = {
    **TINY_MODEL,
    "vision_cfg": {**TINY_MODEL["vision_cfg"], "layers": 2},
    "text_cfg": {**TINY_MODEL["text_cfg"], "layers": 2},
}
RESNET = {
    **TINY_MODEL,
    "vision_cfg": {"image_size": 32, "layers": [2, 1, 1, 1], "width": 8, "head_width": 16},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_corpus(tmp_path_factory.mktemp("corpus") / "shapes")


def online(corpus: Path, **sections: Any) -> dict[str, Any]:
    selection = {"embed": "online", "proxy": {"width": 4}, **sections.pop("selection", {})}
    return recipe(corpus, **{"model": {"config": LAYERS}, "selection": selection, **sections})


def ranks_of(folder: Path, tree: dict[str, Any], num_ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return run_ranks(folder, write_recipe(folder.with_suffix(".yaml"), tree), num_ranks, *overrides)


def assert_close_runs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    """The same survivors; weights and moments up to the order of sums. Moments tell a sum over ranks from a mean."""
    for got, want in zip(trained_rows(ours), trained_rows(theirs), strict=True):
        assert torch.equal(got, want)
    assert ours[0]["figures"] == pytest.approx(theirs[0]["figures"])
    for got, want in zip(ours[0]["moments"], theirs[0]["moments"], strict=True):
        torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-3, atol=1e-4)
    for name, weight in theirs[0]["model"].items():
        got = ours[0]["model"][name].reshape(weight.shape)
        if name.endswith("in_proj_bias"):
            # A key's bias changes no softmax: its gradient is rounding alone, which AdamW makes as large as any.
            got, weight = (torch.cat(bias.chunk(3)[::2]) for bias in (got, weight))
        torch.testing.assert_close(got, weight, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("embed", ["online", "proxy", "columns"])
def test_a_sharded_run_is_the_unsharded_one(tmp_path: Path, corpus: Path, embed: str) -> None:
    """The same to the last bit on two ranks, whose sums have one order; of the weights a rank holds its share."""
    split = {"tasks": ["zeroshot", "retrieval"], "local": str(corpus / "eval"), "batch_size": 5}
    tree = online(corpus, eval={"shapes": split}, eval_interval="3ba")
    if embed == "proxy":
        tree["selection"] = {**recipe(corpus)["selection"], **proxy_section(tmp_path), "soft_start": 0.0}
    elif embed == "columns":
        tree |= columns_recipe(write_columns(tmp_path / "columns", 96)) | {"model": {"config": LAYERS}}
    sharded = ranks_of(tmp_path / "sharded", tree, 2, "fsdp_config={}")
    plain = ranks_of(tmp_path / "plain", tree, 2)
    assert_close_runs(sharded, plain)
    for name, weight in plain[0]["model"].items():
        assert torch.equal(sharded[0]["model"][name].reshape(weight.shape), weight), name
    assert plain[0]["units"] == [] and plain[0]["figures"]
    blocks = [f"towers.{of}.resblocks.{i}" for of in ("visual.transformer", "transformer") for i in (0, 1)]
    assert sorted(sharded[0]["units"]) == sorted(["towers", *blocks])
    numbers = [rank["numbers"] for rank in sharded]
    assert sum(numbers) == plain[0]["numbers"] and max(numbers) < 0.6 * sum(numbers)
    for name in ("algorithm", "model"):
        assert_same(sharded[0][name], sharded[1][name])


@pytest.mark.parametrize(
    ("fsdp", "saved"),
    [
        ({}, "ep0-ba3-rank0.pt"),
        ({"state_dict_type": "sharded"}, "ep0-ba3"),
    ],
    ids=["in full", "sharded"],
)
def test_it_resumes_bit_for_bit(tmp_path: Path, corpus: Path, fsdp: dict[str, Any], saved: str) -> None:
    tree = online(corpus, fsdp_config=fsdp, save_interval="3ba")
    straight = ranks_of(tmp_path / "straight", tree, 2, f"save_folder={tmp_path}/saved")
    resumed = ranks_of(tmp_path / "resumed", tree, 2, f"load_path={tmp_path}/saved/{saved}")
    for ours, theirs in zip(resumed, straight, strict=True):
        for got, want in zip(ours["batches"], theirs["batches"][3:], strict=True):
            assert_same(got, want)
        for name in ("model", "moments", "algorithm"):
            assert_same(ours[name], theirs[name])


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_it_goes_on_on_another_number_of_ranks(tmp_path: Path, corpus: Path, kind: str) -> None:
    proxy = {"scope": "global", "proxy": {"config": TINY_MODEL}, "proxy_lr": 1e-2}  # without batch norm
    tree = online(corpus, fsdp_config={"state_dict_type": kind}, save_interval="3ba", selection=proxy)
    two = ranks_of(tmp_path / "two", tree, 2, f"save_folder={tmp_path}/saved")
    saved = tmp_path / "saved" / ("ep0-ba3-rank0.pt" if kind == "full" else "ep0-ba3")
    later = [{**rank, "batches": rank["batches"][3:]} for rank in two]
    for num_ranks in (4, 1):
        others = ranks_of(tmp_path / str(num_ranks), tree, num_ranks, f"load_path={saved}")
        assert_close_runs(others, later)
        assert len(others[0]["batches"]) == 3
        assert others[0]["numbers"] < sum(rank["numbers"] for rank in two) / num_ranks * 1.2


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_the_same_command_goes_on(tmp_path: Path, corpus: Path, kind: str) -> None:
    places = {"run_name": "run", "save_folder": str(tmp_path / "{run_name}"), "autoresume": True}
    tree = online(corpus, fsdp_config={"state_dict_type": kind}, save_interval="2ba", **places)
    straight = ranks_of(tmp_path / "straight", tree, 2)
    # As if it had been stopped before the last one.
    if kind == "full":
        (tmp_path / "run" / "ep0-ba6-rank0.pt").unlink()
    else:
        # Killed at writing it, and between Composer's removal of its link and the next link.
        (tmp_path / "run" / "ep0-ba6" / ".metadata").unlink()
        (tmp_path / "run" / "ep0-ba6" / "__9_0.distcp").touch()
        (tmp_path / "run" / "latest-rank0.pt").unlink()
    resumed = ranks_of(tmp_path / "again", tree, 2)
    assert len(resumed[0]["batches"]) == 2
    for name in ("model", "moments", "algorithm"):
        assert_same(resumed[0][name], straight[0][name])
    assert not (tmp_path / "run" / "ep0-ba6" / "__9_0.distcp").exists()


def test_torn_pieces_are_set_aside_and_old_ones_removed(tmp_path: Path, corpus: Path) -> None:
    """A whole checkpoint before a torn one is gone on from; how many are kept is counted over stops."""
    places = {"run_name": "run", "save_folder": str(tmp_path / "{run_name}"), "autoresume": True}
    fsdp = {"state_dict_type": "sharded"}
    tree = online(corpus, fsdp_config=fsdp, save_interval="1ba", save_num_checkpoints_to_keep=3, **places)
    straight = ranks_of(tmp_path / "straight", tree, 2)
    folder = tmp_path / "run"
    assert saved_in(folder) == ["ep0-ba4", "ep0-ba5", "ep0-ba6"]
    names = FileSystemReader(folder / "ep0-ba4").read_metadata().state_dict_metadata
    assert any(name.startswith("state.callbacks.CheckpointSaver.") for name in names)  # as of Composer's own
    (folder / "ep0-ba6.torn").mkdir()  # of an earlier stop
    (folder / "ep0-ba1").mkdir()  # somebody's
    (folder / "ep0-ba1" / "notes.txt").touch()
    for name in ("ep0-ba6", "ep0-ba5"):
        piece = folder / name / "__1_0.distcp"
        content, half = piece.read_bytes(), piece.stat().st_size // 2
        # Cut short, and with other numbers in some tensor's place.
        torn = content[:-1] if name == "ep0-ba6" else content[:half] + b"\1" * 400 + content[half + 400 :]
        piece.write_bytes(torn)
        assert fault_of_pieces(folder / name)
    assert fault_of_pieces(folder / "ep0-ba4") is None
    (folder / "ep0-ba4" / "__1_0.distcp").rename(away := folder / "away")
    assert "__1_0.distcp" in str(fault_of_pieces(folder / "ep0-ba4"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: ep0-ba6 \(.*\); ep0-ba5 \(.*\); ep0-ba4 \("):
        newest_whole(folder, in_full=False)
    away.rename(folder / "ep0-ba4" / "__1_0.distcp")
    resumed = ranks_of(tmp_path / "again", tree | {"max_duration": "7ba"}, 2)
    assert len(resumed[0]["batches"]) == 3
    for got, want in zip(resumed[0]["batches"], straight[0]["batches"][4:], strict=False):
        assert_same(got, want)
    assert saved_in(folder) == ["ep0-ba5", "ep0-ba6", "ep1-ba7"]
    assert (folder / "ep0-ba1" / "notes.txt").exists()
    assert [path.name for path in sorted(folder.glob("*.torn"))] == ["ep0-ba5.torn", "ep0-ba6.torn"]


def saved_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("ep*-ba?") if path.is_dir() and path.name != "ep0-ba1")


@pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")
def test_checkpoints_stay_of_one_kind_and_are_not_written_over(tmp_path: Path, corpus: Path) -> None:
    places = {"run_name": "run", "save_folder": str(tmp_path / "{run_name}"), "save_interval": "2ba"}
    tree = online(corpus, fsdp_config={"state_dict_type": "sharded"}, max_duration="2ba", **places)
    tree["selection"]["warmup"] = 0
    ranks_of(tmp_path / "first", tree, 2)
    with pytest.raises(AssertionError, match=r"has ep0-ba2, but training begins after step 0: nothing was written"):
        ranks_of(tmp_path / "again", tree, 2)
    for section in ({}, None):
        with pytest.raises(ValueError, match=r"is a folder of pieces: set fsdp_config\.state_dict_type=sharded"):
            trainer_of(tmp_path / "other", {**tree, "fsdp_config": section, "autoresume": True})
    (tmp_path / "one.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"one\.pt' is one file: set fsdp_config.state_dict_type=full"):
        trainer_of(tmp_path / "other", {**tree, "load_path": str(tmp_path / "one.pt")})


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_stays_sharded_or_not(tmp_path: Path, corpus: Path, sharded: bool) -> None:
    """A logit scale of another shape would stop it later, or its moments would."""
    tree = online(corpus, save_interval="3ba", max_duration="3ba")
    before, now = ({"verbose": False}, None) if sharded else (None, {})
    ranks_of(tmp_path / "before", {**tree, "fsdp_config": before}, 2, f"save_folder={tmp_path}/saved")
    message = f"the checkpoint's run was {'with' if sharded else 'without'} fsdp_config: to go on, set it"
    saved = f"load_path={tmp_path}/saved/ep0-ba3-rank0.pt"
    with pytest.raises(AssertionError, match=message):
        ranks_of(tmp_path / "now", {**tree, "fsdp_config": now, "max_duration": "6ba"}, 2, saved)


@pytest.mark.parametrize(
    "sections",
    [
        {
            "selection": {"selector": "rho", "warmup": 0},
            "model": {"config": LAYERS, "loss": "siglip"},
            "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 0.1}},
        },
        {
            "fsdp_config": {
                "activation_checkpointing": True,
                "reshard_after_forward": False,
            }
        },
    ],
    ids=["the learner embeds pools, SigLIP, clipped", "activations made twice, weights kept"],
)
def test_whatever_else_a_recipe_asks_for(tmp_path: Path, corpus: Path, sections: dict[str, Any]) -> None:
    tree = online(corpus, max_duration="3ba", **{"fsdp_config": {}, **sections})
    sharded = ranks_of(tmp_path / "sharded", tree, 2)
    plain = ranks_of(tmp_path / "plain", {**tree, "fsdp_config": None}, 2)
    assert_close_runs(sharded, plain)
    assert plain[0]["units"] == [] != sharded[0]["units"]


def test_batch_norms_statistics_are_the_first_ranks(tmp_path: Path, corpus: Path) -> None:
    tree = online(corpus, max_duration="3ba", fsdp_config={}, model={"config": RESNET})
    sharded = ranks_of(tmp_path / "sharded", tree, 2)
    plain = ranks_of(tmp_path / "plain", {**tree, "fsdp_config": None}, 2)
    assert "towers.visual.layer1.0" in sharded[0]["units"]
    assert_same(sharded[0]["model"], sharded[1]["model"])
    means = [name for name in sharded[0]["model"] if name.endswith("running_mean")]
    assert means
    for name in means:
        torch.testing.assert_close(sharded[0]["model"][name], plain[0]["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_tools_read_what_it_saved(tmp_path: Path, corpus: Path, kind: str) -> None:
    """Its logit scale has a dimension more than the model's that reads it. Of pieces torch makes one file."""
    saved = tmp_path / "saved"
    tree = online(corpus, fsdp_config={"state_dict_type": kind}, max_duration="3ba", save_interval="3ba")
    model = ranks_of(tmp_path / "run", tree, 2, f"save_folder={saved}")[0]["model"]
    assert model["towers.logit_scale"].shape == (1,)
    if kind == "sharded":
        with pytest.raises(ValueError, match=r"ep0-ba3 is a checkpoint in pieces; `python -m torch\..*dcp_to_torch"):
            find_checkpoint(saved)
        dcp_to_torch_save(saved / "ep0-ba3", saved / "whole.pt")
    file = saved / "ep0-ba3-rank0.pt" if kind == "full" else saved / "whole.pt"
    read = from_checkpoint(str(file))
    assert (read.selector, read.samples_seen) == ("clipcov", 3 * 8)
    for name, value in read.towers.state_dict().items():
        assert torch.equal(value, model[f"towers.{name}"].reshape(value.shape)), name


@pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")
@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"fsdp_config": {"sharding_strategy": "FULL_SHARD"}}, "fsdp_config.sharding_strategy is not one of FSDP2's"),
        ({"fsdp_config": {"load_monolith_rank0_only": True}}, "load_monolith_rank0_only is not one of FSDP2's"),
        ({"fsdp_config": {"state_dict_type": "local"}}, r"state_dict_type='local' is not one of \['full', 'sharded'\]"),
        ({"fsdp_config": {"verbose": 1}}, r"fsdp_config.verbose=1 is not one of \[False, True\]"),
        ({"fsdp_config": {}, "selection": {"embed": "teacher"}}, "embed='teacher' cannot copy a model sharded"),
        (
            {"fsdp_config": {}, "model": {"config": LAYERS, "activation_chunk": 2}},
            "set it to null, and fsdp_config.activation_check",
        ),
        (
            {"fsdp_config": {"activation_checkpointing": True}, "model": {"config": RESNET}},
            "activation_checkpointing=True is not exact with batch norm",
        ),
        (
            {"fsdp_config": {"mixed_precision": "DEFAULT"}, "model": {"config": RESNET}},
            "mixed_precision='DEFAULT' does not go with batch norm; set it to 'FULL'",
        ),
        (
            {
                "fsdp_config": {},
                "algorithms": {"gradient_clipping": {"clipping_type": "adaptive", "clipping_threshold": 0.1}},
            },
            "clipping_type='adaptive' does not clip what fsdp_config shards",
        ),
        (
            {"fsdp_config": {}, "algorithms": {"ema": {"half_life": "2ba"}}},
            "algorithms.ema cannot average what fsdp_config shards; leave one of them out",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    tmp_path: Path, corpus: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, online(corpus, **{"selection": {}, **sections}))


def test_blocks_are_modules_of_one_kind_in_a_row() -> None:
    blocks = {type(block).__name__ for block in blocks_of(build_towers(config=RESNET))}
    assert blocks == {"Bottleneck"}
    towers: Any = build_towers(config=LAYERS)
    rows = [*towers.visual.transformer.resblocks, *towers.transformer.resblocks]
    assert blocks_of(towers) == set(rows) and len(rows) == 4


def test_of_blocks_within_stages_the_blocks_are_units() -> None:
    """Nor are single layers, or rows that nobody calls."""

    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, 2), nn.ReLU())

    stages = nn.Sequential(nn.Sequential(block(), block()), nn.Sequential(block(), block()))
    rows = nn.ModuleList([nn.ModuleList([block()]), nn.ModuleList([block()])])
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert blocks_of(nn.ModuleList([stages, rows, layers])) == {*stages[0], *stages[1]}
