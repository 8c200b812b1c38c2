"""ClipModel: gradients equal the full batch's in any split, checkpoints load without running code."""

import math
import os
import pickle
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as torch_dist
import torch.multiprocessing as mp
from ports import free_port, leave_group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

with warnings.catch_warnings():
    # Composer imports mcli, which imports what websockets has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from composer import Trainer

    from clipcov_stream.build import build_optimizer
    from clipcov_stream.config import OptimizerConfig
    from clipcov_stream.model import ClampLogitScale, ClipModel, build_towers, forward_flops, parameter_groups

CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 6, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
}
ATTENTION_POOL: dict[str, Any] = {
    **CONFIG,
    "embed_dim": 64,
    "custom_text": True,
    "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
}
BATCH_NORM = {**CONFIG, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}}
NUM_ROWS = 12


def vision_of(**changes: str) -> dict[str, Any]:
    """ATTENTION_POOL, its image tower changed."""
    return {**ATTENTION_POOL, "vision_cfg": {**ATTENTION_POOL["vision_cfg"], **changes}}


def towers_of(loss: str = "clip", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_towers(config=CONFIG, loss=loss)


def batch_of(num_rows: int = NUM_ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randn(num_rows, 3, 8, 8, generator=generator),
        "text": torch.randint(1, 32, (num_rows, 6), generator=generator),
    }


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of the model's own loss, by parameter name."""
    own = model.module if isinstance(model, DistributedDataParallel) else model
    model.zero_grad()
    own.loss(model(batch), batch).backward()
    return {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert "towers.logit_scale" in wanted and wanted["towers.logit_scale"].abs() > 1e-4
    for scale in ("towers.logit_scale", "towers.logit_bias"):
        if scale in wanted:
            torch.testing.assert_close(got[scale], wanted[scale], rtol=1e-4, atol=1e-6)
    flat, full = (torch.cat([grads[name].flatten() for name in wanted]).double() for grads in (got, wanted))
    assert torch.cosine_similarity(flat, full, dim=0) == pytest.approx(1, abs=1e-4)
    assert flat.norm() / full.norm() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_loss_is_the_textbook_formula(loss: str) -> None:
    model, batch = ClipModel(towers_of(loss), loss), batch_of()
    outputs = model(batch)
    value = float(model.loss(outputs, batch).detach())
    image, text = (outputs[key].detach().double().numpy() for key in ("image_features", "text_features"))
    logits = image @ text.T * float(outputs["logit_scale"].detach())
    if loss == "clip":
        rows, columns = (np.log(np.exp(logits).sum(axis)) for axis in (1, 0))
        expected = ((rows + columns) / 2 - np.diag(logits)).mean()
    else:
        signs = 2 * np.eye(NUM_ROWS) - 1
        logits = logits + float(outputs["logit_bias"].detach())
        expected = np.log1p(np.exp(-signs * logits)).sum() / NUM_ROWS
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("chunk", [1, 5, 11, 12, 40])
def test_recomputed_chunks_do_not_change_the_gradient(loss: str, chunk: int) -> None:
    towers, batch = towers_of(loss), batch_of()
    wanted = gradients(ClipModel(towers, loss), batch)
    assert_same_gradients(gradients(ClipModel(towers, loss, activation_chunk=chunk), batch), wanted)


def test_microbatches_would_change_the_gradient() -> None:
    # The reason activation_chunk exists; if this ever held, the comparisons above would show nothing.
    model, batch = ClipModel(towers_of()), batch_of()
    wanted = gradients(model, batch)
    halves = [gradients(model, {key: value[part] for key, value in batch.items()}) for part in (slice(6), slice(6, 12))]
    flat, full = (
        torch.cat([grads[name].flatten() for name in wanted])
        for grads in ({name: halves[0][name] + halves[1][name] for name in wanted}, wanted)
    )
    assert torch.cosine_similarity(flat, full, dim=0) < 0.99


def gradients_on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch_dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    half = {key: value.chunk(2)[rank] for key, value in batch_of().items()}
    found = {}
    for loss in ("clip", "siglip"):
        for chunk in (None, 4):
            model = ClipModel(towers_of(loss), loss, activation_chunk=chunk, num_survivors=NUM_ROWS // 2)
            found[f"{loss} {chunk}"] = gradients(DistributedDataParallel(model), half)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    leave_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(gradients_on_rank, (free_port(), str(folder)), nprocs=2, join=False)
    deadline = time.monotonic() + 120
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail("two gloo ranks did not finish within 120 s")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_two_ranks_have_the_full_batch_gradient(
    loss: str, chunk: int | None, two_ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    wanted = gradients(ClipModel(towers_of(loss), loss), batch_of())
    for found in two_ranks:
        assert_same_gradients(found[f"{loss} {chunk}"], wanted)


def test_siglip_starts_from_its_own_scale_and_bias() -> None:
    towers = towers_of("siglip")
    assert towers.logit_scale.item() == pytest.approx(math.log(10))
    assert towers.logit_bias.item() == -10
    own = build_towers(config={**CONFIG, "init_logit_bias": -3.0}, loss="siglip")
    assert own.logit_bias.item() == -3
    assert towers_of("clip").logit_bias is None


def test_logits_stay_in_float32_under_autocast() -> None:
    model, batch = ClipModel(towers_of()), batch_of()
    generator = torch.Generator().manual_seed(2)
    # Neighbours closer than bf16 can tell apart, at the largest scale.
    centre = torch.randn(8, generator=generator)
    image, text = (
        nn.functional.normalize(centre + 0.02 * torch.randn(NUM_ROWS, 8, generator=generator), dim=1) for _ in range(2)
    )
    scale = torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoded = model(batch)
        blurred = (scale * image @ text.T).dtype
        loss = model.loss({"image_features": image, "text_features": text, "logit_scale": scale}, batch)
        assert model.loss(encoded, batch).dtype == torch.float32
    assert blurred == torch.bfloat16
    logits = 100 * image.double() @ text.double().T
    expected = ((logits.logsumexp(0) + logits.logsumexp(1)) / 2 - logits.diagonal()).mean()
    rounded = logits.bfloat16().double()
    wrong = ((rounded.logsumexp(0) + rounded.logsumexp(1)) / 2 - rounded.diagonal()).mean()
    assert abs(wrong - expected) > 1e-3
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_loss_refuses_a_whole_pool() -> None:
    model, batch = ClipModel(towers_of(), num_survivors=4), batch_of()
    with pytest.raises(RuntimeError, match=r"got 12 samples where 4 survivors.*ClipCov.*device_train_microbatch_size"):
        model.loss(model(batch), batch)
    batch = {key: value[:4] for key, value in batch.items()}
    assert model.loss(model(batch), batch).isfinite()


def test_loss_refuses_a_part_of_an_unselected_pool() -> None:
    # Without selection, Composer would cut a pool of 12 into microbatches of the 4 rows that are expected.
    model, batch = ClipModel(towers_of(), num_survivors=4), batch_of(4)
    outputs = model(batch)
    with pytest.raises(RuntimeError, match=r"got 4 samples of an unselected pool .*ClipCov"):
        model.loss(outputs, {**batch, "valid": torch.ones(4, dtype=torch.bool)})


def test_a_model_that_writes_captions_is_refused() -> None:
    towers = open_clip.CoCa(**CONFIG, multimodal_cfg={"context_length": 6, "width": 16, "heads": 2, "layers": 1})
    with pytest.raises(ValueError, match=r"model: a CoCa, .* use a model with two towers"):
        ClipModel(towers)


def test_chunks_with_batch_norm_are_refused() -> None:
    towers = build_towers(config=BATCH_NORM)
    ClipModel(towers)
    with pytest.raises(ValueError, match="activation_chunk is not exact with batch norm"):
        ClipModel(towers, activation_chunk=4)
    with pytest.raises(ValueError, match="activation_chunk=0 must be at least 1"):
        ClipModel(towers_of(), activation_chunk=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B-23"}, r"model\.name='ViT-B-23'.*did you mean .*ViT-B-32"),
        ({"name": "?"}, r"open_clip\.list_models\(\)"),
        ({"config": CONFIG, "loss": "sigclip"}, r"model\.loss='sigclip' is not one of \['clip', 'siglip'\]"),
        ({}, "either a name or a config"),
        ({"name": "ViT-B-32", "config": CONFIG}, "either a name or a config"),
        ({"config": {**CONFIG, "depth": 3}}, "open_clip cannot build.*depth"),
        ({"config": {"embed_dim": 8}}, "open_clip cannot build"),
        ({"config": vision_of(timm_proj="linear")}, "open_clip cannot build.*Cannot currently add attention pooling"),
        ({"config": vision_of(timm_proj="cubic")}, r"open_clip cannot build.*AssertionError\(\)"),
        ({"config": CONFIG, "pretrained": "no/such.pt"}, r"checkpoint 'no/such\.pt' cannot be loaded"),
    ],
)
def test_a_model_that_cannot_be_built_says_why(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_towers(**arguments)


def test_an_attention_pool_is_counted_too() -> None:
    """As SigLIP's and PE-Core's image towers end: beyond the mean of their tokens, by hand."""
    configs = (ATTENTION_POOL, vision_of(timm_pool="avg"))
    pooled, plain = (forward_flops(build_towers(config=config), 160, 6) for config in configs)
    tokens, width = 100, 64
    # Key and value of every token; of the one query its own matrix, the output's and an MLP three times as wide.
    assert pooled - plain == 2 * (tokens * 2 * width**2 + 2 * tokens * width + (2 + 2 * 3) * width**2)


def test_unknown_loss_of_a_model() -> None:
    with pytest.raises(ValueError, match=r"model\.loss='softmax' is not one of"):
        ClipModel(towers_of(), loss="softmax")


def assert_same_weights(towers: nn.Module, wanted: nn.Module) -> None:
    assert towers.state_dict().keys() == wanted.state_dict().keys()
    for name, value in towers.state_dict().items():
        assert torch.equal(value, wanted.state_dict()[name]), name


@pytest.mark.parametrize("layout", ["plain", "open_clip", "data parallel"])
def test_open_clip_checkpoints_load(tmp_path: Path, layout: str) -> None:
    towers = towers_of(seed=3)
    saved = {
        "plain": towers.state_dict(),
        "open_clip": {"epoch": 1, "name": "run", "state_dict": towers.state_dict()},
        "data parallel": {"state_dict": {f"module.{name}": value for name, value in towers.state_dict().items()}},
    }[layout]
    torch.save(saved, tmp_path / "towers.pt")
    torch.manual_seed(4)
    assert_same_weights(build_towers(config=CONFIG, pretrained=str(tmp_path / "towers.pt")), towers)


def fit_one_step(model: ClipModel, **options: object) -> None:
    batch = batch_of(4)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(rows, batch_size=4),
        optimizers=torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-2),
        max_duration="1ba",
        device="cpu",
        progress_bar=False,
        **options,
    )
    trainer.fit()
    trainer.close()


# Composer leaves a TemporaryDirectory of its console logger to the garbage collector.
composer_runs = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")


@composer_runs
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_composer_checkpoints_load(tmp_path: Path, loss: str) -> None:
    model = ClipModel(towers_of(loss), loss)
    fit_one_step(model, save_folder=str(tmp_path), save_interval="1ba")
    path = tmp_path / "ep0-ba1-rank0.pt"
    # The point of the allowlist: Composer's checkpoints are more than tensors.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    loaded = build_towers(config=CONFIG, pretrained=str(path), loss=loss)
    assert_same_weights(loaded, model.towers)
    assert not torch.equal(loaded.logit_scale, towers_of(loss).logit_scale), "the step changed nothing"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["state_dict", "weights", "rng", "top"])
def test_a_checkpoint_that_runs_code_is_refused_before_it_runs(tmp_path: Path, where: str) -> None:
    owned, path, weights = tmp_path / "owned", tmp_path / "bad.pt", towers_of().state_dict()
    saved = {
        "state_dict": {"state_dict": Payload(owned)},
        "weights": {**weights, "payload": Payload(owned)},
        "rng": {
            "state": {"model": {f"towers.{name}": value for name, value in weights.items()}},
            "rng": [Payload(owned)],
        },
        "top": Payload(owned),
    }[where]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"bad\.pt' cannot be loaded"):
        build_towers(config=CONFIG, pretrained=str(path))
    assert not owned.exists()
    torch.load(path, weights_only=False)
    assert owned.exists(), "the payload is harmless: the test above shows nothing"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    torch.save(towers_of("siglip").state_dict(), tmp_path / "siglip.pt")
    with pytest.raises(ValueError, match=r"(?s)siglip\.pt.*logit_bias"):
        build_towers(config=CONFIG, pretrained=str(tmp_path / "siglip.pt"))
    torch.save(towers_of().state_dict(), tmp_path / "towers.pt")
    wider = {**CONFIG, "embed_dim": 16}
    with pytest.raises(ValueError, match=r"another model's: 2 of \d+ have other shapes, .*Name the model") as caught:
        build_towers(config=wider, pretrained=str(tmp_path / "towers.pt"))
    assert len(str(caught.value)) < 500


def test_every_parameter_is_in_one_group_and_only_matrices_decay() -> None:
    model = ClipModel(towers_of("siglip"), "siglip")
    groups = parameter_groups(model, weight_decay=0.3)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        gain = name.endswith(("bias", "logit_scale")) or ".ln_" in name or parameter.ndim < 2
        assert decay[id(parameter)] == (0 if gain else 0.3), name
    assert set(decay.values()) == {0, 0.3}


def test_a_decoupled_step_without_gradients_takes_the_decay_off() -> None:
    towers = towers_of()
    weight = towers.visual.proj
    before = weight.detach().clone()
    optimizer = build_optimizer(OptimizerConfig(name="decoupled_adamw"), ClipModel(towers))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 1e-5), rtol=1e-7, atol=0)


def test_frozen_parameters_are_in_no_group() -> None:
    model = ClipModel(towers_of())
    model.towers.visual.requires_grad_(False)
    grouped = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


@composer_runs
@pytest.mark.parametrize(("start", "end"), [(math.log(100) + 1, math.log(100)), (-1.0, 0.0)])
def test_logit_scale_is_clamped_after_a_step(start: float, end: float) -> None:
    model = ClipModel(towers_of())
    with torch.no_grad():
        model.logit_scale.fill_(start)
    fit_one_step(model, callbacks=[ClampLogitScale()])
    assert model.logit_scale.item() == pytest.approx(end, abs=1e-6)


def test_evaluation_batches_may_lack_captions() -> None:
    model, batch = ClipModel(towers_of(), activation_chunk=5).eval(), batch_of()
    with torch.no_grad():
        outputs = model.eval_forward({"image": batch["image"]})
        torch.testing.assert_close(outputs["image_features"], model.encode_image(batch["image"]))
        torch.testing.assert_close(model(batch)["text_features"], model.encode_text(batch["text"]))
    assert "text_features" not in outputs
    assert outputs["image_features"].norm(dim=1) == pytest.approx(np.ones(NUM_ROWS), abs=1e-5)
