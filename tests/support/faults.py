"""Small runs that are broken and resumed, and results that must be equal bit for bit."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from transformers import AutoTokenizer

from colm_scale.base import BASE_MODEL
from colm_scale.checkpoint.store import CheckpointFolder
from support.commands import Forked, Outcome, Ranks, rows, write_rows
from support.families import base_model

PHASES = ("sample", "sketch", "gather", "select", "broadcast", "learn", "route", "train", "optimizer", "checkpoint")
SECONDS = 120
"""Time limit of a run on a busy machine, beyond which it counts as hung."""
ENGINES: dict[str, tuple[str, ...]] = {
    "single": (),
    "ddp": (),
    **{
        name: ("--ds_config", f"ds_configs/{name}.json")
        for name in ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    },
    "fsdp": ("--engine", "fsdp"),
    "fsdp_offload": ("--engine", "fsdp", "--fsdp.cpu_offload", "true"),
}


def write_materials(folder: Path) -> None:
    """Write a tiny model, and additions from three sources, the smallest of which is kept."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    tokenizer.save_pretrained(folder / "model")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    base_model("llama", vocab_size=len(tokenizer), **ends).save_pretrained(folder / "model")
    added = [("one", 1)] * 8 + [("seven", 7)] * 24 + [("nine", 9)] * 24
    write_rows(
        folder / "train.jsonl",
        [
            {"instruction": f"What is {i} + {j}?", "output": str(i + j), "source": name}
            for i, (name, j) in enumerate(added)
        ],
    )


class Workshop:
    """A bench for breaking and resuming small runs, which take seconds after the imports.

    Args:
        folder: Gets the model, the data, the last run's output, and the results of `unbroken` runs.
    """

    def __init__(self, forked: Forked, folder: Path, steps: int = 6):
        self.forked, self.folder, self.steps = forked, folder, steps
        self._unbroken: dict[tuple[str, int], dict[str, object]] = {}
        write_materials(folder)

    def options(self, run: Path, engine: str, *more: str) -> list[str]:
        """Options of a run that saves every second step."""
        return [
            *("--model.name", str(self.folder / "model"), "--data.train", str(self.folder / "train.jsonl")),
            *("--selection.candidates", "16", "--selection.budget", "8", "--selection.columns", "32"),
            *("--train.learning_rate", "0.01", "--train.threads", "1", "--train.steps", str(self.steps)),
            *("--train.micro_batch_tokens", "64"),  # several micro-batches for each rank
            *("--profile.floor_every", "0", "--profile.display", "plain", "--checkpoint.every", "2"),
            *(*ENGINES[engine], "--output_dir", str(run), *more),
        ]

    def start(self, run: Path, engine: str, *more: str, ranks: int = 2, hosts: int = 1) -> Ranks:
        return self.forked.start(self.options(run, engine, *more), self.folder / "output", ranks, hosts=hosts)

    def go_on(self, run: Path, engine: str, *more: str, ranks: int = 2) -> Outcome:
        """Resume a run to its end."""
        return self.start(run, engine, "--resume", "auto", *more, ranks=ranks).outcome(SECONDS)

    def unbroken(self, engine: str, ranks: int = 2) -> dict[str, object]:
        """The `result` of a run without a fault."""
        if (engine, ranks) not in self._unbroken:
            run = self.folder / f"unbroken-{engine}-{ranks}-{self.steps}"
            self.start(run, engine, ranks=ranks).outcome(SECONDS).succeeded()
            self._unbroken[engine, ranks] = result(run)
        return self._unbroken[engine, ranks]


class NoMounts(RuntimeError):
    """This machine does not permit mounts; the message gives the reason."""


def own_mounts() -> tuple[str, ...]:
    """Command prefix for a process with private mounts.

    Raises:
        NoMounts: Root is required.
    """
    prefix = ("unshare", "--mount")
    try:
        subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoMounts(f"no mounts: {getattr(error, 'stderr', None) or error}".strip()) from None
    return prefix


def mount_disk(forked: Forked, place: Path, megabytes: int) -> Path:
    """Mount a small disk at ``place`` for a process of `own_mounts`; returns its path for other processes."""
    enter = ["nsenter", "--target", str(forked.pid), "--mount"]
    subprocess.run([*enter, "mkdir", "-p", str(place)], check=True)
    subprocess.run([*enter, "mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)], check=True)
    return Path(f"/proc/{forked.pid}/root{place}")


def steps_written(run: Path) -> int:
    """The last step in a run's ``metrics.jsonl``; 0 if there is none."""
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes().rpartition(b"\n")[0].splitlines() if metrics.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def newest_checkpoint(run: Path) -> int:
    """The step of a run's newest verified checkpoint; 0 if there is none."""
    found = CheckpointFolder(run / "checkpoints", keep=1).newest(fallback=False)
    return 0 if found is None else found.state["step"]


def result(run: Path) -> dict[str, object]:
    """Results that equal runs share bit for bit: ids and weights, losses, gradient norms, adapter."""
    metrics = rows(run / "metrics.jsonl")
    return {
        "steps": [row["step"] for row in metrics],
        "losses": [(row["loss"], row["gradient_norm"], row["learning_rate"]) for row in metrics],
        "selection": rows(run / "selection.jsonl"),
        "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
