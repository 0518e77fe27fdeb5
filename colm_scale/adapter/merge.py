"""Write a folder that other programs can load: the adapter merged into its base model, or the adapter alone."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME
from transformers.utils.hub import cached_file

from colm_scale.adapter.find import Trained, adapted, find
from colm_scale.base import BASE_MODEL
from colm_scale.config import ModelConfig
from colm_scale.config.commands import MergeConfig
from colm_scale.errors import UserError
from colm_scale.modeling.causal import base_of, input_weight
from colm_scale.modeling.load import check_model, context_length, load_model, load_tokenizer
from colm_scale.modeling.multimodal import leave_out, put_back, sees_or_hears
from colm_scale.randomness import generator
from colm_scale.run.saved_adapter import name_base, of_run

_PROBE = (2, 64)
"""Rows and tokens of the batch on which the merged and the adapted model are compared."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest allowed difference between logits, as a share of the largest logit. In float32 only the order of summation
differs, typically by 1e-6, and a wrong merge by a tenth or more. Half precision rounds the merged weights."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The written folder, and how close the merged model is to the adapted one.

    Attributes:
        total_bytes: Size of the weights.
        difference: Largest difference between a logit of the merged and of the adapted model; None if not merged.
        largest: Largest logit.
        same_tokens: Share of positions at which both models predict the same next token.
        notes: Lines for the user.
    """

    place: Path
    total_bytes: int
    difference: float | None = None
    largest: float | None = None
    same_tokens: float | None = None
    notes: tuple[str, ...] = ()


def export(options: MergeConfig) -> Merged:
    """Merge the adapter, or write it alone. After an error no output is left.

    Raises:
        UserError: The adapter or base model does not exist, the output folder exists, or the merged model differs from
            the adapted one.
    """
    place = _free_place(options)
    device = _device(options.device)
    trained = find(options.run, options.adapter, options.model, trust_remote_code=options.trust_remote_code)
    check_model(trained.config.model, "model")
    with _written(place) as new:
        if options.adapter_only:
            return _adapter_alone(trained, options, new, place)
        return _merge(trained, options, device, new, place)


def _merge(trained: Trained, options: MergeConfig, device: torch.device, new: Path, place: Path) -> Merged:
    model, notes = _whole(trained.config.model)
    dtype = _dtype(options, trained)
    base = load_model(model, dtype, device, "model", whole=True)
    unadapted = leave_out(base) if sees_or_hears(base.config) else {}
    adapter = adapted(base, trained)
    tokens = _probe_tokens(base_of(adapter), device)
    expected = _logits(adapter, tokens)
    notes += _untie(base_of(adapter))
    merged = adapter.merge_and_unload()
    put_back(merged, unadapted)
    merged.save_pretrained(new, max_shard_size=options.shard_size)
    del adapter, merged, base, unadapted  # so that the device never holds two models
    notes += _write_tokenizer(trained, model, new)
    _copy_processor(model, new)
    again = load_model(dataclasses.replace(model, name=str(new), revision=None), dtype, device, "output")
    found = _logits(again.eval(), tokens)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE[dtype] * largest:
        raise UserError(
            f"the merged model is not the adapted one: a logit differs by {difference:.3g} (the largest is "
            f"{largest:.3g}); nothing was written. Use --dtype float32, or export the adapter with --adapter_only true"
        )
    same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    return Merged(place, _bytes(new), difference, largest, same, tuple(notes))


def _untie(model: PreTrainedModel) -> list[str]:
    """Give the head a weight of its own if it shares one with the embedding and either has an adapter.

    peft would add both adapters to the one weight. Returns a note if so.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    adapted_ones = [layer for layer in (head, embedding) if isinstance(layer, BaseTunerLayer)]
    if not adapted_ones or head.weight is not embedding.weight:
        return []
    layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
    layer.weight = nn.Parameter(input_weight(model).clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    return ["note: the adapter changes the embedding or the head alone, so the merged model no longer ties them"]


def _adapter_alone(trained: Trained, options: MergeConfig, new: Path, place: Path) -> Merged:
    """Copy the adapter, or save it from a checkpoint; its configuration gets the current name of the base model."""
    if trained.weights:
        model, _ = _whole(trained.config.model)
        base = load_model(model, _dtype(options, trained), torch.device("cpu"), "model")
        adapted(base, trained).save_pretrained(str(new), save_embedding_layers=False)
    else:
        new.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            if (trained.folder / name).is_file():
                shutil.copyfile(trained.folder / name, new / name)
    name_base(new, trained.config.model)
    return Merged(place, _bytes(new))


def _whole(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The base model without quantisation and with an attention that runs anywhere, and a note if that is a change."""
    whole = dataclasses.replace(model, quantize="none", attention="auto")
    if model.quantize == "none":
        return whole, []
    return whole, [
        f"note: the adapter was trained on a base model in {model.quantize}; it is merged into, and compared with, the "
        f"base model without quantisation, so its answers may differ slightly from those of the run"
    ]


def _dtype(options: MergeConfig, trained: Trained) -> torch.dtype:
    found: torch.dtype = getattr(torch, trained.config.train.dtype if options.dtype == "run" else options.dtype)
    return found


def _write_tokenizer(trained: Trained, model: ModelConfig, new: Path) -> list[str]:
    """Write the base model's tokenizer with the run's chat template; returns notes."""
    tokenizer = load_tokenizer(model, "model")
    notes = []
    try:
        tokenizer = of_run(tokenizer, trained.config.data)
    except UserError as error:
        notes.append(f"note: the tokenizer lacks the run's chat template: {error}")
    tokenizer.save_pretrained(new)
    return notes


def _copy_processor(model: ModelConfig, new: Path) -> None:
    """Copy what makes inputs of images and sound, if the base model has it; its chat template is the tokenizer's."""
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME):
        if file := cached_file(model.name or BASE_MODEL, name, revision=model.revision, **missing):
            shutil.copyfile(file, new / name)


def _probe_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    """``[2, 64]`` token ids from a fixed seed."""
    rows, length = _PROBE
    length = min(length, context_length(model.config))
    drawn = torch.randint(model.config.get_text_config().vocab_size, (rows, length), generator=generator(0, "merge"))
    return drawn.to(device)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float().cpu()


def _free_place(options: MergeConfig) -> Path:
    kind = "adapter" if options.adapter_only else "merged"
    run = Path(options.run).absolute()
    place = Path(options.output) if options.output else run.with_name(f"{run.name}-{kind}")
    if place.exists():
        raise UserError(f"--output {place} exists already, and nothing is overwritten: use another folder")
    return place


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here ({str(error).splitlines()[0]})") from None
    return device


@contextmanager
def _written(place: Path) -> Iterator[Path]:
    """A temporary path, renamed to ``place`` at the end of the block or removed after an error."""
    new = place.with_name(f".{place.name}.new")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        yield new
        new.rename(place)
    except OSError as error:
        raise UserError(f"--output {place} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
