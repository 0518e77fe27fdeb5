"""Find a trained adapter, given the folder of a run, adapter or checkpoint, and its base model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from colm_scale.base import BASE_MODEL
from colm_scale.checkpoint.files import Checkpoint
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import LoraConfig, ModelConfig, RunConfig
from colm_scale.config.command_line import read_trained
from colm_scale.config.commands import Which
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters, check_adapter
from colm_scale.reporting.run_directory import FACTS
from colm_scale.run.prepare import resolve

_Result = TypeVar("_Result")

_ADAPTER, _CONFIG, _MANIFEST = "adapter_config.json", "config.yaml", "manifest.json"


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter and what it was trained on.

    Attributes:
        folder: Adapter folder in PEFT format, or checkpoint folder.
        weights: Adapter weights of a checkpoint, by name; empty if ``folder`` is in PEFT format.
        config: Resolved configuration of the run; without a run, the defaults and the base model named by the adapter.
        sources: Training examples of each source, in the order of the run's source numbers; empty if not recorded.
    """

    folder: Path
    weights: Mapping[str, Tensor]
    config: RunConfig
    sources: Mapping[str, int]

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return self.config.model.name or str(BASE_MODEL)


def find(name: str, which: Which, model: str | None, *, trust_remote_code: bool) -> Trained:
    """Find the adapter in a folder.

    Args:
        name: Folder of a run, an adapter or a checkpoint.
        which: Adapter of a run: the one with the lowest held-out loss (if the run evaluated during training), or the
            one of its last step.
        model: Base model to use instead of the one named by the run.
        trust_remote_code: Allow the base model to run its own code. The run's setting is ignored, since its folder may
            come from anywhere.

    Raises:
        UserError: There is no adapter, or it cannot be read.
    """
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{name}: there is no such folder; use the folder of a run, an adapter or a checkpoint")
    run, folder, weights = _place(path, which)
    in_run = (run / _CONFIG).is_file()
    config = resolve(read_trained(run / _CONFIG)) if in_run else _config_of(folder)
    base = dataclasses.replace(config.model, trust_remote_code=trust_remote_code)
    if model:
        base = dataclasses.replace(base, name=model, revision=None)
    if not weights:
        _without_option(lambda: check_adapter(LoraConfig(adapter=str(folder))))
    sources = _sources(run / FACTS) if in_run else {}
    return Trained(folder, weights, dataclasses.replace(config, model=base), sources)


def adapted(base: PreTrainedModel, trained: Trained) -> PeftModel:
    """Add the adapter to the base model; returns it in evaluation mode.

    Raises:
        UserError: The adapter does not fit.
    """
    seed = trained.config.train.seed
    if not trained.weights:
        folder = LoraConfig(adapter=str(trained.folder))
        return _without_option(lambda: add_adapters(base, folder, seed)).eval()
    model = add_adapters(base, trained.config.lora, seed).eval()
    wanted = {f"model.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    odd = sorted(wanted.keys() ^ trained.weights.keys())
    if odd or any(wanted[name].shape != weight.shape for name, weight in trained.weights.items()):
        raise UserError(f"checkpoint {trained.folder} does not fit this model: {odd[0] if odd else 'shapes differ'}")
    with torch.no_grad():
        for name, weight in trained.weights.items():
            wanted[name].copy_(weight)
    return model


def _without_option(action: Callable[[], _Result]) -> _Result:
    """Run an action; in its error messages, replace the training option --lora.adapter by plain words."""
    try:
        return action()
    except UserError as error:
        raise UserError(str(error).replace("--lora.adapter ", "adapter ")) from None


def _place(path: Path, which: Which) -> tuple[Path, Path, Mapping[str, Tensor]]:
    """The folder that may hold a run, the adapter or checkpoint folder, and the adapter weights of a checkpoint."""
    if (path / _ADAPTER).is_file():
        return path.parent, path, {}
    if (path / _MANIFEST).is_file():
        run = path.absolute().parent.parent
        if not (run / _CONFIG).is_file():
            raise UserError(f"{path} is a checkpoint outside a run directory: {run} has no {_CONFIG} to name the model")
        return run, path, CheckpointFolder.read(path).tensors["adapter"]
    if not (path / _CONFIG).is_file():
        raise UserError(
            f"{path} is not a run directory (it has no {_CONFIG}), not an adapter ({_ADAPTER}) and not a checkpoint "
            f"({_MANIFEST})"
        )
    return path, *_of_run(path, which)


def _of_run(run: Path, which: Which) -> tuple[Path, Mapping[str, Tensor]]:
    best, last = run / "adapter", run / "adapter_last"
    if which == "last" and (last / _ADAPTER).is_file():
        return last, {}
    checkpoints = _newest(run)
    # A run that evaluates during training writes its best adapter to `adapter`, even if it is interrupted.
    config = read_trained(run / _CONFIG)
    if which == "last" and config.eval.every != 0 and config.data.has_held_out:
        for newest in checkpoints:
            return newest.path, newest.tensors["adapter"]
    if not (best / _ADAPTER).is_file():
        others = f"but a checkpoint; use {checkpoints[0].path} instead" if checkpoints else "and no checkpoint"
        raise UserError(f"{run} has no adapter yet (the run has not ended), {others}")
    return best, {}


def _newest(run: Path) -> list[Checkpoint]:
    """The newest intact checkpoint of a run, if there is one."""
    try:
        newest = CheckpointFolder(run / "checkpoints", keep=1).newest(fallback=True)
    except UserError:
        return []
    return [newest] if newest else []


def _sources(facts: Path) -> dict[str, int]:
    """Training examples of each source, as recorded by the run; empty if there is no such file."""
    try:
        return {row["name"]: row["examples"] for row in json.loads(facts.read_text("utf-8"))["sources"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{facts} cannot be read: {error}") from None


def _config_of(folder: Path) -> RunConfig:
    """The configuration of an adapter without a run: defaults and its base model."""
    try:
        facts = json.loads((folder / _ADAPTER).read_text("utf-8"))
        name = facts.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / _ADAPTER} cannot be read: {error}") from None
    return resolve(RunConfig(model=ModelConfig(name=name or None, revision=facts.get("revision"))))
