"""CoLM in transformers' Trainer: python docs/examples/trainer.py DATA.jsonl OUTPUT [MODEL] [STEPS]

Also runs under torchrun, and with the Trainer's DeepSpeed or FSDP. Each row of DATA has ``prompt``, ``completion`` and
``source``. MODEL defaults to the small base in the package.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from colm_scale.base import BASE_MODEL
from colm_scale.integrations import CoresetTrainerMixin, SelectionConfig


class CoresetTrainer(CoresetTrainerMixin, Trainer):
    """The Trainer on coresets."""


def main(data: str, output: str, name: str = str(BASE_MODEL), steps: str = "20") -> CoresetTrainer:
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(name), LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )

    def tokenise(row: dict) -> dict[str, list[int]]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
        completion = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    rows = load_dataset("json", data_files=data, split="train")
    trainer = CoresetTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # one process trains on 8 x 2 = 16 examples per step
            max_steps=int(steps),
            learning_rate=1e-3,
            logging_steps=5,
            report_to=[],
        ),
        train_dataset=rows.map(tokenise, remove_columns=["prompt", "completion"]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        coreset=SelectionConfig(candidates=32, budget=16),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
