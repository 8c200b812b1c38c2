"""YAML -> Trainer: `composer recipe.yaml`, or `python -m clipcov_stream recipe.yaml key.sub=value`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, get_device, reproducibility

from clipcov_stream import build, evaluators
from clipcov_stream.about import About
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.alone import Alone
from clipcov_stream.checkpoints import (
    WholeCheckpoints,
    WholePieces,
    check_folder,
    check_kind,
    folder_of,
    newest_whole,
    restore_generators,
    signal_files_of_nodes,
)
from clipcov_stream.cli import find_recipe
from clipcov_stream.clock import check_duration, check_interval
from clipcov_stream.config import TrainConfig, load_config
from clipcov_stream.embed import check_resolution
from clipcov_stream.gallery import Gallery
from clipcov_stream.guard import SkippedShards
from clipcov_stream.identity import OtherRun
from clipcov_stream.ledger import Ledger
from clipcov_stream.metrics_file import MetricsFile
from clipcov_stream.model import ClampLogitScale
from clipcov_stream.patches import towers_with_patches
from clipcov_stream.preemption import SaveOnSignal, Told
from clipcov_stream.recorded import RecordedRecipe
from clipcov_stream.redact import redacted
from clipcov_stream.remote import is_remote
from clipcov_stream.sharded import AverageGradients, check_sharding, fsdp_of, make_shardable, saves_in_full
from clipcov_stream.stored_checkpoints import StoredCheckpoints, check_store, newest_stored, staging_of
from clipcov_stream.stream import PoolLoader
from clipcov_stream.weights import checked_loading
from clipcov_stream.zeroshot import ZeroShotHead

log = logging.getLogger(__name__)


class EndThreads(Callback):
    """Ends the training loader's threads, and then the run's locks, with the trainer, also after an exception."""

    def __init__(self, alone: Alone) -> None:
        self.alone = alone

    def close(self, state: State, logger: Logger) -> None:
        if isinstance(state.train_dataloader, PoolLoader):
            state.train_dataloader.close()

    def post_close(self) -> None:
        # In close other callbacks may still write.
        self.alone.release()


def saves_here(config: TrainConfig) -> bool:
    """Whether checkpoints are on a local disk."""
    return not is_remote(config.save_folder)


def saves_files_there(config: TrainConfig) -> bool:
    """Whether they are in an object store. In pieces, or on Databricks, they are Composer's matter."""
    store = is_remote(config.save_folder) and not str(config.save_folder).startswith("dbfs:/")
    return store and saves_in_full(config.fsdp_config)


def written_by(config: TrainConfig) -> Alone:
    """Locks on all that a run writes here."""
    folders = [folder for folder in (config.ledger, config.gallery) if folder is not None and not is_remote(folder)]
    saves = config.save_folder
    if saves and saves_files_there(config):
        saves = staging_of(saves)
    # Where there is no run_name Composer makes one up, which no other run has.
    if saves and not is_remote(saves) and (config.run_name or "{run_name}" not in saves):
        folders.append(str(folder_of(saves, config.run_name or "")))
    return Alone(folders, [config.metrics_file] if config.metrics_file and not is_remote(config.metrics_file) else [])


def resume_from(config: TrainConfig) -> tuple[str | None, bool, bool]:
    """Composer's load_path, load_weights_only and autoresume, the last of which is done here but for pieces in a store.

    Raises:
        ValueError: autoresume without a run_name or a save_folder, with torn checkpoints alone, or from a store that
            cannot be listed; a checkpoint in full of a run that saves pieces, or the other way round.
    """
    as_given = config.load_path, config.load_weights_only
    in_full = saves_in_full(config.fsdp_config)
    if config.load_path and not is_remote(config.load_path):
        check_kind(Path(config.load_path), in_full)
    if config.save_folder and saves_files_there(config):
        check_store(config.save_folder)
    elif not config.autoresume or (config.save_folder and not saves_here(config)):
        return *as_given, config.autoresume
    if not config.autoresume:
        return *as_given, False
    for name in ("run_name", "save_folder"):
        if getattr(config, name) is None:
            raise ValueError(f"autoresume=true needs a {name}, by which it finds its checkpoints")
    if saves_files_there(config):
        stored = newest_stored(str(config.save_folder), str(config.run_name))
        return (*as_given, False) if stored is None else (stored, False, False)
    newest = newest_whole(folder_of(str(config.save_folder), str(config.run_name)), in_full)
    # Nothing here: a logger that uploads checkpoints may have some, which Composer looks for.
    return (*as_given, True) if newest is None else (str(newest), False, False)


def ours_first(algorithms: Sequence[Any], event: Any) -> Sequence[Any]:
    """Algorithm pass that runs selection before anything that changes the batch.

    Composer runs AFTER_DATALOADER algorithms in reverse order of the list.
    """
    return sorted(algorithms, key=lambda algorithm: not isinstance(algorithm, ClipCov))


def build_trainer(config: TrainConfig) -> Trainer:
    """Everything in a recipe, checked before the first step.

    Raises:
        ValueError: whatever cannot work, named by its key; a live run that writes to the same places.
    """
    alone = written_by(config)
    with alone.released_on_error():
        return assembled(config, alone)


def assembled(config: TrainConfig, alone: Alone) -> Trainer:
    """The Trainer, which releases the locks when it is closed."""
    check_duration(config.max_duration, "max_duration")
    check_interval(config.eval_interval, "eval_interval")
    build.check_compile(config.compile_config)
    scheduler = build.build_scheduler(config.scheduler, config.max_duration)
    loggers = build.build_named("loggers", config.loggers)
    callbacks = build.build_named("callbacks", config.callbacks)
    algorithms = build.build_named("algorithms", config.algorithms)
    if config.fsdp_config is not None:
        check_sharding(config.fsdp_config, config.selection.embed, config.model.activation_chunk, algorithms)
    device = get_device(config.device)
    # Before any StreamingDataset: it would make, and destroy, a process group of its own.
    dist.initialize_dist(device, timeout=config.dist_timeout)
    alone.take()
    reproducibility.seed_all(config.seed)
    num_survivors = build.survivors_per_rank(config.stream, config.selection)
    microbatch = build.check_microbatch(config.device_train_microbatch_size, num_survivors)
    evals = evaluators.eval_sections(config.eval, config.eval_suite)
    tasks = {task for section in evals.values() for task in evaluators.tasks_of(section)}
    model = build.build_model(config.model, num_survivors, tasks & set(evaluators.TASKS))
    fsdp = fsdp_of(config.fsdp_config)
    if fsdp is not None:
        make_shardable(model.towers, fsdp)
    tokenizer = build.tokenizer_of(model.towers, config.model)
    config = replace(config, selection=build.with_online_proxy(config.selection, model.towers))
    embedder = build.columns_embedder(config.stream) if config.selection.embed == "columns" else None
    transform = build.transform_of(model.towers, config.stream.min_scale)
    selection = build.build_selection(config.selection, transform, tokenizer, embedder)
    selection.dist_timeout = config.dist_timeout
    # As it came out, for who reads the run's records.
    how = {"run_ahead": selection.run_ahead, "lag_delay": selection.lag_delay}
    config = replace(config, selection=replace(config.selection, **how))
    towers = model.towers if selection.proxy is None else selection.proxy
    towers_with_patches(towers, selection.embed_patch_dropout)
    check_resolution(towers, selection.embed_resolution)
    columns = config.selection.embed == "columns" and selection.uses_embeddings
    deferred = build.defers(config.stream, selection, build.image_size_of(model.towers))
    options = (config.seed, deferred, selection.scoring_size)
    loader = build.build_stream(config.stream, model.towers, tokenizer, columns, *options)
    splits, prompts = evaluators.build_evaluators(evals, model.towers, tokenizer)
    if config.metrics_file:
        loggers.append(MetricsFile(config.metrics_file))
        callbacks.append(About(config.metrics_file, config))
    chosen = {name: getattr(config.selection, name) for name in ("selector", "embed", "scope", "filter_ratio")}
    if config.ledger:
        callbacks.append(Ledger(config.ledger, seed=config.seed, **chosen))
    if config.gallery:
        callbacks.append(Gallery(config.gallery, config.gallery_interval, seed=config.seed, **chosen))
    load_path, load_weights_only, autoresume = resume_from(config)
    saving: dict[str, Any] = {"save_interval": config.save_interval, "overwrite": config.save_overwrite}
    there = saves_files_there(config)
    if config.save_folder and there:
        callbacks.append(StoredCheckpoints(config.save_folder, **saving))
    elif config.save_folder and saves_here(config):
        keep = config.save_num_checkpoints_to_keep
        kind = WholeCheckpoints if saves_in_full(config.fsdp_config) else WholePieces
        callbacks.append(kind(config.save_folder, num_checkpoints_to_keep=keep, **saving))
    parallelism: dict[str, Any] = {} if fsdp is None else {"parallelism_config": {"fsdp": fsdp}}
    with checked_loading(), signal_files_of_nodes():
        trainer = Trainer(
            model=model,
            train_dataloader=loader,
            # Last in the list runs first at AFTER_DATALOADER; the pass makes sure of it.
            algorithms=[*algorithms, selection],
            algorithm_passes=[ours_first],
            optimizers=build.build_optimizer(config.optimizer, model),
            schedulers=scheduler,
            eval_dataloader=splits or None,
            eval_interval=config.eval_interval if splits else 0,
            callbacks=[
                ClampLogitScale(),
                EndThreads(alone),
                SaveOnSignal(),
                SkippedShards(),
                ZeroShotHead(prompts),
                RecordedRecipe(config),
                *([] if fsdp is None else [AverageGradients()]),
                *callbacks,
            ],
            loggers=loggers or None,
            max_duration=config.max_duration,
            device=device,
            device_train_microbatch_size=microbatch,
            precision=config.precision,
            seed=config.seed,
            run_name=config.run_name,
            save_folder=None if there else config.save_folder,
            save_interval=config.save_interval,
            save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
            save_overwrite=config.save_overwrite,
            load_path=load_path,
            load_weights_only=load_weights_only,
            autoresume=autoresume,
            progress_bar=config.progress_bar,
            log_to_console=config.log_to_console,
            console_log_interval=config.console_log_interval,
            compile_config=config.compile_config,
            dist_timeout=config.dist_timeout,
            **parallelism,
        )
    check_folder(trainer)
    restore_generators(trainer)
    return trainer


def main(path: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Command line: the recipe's path or a shipped one's name, then overrides `key.sub=value`.

    With `path` the recipe itself is the script, and all arguments are overrides.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if path is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise SystemExit("usage: composer [-n RANKS] [-m clipcov_stream] RECIPE.yaml [key.sub=value ...]")
        path = arguments.pop(0)
    # The last batch of an evaluation split is shorter than the others; Composer warns of it every time.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length")
    # Remarks on odd files; what cannot be decoded is counted.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if "GROUP_RANK" in os.environ:  # torchrun's name for what Composer asks for as
        os.environ.setdefault("NODE_RANK", os.environ["GROUP_RANK"])
    try:
        config = load_config(find_recipe(path), arguments)
        trainer = build_trainer(config)
    except ValueError as error:
        if os.environ.get("CLIPCOV_TRACEBACK"):
            raise
        raise SystemExit(f"error: {redacted(error)}") from error
    try:
        train(trainer, config.eval_first and bool(trainer.state.evaluators))
    except Told:
        # The launcher's may come until the very end, and would cut it short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        trainer.close()
        leave_group()
        raise
    except OtherRun as error:  # what only a first pool tells, on every rank
        trainer.engine.close()
        if os.environ.get("CLIPCOV_TRACEBACK"):
            raise
        raise SystemExit(f"error: {redacted(error)}") from error
    except SystemExit:  # of this rank: another may be where it does not meet a barrier
        trainer.engine.close()
        raise
    except BaseException:
        for saver in trainer.state.callbacks:
            if isinstance(saver, StoredCheckpoints):
                saver.finish(trainer.state)  # here: as Python ends nothing can be uploaded
        raise
    text = summary(trainer, config)
    trainer.close()
    if dist.get_global_rank() == 0:
        print(text, flush=True)
    leave_group()


def train(trainer: Trainer, eval_first: bool = False) -> None:
    """Train until `max_duration`, from wherever the trainer stands.

    Of a run that was stopped after its last checkpoint what comes after it is made up for, the last metrics and
    evaluation: Composer's `fit` would raise, and a job that is started again until it succeeds never would.
    """
    state = trainer.state
    if state.max_duration is not None and state.timestamp >= state.max_duration:
        log.warning("nothing is left to train: the checkpoint is of max_duration=%s", state.max_duration)
        state.previous_timestamp = state.timestamp  # None would be that of a run which has not begun: no evaluation
        trainer._train_loop()  # what fit does once it has checked its arguments
        return
    step = int(state.timestamp.batch)
    if step and dist.get_global_rank() == 0:
        print(f"{state.run_name}: goes on from step {step:,}", flush=True)
    # A resumed run has been evaluated at its start.
    if eval_first and not step:
        trainer.eval()
    trainer.fit()


def summary(trainer: Trainer, config: TrainConfig) -> str:
    """How a run ended: steps, samples, the last evaluation's figures, and where things are."""
    state = trainer.state
    streamed = int(state.timestamp.sample)
    seen = next(one for one in state.algorithms if isinstance(one, ClipCov)).samples_seen
    lines = [
        f"{state.run_name}: {int(state.timestamp.batch):,} steps, {streamed:,} samples streamed, {seen:,} seen",
        *(
            f"  {name}: {value:.4f}"
            for file in trainer.logger.destinations
            if isinstance(file, MetricsFile)
            for name, value in sorted(file.evaluated.items())
        ),
    ]
    if config.save_folder:
        here = folder_of(config.save_folder, state.run_name) if saves_here(config) else config.save_folder
        lines.append(f"  checkpoints: {redacted(here)}")
    if config.metrics_file:
        lines.append(f"  metrics: {config.metrics_file}")
    return "\n".join(lines)


def leave_group() -> None:
    """Destroy the process group, if there is one, once gloo's threads have let go of their last tensors.

    torch 2.7 joins those threads while it holds the interpreter's lock; a thread that still holds a tensor waits for
    that lock to drop it, and both wait for ever. A moment's sleep gives the lock away.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
