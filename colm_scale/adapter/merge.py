"""An adapter merged into its base model, or by itself, as a folder that other programs read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from colm_scale.adapter.find import Trained, adapted, find
from colm_scale.config import ModelConfig
from colm_scale.config.commands import MergeConfig
from colm_scale.data.examples import read_chat_template
from colm_scale.errors import UserError
from colm_scale.modeling.causal import base_of, moved
from colm_scale.modeling.load import check_model, context_length, load_model, load_tokenizer
from colm_scale.randomness import generator

_PROBE = (2, 64)
"""Rows and tokens on which the merged model is compared."""
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of a logit, as a share of the largest logit. Float32: sums in another order, 1e-6 after an
ordinary run; a wrong merge is off by a tenth and more. In half precision merged weights round what the adapter adds."""


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written.

    Attributes:
        place: The folder.
        total_bytes: Of its weights.
        difference: Largest difference of a logit from that of the base with the adapter; None if nothing was merged.
        largest: The largest logit.
        same_tokens: Share of the compared tokens after which both hold the same next one for the likeliest.
        notes: What a user should know.
    """

    place: Path
    total_bytes: int
    difference: float | None = None
    largest: float | None = None
    same_tokens: float | None = None
    notes: tuple[str, ...] = ()


def export(options: MergeConfig) -> Merged:
    """Merge, or write the adapter alone.

    Raises:
        UserError: There is no such adapter or base, the folder to write exists, or what was written is not the adapted
            model; then nothing is left.
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
    adapter = adapted(load_model(model, dtype, device, "model"), trained)
    tokens = _probe_tokens(base_of(adapter), device)
    expected = _logits(adapter, tokens)
    merged = adapter.merge_and_unload()
    merged.save_pretrained(new, max_shard_size=options.shard_size)
    del adapter, merged  # so that the device never holds two
    notes += _write_tokenizer(trained, model, new)
    again = AutoModelForCausalLM.from_pretrained(
        new, dtype=dtype, use_safetensors=True, trust_remote_code=model.trust_remote_code
    )
    found = _logits(moved(again, device).eval(), tokens)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= _TOLERANCE[dtype] * largest:
        raise UserError(
            f"the merged model is not the adapted one: a logit differs by {difference:.3g}, where the largest is "
            f"{largest:.3g}; nothing was written. Try --dtype float32, or keep the adapter apart (--adapter_only true)"
        )
    same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    return Merged(place, _bytes(new), difference, largest, same, tuple(notes))


def _adapter_alone(trained: Trained, options: MergeConfig, new: Path, place: Path) -> Merged:
    """Copied, with the base model's name as it is now; from a checkpoint it is put together."""
    if trained.weights is not None:
        model, _ = _whole(trained.config.model)
        base = load_model(model, _dtype(options, trained), torch.device("cpu"), "model")
        adapted(base, trained).save_pretrained(str(new), save_embedding_layers=False)
    else:
        new.mkdir()
        for name in ("adapter_model.safetensors", "README.md"):
            if (trained.folder / name).is_file():
                shutil.copyfile(trained.folder / name, new / name)
    facts_from = new if trained.weights is not None else trained.folder
    facts = json.loads((facts_from / "adapter_config.json").read_text("utf-8"))
    facts |= {"base_model_name_or_path": trained.base, "revision": trained.config.model.revision}
    (new / "adapter_config.json").write_text(json.dumps(facts, indent=2), "utf-8")
    return Merged(place, _bytes(new))


def _whole(model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The base to merge into: not quantised, with the attention that runs anywhere."""
    whole = dataclasses.replace(model, quantize="none", attention="auto")
    if model.quantize == "none":
        return whole, []
    return whole, [
        f"note: the adapter was trained on a base in {model.quantize}; it is merged into the base before it was "
        f"quantised, and that is what the merged model is compared with. Its answers can differ a little from those of "
        f"the run"
    ]


def _dtype(options: MergeConfig, trained: Trained) -> torch.dtype:
    found: torch.dtype = getattr(torch, trained.config.train.dtype if options.dtype == "run" else options.dtype)
    return found


def _write_tokenizer(trained: Trained, model: ModelConfig, new: Path) -> list[str]:
    """The base's tokenizer, with the chat template of the run."""
    tokenizer = load_tokenizer(model, "model")
    notes = []
    try:
        tokenizer.chat_template = read_chat_template(trained.config.data) or tokenizer.chat_template
    except UserError as error:
        notes.append(f"note: the tokenizer is written without the run's chat template: {error}")
    tokenizer.save_pretrained(new)
    return notes


def _probe_tokens(model: PreTrainedModel, device: torch.device) -> Tensor:
    """``[2, 64]`` token ids drawn at random, always the same ones."""
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
        raise UserError(f"--output {place} exists already, and nothing is overwritten: give another folder")
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
    """A name beside ``place``, which gets that name at the end, or is removed if it does not come to that."""
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
