"""CoLM in TRL's SFTTrainer: python docs/examples/sft_trainer.py DATA.jsonl OUTPUT [MODEL] [STEPS]

Each row of DATA has ``prompt``, ``completion`` and ``source``. MODEL defaults to the small base in the package.
"""

import sys

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from colm_scale.base import BASE_MODEL
from colm_scale.integrations import CoresetTrainerMixin, SelectionConfig


class CoresetSFTTrainer(CoresetTrainerMixin, SFTTrainer):
    """The SFTTrainer on coresets."""


def main(data: str, output: str, name: str = str(BASE_MODEL), steps: str = "20") -> CoresetSFTTrainer:
    trainer = CoresetSFTTrainer(
        model=name,
        args=SFTConfig(
            output_dir=output,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,  # one process trains on 8 x 2 = 16 examples per step
            max_steps=int(steps),
            learning_rate=1e-3,
            logging_steps=5,
            report_to=[],
            bf16=False,
        ),
        train_dataset=load_dataset("json", data_files=data, split="train"),
        peft_config=LoraConfig(r=16, target_modules="all-linear"),
        coreset=SelectionConfig(candidates=32, budget=16),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
