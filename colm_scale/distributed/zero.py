"""Training under DeepSpeed ZeRO, and the one source of truth about its configuration.

A file in ``ds_configs`` says what DeepSpeed alone knows: ZeRO stage, offload, communication. What the run decides
(batch arithmetic, clipping, dtype, optimizer) is written in here, and a file that says otherwise is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from colm_scale.config import RunConfig, TrainConfig
from colm_scale.distributed.engine import make_optimizer, optimizer_tensors, remember, trainable
from colm_scale.distributed.group import Group
from colm_scale.errors import UserError
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.records import Batch

_STAGES = (0, 1, 2)
_DECIDED_HERE = {
    "optimizer": "AdamW from --train.*",
    "scheduler": "--train.schedule",
    "amp": "--train.dtype",
    "fp16": "--train.dtype",
    "bf16": "--train.dtype",
    "bfloat16": "--train.dtype",
    "torch_autocast": "--train.dtype",
    "data_types": "--train.dtype",
}


def read_ds_config(config: RunConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of a run: the file's topology with the run's decisions written in.

    Raises:
        UserError: The file is missing, is not a JSON object, or contradicts the run (naming both values).
    """
    path = Path(config.ds_config)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--ds_config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--ds_config {path} is not a UTF-8 text file") from None
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--ds_config {path} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(given, dict):
        raise UserError(f"--ds_config {path} holds a {type(given).__name__}, but must be a JSON object")
    _check_stage(given, path)
    return _with_decisions(given, config, world_size, path)


def _check_stage(given: dict, path: Path) -> None:
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(
            f"--ds_config {path}: zero_optimization is {json.dumps(zero)}, but must be an object with a stage"
        )
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in _STAGES:
        raise UserError(f"--ds_config {path}: zero_optimization.stage is {stage!r}, but must be one of {_STAGES}")


def _with_decisions(given: dict, config: RunConfig, world_size: int, path: Path) -> dict:
    decided = {
        # An optimizer step is one micro-batch as far as DeepSpeed's arithmetic goes: how many there really are changes
        # from step to step, so the engine sets the accumulation boundary itself.
        "train_batch_size": (world_size, config.selection.budget, "--selection.budget"),
        "train_micro_batch_size_per_gpu": (1, "decided per step", "--train.micro_batch_tokens"),
        "gradient_accumulation_steps": (1, "decided per step", "--train.micro_batch_tokens"),
        "gradient_clipping": (config.train.max_grad_norm, config.train.max_grad_norm, "--train.max_grad_norm"),
    }
    for key, (_, ours, option) in decided.items():
        theirs = given.get(key, "auto")
        if theirs not in ("auto", ours):
            raise UserError(
                f"--ds_config {path}: {key} is {theirs!r}, but the run's is {ours!r} ({option}): remove the key or "
                f"change the option"
            )
    for key, option in _DECIDED_HERE.items():
        theirs = given.get(key, "auto")
        switched_off = isinstance(theirs, dict) and theirs.get("enabled") is False
        if theirs != "auto" and not switched_off:
            raise UserError(
                f"--ds_config {path}: {key} is {json.dumps(theirs)}, but the run decides this itself "
                f"({option}, here {_decision(key, config.train)}): remove the key"
            )
    result = {key: value for key, value in given.items() if key not in _DECIDED_HERE}
    return result | {key: value for key, (value, _, _) in decided.items()}


def _decision(key: str, train: TrainConfig) -> str:
    return {"optimizer": "AdamW", "scheduler": train.schedule}.get(key, train.dtype)


class ZeroEngine:
    """DeepSpeed's engine behind the `Engine` protocol.

    Adapters are float32 whatever the base's type, so DeepSpeed runs in its float32 mode and keeps no second copy.
    """

    name = "deepspeed"

    def __init__(self, module: ExampleLoss, config: TrainConfig, group: Group, ds_config: dict):
        os.environ.setdefault("LOCAL_RANK", str(group.local_rank))
        if group.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it looks for others, and warns
        import deepspeed

        # Gloo does what its shared-memory kernel for CPUs does. That one would be compiled at the first run, and a run
        # killed while it compiles leaves a lock behind that every later run waits for, for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not dist.is_initialized():  # a lone process: DeepSpeed wants a group all the same
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        self.module = module
        self._base_optimizer = make_optimizer(module, config)
        self._ranks = group.world_size
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._base_optimizer, config=ds_config, dist_init_required=False
        )

    def forward(self, batch: Batch) -> Tensor:
        return self._engine(batch.input_ids, batch.attention_mask, batch.labels)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)  # sticky, so said every time
        self._engine.backward(loss * self._ranks, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float | None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)  # stage 0 without clipping takes none

    def snapshot(self) -> Callable[[], None]:
        # ZeRO-1 and 2 train float32 partitions and copy them into the module: both are put back.
        restore_partitions = remember(optimizer_tensors(self._base_optimizer))
        restore_module = remember(trainable(self.module))

        @torch.no_grad()
        def restore() -> None:
            restore_partitions()
            restore_module()

        return restore
