"""Sharded LoRA fine-tuning with CoLM.

deepspeed launchers/train.py --ds_config ds_configs/zero2.json      ZeRO-2, all GPUs (one process on CPU)
torchrun --nproc_per_node 2 launchers/train.py                      DDP on 2 processes
python launchers/train.py                                           one process

The same as ``colm-scale train``; ``--help`` lists every option.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout runs without being installed

from colm_scale.cli.main import train

if __name__ == "__main__":
    train()
