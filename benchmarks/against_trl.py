"""Compare steps with TRL's SFTTrainer: same model, LoRA, examples and dtype, alternating in one process.

pip install trl; python benchmarks/against_trl.py [-- OPTIONS OF THE RUN]

SFTTrainer trains on all candidates by gradient accumulation, tokenised in advance by the product, in micro-batches with
the product's mean number of tokens; padding-free with flash-attn on a GPU, padded on a CPU. In each block of steps, all
arms get the same candidates. Rows are appended to benchmarks/results/against_trl.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict

import rows
import runs
import step_time
import torch
import transformers
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available

from colm_scale.config import command_line as arguments
from colm_scale.distributed.connect import connect
from colm_scale.distributed.group import Group
from colm_scale.modeling.load import load_model
from colm_scale.run.inputs import Inputs, read_inputs
from colm_scale.run.prepare import resolve

ARMS = {
    "full": ("--selection.method", "full"),
    "colm": (),
    "stratified": ("--selection.method", "stratified"),
}
TRL = "SFTTrainer"
CANDIDATES = 64


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.perf_counter() - self._started)


class Peft:
    """TRL's trainer around one adapted model, which is trained on from block to block."""

    def __init__(self, config, group: Group, inputs: Inputs, per_device: int):
        from peft import LoraConfig
        from trl import SFTConfig, SFTTrainer

        class InOrder(SFTTrainer):
            def _get_train_sampler(self, *_: object, **__: object) -> SequentialSampler:
                return SequentialSampler(self.train_dataset)

        self._trainer, self._inputs, self._per_device = InOrder, inputs, per_device
        self._model = load_model(config.model, getattr(torch, config.train.dtype), group.device)
        self._lora = LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear")
        self._arguments, self._config = SFTConfig, config

    def train(self, indices: torch.Tensor) -> list[float]:
        """Train on these examples in order; returns the seconds of each step."""
        examples = self._inputs.sampler.examples
        found = [examples.example(int(index)) for index in indices]
        data = Dataset.from_dict(
            {
                "input_ids": [tokens.tolist() for tokens, _ in found],
                "labels": [tokens.long().masked_fill(~mask, -100).tolist() for tokens, mask in found],
            }
        )
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder:
            arguments = self._arguments(
                output_dir=folder,
                per_device_train_batch_size=self._per_device,
                gradient_accumulation_steps=CANDIDATES // self._per_device,
                num_train_epochs=1,
                learning_rate=1e-3,
                report_to=[],
                logging_strategy="no",
                save_strategy="no",
                disable_tqdm=True,
                gradient_checkpointing=self._config.train.activation_checkpointing,
                bf16=self._config.train.dtype == "bfloat16",
                padding_free=torch.cuda.is_available() and is_flash_attn_2_available(),
                dataset_kwargs={"skip_prepare_dataset": True},
                use_cpu=not torch.cuda.is_available(),
            )
            one = self._trainer(
                model=self._model,
                args=arguments,
                train_dataset=data,
                processing_class=self._inputs.tokenizer,
                peft_config=None if hasattr(self._model, "peft_config") else self._lora,
                callbacks=[clock],
            )
            one.train()
            self._model = one.model
        return clock.seconds


def main() -> None:
    """Run the command line."""
    import trl

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    own, options = rows.split(sys.argv[1:])
    given = parser.parse_args(own)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    group = connect()
    quiet = [*step_time.QUIET, "--selection.candidates", str(CANDIDATES), *options]
    steps = {arm: step_time.prepare([*quiet, *of_arm], group)[0] for arm, of_arm in ARMS.items()}
    config = resolve(arguments.parse(quiet))
    inputs = read_inputs(config, group)
    mean = float(inputs.sampler.examples.lengths.double().mean())
    per_device = max(size for size in (1, 2, 4, 8, 16, 32, 64) if size * mean <= config.train.micro_batch_tokens)
    theirs = Peft(config, group, inputs, per_device)
    seconds: dict[str, list[float]] = defaultdict(list)
    for block in range(given.blocks + 1):
        numbers = range(block * given.steps + 1, (block + 1) * given.steps + 1)
        indices = torch.cat([inputs.sampler(number).indices for number in numbers])
        found = {TRL: theirs.train(indices), **{arm: [] for arm in ARMS}}
        for arm, step in steps.items():
            for number in numbers:
                started = time.perf_counter()
                step(number, 1e-3)
                found[arm].append(time.perf_counter() - started)
        for arm, taken in found.items():
            seconds[arm] += taken if block else []  # the first block warms up
    for arm, taken in seconds.items():
        ratios = [own / other for own, other in zip(taken, seconds[TRL])]
        row = {"benchmark": "against_trl", "arm": arm, "trl": trl.__version__, "candidates": CANDIDATES}
        row |= {"examples_of_a_micro_batch": per_device, "seconds": runs.quantiles(taken), "steps": len(taken)}
        row |= {"model": config.model.name or "built-in base", "over_trl": runs.quantiles(ratios)}
        rows.append("against_trl", row | {"environment": rows.here()})
        print(arm, row["seconds"], row["over_trl"], flush=True)


def table() -> str:
    """One row per arm; the last measurement of each."""
    last = {(row["model"], row["arm"]): row for row in rows.read("against_trl")}
    lines = ["| model | trained, step | seconds | of SFTTrainer's (p20 to p80) |", "|---|---|---:|---:|"]
    for (model, arm), row in last.items():
        over, trained = row["over_trl"], row["candidates"] // (2 if arm in ("colm", "stratified") else 1)
        ratio = f"{over['p50']:.2f} ({over['p20']:.2f} to {over['p80']:.2f})"
        what = f"`{arm}`: {trained} of {row['candidates']}"
        lines.append(f"| {model} | {what} | {row['seconds']['p50']:.2f} | {ratio} |")
    return "\n".join(lines)


TABLES = {"against TRL": table}

if __name__ == "__main__":
    main()
