"""What training has left: an adapter, by whatever folder it is named, and the base model that it belongs to."""

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
from colm_scale.checkpoint.store import Checkpoint, CheckpointFolder
from colm_scale.config import LoraConfig, ModelConfig, RunConfig
from colm_scale.config.command_line import read_trained
from colm_scale.config.commands import Which
from colm_scale.errors import UserError
from colm_scale.modeling.load import add_adapters, check_adapter
from colm_scale.reporting.run_directory import FACTS
from colm_scale.run.prepare import resolve

_Result = TypeVar("_Result")

_ADAPTER, _CONFIG, _MANIFEST = "adapter_config.json", "config.yaml", "manifest.json"


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter and what it was trained on.

    Attributes:
        folder: Of the adapter in PEFT format, or of the checkpoint that holds it.
        weights: The adapter of a checkpoint, by name; None if ``folder`` is PEFT's.
        config: Of the run, resolved; without one the defaults, with the base model that the adapter names.
        sources: Training examples of each source, in the order of the run's numbers, where the run says so.
    """

    folder: Path
    weights: Mapping[str, Tensor] | None
    config: RunConfig
    sources: Mapping[str, int]

    @property
    def base(self) -> str:
        """Hub id or folder of the base model."""
        return self.config.model.name or str(BASE_MODEL)


def find(name: str, which: Which, model: str | None, *, trust_remote_code: bool) -> Trained:
    """The adapter in a folder.

    Args:
        name: Folder of a run, of an adapter, or of a checkpoint.
        which: Of a run: the adapter with the lowest held-out loss, where it was evaluated while it trained, or that of
            its last step.
        model: A base model to take in place of the one that the run names.
        trust_remote_code: Whether the base may bring code. That the run did is no reason: its folder may come from
            anywhere.

    Raises:
        UserError: There is no adapter, or none that can be read.
    """
    path = Path(name)
    if not path.is_dir():
        raise UserError(f"{name}: there is no such folder; give that of a run, of an adapter, or of a checkpoint")
    run, folder, checkpoint = _place(path, which)
    config = resolve(read_trained(run / _CONFIG)) if run else _config_of(folder)
    base = dataclasses.replace(config.model, trust_remote_code=trust_remote_code)
    if model is not None:
        base = dataclasses.replace(base, name=model, revision=None)
    if checkpoint is None:
        with_way_out(lambda: check_adapter(LoraConfig(adapter=str(folder))))
    sources = _sources(run / FACTS) if run else {}
    weights = None if checkpoint is None else checkpoint.tensors["adapter"]
    return Trained(folder, weights, dataclasses.replace(config, model=base), sources)


def adapted(base: PreTrainedModel, trained: Trained) -> PeftModel:
    """The base with the adapter on it, in evaluation mode.

    Raises:
        UserError: The adapter does not fit.
    """
    seed = trained.config.train.seed
    if trained.weights is None:
        folder = LoraConfig(adapter=str(trained.folder))
        return with_way_out(lambda: add_adapters(base, folder, seed)).eval()
    model = add_adapters(base, trained.config.lora, seed).eval()
    wanted = {f"model.{name}": weight for name, weight in model.named_parameters() if weight.requires_grad}
    odd = sorted(wanted.keys() ^ trained.weights.keys())
    if odd or any(wanted[name].shape != weight.shape for name, weight in trained.weights.items()):
        raise UserError(f"checkpoint {trained.folder} does not fit this model: {odd[0] if odd else 'shapes differ'}")
    with torch.no_grad():
        for name, weight in trained.weights.items():
            wanted[name].copy_(weight)
    return model


def with_way_out(action: Callable[[], _Result]) -> _Result:
    """Do it; what is wrong with an adapter is said without the option of training that names one."""
    try:
        return action()
    except UserError as error:
        raise UserError(str(error).replace("--lora.adapter ", "adapter ")) from None


def _place(path: Path, which: Which) -> tuple[Path | None, Path, Checkpoint | None]:
    """The run (None without one), the folder that holds the adapter, and the checkpoint if it is one."""
    if (path / _ADAPTER).is_file():
        return (path.parent if (path.parent / _CONFIG).is_file() else None), path, None
    if (path / _MANIFEST).is_file():
        run = path.absolute().parent.parent
        if not (run / _CONFIG).is_file():
            raise UserError(f"{path} is a checkpoint outside of its run: {run} has no {_CONFIG}, which names the model")
        return run, path, CheckpointFolder.read(path)
    if not (path / _CONFIG).is_file():
        raise UserError(
            f"{path} is no folder of a run (it has no {_CONFIG}), of an adapter ({_ADAPTER}), or of a checkpoint "
            f"({_MANIFEST})"
        )
    return path, *_of_run(path, which)


def _of_run(run: Path, which: Which) -> tuple[Path, Checkpoint | None]:
    best, last = run / "adapter", run / "adapter_last"
    newest = _newest(run)
    if which == "last":
        if (last / _ADAPTER).is_file():
            return last, None
        # A run that was evaluated while it trained keeps its best as `adapter`, also if it was interrupted.
        config = read_trained(run / _CONFIG)
        if newest is not None and config.eval.every != 0 and config.data.has_held_out:
            return newest.path, newest
    if not (best / _ADAPTER).is_file():
        way_out = "and no checkpoint" if newest is None else f"but a checkpoint, {newest.path}: name that instead"
        raise UserError(f"{run} has no adapter yet (the run has not ended), {way_out}")
    return best, None


def _newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole."""
    try:
        return CheckpointFolder(run / "checkpoints", keep=1).newest(fallback=True)
    except UserError:
        return None


def _sources(facts: Path) -> dict[str, int]:
    """What a run has written down of its sources before its first step."""
    try:
        return {row["name"]: row["examples"] for row in json.loads(facts.read_text("utf-8"))["sources"]}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{facts} cannot be read: {error}") from None


def _config_of(folder: Path) -> RunConfig:
    """What is known of an adapter without its run."""
    try:
        facts = json.loads((folder / _ADAPTER).read_text("utf-8"))
        name = facts.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / _ADAPTER} cannot be read: {error}") from None
    return resolve(RunConfig(model=ModelConfig(name=name or None, revision=facts.get("revision"))))
