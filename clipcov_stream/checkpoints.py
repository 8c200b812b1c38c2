"""Checkpoints that are there in full or not at all, and the newest of them.

Composer writes a checkpoint under its final name, removes the link to the one before, and makes a new link. A process
killed within leaves a torn file, or no link, from which `autoresume` starts the run anew in silence; a whole file
without its link is one that Composer then refuses to write beside. Here a file gets its name once it is on the disk,
the newest whole one is looked for among the files themselves, and what is torn is set aside, with a warning.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
import weakref
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import (
    checkpoint,
    dist,
    ensure_folder_has_no_conflicting_files,
    format_name_with_dist,
    reproducibility,
)

from clipcov_stream import pieces
from clipcov_stream.pieces import fault_of_pieces, pieces_in, remove_unfinished

NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
PARTIAL = ".partial-"
"""What the name of a file begins with while it is written; the rest is its own, whose suffix says how to write it."""


class WholeCheckpoints(CheckpointSaver):
    """Composer's CheckpointSaver for a local folder, whose files are whole if they are there.

    A file is written beside its place, flushed to the disk and renamed: one fsync per checkpoint. A resumed run counts
    the folder's files among those of which `num_checkpoints_to_keep` are kept; Composer's own forgets them.

    Args:
        folder: local; `{run_name}` is filled in.
        kwargs: CheckpointSaver's.
    """

    def __init__(self, folder: str, **kwargs: Any) -> None:
        # Nothing is uploaded, unless a logger that does is among the Trainer's.
        names = {"remote_file_name": f"{folder}/ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt"}
        names["latest_remote_file_name"] = f"{folder}/latest-rank{{rank}}.pt"
        super().__init__(folder=folder, **{**names, **kwargs})

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        if dist.get_global_rank() == 0:
            folder = folder_of(self.folder, state.run_name)
            for path in folder.glob(f"{PARTIAL}*"):
                path.unlink()
            # Those that the checkpoint knows of, itself among them: others in the folder are another run's.
            ours = {Path(name).name for name in self.all_saved_checkpoints_to_timestamp}
            self.saved_checkpoints[:] = [str(path) for path in reversed(checkpoints_in(folder)) if path.name in ours]

    def place(self, run_name: str) -> str:
        """The folder, for messages."""
        return str(folder_of(self.folder, run_name))

    def later(self, state: State) -> str:
        """The name of the newest checkpoint if it is of a step that is still to come; "" if there is none.

        Raises:
            OSError: the folder cannot be looked at.
        """
        folder = folder_of(self.folder, state.run_name)
        try:
            ensure_folder_has_no_conflicting_files(folder, self.filename.filename, state.timestamp)
        except FileExistsError:
            return checkpoints_in(folder)[0].name
        return ""

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        # One that was written again would be removed twice.
        self.saved_checkpoints[:] = dict.fromkeys(self.saved_checkpoints)
        super()._rotate_checkpoints(sharding_enabled)

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        with whole_writes():
            super()._save_checkpoint(state, logger)


class WholePieces(WholeCheckpoints):
    """The same of a learner that is saved in pieces: each checkpoint is a folder, and whole once the list is there."""

    # By which its state is found in checkpoints, and pieces are loaded with all that is asked for or not at all: so
    # that those of Composer's own saver are, too.
    __qualname__ = CheckpointSaver.__qualname__

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        if dist.get_global_rank() == 0:
            folder = folder_of(self.folder, state.run_name)
            remove_unfinished(folder)
            ours = {Path(name).parent.name for name in self.all_saved_checkpoints_to_timestamp}
            found = [path / pieces.FIRST for path in reversed(pieces_in(folder)) if path.name in ours]
            self.saved_checkpoints[:] = [str(path) for path in found]

    def later(self, state: State) -> str:
        newest = next((path.name for path in pieces_in(folder_of(self.folder, state.run_name))), "")
        return newest if pieces.order_of(newest)[0] > int(state.timestamp.batch) else ""

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        # Where `overwrite` writes over one: until all pieces are new, it is none.
        if dist.get_global_rank() == 0:
            name = checkpoint.get_save_filename(state, self.filename.format(state, keep_placeholders=True))
            Path(name).with_name(pieces.LIST).unlink(missing_ok=True)
        dist.barrier()
        super()._save_checkpoint(state, logger)


class Generators(Callback):
    """Sets torch's, NumPy's and Python's random number generators to a checkpoint's before the first pool is asked for,
    where the data set goes on by itself.

    Where it does not, Composer reads pools and throws them away, and sets the generators before the last of these: what
    shuffles them may have drawn from the generators before.

    Args:
        trainer: that goes on from a checkpoint.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = weakref.ref(trainer)

    def before_dataloader(self, state: State, logger: Logger) -> None:
        trainer = self.trainer()
        goes_on = "train" in state.dataset_resumption
        if trainer is not None and trainer._rng_state is not None and (goes_on or not trainer.spin_dataloaders):
            reproducibility.load_rng_state(trainer._rng_state)
            trainer._rng_state = None


def restore_generators(trainer: Trainer) -> None:
    """Have a Trainer that was just made from a checkpoint go on with the checkpoint's generators.

    Composer 0.32 does that by itself where an epoch begins, and in the midst of one as it throws away the last pool
    that was trained on. A StreamingDataset resumes without any to throw away, and what draws from the generators, such
    as dropout, would draw other numbers than in a run that was not stopped.
    """
    if trainer._rng_state is not None and int(trainer.state.timestamp.batch_in_epoch):
        trainer.state.callbacks.append(Generators(trainer))


@contextmanager
def signal_files_of_nodes() -> Iterator[None]:
    """Within the block each node has a file of its own by which its ranks wait for its first.

    Composer 0.32 gives the files of all nodes one name: in a folder that nodes share, as for `autoresume` the
    checkpoints' is, the second node to remove it fails, and the run with it.
    """
    of_all = dist.get_node_signal_file_name
    dist.get_node_signal_file_name = lambda *args, **kwargs: f"{of_all(*args, **kwargs)}_{dist.get_node_rank()}"
    try:
        yield
    finally:
        dist.get_node_signal_file_name = of_all


def check_folder(trainer: Trainer) -> None:
    """Raise ValueError, on all ranks, if the folder has a checkpoint of a step that the run is still to come to, or
    does not let itself be looked at.

    Composer looks too, but at the start of `fit`: by then an evaluation may have set the metrics of the run that wrote
    it aside.
    """
    state = trainer.state
    for saver in state.callbacks:
        if not isinstance(saver, CheckpointSaver) or saver.overwrite:
            continue
        is_whole = isinstance(saver, WholeCheckpoints)
        place = saver.place(state.run_name) if is_whole else str(folder_of(saver.folder, state.run_name))
        answer = ["", ""]
        if dist.get_global_rank() == 0 and is_whole:
            try:
                answer[0] = saver.later(state)
            except OSError as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1]:
            raise ValueError(answer[1])
        if answer[0]:
            raise ValueError(
                f"save_folder {place!r} has {answer[0]}, but training begins after step "
                f"{int(state.timestamp.batch)}: nothing was written. To go on from it, set autoresume=true; to start "
                "anew, give another run_name or save_folder, or set save_overwrite=true"
            )


@contextmanager
def whole_writes() -> Iterator[None]:
    """Within the block Composer's checkpoints of one file get their names once they are on the disk."""
    write = checkpoint._write_checkpoint_file
    checkpoint._write_checkpoint_file = partial(write_whole, write)
    try:
        yield
    finally:
        checkpoint._write_checkpoint_file = write


def write_whole(write: Callable[[dict[str, Any], str], None], state_dict: dict[str, Any], filename: str) -> None:
    """Have `write` write a file beside its place, and move it there once it is on the disk.

    Raises:
        OSError: it could not be written; what torch says of a full disk names neither the file nor the disk.
    """
    place = Path(filename)
    partial_ = place.with_name(PARTIAL + place.name)
    try:
        write(state_dict, str(partial_))
        sync(partial_)
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(place.parent).free
        partial_.unlink(missing_ok=True)
        raise OSError(
            f"checkpoint {filename} could not be written with {free} bytes left on its disk: {error}; those before it "
            "are whole"
        ) from error
    partial_.replace(place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_of(save_folder: str, run_name: str) -> Path:
    """`save_folder` with its placeholders filled in, as Composer does."""
    return Path(format_name_with_dist(save_folder, run_name))


def order_of(name: str) -> tuple[int, int]:
    """By which checkpoints are sorted: steps done when one was written, and epochs; (-1, -1) of another file.

    Two of one step are of the same weights; the one of the later epoch has been through that epoch's end.
    """
    match = NAME.fullmatch(name)
    return (-1, -1) if match is None else (int(match[2]), int(match[1]))


def step_of(path: Path) -> int:
    """Steps done when a checkpoint was written, by its name; -1 of another file."""
    return order_of(path.name)[0]


def checkpoints_in(folder: Path) -> list[Path]:
    """Files with a checkpoint's name, newest first."""
    named = [path for path in folder.glob("ep*.pt") if step_of(path) >= 0]
    return sorted(named, key=lambda path: order_of(path.name), reverse=True)


def fault_of(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; None if every part of it matches its checksum.

    Costs: reads the whole file once.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            return None if bad is None else f"its part {bad!r} does not match its checksum"
    except Exception as error:  # of a damaged directory zipfile raises whatever reading it comes to
        return str(error) or type(error).__name__


def newest_whole(folder: str | Path, in_full: bool = True) -> Path | None:
    """The newest whole checkpoint in a folder; None if there is none.

    Newer ones that are torn are renamed to NAME.torn, lest Composer refuse to write their like again, with a warning
    that names them and the one before. Rank 0 looks, and all ranks get its answer; each must ask.

    Args:
        in_full: whether a checkpoint is one file, or a folder of pieces.

    Raises:
        ValueError: there are checkpoints, and none is whole; or the newest is of the other kind; or the folder does not
            let itself be read.

    Costs: rank 0 reads the newest once, and torn ones; the others wait.
    """
    answer: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            answer = list(searched(Path(folder), in_full))
        except OSError as error:
            answer = [None, f"autoresume: {str(folder)!r} cannot be searched for checkpoints: {error}"]
    dist.broadcast_object_list(answer, src=0)
    path, error = answer
    if error is not None:
        raise ValueError(error)
    return None if path is None else Path(path)


def searched(folder: Path, in_full: bool) -> tuple[str | None, str | None]:
    """The newest whole checkpoint; or what to say of a folder that has torn ones alone, or newer ones of another
    kind."""
    files, folders = checkpoints_in(folder), pieces_in(folder)
    own, others = (files, folders) if in_full else (folders, files)
    if others and (not own or order_in(others[0]) > order_in(own[0])):
        return None, unlike_kind(others[0], in_full)
    torn: dict[str, str] = {}
    for path in own:
        fault = fault_of(path) if in_full else fault_of_pieces(path)
        if fault is None:
            break
        torn[path.name] = fault
    else:
        path = None
    said = "; ".join(f"{name} ({fault})" for name, fault in torn.items())
    if torn and path is None:
        return None, (
            f"autoresume: no checkpoint in {str(folder)!r} is whole: {said}. Delete them to start anew, or set "
            "load_path to one from elsewhere"
        )
    for name in torn:
        if (aside := folder / f"{name}.torn").is_dir():  # of an earlier kill
            shutil.rmtree(aside)
        (folder / name).rename(aside)
    if torn and path is not None:
        warnings.warn(
            f"autoresume: torn checkpoints in {str(folder)!r} are set aside as NAME.torn: {said}; training "
            f"goes on from {path.name}, the newest that is whole",
            stacklevel=4,
        )
    return (None if path is None else str(path)), None


def order_in(path: Path) -> tuple[int, int]:
    """`order_of` of a checkpoint of either kind."""
    return max(order_of(path.name), pieces.order_of(path.name))


def check_kind(path: Path, in_full: bool) -> None:
    """Raise ValueError if there is a checkpoint of the other kind."""
    if path.exists() and path.is_dir() == in_full:
        raise ValueError(unlike_kind(path, in_full))


def unlike_kind(path: Path, in_full: bool) -> str:
    """What to say of a checkpoint in pieces where one in full is to be read, or the other way round."""
    found, key = ("a folder of pieces", "sharded") if in_full else ("one file", "full")
    return f"the checkpoint {str(path)!r} is {found}: set fsdp_config.state_dict_type={key}"
