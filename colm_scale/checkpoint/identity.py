"""The identity of a run: the options that decide what is computed, the training data and the base model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from colm_scale.config import RunConfig
from colm_scale.config.removed import OPTIONS, is_harmless
from colm_scale.errors import UserError
from colm_scale.modeling.weights import WHOLE, Weights
from colm_scale.records import Json

_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "_attn_implementation",
    "use_cache",
}
"""Keys of a model's configuration about its origin or how it is run, not about what it computes."""
_LEFT_OUT = {
    "data.train": "the data's digest covers the contents; the place does not matter",
    "data.eval": "training does not depend on it",
    "data.sources": "the data's digest covers them",
    "data.chat_template": "the data's digest covers the rendered text",
    "data.left_out": "the data's digest covers the rendered text",
    "data.now": "the data's digest covers the rendered text",
    "selection.replay": "the data's digest covers the contents; the place does not matter",
    "train.threads": "rounding at most",
    "train.activation_checkpointing": "rounding at most",
    "train.compile": "rounding at most",
    "train.forward_reuse": "rounding at most",
    "train.forward_reuse_gib": "rounding at most",
    "train.timeout": "ends a run but does not change one",
}
"""Options that may differ, and why. All others of the compared sections must be equal."""
_ADDED = {"lora.use_rslora": False}
"""Options that older checkpoints lack, with the value that these were made with; at that value they are left out."""
_MAKE_OTHER_WEIGHTS = {"train.dtype", "model.quantize"}
"""Options that change the model's digest; if one differs, the message does not repeat that the model does."""
_NONE = "no such option"
"""Stands for the value of an option that the other version does not have."""


def model_digest(module: nn.Module, weights: Weights = WHOLE) -> str:
    """Compute the SHA-256 of a base model, in hexadecimal: of its configuration and a sample of each frozen parameter.

    Adapters, device and origin do not change it. A sample has at most 1,024 elements at equal distances, so billions of
    parameters take moments. Other fine-tunings of a model have other digests, but a change of unsampled elements alone
    goes unnoticed.

    Args:
        module: A transformers model or a module around one, before an engine shards it.
        weights: Its weights; if they come from files, an engine may have sharded it.
    """
    model = next(part for part in module.modules() if isinstance(part, PreTrainedModel))
    digest = hashlib.sha256(json.dumps(_lasting(model.config.to_diff_dict()), sort_keys=True, default=str).encode())
    for name, (shape, dtype, sample) in sorted(weights.samples(model).items()):
        digest.update(repr((name, shape, dtype)).encode())
        digest.update(sample)
    return digest.hexdigest()


def config_facts(config: RunConfig) -> Json:
    """Return the options that decide what is computed, by dotted name, as JSON gives them back.

    ``lora.adapter`` is included although the checkpoint has the trained weights: the adapter's own alpha, dropout and
    targets are used, and another adapter of the same shape would change them unnoticed.

    Args:
        config: Resolved, so that a default and the same value given by the user are equal.
    """
    facts: Json = {"model.quantize": config.model.quantize}
    for section in ("data", "selection", "sources", "lora", "train"):
        options = dataclasses.asdict(getattr(config, section))
        facts |= {f"{section}.{name}": value for name, value in options.items()}
    compared = {name: value for name, value in facts.items() if name not in _LEFT_OUT}
    for name, value in _ADDED.items():
        if compared[name] == value:
            del compared[name]
    plain: Json = json.loads(json.dumps(compared))
    return plain


def check_same_run(stored: Json, current: Json, where: Path) -> None:
    """Check that a run can resume from a checkpoint.

    Args:
        stored: The checkpoint's ``config`` (see `config_facts`) and digests ``data`` and ``model``.
        current: The same of this run.
        where: The checkpoint.

    Raises:
        UserError: It cannot. Names everything that differs, options with both values.
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
            f"checkpoint {where} is not one of this run: {'; '.join(found)}. Resume with what it was made with, or "
            "start another run (another --output_dir, without --resume)"
        )


def _difference(name: str, before: dict[str, object], now: dict[str, object]) -> str:
    found = f"--{name} is {_said(now, name)}, but the checkpoint was made with {_said(before, name)}"
    return found if name in now or name not in OPTIONS else f"{found} ({OPTIONS[name].way_out})"


def _said(options: dict[str, object], name: str) -> object:
    return json.dumps(options[name], ensure_ascii=False) if name in options else _NONE


def _lasting(value: object) -> object:
    """Remove the volatile keys of a configuration, nested ones included."""
    if isinstance(value, dict):
        return {str(key): _lasting(item) for key, item in value.items() if key not in _VOLATILE}
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value
