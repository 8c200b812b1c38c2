"""YAML -> Trainer: `composer recipe.yaml`, or `python -m clipcov_stream recipe.yaml key.sub=value`."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist, get_device, reproducibility

from clipcov_stream import build
from clipcov_stream.about import About
from clipcov_stream.algorithm import ClipCov
from clipcov_stream.clock import check_duration
from clipcov_stream.config import TrainConfig, load_config
from clipcov_stream.gallery import Gallery
from clipcov_stream.ledger import Ledger
from clipcov_stream.model import ClampLogitScale
from clipcov_stream.stream import PoolLoader
from clipcov_stream.zeroshot import ZeroShotHead


class MetricsFile(LoggerDestination):
    """Appends every step's metrics to a JSON-lines file, on rank 0.

    Each line has `step`, the optimizer steps done, and the metrics logged since the last line. Every evaluation adds a
    line for its step. A resumed run appends; of two lines for one step the later is the true one.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.pending: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.pending.update({key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()})

    def batch_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def eval_end(self, state: State, logger: Logger) -> None:
        self.pending.update({"samples_streamed": int(state.timestamp.sample)})
        # Before the next step's metrics join: evaluations come after batch_end, after epoch_end and on their own.
        self.flush(int(state.timestamp.batch))

    def fit_end(self, state: State, logger: Logger) -> None:
        self.flush(int(state.timestamp.batch))

    def flush(self, step: int) -> None:
        if self.pending and dist.get_global_rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **self.pending}) + "\n")
        self.pending = {}


class CompleteEpochs(Callback):
    """Raises when an epoch yields fewer pools than its loader promises.

    Streaming reports a shard that cannot be read in a background thread and ends the epoch there; without this a run
    would train on what is left, in silence.
    """

    def epoch_end(self, state: State, logger: Logger) -> None:
        before = state.previous_timestamp
        if before is None or state.dataloader_len is None:
            return
        seen, promised = int(before.batch_in_epoch), int(state.dataloader_len)
        if seen < promised:
            raise RuntimeError(
                f"epoch {int(before.epoch)} ended after {seen} of {promised} pools: a shard could not be read; the log "
                "above names it"
            )


class EndThreads(Callback):
    """Ends the training loader's threads with the trainer, also after an exception."""

    def close(self, state: State, logger: Logger) -> None:
        if isinstance(state.train_dataloader, PoolLoader):
            state.train_dataloader.close()


def ours_first(algorithms: Sequence[Any], event: Any) -> Sequence[Any]:
    """Algorithm pass that runs selection before anything that changes the batch.

    Composer runs AFTER_DATALOADER algorithms in reverse order of the list.
    """
    return sorted(algorithms, key=lambda algorithm: not isinstance(algorithm, ClipCov))


def build_trainer(config: TrainConfig) -> Trainer:
    """Everything in a recipe, checked before the first step.

    Raises:
        ValueError: whatever cannot work, named by its key.
    """
    check_duration(config.max_duration, "max_duration")
    scheduler = build.build_scheduler(config.scheduler, config.max_duration)
    loggers = build.build_named("loggers", config.loggers)
    callbacks = build.build_named("callbacks", config.callbacks)
    algorithms = build.build_named("algorithms", config.algorithms)
    if config.fsdp_config and config.selection.embed == "teacher":
        raise ValueError(
            "selection.embed='teacher' cannot copy a model sharded by fsdp_config; use embed='proxy' or 'columns'"
        )
    device = get_device(config.device)
    # Before any StreamingDataset: it would make, and destroy, a process group of its own.
    dist.initialize_dist(device, timeout=config.dist_timeout)
    reproducibility.seed_all(config.seed)
    num_survivors = build.survivors_per_rank(config.stream, config.selection)
    microbatch = build.check_microbatch(config.device_train_microbatch_size, num_survivors)
    tasks = {task for section in config.eval.values() for task in section.tasks}
    model = build.build_model(config.model, num_survivors, tasks & set(build.TASKS))
    tokenizer = build.tokenizer_of(model.towers, config.model)
    embedder = build.columns_embedder(config.stream) if config.selection.embed == "columns" else None
    selection = build.build_selection(config.selection, build.transform_of(model.towers), tokenizer, embedder)
    selection.dist_timeout = config.dist_timeout
    columns = config.selection.embed == "columns" and selection.uses_embeddings
    deferred = build.defers(config.stream, selection)
    options = (config.seed, deferred, selection.scoring_size)
    loader = build.build_stream(config.stream, model.towers, tokenizer, columns, *options)
    evaluators, prompts = build.build_evaluators(config.eval, model.towers, tokenizer)
    if config.metrics_file:
        loggers.append(MetricsFile(config.metrics_file))
        callbacks.append(About(config.metrics_file, config))
    chosen = {name: getattr(config.selection, name) for name in ("selector", "embed", "scope", "filter_ratio")}
    if config.ledger:
        callbacks.append(Ledger(config.ledger, seed=config.seed, **chosen))
    if config.gallery:
        callbacks.append(Gallery(config.gallery, config.gallery_interval, seed=config.seed, **chosen))
    parallelism: dict[str, Any] = {"parallelism_config": {"fsdp": config.fsdp_config}} if config.fsdp_config else {}
    return Trainer(
        model=model,
        train_dataloader=loader,
        # Last in the list runs first at AFTER_DATALOADER; the pass makes sure of it.
        algorithms=[*algorithms, selection],
        algorithm_passes=[ours_first],
        optimizers=build.build_optimizer(config.optimizer, model),
        schedulers=scheduler,
        eval_dataloader=evaluators or None,
        eval_interval=config.eval_interval if evaluators else 0,
        callbacks=[
            ClampLogitScale(),
            CompleteEpochs(),
            EndThreads(),
            ZeroShotHead(prompts),
            *callbacks,
        ],
        loggers=loggers or None,
        max_duration=config.max_duration,
        device=device,
        device_train_microbatch_size=microbatch,
        precision=config.precision,
        seed=config.seed,
        run_name=config.run_name,
        save_folder=config.save_folder,
        save_interval=config.save_interval,
        save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        save_overwrite=config.save_overwrite,
        load_path=config.load_path,
        load_weights_only=config.load_weights_only,
        autoresume=config.autoresume,
        progress_bar=config.progress_bar,
        log_to_console=config.log_to_console,
        console_log_interval=config.console_log_interval,
        compile_config=config.compile_config,
        dist_timeout=config.dist_timeout,
        **parallelism,
    )


def main(path: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Command line: the recipe's path, unless the recipe itself is the script, then overrides `key.sub=value`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if path is None:
        if not arguments or arguments[0] in ("-h", "--help"):
            raise SystemExit("usage: composer [-n RANKS] [-m clipcov_stream] RECIPE.yaml [key.sub=value ...]")
        path = arguments.pop(0)
    # The last batch of an evaluation split is shorter than the others; Composer warns of it every time.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length")
    try:
        config = load_config(path, arguments)
        trainer = build_trainer(config)
    except ValueError as error:
        if os.environ.get("CLIPCOV_TRACEBACK"):
            raise
        raise SystemExit(f"error: {error}") from error
    if config.eval_first and config.eval:
        trainer.eval()
    trainer.fit()
    trainer.close()
    leave_group()


def leave_group() -> None:
    """Destroy the process group, if there is one, once gloo's threads have let go of their last tensors.

    torch 2.7 joins those threads while it holds the interpreter's lock; a thread that still holds a tensor waits for
    that lock to drop it, and both wait for ever. A moment's sleep gives the lock away.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
