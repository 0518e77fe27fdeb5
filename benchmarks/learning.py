"""The learning benchmark: arms on the same candidates, at matched steps and at matched time.

python benchmarks/learning.py cost                        what a step of each arm costs, interleaved in one process
python benchmarks/learning.py run --seeds 0 1 2 --minutes 60
python benchmarks/learning.py run --arms stratified last_layer --match time --data maths=train.jsonl,held_out.jsonl
python benchmarks/learning.py run --groups staleness --match steps --data built-in-1000      several epochs of few rows
python benchmarks/learning.py run --model FOLDER --workers 1 -- --train.dtype bfloat16     a larger model, on a GPU
python benchmarks/learning.py run --candidates 32 --budget 8      other sizes: `full n` trains on 32, `full 2n` on 64

An arm is the product's own command with its options (`arms.py`). With --match steps, all arms make the same number of
steps; with --match time, each makes the steps that fit into the time of the reference, by the costs measured before. An
interrupted benchmark continues without repeating runs, all arms of a seed before the next seed. Rows are appended to
benchmarks/results/learning.jsonl; options after -- go to every run.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import mean

import rows
import runs
from arms import ARMS, GROUPS, REFERENCE, sized
from numpy import percentile

from colm_scale.data.builtin import builtin_rows
from colm_scale.reporting.noise import NoiseScale

QUIET = (
    *("--engine", "single", "--train.threads", "1", "--checkpoint.every", "0", "--profile.floor_every", "0"),
    *("--profile.display", "off", "--eval.every", "0", "--eval.limit", "60", "--eval.generate", "12"),
)


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["colm_scale.cli.commands", "colm_scale.run.assemble", "transformers", "peft"])
"""Every run is a process of its own, forked from one that has imported the libraries: a fifth less time for a run."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """Setting of all arms: name of the data, further options, candidates and coreset of a step."""

    data: str
    options: tuple[str, ...]
    candidates: int = 64
    budget: int = 32

    @classmethod
    def of(cls, data: str, model: str | None, options: Sequence[str]) -> Setting:
        """Parse ``built-in``, ``NAME=TRAIN,EVAL``, or either with a ``-ROWS`` after the name to train on so many."""
        name, _, files = data.partition("=")
        train, _, held_out = files.partition(",")
        few = name.rpartition("-")[2]
        if few.isdigit():
            train, held_out = _few(int(few), train, held_out)
        given = [*(("--data.train", train) if train else ()), *(("--data.eval", held_out) if held_out else ())]
        if model:
            given += ["--model.name", model]
            name += f" {Path(model).name}"
        return cls(name, (*given, *options))

    def labelled(self, label: str | None) -> Setting:
        """With a label, which becomes part of the name."""
        return dataclasses.replace(self, data=f"{self.data}, {label}") if label else self

    def sized(self, candidates: int, budget: int) -> Setting:
        """With other candidates and another coreset than the default, which are then part of the name."""
        if (candidates, budget) == (self.candidates, self.budget):
            return self
        return dataclasses.replace(
            self, data=f"{self.data}, {budget} of {candidates}", candidates=candidates, budget=budget
        )

    def command_line(self, arm: str) -> list[str]:
        """Options of an arm."""
        return [*QUIET, *self.options, *sized(arm, self.candidates, self.budget)]


def _few(count: int, train: str, held_out: str) -> tuple[str, str]:
    """Files with ``count`` of the training rows, and with the held-out rows; no name stands for the built-in rows."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    if not train:
        train = _write(folder / "all.jsonl", map(json.dumps, builtin_rows("train")))
        held_out = _write(folder / "held_out.jsonl", map(json.dumps, builtin_rows("eval")))
    taken = Random("few rows").sample(Path(train).read_text(encoding="utf-8").splitlines(), count)
    return _write(folder / "train.jsonl", taken), held_out


def _write(path: Path, lines: Iterable[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def cost(setting: Setting, arms: Sequence[str], rounds: int) -> None:
    """Time a step of every arm in turn, round after round, in this process on one thread."""
    seconds = interleaved({arm: prepared(setting.command_line(arm)) for arm in arms}, rounds)
    for arm, taken in seconds.items():
        ratios = [own / reference for own, reference in zip(taken, seconds[REFERENCE])]
        row = {"benchmark": "learning", "kind": "cost", "data": setting.data, "arm": arm, "rounds": rounds}
        row |= {"step_seconds": runs.quantiles(taken), "over_reference": runs.quantiles(ratios)}
        rows.append("learning", row | {"environment": rows.here()})
        print(f"{arm:28} {percentile(ratios, 50):.2f} of {REFERENCE}", flush=True)


def interleaved(steps: dict[Hashable, Callable[[int, float], object]], rounds: int) -> dict[Hashable, list[float]]:
    """Seconds of every step, made in turn, round after round; a first round is not counted."""
    seconds: dict[Hashable, list[float]] = {name: [] for name in steps}
    for number in range(1, rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step(number, 1e-3)
            seconds[name].append(time.perf_counter() - started)
    return {name: taken[1:] for name, taken in seconds.items()}


def prepared(options: list[str]):
    """The product's step for one arm, as a function of step number and learning rate."""
    import torch
    import transformers

    from colm_scale.config import command_line as arguments
    from colm_scale.distributed.connect import connect
    from colm_scale.engines.choose import loading_device, make_engine
    from colm_scale.profiling.memory import memory_meter
    from colm_scale.profiling.spans import Spans
    from colm_scale.run import assemble as assembly
    from colm_scale.run.inputs import read_inputs
    from colm_scale.run.prepare import resolve

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    config = resolve(arguments.parse(options))
    group = connect()
    inputs = read_inputs(config, group)
    module, weights, tap = assembly.build_model(config, loading_device(config, inputs.ds_config, group), group)
    engine = make_engine(config, inputs.ds_config, module, group, weights)
    spans = Spans(group.device, memory_meter(group), lambda phase: None)
    return assembly.build_step(config, inputs, engine, tap, spans, group)


def steps_of(arm: str, match: str, setting: Setting, steps: dict[str, int]) -> int:
    """Steps of an arm: the same for all, or those that fit into the time of the reference's steps."""
    if match == "steps":
        return steps[match]
    costs = {row["arm"]: row["over_reference"]["p50"] for row in rows.read("learning") if _is_cost(row, setting)}
    if arm not in costs:
        sys.exit(f"the cost of {arm} on {setting.data} is not known: python benchmarks/learning.py cost --arms {arm}")
    return round(steps[match] / costs[arm])


def _is_cost(row: dict, setting: Setting) -> bool:
    return row["kind"] == "cost" and row["data"] == setting.data


def run(setting: Setting, arm: str, match: str, seed: int, steps: int) -> None:
    """Run the product once; returns the row."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        options = setting.command_line(arm)
        options += ["--train.steps", str(steps), "--train.seed", str(seed), "--output_dir", str(out)]
        process = PROCESSES.Process(target=_train, args=(options,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{arm} ended with {process.exitcode}: colm-scale train {' '.join(options)}")
        whole = runs.row(out, setting.data)
        made = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    facts = {key: whole[key] for key in ("before", "after", "step_seconds", "environment")}
    del facts["environment"]["command"]
    row = {"benchmark": "learning", "kind": "run", "data": setting.data, "digest": whole["data"], "arm": arm}
    row |= {"match": match, "seed": seed, "steps": steps, "peak_bytes": max(whole["peak_bytes"])}
    rows.append("learning", row | {"telemetry": _telemetry(made), "noise": _noise(made)} | facts)
    print(f"{setting.data} {arm} {match} seed {seed}: {steps} steps, {whole['after']}", flush=True)


def _train(options: list[str]) -> None:
    """Run ``colm-scale train``, with its output on standard error only."""
    from colm_scale.cli.main import train

    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    train(options)


def _telemetry(steps: list[dict]) -> dict[str, float]:
    """Means over the steps; ``nearer`` is the share in which the coreset's mean sketch beats the draw's."""
    found = [step.get("telemetry", {}) for step in steps]
    if not found[-1]:
        return {}
    compared = [(own["sketch_error"], own["sketch_error_stratified"]) for own in found if "sketch_error" in own]
    nearer = {"nearer": mean(own < drawn for own, drawn in compared)} if compared else {}
    return runs.mean_by_key(found) | nearer


def _noise(steps: list[dict]) -> dict[str, float]:
    """Gradient noise scale of the run, its 95 % interval, and what a step's examples are worth."""
    total = NoiseScale()
    for step in steps:
        total.add(step.get("noise", {}))
    low, high = total.interval()
    return {"scale": total.scale, "low": low, "high": high, "worth": total.worth}


def missing(
    setting: Setting, arms: Sequence[str], matches: Sequence[str], seeds: Sequence[int], steps: dict[str, int]
) -> Iterator:
    """Runs that are still to be made."""
    of_runs = [row for row in rows.read("learning") if row["kind"] == "run" and row["data"] == setting.data]
    done = {(row["arm"], row["match"], row["seed"], row["steps"]) for row in of_runs}
    for seed in seeds:
        for match in matches:
            for arm in arms:
                count = steps_of(arm, match, setting, steps)
                if (arm, match, seed, count) not in done:
                    yield setting, arm, match, seed, count


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "run"))
    parser.add_argument("--data", default="built-in", help="built-in or NAME=TRAIN,HELD_OUT; NAME-ROWS for a part")
    parser.add_argument("--model", help="hub id or folder; default: the built-in base")
    parser.add_argument("--label", help="name of a variant, such as of costs with further options")
    parser.add_argument("--candidates", type=int, default=64, help="n, of the arms whose name says no sizes")
    parser.add_argument("--budget", type=int, default=32, help="b")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="instead of groups")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--match", nargs="+", choices=("steps", "time"), default=["steps", "time"])
    parser.add_argument("--steps", type=int, default=80, help="steps of every arm at matched steps")
    parser.add_argument("--reference_steps", type=int, default=140, help=f"steps of {REFERENCE} at matched time")
    parser.add_argument("--rounds", type=int, default=12, help="steps of every arm that are timed")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no further run after this time")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    arms = given.arms or [arm for group in given.groups for arm in GROUPS[group] if arm in ARMS]
    setting = Setting.of(given.data, given.model, options).labelled(given.label)
    setting = setting.sized(given.candidates, given.budget)
    if given.what == "cost":
        cost(setting, list(dict.fromkeys([REFERENCE, *arms])), given.rounds)
        return
    steps = {"steps": given.steps, "time": given.reference_steps}
    until = time.monotonic() + 60 * given.minutes

    def run_in_time(job: tuple) -> None:
        if time.monotonic() < until:
            run(*job)

    with ThreadPoolExecutor(given.workers) as pool:
        for _ in pool.map(run_in_time, missing(setting, arms, given.match, given.seeds, steps)):
            pass  # raises the error of a run


if __name__ == "__main__":
    main()
