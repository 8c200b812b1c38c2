"""Kill runs, or tell them to end, at seeded moments, resume them, and compare with a run that was let be.

    python tools/kills.py --kills 200 --out tools/results

A trajectory is one small run (columns, teacher or online, one or two ranks, with and without run-ahead, its checkpoints
in full or in pieces, on the disk or in a store that speaks S3), killed by SIGKILL up to `--per-run` times, resumed by
the same command each time, and then finishes. A kill comes by the clock (a random moment from the process's start on),
at a random event of a random step, within the write of a checkpoint after a random share of its bytes, within its
upload, or by the clock with the newest checkpoint then cut short, as a machine that lost power may leave it. It hits
one rank, and the others a moment later, as a launcher would; half of the time a rank's whole process group with it, so
that nothing cleans up shared memory. In place of a kill a rank, or its group, may be told to end, by SIGTERM: all ranks
must do so of themselves, and no step that was trained may be lost. A store is slow at times and out at times, and half
of the time what was still to be uploaded is gone with the machine. Seeds decide all of this but how far a process is
when the clock strikes.

At the end weights, optimizer, selection's state, random number generators, place in the stream and clock in the last
checkpoint, the ledger's bytes and the metrics file (but for milliseconds) must equal those of the same run undisturbed.

Processes are forked from this one, which has imported everything and has no threads: an attempt costs a second, not
ten. The last line of stdout is one JSON document; the exit status is 1 if anything differed.
"""

from __future__ import annotations

import argparse
import atexit
import json
import mmap
import os
import random
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import S3ObjectStore, checkpoint
from killed_runs import (
    EVERY,
    POOL,
    RUNS,
    STEPS,
    left_by,
    newest_step,
    place_of,
    recipe_of,
    same,
    shared_memory,
    store_of,
    tear,
    write_corpus,
)
from torch.distributed.checkpoint import FileSystemWriter

from clipcov_stream import stored_checkpoints
from clipcov_stream.config import load_config
from clipcov_stream.stored_checkpoints import staging_of
from clipcov_stream.train import build_trainer, leave_group, train

EVENTS = (
    *(Event.FIT_START, Event.EPOCH_START, Event.AFTER_DATALOADER, Event.BEFORE_TRAIN_BATCH, Event.AFTER_FORWARD),
    *(Event.AFTER_BACKWARD, Event.BATCH_END, Event.BATCH_CHECKPOINT, Event.EPOCH_END),
)
PHASES = ("starting", "between steps", "loading", "training", "writing a checkpoint", "ending")
IN_TRAINING = ("between steps", "loading", "training", "writing a checkpoint")
TOLD = 128 + signal.SIGTERM
"""The exit status of a run that was told to end."""
PATIENCE = 30
"""Seconds that ranks have to end once one was told to, as of Composer's launcher."""
NOW = struct.Struct("<BI")


@dataclass(frozen=True)
class Kill:
    """What an attempt dies of.

    Args:
        kind: clock, event, write, torn, told or upload.
        delay: seconds after the process's start or, if `training`, after that of training, for clock, torn and told.
        event, step: where, for event.
        write, share: number of the checkpoint of this attempt, and share of its bytes, for write; of the newest
            checkpoint's bytes, for torn.
        rank: that is killed first.
        lag: seconds until the others are.
        group: whether a rank's children, workers and Python's resource tracker, die with it.
        pause: seconds that the store takes for a checkpoint; for upload the kill is in that of number `write`.
        fails: attempts at each that the store refuses.
        elsewhere: whether the next attempt finds nothing of what was still to be uploaded.
    """

    kind: str
    delay: float = 0.0
    training: bool = False
    event: str = ""
    step: int = 0
    write: int = 0
    share: float = 0.0
    rank: int = 0
    lag: float = 0.0
    group: bool = False
    pause: float = 0.0
    fails: int = 0
    elsewhere: bool = False

    @classmethod
    def drawn(cls, rng: random.Random, ranks: int, seconds: float, stored: bool = False) -> Kill:
        kill = cls._drawn(rng, ranks, seconds)
        if not stored:
            return kill
        if kill.kind == "torn" or rng.random() < 0.2:  # an object is there in full or not at all
            kill = replace(kill, kind="upload", rank=0)
        store = {"pause": rng.choice((0.0, rng.uniform(0, 2))), "fails": rng.choice((0, 0, 1, 2))}
        return replace(kill, **store, elsewhere=rng.random() < 0.5)

    @classmethod
    def _drawn(cls, rng: random.Random, ranks: int, seconds: float) -> Kill:
        kind = rng.choices(("clock", "event", "write", "torn", "told"), (0.35, 0.2, 0.15, 0.1, 0.2))[0]
        training = rng.random() < 0.7
        return cls(
            kind,
            delay=rng.uniform(0, (0.4 if training else 0.9) * seconds),
            training=training,
            event=rng.choice(EVENTS).value,
            step=rng.randrange(STEPS),
            write=rng.randrange(3),
            share=rng.random(),
            rank=0 if kind == "write" else rng.randrange(ranks),  # rank 0 writes
            lag=rng.choice((0.0, rng.uniform(0, 0.3))),
            group=rng.random() < 0.5,
        )


@dataclass
class Trajectory:
    """One run, killed and resumed until it ended.

    Args:
        run: name of it in RUNS.
        kills: what each was, and what the process was doing then.
        faults: what was not as it should be.
    """

    run: str
    seed: int
    kills: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Board(Callback):
    """Shows the parent what this process is doing, and dies where it is told to."""

    def __init__(self, board: mmap.mmap, kill: Kill | None, rank: int) -> None:
        self.board, self.rank = board, rank
        self.kill = kill if kill is not None and kill.rank == rank else None
        self.num_writes = self.num_uploads = 0
        self.store = (0, 0.0) if kill is None else (kill.fails, kill.pause)
        self.failed: Counter[str] = Counter()

    def show(self, phase: str, step: int) -> None:
        self.board[self.rank * NOW.size : (self.rank + 1) * NOW.size] = NOW.pack(PHASES.index(phase), step)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        phase = {Event.BEFORE_DATALOADER: "loading", Event.AFTER_DATALOADER: "training", Event.FIT_END: "ending"}
        self.show(phase.get(event, PHASES[self.board[self.rank * NOW.size]]), int(state.timestamp.batch))
        if event in (Event.BATCH_END, Event.FIT_START):
            self.show("between steps", int(state.timestamp.batch))
        kill = self.kill
        if kill and kill.kind == "event" and event.value == kill.event and int(state.timestamp.batch) >= kill.step:
            self.die()

    def die(self) -> None:
        assert self.kill is not None
        (os.killpg if self.kill.group else os.kill)(os.getpid(), signal.SIGKILL)

    def write(self, state_dict: dict[str, Any], filename: str) -> None:
        """Composer's write of a checkpoint, which may end early."""
        before = self.board[: 2 * NOW.size]
        step = state_dict["state"]["timestamp"]["Timestamp"]["batch"]
        self.show("writing a checkpoint", int(step))
        kill, self.num_writes = self.kill, self.num_writes + 1
        with open(filename, "wb") as file:
            torch.save(state_dict, file)
            if kill and kill.kind == "write" and self.num_writes > kill.write:
                file.flush()
                os.truncate(filename, int(kill.share * file.tell()))
                self.die()
        self.board[: 2 * NOW.size] = before

    def list_pieces(self, finish: Callable[..., None], *args: Any) -> None:
        """torch's writing of the list that makes pieces a checkpoint, before or after which the run may end."""
        before = self.board[: 2 * NOW.size]
        self.show("writing a checkpoint", NOW.unpack_from(self.board, self.rank * NOW.size)[1])
        kill, self.num_writes = self.kill, self.num_writes + 1
        dies = kill is not None and kill.kind == "write" and self.num_writes > kill.write
        if kill and dies and kill.share < 0.5:
            self.die()
        finish(*args)
        if dies:
            self.die()
        self.board[: 2 * NOW.size] = before

    def upload(self, upload: Callable[..., None], store: S3ObjectStore, name: str, *args: Any, **of: Any) -> None:
        """A store's taking of an object, which may be slow, fail, or see the run end in the midst of one."""
        (fails, pause), kill = self.store, self.kill
        if not name.endswith(".pt"):
            return upload(store, name, *args, **of)
        self.failed[name] += 1
        if self.failed[name] <= fails:
            raise ConnectionError("the store is out")
        time.sleep(pause)
        self.num_uploads += 1
        if kill and kill.kind == "upload" and self.num_uploads > kill.write:
            of["callback"] = lambda *_: self.die()
        return upload(store, name, *args, **of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="that must have hit, over all runs")
    parser.add_argument("--per-run", type=int, default=6, help="kills of one run before it may finish")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", action="append", choices=list(RUNS), help="only this; all in turn by default")
    parser.add_argument("--out", help="folder for kills.json and kills.md")
    args = parser.parse_args()
    for option in ("kills", "per_run"):
        if getattr(args, option) < 1:
            parser.error(f"--{option.replace('_', '-')} {getattr(args, option)} must be at least 1")
    torch.set_num_threads(1)
    began, names, work = time.time(), args.run or list(RUNS), Path(tempfile.mkdtemp(prefix="kills"))
    try:
        with store_of(names):
            write_corpus(work / "corpus")
            straight = {name: undisturbed(work, name) for name in names}
            done: list[Trajectory] = []
            while sum(len(each.kills) for each in done) < args.kills:
                name = names[len(done) % len(names)]
                done.append(trajectory(work, name, args.seed + len(done), args.per_run, *straight[name]))
                print(line_of(done, args.kills, time.time() - began), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = summary(done, args, time.time() - began)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "kills.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (Path(args.out) / "kills.md").write_text(report(result), encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "trajectories"}))
    raise SystemExit(bool(result["faults"]))


def undisturbed(work: Path, name: str) -> tuple[dict[str, Any], float]:
    """What the run leaves if it is let be, and the seconds it takes."""
    folder = work / "straight"
    path, began, others = recipe_of(work, name, folder), time.time(), set(shared_memory())
    said = attempt(path, name, 0, None)
    if said is not None:
        raise SystemExit(f"error: the undisturbed run {name!r} fails: {said}")
    left = left_by(folder, name, others), time.time() - began
    shutil.rmtree(folder)
    return left


def trajectory(work: Path, name: str, seed: int, per_run: int, expected: dict[str, Any], seconds: float) -> Trajectory:
    """Kill a run and resume it until it ends, and compare."""
    rng, folder, done = random.Random(seed), work / f"run{seed}", Trajectory(name, seed)
    path, others = recipe_of(work, name, folder), set(shared_memory())
    while True:
        kill = Kill.drawn(rng, RUNS[name].ranks, seconds, RUNS[name].stored) if len(done.kills) < per_run else None
        workers = int(rng.random() < 0.15)
        said = attempt(path, name, workers, kill)
        if said is None:
            break
        if not isinstance(said, dict):
            print(said, file=sys.stderr)
            done.faults.append(said.strip().splitlines()[-1])  # without the machine's paths
            return done  # its folder stays until the end, for a look
        if kill is not None and kill.kind == "torn":
            said["torn"] = tear(folder / "saved", kill.share)
        done.kills.append(said)
        if kill is not None and kill.elsewhere:
            shutil.rmtree(Path(staging_of(place_of(folder, name))).parent, ignore_errors=True)
        if said["kind"] == "told" and said["phase"] in IN_TRAINING and newest_step(folder, name) < said["at_step"]:
            done.faults.append(f"told to end after step {said['at_step']}, it saved none after {said['at_step'] - 1}")
            return done
    found = left_by(folder, name, others)
    done.faults = [key for key in expected if not same(expected[key], found.get(key))]
    shutil.rmtree(folder)
    return done


def attempt(path: Path, name: str, num_workers: int, kill: Kill | None) -> dict[str, Any] | str | None:
    """Run a recipe until it ends (None), is killed (what it was doing) or fails (what it said)."""
    ranks = RUNS[name].ranks
    board = mmap.mmap(-1, ranks * NOW.size)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = trains = time.time()
    processes = [forked(path, rank, ranks, port, num_workers, board, kill) for rank in range(ranks)]
    ended: dict[int, int] = {}
    struck, elapsed, told = None, 0.0, 0.0
    while len(ended) < ranks:
        elapsed = time.time() - began
        for rank, pid in enumerate(processes):
            if rank not in ended and (status := os.waitpid(pid, os.WNOHANG))[0]:
                ended[rank] = os.waitstatus_to_exitcode(status[1])
        if kill is not None and kill.training and seen(board, kill.rank)["phase"] == PHASES[0]:
            trains = time.time()
        by_clock = (
            kill is not None
            and kill.kind in ("clock", "torn", "told")
            and time.time() - (trains if kill.training else began) >= kill.delay
        )
        if kill is not None and struck is None and kill.rank not in ended and by_clock:
            struck = seen(board, kill.rank)
            strike(processes[kill.rank], kill.group, signal.SIGTERM if kill.kind == "told" else signal.SIGKILL)
        if kill is not None and kill.kind == "told" and TOLD in ended.values() and not told:
            told = time.time()
            for rank in set(range(ranks)) - set(ended):
                strike(processes[rank], False, signal.SIGTERM)
        if told and time.time() - told > PATIENCE:
            for rank in set(range(ranks)) - set(ended):
                strike(processes[rank], True)
        died = [rank for rank, code in ended.items() if code == -signal.SIGKILL]
        if died or elapsed > 240:
            if kill is not None:
                struck = struck or seen(board, kill.rank)
                time.sleep(kill.lag)
            for rank in set(range(ranks)) - set(ended):
                strike(processes[rank], kill is None or kill.group)
                ended[rank] = os.waitstatus_to_exitcode(os.waitpid(processes[rank], 0)[1])
        time.sleep(0.002)
    # Before training and after it ranks may end as they like.
    elsewhere = struck is not None and struck["phase"] not in IN_TRAINING and set(ended.values()) <= {0, 1, TOLD}
    told_to = told and (set(ended.values()) == {TOLD} or elsewhere)
    is_killed = kill is not None and kill.kind != "told" and -signal.SIGKILL in ended.values()
    if kill is not None and struck is not None and (told_to or is_killed) and elapsed <= 240:
        return {**{key: value for key, value in asdict(kill).items() if key != "lag"}, **struck, "workers": num_workers}
    if any(ended.values()):
        log = path.with_name("failed.txt")
        return f"exit status {ended}: {log.read_text() if log.exists() else 'hung'}"
    return None


def strike(pid: int, group: bool, number: int = signal.SIGKILL) -> None:
    try:
        (os.killpg if group else os.kill)(pid, number)
    except ProcessLookupError:
        # Between its fork and its own process group.
        os.kill(pid, number)


def seen(board: mmap.mmap, rank: int) -> dict[str, Any]:
    """What a rank is doing."""
    phase, step = NOW.unpack_from(board, rank * NOW.size)
    return {"phase": PHASES[phase], "at_step": step}


def forked(path: Path, rank: int, ranks: int, port: int, num_workers: int, board: mmap.mmap, kill: Kill | None) -> int:
    """A child that runs the recipe as one of several ranks; its number."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # of a child that has not begun
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return pid
    status = 1
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if ranks > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "NODE_RANK": 0}
            os.environ |= {key: str(value) for key, value in world.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with path.with_name("output.txt").open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        # Of the parent: nothing may depend on them, nor on the clock.
        random.seed()
        np.random.seed(os.getpid() % 2**31)
        torch.manual_seed(time.time_ns())
        shown = Board(board, kill, rank)
        checkpoint._write_checkpoint_file = shown.write
        finish = FileSystemWriter.finish
        upload = S3ObjectStore.upload_object
        S3ObjectStore.upload_object = lambda self, object_name, filename, callback=None, **kwargs: shown.upload(
            upload, self, object_name, filename, callback=callback, **kwargs
        )
        stored_checkpoints.FIRST_PAUSE = 0.05
        FileSystemWriter.finish = lambda self, metadata, results: shown.list_pieces(finish, self, metadata, results)
        trainer = build_trainer(load_config(str(path), [f"stream.num_workers={num_workers}"]))
        trainer.state.callbacks.insert(0, shown)
        train(trainer)
        trainer.close()
        leave_group()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        path.with_name("failed.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        # Its datasets' shared memory goes at the interpreter's exit, which os._exit leaves out.
        atexit._run_exitfuncs()
        os._exit(status)


def line_of(done: list[Trajectory], wanted: int, seconds: float) -> str:
    """Progress, and the last trajectory."""
    kills, last = sum(len(each.kills) for each in done), done[-1]
    result = "; ".join(last.faults) or "same"
    return f"[{seconds:5.0f} s] {kills}/{wanted} kills; seed {last.seed}, {last.run}: {len(last.kills)} kills: {result}"


def summary(done: list[Trajectory], args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    kills = [kill for each in done for kill in each.kills]
    options = ["--kills", str(args.kills), "--per-run", str(args.per_run), "--seed", str(args.seed)]
    options += [option for name in args.run or () for option in ("--run", name)]
    return {
        "kills": len(kills),
        "runs": len(done),
        "faults": [{"run": each.run, "seed": each.seed, "faults": each.faults} for each in done if each.faults],
        "by_run": dict(Counter(each.run for each in done for _ in each.kills)),
        "by_kind": dict(Counter(kill["kind"] for kill in kills)),
        "by_phase": dict(Counter(kill["phase"] for kill in kills)),
        "by_step": dict(sorted(Counter(kill["at_step"] for kill in kills).items())),
        "torn": sum(kill.get("torn") is not None for kill in kills),
        "whole_group": sum(kill["group"] for kill in kills),
        "with_workers": sum(kill["workers"] > 0 for kill in kills),
        "seeds": [args.seed, args.seed + len(done) - 1],
        "command": shlex.join(["python", "tools/kills.py", *options]),
        "minutes": round(seconds / 60, 1),
        "torch": torch.__version__,
        "trajectories": [asdict(each) for each in done],
    }


def report(result: dict[str, Any]) -> str:
    """The figures as Markdown."""

    def table(title: str, counts: dict[Any, int]) -> str:
        rows = "".join(f"| {key} | {value} |\n" for key, value in counts.items())
        return f"| {title} | kills |\n|---|---|\n{rows}\n"

    equal = result["runs"] - len(result["faults"])
    faults = "".join(f"- seed {f['seed']}, {f['run']}: {'; '.join(f['faults'])}\n" for f in result["faults"])
    return (
        f"# Runs killed and resumed\n\n`{result['command']}` ({result['minutes']} minutes, torch {result['torch']}); "
        f"seeds {result['seeds'][0]} to {result['seeds'][1]}, one per run.\n\n"
        f"{result['kills']} kills over {result['runs']} runs of {STEPS} steps ({POOL} candidates, a checkpoint every "
        f"{EVERY} steps), by SIGKILL but for those `told` to end by SIGTERM, which must lose no step. "
        f"{equal} of {result['runs']} runs resumed after every kill and ended with the "
        "weights, optimizer, selection's state, generators, place in the stream, ledger and metrics (but for "
        f"milliseconds) of the same run undisturbed, bit for bit. {result['whole_group']} kills took the process "
        f"group, {result['with_workers']} hit a run with a worker, "
        f"after {result['torn']} the newest checkpoint was cut short.\n\n{faults}"
        + table("run", result["by_run"])
        + table("kind", result["by_kind"])
        + table("what the process was doing", result["by_phase"])
        + table("steps done", result["by_step"])
        + "Not claimed: power lost with the machine (only files cut short stand for it), several nodes, GPUs.\n"
    )


if __name__ == "__main__":
    main()
