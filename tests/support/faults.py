"""Small runs that are broken and go on, and what must then be equal bit by bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer

from colm_scale.base import BASE_MODEL
from colm_scale.checkpoint.store import CheckpointFolder
from support.commands import rows, write_rows
from support.families import base_model

PHASES = ("sample", "sketch", "gather", "select", "broadcast", "learn", "route", "train", "optimizer", "checkpoint")
WRITING = ("writing", "naming", "pruning")
"""Where rank 0 can be while it writes a checkpoint; see `support.sabotage.at`."""
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


def small_run(folder: Path, engine: str = "ddp", *, steps: int = 6, every: int = 2) -> list[str]:
    """Options of a run of a tiny model, which is written to ``folder`` if it is not there: seconds, once imported."""
    if not (folder / "train.jsonl").exists():
        tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
        tokenizer.save_pretrained(folder / "model")
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        base_model("llama", vocab_size=len(tokenizer), **ends).save_pretrained(folder / "model")
        added = [("one", 1)] * 8 + [("seven", 7)] * 24 + [("nine", 9)] * 24
        sums = [
            {"instruction": f"What is {i} + {j}?", "output": str(i + j), "source": name}
            for i, (name, j) in enumerate(added)
        ]
        write_rows(folder / "train.jsonl", sums)
    return [
        *("--model.name", str(folder / "model"), "--data.train", str(folder / "train.jsonl")),
        *("--selection.candidates", "16", "--selection.budget", "8", "--selection.columns", "32"),
        *("--train.learning_rate", "0.01", "--train.threads", "1", "--train.steps", str(steps)),
        *("--train.micro_batch_tokens", "64"),  # several micro-batches: some for each rank
        *("--profile.floor_every", "0", "--profile.display", "plain", "--checkpoint.every", str(every)),
        *ENGINES[engine],
    ]


def steps_written(run: Path) -> int:
    """The last step in a run's ``metrics.jsonl``; 0 without any."""
    metrics = run / "metrics.jsonl"
    whole = metrics.read_bytes().rpartition(b"\n")[0].splitlines() if metrics.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def newest_checkpoint(run: Path) -> int:
    """The step of a run's newest checkpoint, every byte of it verified; 0 without any."""
    found = CheckpointFolder(run / "checkpoints", keep=1).newest(fallback=False)
    return 0 if found is None else found.state["step"]


def result(run: Path) -> dict[str, object]:
    """What two equal runs have in common, bit by bit: ids and weights, losses, gradient norms, and the adapter."""
    metrics = rows(run / "metrics.jsonl")
    return {
        "steps": [row["step"] for row in metrics],
        "losses": [(row["loss"], row["gradient_norm"], row["learning_rate"]) for row in metrics],
        "selection": rows(run / "selection.jsonl"),
        "adapter": hashlib.sha256((run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
    }
