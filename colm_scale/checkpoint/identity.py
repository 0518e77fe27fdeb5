"""What makes two runs the same run: equal options that decide what is computed, equal data, equal base model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from colm_scale.config import RunConfig
from colm_scale.config.removed import OPTIONS, is_harmless
from colm_scale.errors import UserError
from colm_scale.records import Json

_SAMPLE = 1024
"""Elements of each parameter that the model's digest reads."""
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "use_cache",
}
"""Keys of a model's configuration that say where it came from or how it is run, not what it computes."""
_LEFT_OUT = {
    "data.train": "the data's digest covers what they hold, wherever they lie",
    "data.eval": "nothing that is trained depends on it",
    "data.sources": "the data's digest covers them",
    "data.chat_template": "the data's digest covers what it writes",
    "selection.replay": "the data's digest covers what it holds, wherever it lies",
    "train.threads": "rounding at most",
    "train.activation_checkpointing": "rounding at most",
    "train.compile": "rounding at most",
    "train.forward_reuse": "rounding at most",
    "train.forward_reuse_gib": "rounding at most",
    "train.timeout": "ends a run, but changes none",
}
"""Options of the compared sections that may differ, and why."""
_MAKE_OTHER_WEIGHTS = {"train.dtype", "model.quantize"}
"""Where one of these differs, the model's digest does too, and nothing more is to be said about it."""
_NONE = "no such option"
"""In place of the value of an option that one version has and the other has not."""


def model_digest(module: nn.Module) -> str:
    """SHA-256 of a base model, in hexadecimal: its configuration, and a sample of each frozen parameter.

    Equal with and without adapters, on every device, and wherever the model was loaded from. A sample reads at most
    1,024 elements at equal distances, so this takes moments for billions of parameters, and another fine-tuning of the
    same model has another digest; a change that leaves all of them alone goes unseen.

    Args:
        module: A transformers model or what is wrapped around one, before an engine cuts it into shards.
    """
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    digest = hashlib.sha256(json.dumps(_lasting(model.config.to_diff_dict()), sort_keys=True, default=str).encode())
    # peft moves the layer it adapts one level down.
    frozen = {
        name.replace(".base_layer.", "."): parameter.data
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    for name, data in sorted(frozen.items()):
        digest.update(repr((name, tuple(data.shape), str(data.dtype))).encode())
        digest.update(_sample(data))
    return digest.hexdigest()


def config_facts(config: RunConfig) -> Json:
    """The options that decide what is computed, by dotted name, as JSON gives them back.

    ``lora.adapter`` is among them although the checkpoint holds what has become of its weights: its own alpha, dropout
    and targets are used, and another adapter of the same shape would change them unseen.

    Args:
        config: Resolved, so that a default and the same value written out are equal.
    """
    facts: Json = {"model.quantize": config.model.quantize}
    for section in ("data", "selection", "sources", "lora", "train"):
        options = dataclasses.asdict(getattr(config, section))
        facts |= {f"{section}.{name}": value for name, value in options.items()}
    plain: Json = json.loads(json.dumps({name: value for name, value in facts.items() if name not in _LEFT_OUT}))
    return plain


def check_same_run(stored: Json, current: Json, where: Path) -> None:
    """Check that a run may go on from a checkpoint.

    Args:
        stored: Of the checkpoint: ``config`` (see `config_facts`), and the digests ``data`` and ``model``.
        current: The same of this run.
        where: The checkpoint.

    Raises:
        UserError: It may not. Names everything that differs, options with both values.
    """
    now = current["config"]
    before = {name: value for name, value in stored["config"].items() if name in now or not is_harmless(name, value)}
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name, _NONE) != now.get(name, _NONE)]
    found = [_difference(name, before, now) for name in names]
    if stored["data"] != current["data"]:
        found.append("other training data")
    if stored["model"] != current["model"] and not _MAKE_OTHER_WEIGHTS.intersection(names):
        found.append("other base model")
    if found:
        raise UserError(
            f"checkpoint {where} is not one of this run: {'; '.join(found)}. Go on with what it was made with, or "
            "begin another run (another --output_dir, without --resume)"
        )


def _difference(name: str, before: dict[str, object], now: dict[str, object]) -> str:
    found = f"--{name} is {_said(now, name)}, but the checkpoint was made with {_said(before, name)}"
    return found if name in now or name not in OPTIONS else f"{found} ({OPTIONS[name].way_out})"


def _said(options: dict[str, object], name: str) -> object:
    return json.dumps(options[name], ensure_ascii=False) if name in options else _NONE


def _lasting(value: object) -> object:
    """A configuration, nested ones too, without its volatile keys."""
    if isinstance(value, dict):
        return {str(key): _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value


def _sample(data: Tensor) -> bytes:
    """At most 1,024 elements, whatever their type, as they are in memory."""
    flat = data.reshape(-1)
    sample = flat[:: max(1, math.ceil(len(flat) / _SAMPLE))]
    return sample.contiguous().view(torch.uint8).cpu().numpy().tobytes()
