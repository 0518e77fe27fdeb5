"""The one source of truth about a DeepSpeed configuration.

A file, the user's or one of ``ds_configs`` by name, sets what only DeepSpeed knows: ZeRO stage, offload, communication.
The run's decisions (batch arithmetic, clipping, dtype, optimizer) are added here. A file that contradicts them, or has
a key that DeepSpeed would silently ignore, is an error.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from pathlib import Path

from colm_scale.config import EXPERTS, RunConfig
from colm_scale.errors import UserError
from colm_scale.records import Json

NO_EXPERTS = f"ZeRO-3 (--ds_config) cannot train adapters on {EXPERTS}: use --engine fsdp, or zero2"
_SHIPPED = Path(__file__).parents[1] / "ds_configs"
_STAGES = (0, 1, 2, 3)
_DECIDED_HERE = {
    "optimizer": "--train.optimizer",
    "scheduler": "--train.schedule",
    "amp": "--train.dtype",
    "fp16": "--train.dtype",
    "bf16": "--train.dtype",
    "bfloat16": "--train.dtype",
    "torch_autocast": "--train.dtype",
    "data_types": "--train.dtype",
}
_ARITHMETIC = {
    "train_batch_size": "--selection.budget",
    "train_micro_batch_size_per_gpu": "--train.micro_batch_tokens",
    "gradient_accumulation_steps": "--train.micro_batch_tokens",
    "gradient_clipping": "--train.max_grad_norm",
}
_ALLOWED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "aio",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "wandb",
)
_REFUSED_IN_ZERO = {
    "compute_grad_norm": "a bad update is detected by the gradient norm",
    "legacy_stage1": "it is not maintained",
    "zero_hpz_partition_size": "checkpoints do not cover its second shards",
    "mics_shard_size": "checkpoints do not cover its groups",
    "zenflow": "its updates lag, so the ids would not be reproducible",
}


def read_ds_config(config: RunConfig, world_size: int) -> Json:
    """Read a run's DeepSpeed configuration and add the run's decisions. Empty without ``--ds_config``.

    Raises:
        UserError: DeepSpeed is not installed, or the file is missing, is not a JSON object, has an unknown key, or
            contradicts the run (names both values).
    """
    if not config.ds_config:
        return {}
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"--ds_config {config.ds_config} needs DeepSpeed, which is not installed: pip install "
            f"'colm_scale[deepspeed]', or leave --ds_config out (--engine fsdp shards without it)"
        )
    path = _found(config.ds_config)
    given = _without_auto(_json_object(path))
    zero = given.get("zero_optimization", {})
    _check_keys(given, path)
    _check_zero(zero, path)
    _check_decisions(given, config, path)
    result = {key: value for key, value in given.items() if key not in _DECIDED_HERE}
    if "offload_optimizer" in zero:
        result["zero_force_ds_cpu_optimizer"] = False  # the run's own optimizer, which needs no compilation
    # The number of micro-batches changes from step to step, so DeepSpeed counts one per step and the engine sets the
    # accumulation boundary.
    return result | {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # `checked_ds_config` refuses those that need whole matrices
    }


def zero_stage(ds_config: Json) -> int:
    """Return the ZeRO stage; 0 without DeepSpeed."""
    stage: int = ds_config.get("zero_optimization", {}).get("stage", 0)
    return stage


def _found(named: str) -> Path:
    """Return the file, or the package's file of that name."""
    shipped = {path.stem: path for path in _SHIPPED.glob("*.json")}
    if not Path(named).exists() and named in shipped:
        return shipped[named]
    if not Path(named).exists() and not Path(named).suffix:
        raise UserError(f"--ds_config {named} is neither a file nor one of {', '.join(sorted(shipped))}")
    return Path(named)


def _json_object(path: Path) -> Json:
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
    return given


def _without_auto(given: Json) -> Json:
    """Remove the keys whose value is "auto", those of ``zero_optimization`` too."""
    return {
        key: _without_auto(value) if isinstance(value, dict) and key == "zero_optimization" else value
        for key, value in given.items()
        if value != "auto"
    }


def _check_keys(given: Json, path: Path) -> None:
    known = [*_ALLOWED, *_ARITHMETIC, *_DECIDED_HERE]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(_ALLOWED)}"
            raise UserError(f"--ds_config {path}: {key} would have no effect here: {hint}")


def _check_zero(zero: object, path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    where = f"--ds_config {path}: zero_optimization"
    if not isinstance(zero, dict):
        raise UserError(f"{where} is {json.dumps(zero)}, but must be an object with a stage")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in _STAGES:
        raise UserError(f"{where}.stage is {stage!r}, but must be one of {_STAGES}")
    for key, reason in _REFUSED_IN_ZERO.items():
        if key in zero:
            raise UserError(f"{where}.{key} is not supported: {reason}; remove the key")
    for key in ("offload_optimizer", "offload_param"):
        offload = zero.get(key)
        if isinstance(offload, dict) and offload.get("device") not in (None, "none", "cpu"):
            raise UserError(f"{where}.{key}.device is {offload['device']!r}, but must be 'cpu' or 'none'")
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}.{name} is {first['input']!r}: {first['msg']}") from None


def _check_decisions(given: Json, config: RunConfig, path: Path) -> None:
    ours = {"train_batch_size": config.selection.budget, "gradient_clipping": config.train.max_grad_norm}
    for key, option in _ARITHMETIC.items():
        value = ours.get(key, "decided per step")
        if given.get(key, value) != value:
            raise UserError(
                f"--ds_config {path}: {key} is {given[key]!r}, but the run uses {value!r} ({option}): remove the key "
                f"or change the option"
            )
    for key, option in _DECIDED_HERE.items():
        theirs = given.get(key)
        switched_off = isinstance(theirs, dict) and theirs.get("enabled") is False
        if key in given and not switched_off:
            raise UserError(
                f"--ds_config {path}: {key} is {json.dumps(theirs)}, but the run decides this "
                f"({option}, here {getattr(config.train, option.rpartition('.')[2])}): remove the key"
            )
