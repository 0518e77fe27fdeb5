"""The runs of `support.worker` in the trainers of transformers and TRL: same model, same candidates, same order.

As a script, under a launcher: ``trainers.py KIND CASE FOLDER STEPS RANKS RESUME OPTIONS``, the last two as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import datasets
import torch
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from colm_scale.base import BASE_MODEL
from colm_scale.config import RunConfig, TrainConfig
from colm_scale.data.sampler import CandidateSampler
from colm_scale.distributed.group import Group
from colm_scale.integrations import CoresetTrainerMixin
from support import worker
from support.commands import rows
from support.spies import collectives

HAS_TRL = find_spec("trl") is not None
WITHOUT_TRL = "TRL is not installed: pip install trl"
DIRECTORY = "coreset"


class CoresetTrainer(CoresetTrainerMixin, Trainer):
    """The class as a user defines it."""


def data(case: worker.Case, steps: int) -> datasets.Dataset:
    """The candidates of the product's own steps, in order."""
    examples = worker.examples()
    sampler = CandidateSampler(examples, case.selection.candidates, worker.run_config(case).train.seed)
    order = torch.cat([sampler(step).indices for step in range(1, steps + 1)])
    found = [examples.example(index) for index in order.tolist()]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [tokens.tolist() for tokens, _ in found],
            "labels": [tokens.long().masked_fill(~mask, -100).tolist() for tokens, mask in found],
            "source": [examples.source_names[source] for source in examples.sources[order]],
            "coreset_id": examples.ids[order].tolist(),
        }
    )


def collate(features: list[dict]) -> dict[str, torch.Tensor]:
    """Pads on the left, unlike the product."""
    longest = max(len(row["input_ids"]) for row in features)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([[value] * (longest - len(row[name])) + row[name] for row in features])

    mask = torch.tensor([[i >= longest - len(row["input_ids"]) for i in range(longest)] for row in features]).long()
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def arguments(case: worker.Case, folder: Path, steps: int, ranks: int, **options: object) -> dict:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": case.selection.budget // (2 * ranks),
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": worker.RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "seed": worker.run_config(case).train.seed,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }


def make(kind: str, case: worker.Case, folder: Path, steps: int, ranks: int = 1, **options: object) -> Trainer:
    """A trainer with the same task as the product's own loop."""
    config = worker.run_config(case)
    given = arguments(case, folder, steps, ranks, **options)
    train = TrainConfig(micro_batch_tokens=config.train.micro_batch_tokens, packing=config.train.packing)
    common = {
        "model": worker.model(config)[0].model,
        "train_dataset": data(case, steps),
        "coreset": RunConfig(selection=case.selection, train=train),
    }
    if kind == "transformers":
        return CoresetTrainer(args=TrainingArguments(**given), data_collator=collate, **common)
    from trl import SFTConfig, SFTTrainer

    class CoresetSFTTrainer(CoresetTrainerMixin, SFTTrainer):
        """The class as a user defines it."""

    args = SFTConfig(**given, bf16=False, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)  # only the padding token is used
    return CoresetSFTTrainer(args=args, processing_class=tokenizer, **common)


def train(kind: str, case: worker.Case, folder: Path, steps: int, ranks: int = 1, resume=None, **options) -> dict:
    """Results of a trainer in the format of the product's own loop."""
    trainer = make(kind, case, folder, steps, ranks, **options)
    with worker.perturbed(case):
        trainer.train(resume_from_checkpoint=resume)
    return {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "logs": trainer.state.log_history,
        "adapters": worker.adapters(trainer.accelerator.unwrap_model(trainer.model_wrapped)),
    }


def ours(case: worker.Case, steps: int) -> dict:
    """Run the product's own loop in one process."""
    group = Group(0, 1, 0, 1, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, worker.perturbed(case):
        parts = worker.make_parts(case, "auto", group, Path(folder))
        reports = [parts.step(step, worker.RATE)[0] for step in range(1, steps + 1)]
    return {
        "losses": [report.loss for report in reports],
        "selected": [report.candidates.ids[report.selection.positions].tolist() for report in reports],
        "weights": [report.selection.weights.tolist() for report in reports],
        "adapters": worker.adapters(parts.module.model),
    }


def selected(folder: Path) -> list[list[int]]:
    return [row["selected"] for row in rows(folder / DIRECTORY / "selection.jsonl")]


def main() -> None:
    """Run one rank under a launcher."""
    kind, name, folder, steps, ranks, resume, options = sys.argv[1:]
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if "deepspeed" in options:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see `colm_scale.engines.zero`
    counts, training_step = [], Trainer.training_step

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        with torch.profiler.profile() as profile:
            loss = training_step(*args, **kwargs)
        counts.append(dict(collectives(profile)))
        return loss

    Trainer.training_step = counted
    of_trainer = {"resume": json.loads(resume), **json.loads(options)}
    found = train(kind, worker.CASES[name], Path(folder), int(steps), int(ranks), **of_trainer)
    if torch.distributed.get_rank() == 0:
        torch.save(found | {"collectives": counts}, Path(folder) / "found.pt")


if __name__ == "__main__":
    main()
