"""``launchers/train.py`` with a fault, given by the last option, ``--sabotage``:

    --sabotage kill sketch 2 1      a deed and its place: phase, step and rank (`DEEDS`, `at`)
    --sabotage behind 9 kill train 5 0      the same while a checkpoint is half written: each takes 9 seconds longer
    --sabotage nan candidate        numbers that are not finite and their place (`NUMBERS`); ``inf`` likewise
    --sabotage selection            rank 1 receives another selection than rank 0 sent

``@RANK`` in any option is replaced by the rank, so that ranks read different files. A launcher that restarts a failed
run omits the sabotage.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from colm_scale.checkpoint import files, store
from colm_scale.checkpoint.background import BackgroundWriter, Snapshot
from colm_scale.cli import main as cli
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.engines.single_and_ddp import TorchEngine
from colm_scale.estimators import base, last_layer
from colm_scale.records import Batch, Candidates
from colm_scale.sketch.tap import Tap

BAD_ID = 5
"""The training example whose loss becomes NaN."""


def rank() -> str:
    return os.environ.get("RANK", "0")


# Deeds: faults of the process itself


def raise_error() -> None:
    raise RuntimeError(f"the disk of rank {rank()} burns")


def hang() -> None:
    while True:
        time.sleep(60)


PAGE_BYTES = 4096


def output_dir() -> Path:
    return Path(sys.argv[sys.argv.index("--output_dir") + 1])


def fill_disk(but: int) -> None:
    """Fill the disk of the run's folder up to ``but`` bytes, and the last page of its files of rows."""
    folder = output_dir()
    if not but:
        for rows in folder.glob("*.jsonl"):
            with rows.open("ab") as file:
                file.write(b" " * (-rows.stat().st_size % PAGE_BYTES))  # JSON permits blanks before a row
    with (folder / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - but))


def wait_for_the_next() -> None:
    """Until the steps wait for this checkpoint."""
    WAITED_FOR.wait()


def wait_for_a_stop() -> None:
    (output_dir() / "waiting").touch()
    while not WATCHES[-1].stop_requested:
        time.sleep(0.05)


WAITED_FOR = threading.Event()
WATCHES: list[Watch] = []
"""This rank's, after the start of a step."""
DEEDS = {
    "raise": raise_error,
    "exit": lambda: os._exit(3),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": hang,
    "slow": wait_for_the_next,
    "wait": wait_for_a_stop,
    "fill": lambda: fill_disk(but=2**14),  # enough for rows but not for a checkpoint
    "flood": lambda: fill_disk(but=0),
}


WRITING = ("writing", "naming", "pruning")
"""Phases of writing a checkpoint on rank 0."""


def at(deed: Callable[[], None], phase: str, step: str, on_rank: str, *, behind: float = 0.0) -> None:
    """Do ``deed`` when that rank enters a phase of a step.

    The phases are those of `Watch`, for which a checkpoint that is being written is finished first, unless writing is
    ``behind`` by these seconds. And, while rank 0 writes the checkpoint of that step, ``writing`` (half of a file is
    written), ``naming`` (all files are written, but the folder is not renamed yet) and ``pruning`` (the checkpoint is
    complete, and an old one is about to be deleted).
    """
    begin, enter = Watch.begin, Watch.enter
    begin_to_write, wait = BackgroundWriter.begin, BackgroundWriter.wait
    writers: list[BackgroundWriter] = []
    now = [0]

    def remember(self, number: int) -> None:
        now[0] = number
        WATCHES.append(self)
        begin(self, number)

    def entered(self, name: str) -> None:
        enter(self, name)
        arrive(name, now[0])

    def remember_writer(self, snapshot: Snapshot) -> None:
        writers[:] = [self]
        begin_to_write(self, snapshot)

    def waited(self) -> None:
        if self._pending:
            WAITED_FOR.set()
        wait(self)

    def arrive(name: str, number: int) -> None:
        if name == "writing":
            time.sleep(behind)
        if (name, str(number), rank()) == (phase, step, on_rank):
            if name not in WRITING and not behind:
                for writer in writers:
                    writer.finish()
            deed()

    Watch.begin, Watch.enter = remember, entered
    BackgroundWriter.begin, BackgroundWriter.wait = remember_writer, waited
    arrive_in_checkpoint(arrive)


def arrive_in_checkpoint(arrive: Callable[[str, int], None]) -> None:
    now = [0]
    folder = store.CheckpointFolder
    write, put, discard, write_all = files._write_file, folder._put, folder._discard, folder.write

    def write_half_before(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, object]:
        content = b"".join(parts)
        if path.stem == "optimizer":
            path.write_bytes(content[: len(content) // 2])
            arrive("writing", now[0])
            path.unlink()
        return write(path, [content])

    def remember(self, step: int, *content: object) -> Path:
        now[0] = step
        return write_all(self, step, *content)

    files._write_file, folder.write = write_half_before, remember
    folder._put = lambda self, new, final: (arrive("naming", now[0]), put(self, new, final))
    folder._discard = lambda self, old: (arrive("pruning", now[0]), discard(self, old))


# Numbers that are not finite


def bad_rows(first_step: int) -> Callable[[Batch], Tensor]:
    """Rows of a batch that contain the example `BAD_ID`; none before ``first_step``."""
    draw, drawn = CandidateSampler.__call__, []

    def remember(self, step: int) -> Candidates:
        drawn[:] = [draw(self, step)]
        return drawn[0]

    CandidateSampler.__call__ = remember
    return lambda batch: (drawn[0].ids[batch.positions] == BAD_ID) & (drawn[0].step >= first_step)


def spoil_sketches(value: float, is_bad: Callable[[Batch], Tensor]) -> None:
    factors = Tap.factors

    def spoilt(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        losses, delta, a = factors(self, batch)
        bad = is_bad(batch)
        losses[: len(bad)][bad] = value
        delta[: len(bad)][bad] = value
        return losses, delta, a

    Tap.factors = spoilt


def spoil_rank(value: float) -> None:
    """All candidates that rank 1 sketches."""
    if rank() == "1":
        spoil_sketches(value, lambda batch: torch.ones(len(batch.positions), dtype=torch.bool))


def spoil_matrix(value: float) -> None:
    """All gathered values, on every rank."""
    gather = base.gather_rows
    for module in (base, last_layer):
        module.gather_rows = lambda *arguments: gather(*arguments).fill_(value)


def spoil_training(value: float) -> None:
    """The training loss of one example, from step 2 on."""
    forward, is_bad = TorchEngine.forward, bad_rows(first_step=2)
    TorchEngine.forward = lambda self, batch: forward(self, batch).masked_fill(is_bad(batch), value)


def spoil_gradient(value: float) -> None:
    """Rank 1's share of the gradient; all losses stay finite."""
    backward = TorchEngine.backward
    if rank() == "1":
        TorchEngine.backward = lambda self, loss: backward(self, loss * value)


NUMBERS = {
    "candidate": lambda value: spoil_sketches(value, bad_rows(first_step=1)),
    "rank": spoil_rank,
    "matrix": spoil_matrix,
    "training": spoil_training,
    "gradient": spoil_gradient,
}


def change_selection() -> None:
    broadcast = Group.broadcast

    def changed(self, tensor: Tensor, label: str, source: int = 0) -> Tensor:
        received = broadcast(self, tensor, label, source)
        if label == "broadcast" and rank() == "1":
            received[5] += 1  # the first position
        return received

    Group.broadcast = changed


def sabotage(kind: str, *words: str) -> None:
    match kind:
        case "nan" | "inf":
            NUMBERS[words[0]](float(kind))
        case "selection":
            change_selection()
        case "behind":
            seconds, deed, *place = words
            at(DEEDS[deed], *place, behind=float(seconds))
        case _:
            at(DEEDS[kind], *words)


def main() -> None:
    """Run with the options of the command line."""
    options = [option.replace("@RANK", rank()) for option in sys.argv[1:]]
    if "--sabotage" in options:
        place = options.index("--sabotage")
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            sabotage(*options[place + 1 :])
        options = options[:place]
    cli.train(options)


if __name__ == "__main__":
    main()
