"""Break small runs at random with real faults, resume them, and compare them with unbroken runs.

python benchmarks/faults.py --runs 200 --seed 0    break, resume and compare; appends the tally to results/faults.jsonl

Engine, ranks, fault, step, phase and rank are random. A resumed run must have the ids, losses and adapter of an
unbroken run, bit for bit; a run that does not end counts as a hang. Outcomes are saved in runs/, so that an interrupted
benchmark can continue.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, TypeVar

import rows
import torch

from colm_scale.randomness import generator

if TYPE_CHECKING:
    from support.commands import Forked, Ranks
    from support.faults import Workshop

STEPS, EVERY = 8, 2
HANG_SECONDS = 10
"""``--train.timeout`` of runs in which a rank is made to hang."""
KINDS = ("SIGKILL", "SIGTERM to a rank", "SIGTERM to all", "exception", "hang", "disk full", "damaged checkpoint")
_DEEDS = {"SIGTERM to a rank": "terminate", "exception": "raise", "hang": "hang"}
_Choice = TypeVar("_Choice")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault and its place.

    Attributes:
        deed: Name in `support.sabotage`; empty for a fault from outside.
    """

    number: int
    engine: str
    ranks: int
    kind: str
    deed: str
    phase: str
    step: int
    rank: int


@dataclass(frozen=True, slots=True)
class Fate:
    """The outcome of one broken run.

    Attributes:
        said: First line of the broken run's error.
        codes: Exit codes of its ranks, negative for a signal.
        lost: Steps that were repeated.
        hung: True if the broken or the resumed run had to be killed.
        different: Results in which the resumed run differs from the unbroken one.
    """

    said: str
    codes: list[int | None]
    lost: int
    hung: bool
    different: list[str]
    seconds: float


class Draw:
    """Draw the choices for one run, reproducibly."""

    def __init__(self, seed: int, number: int):
        self._generator = generator(seed, "fault", number)

    def below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self._generator))

    def of(self, options: Sequence[_Choice]) -> _Choice:
        return options[self.below(len(options))]


def drawn_fault(seed: int, number: int, kinds: Sequence[str]) -> Fault:
    """Draw a fault at a place that the run reaches."""
    from support.faults import ENGINES, PHASES
    from support.sabotage import WRITING

    draw = Draw(seed, number)
    engine, kind = draw.of(list(ENGINES)), draw.of(kinds)
    ranks = {"single": 1, "ddp": 2}.get(engine) or draw.of((1, 2))
    rank = draw.below(ranks)
    phase = draw.of((*PHASES, *WRITING) if rank == 0 else PHASES)
    deed = _DEEDS.get(kind, "kill")
    if kind == "SIGTERM to all":
        deed = ""
    if kind == "disk full":
        deed, phase = draw.of((("fill", "checkpoint"), ("flood", "checkpoint"), ("flood", "train")))
        rank = 0
    first = 5 if kind == "damaged checkpoint" else 6 if phase == "pruning" else 1
    saves = phase in ("checkpoint", *WRITING)
    steps = [step for step in range(first, STEPS + 1) if not saves or step % EVERY == 0]
    return Fault(number, engine, ranks, kind, deed, phase, draw.of(steps), rank)


def tried(workshop: Workshop, fault: Fault, place: Path, seen: Path, seed: int) -> Fate:
    """Break a run in the folder ``place`` (``seen`` from this process), resume it to its end, and compare."""
    from support.commands import Hung
    from support.faults import SECONDS, result, steps_written

    started, hung, lost, outcome = time.monotonic(), False, 0, None
    ranks = broken(workshop, fault, place, seen)
    try:
        outcome = ranks.outcome(SECONDS)
    except Hung:
        hung = True
    codes = ranks.codes()
    written = steps_written(seen)
    (seen / "filler").unlink(missing_ok=True)
    if fault.kind == "damaged checkpoint":
        damage(seen / "checkpoints", Draw(seed, fault.number + 1_000_000))
    try:
        lost = written - went_on(workshop, fault, place, seen) if any(codes) else 0
        unbroken = workshop.unbroken(fault.engine, fault.ranks)
        found = result(seen)
        different = [name for name in unbroken if found[name] != unbroken[name]]
    except Hung:
        hung, different = True, ["end"]
    except (AssertionError, OSError) as error:
        different = [f"{type(error).__name__}: {error}"[:2000]]
    said = (outcome.stderr.splitlines() or [""])[0] if outcome else "hung"
    return Fate(said, codes, lost, hung, different, time.monotonic() - started)


def broken(workshop: Workshop, fault: Fault, place: Path, seen: Path) -> Ranks:
    """Start a run with the fault."""
    from support.commands import wait_until
    from support.faults import SECONDS, steps_written

    options = ["--train.timeout", str(HANG_SECONDS)] if fault.kind == "hang" else []
    if fault.deed:
        options += ["--sabotage", fault.deed, fault.phase, str(fault.step), str(fault.rank)]
    ranks = workshop.start(place, fault.engine, *options, ranks=fault.ranks)
    if fault.kind == "SIGTERM to all":
        with suppress(AssertionError):  # it ended or hangs; the next wait tells which
            wait_until(lambda: steps_written(seen) >= fault.step - 1 and (seen / "metrics.jsonl").exists(), SECONDS)
        ranks.send(signal.SIGTERM)
    return ranks


def damage(checkpoints: Path, draw: Draw) -> None:
    """Shorten a file of the newest checkpoint, or flip one of its bits."""
    file = draw.of(sorted(sorted(checkpoints.glob("step-*"))[-1].iterdir()))
    content = bytearray(file.read_bytes())
    place = draw.below(len(content))
    if draw.below(2):
        content = content[:place]
    else:
        content[place] ^= 1 << draw.below(8)
    file.write_bytes(content)


def went_on(workshop: Workshop, fault: Fault, place: Path, seen: Path) -> int:
    """Resume to the end; returns the step from which the run resumed."""
    options = ["--checkpoint.fallback", "true"] if fault.kind == "damaged checkpoint" else []
    outcome = workshop.go_on(place, fault.engine, *options, ranks=fault.ranks).succeeded()
    found = re.search(r"resuming after step (\d+),", outcome.stdout)
    return int(found[1]) if found else 0


def tally(fates: Iterable[dict]) -> dict[str, object]:
    """Counts of a group of runs."""
    fates = list(fates)
    return {
        "tried": len(fates),
        "survived": sum(not fate["different"] and not fate["hung"] for fate in fates),
        "hangs": sum(fate["hung"] for fate in fates),
        "most_lost": max(fate["lost"] for fate in fates),
        "mean_lost": mean(fate["lost"] for fate in fates),
    }


def grouped(fates: Sequence[dict], key: str) -> dict[str, dict[str, object]]:
    values = sorted({fate[key] for fate in fates})
    return {value: tally(fate for fate in fates if fate[key] == value) for value in values}


def summary(fates: Sequence[dict], seed: int, left_out: str | None) -> dict[str, object]:
    """The row for all runs."""
    return {
        "benchmark": "faults",
        "seed": seed,
        "steps": STEPS,
        "every": EVERY,
        **tally(fates),
        "by_kind": grouped(fates, "kind"),
        "by_engine": grouped(fates, "engine"),
        "by_phase": grouped([fate for fate in fates if fate["deed"]], "phase"),
        "failures": [fate["number"] for fate in fates if fate["different"] or fate["hung"]],
        "left_out": left_out,
        "seconds": sum(fate["seconds"] for fate in fates),
        "environment": rows.here(),
    }


def run_all(runs: int, seed: int, work: Path) -> None:
    """Make every run that ``work`` does not contain yet, then append the tally."""
    from support.commands import Forked
    from support.faults import NoMounts, Workshop, own_mounts

    kinds, prefix, left_out = KINDS, (), None
    try:
        prefix = own_mounts()
    except NoMounts as error:
        kinds, left_out = tuple(kind for kind in KINDS if kind != "disk full"), f"disk full: {error}"
    done = [json.loads(line) for line in work.read_text("utf-8").splitlines()] if work.exists() else []
    folder = work.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Forked(folder / "forked", *prefix) as forked:
        workshop = Workshop(forked, folder, steps=STEPS)
        places = Places(forked, folder, mounts=bool(prefix))
        for number in sorted(set(range(runs)) - {row["number"] for row in done}):
            fault = drawn_fault(seed, number, kinds)
            place, seen = places.fresh(small=fault.kind == "disk full")
            done.append(asdict(fault) | asdict(tried(workshop, fault, place, seen, seed)))
            with work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[-1]) + "\n")
            print(json.dumps(done[-1]), flush=True)
    shutil.rmtree(folder)
    row = summary(sorted(done, key=lambda row: row["number"]), seed, left_out)
    rows.append("faults", row)
    print({name: row[name] for name in ("tried", "survived", "hangs", "most_lost", "failures")}, flush=True)


class Places:
    """Yield folders for consecutive runs, on the common disk or on a small disk of their own."""

    def __init__(self, forked: Forked, folder: Path, mounts: bool):
        from support.faults import mount_disk

        self._folder = folder
        self._small = folder / "small"
        self._seen = mount_disk(forked, self._small, megabytes=16) if mounts else None

    def fresh(self, small: bool) -> tuple[Path, Path]:
        """Folder of a run, as the run and as this process see it."""
        place, seen = (self._small / "run", self._seen / "run") if small else (self._folder / "run",) * 2
        shutil.rmtree(seen, ignore_errors=True)
        return place, seen


def table() -> str:
    """One row per fault and one per engine, of the last tally."""
    row = rows.read("faults")[-1]
    lines = ["| | broken | went on to the same result | steps lost, most (mean) | hangs |", "|---|---:|---:|---:|---:|"]
    groups = {"all": row, **row["by_kind"], **{f"`{name}`": counts for name, counts in row["by_engine"].items()}}
    for name, counts in groups.items():
        lost = f"{counts['most_lost']} ({counts['mean_lost']:.1f})"
        lines.append(f"| {name} | {counts['tried']} | {counts['survived']} | {lost} | {counts['hangs']} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"faults": table}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    run_all(given.runs, given.seed, rows.ROOT / "runs" / f"faults-{given.seed}.jsonl")


if __name__ == "__main__":
    sys.path.insert(0, str(rows.ROOT / "tests"))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    main()
