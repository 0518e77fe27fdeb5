"""The probe: the linear layer of the last decoder block whose gradients are sketched; and how to find it.

Packing and probes are tried out on small models: the first blocks of a model, or a sample of its blocks with random
weights, for a model that already has adapters, is sharded, or is not loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from colm_scale.data.batching import make_batch
from colm_scale.errors import UserError
from colm_scale.modeling.multimodal import without_weights
from colm_scale.modeling.roles import ROLES, find_role, listing, width
from colm_scale.modeling.weights import draw
from colm_scale.randomness import global_draws
from colm_scale.records import Batch

_CPU = torch.device("cpu")
_SAMPLE_VOCABULARY = 128
_SAMPLE_MLP = 64
_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "shared_expert_intermediate_size")
"""Names of the width of an MLP, or of an expert, in configurations."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The layer that the sketch probes.

    Attributes:
        block: Qualified name of the decoder block.
        layer: Qualified name of the linear layer whose LoRA B matrix is the probe tensor.
        rows: ``[d_out]`` int64 output rows of that layer that belong to the probe (all, unless it is fused).
    """

    block: str
    layer: str
    rows: Tensor


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode; afterwards every module is back in its own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the largest ModuleList. Jamba's blocks are of two types."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder blocks, so the last block cannot be found")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def few_blocks(base: PreTrainedModel, numbers: Sequence[int], device: torch.device = _CPU) -> PreTrainedModel:
    """A model of a few blocks of another, in ascending order, with its embeddings, final norm and head, sharing its
    weights. In place of those that are on the meta device, it has random ones on ``device``, and a tiny vocabulary.

    An engine that shards or moves the base's parameters does not affect the copy.
    """
    model = copy_of_blocks(base, numbers)
    if any(weight.is_meta for weight in model.parameters()):
        if type(model.get_output_embeddings()) is nn.Linear:
            model.resize_token_embeddings(_SAMPLE_VOCABULARY, mean_resizing=False)
        with global_draws(device, 0, "sample"):
            draw(model, device)
    return model


def copy_of_blocks(base: PreTrainedModel, numbers: Sequence[int]) -> PreTrainedModel:
    """A model as in `few_blocks`, on the same device."""
    name, blocks = decoder_blocks(base)
    # New parameters on the same storage; those of bitsandbytes, which no engine shards, are shared as they are.
    memo: dict[int, object] = {id(p): copy.copy(p) if type(p) is nn.Parameter else p for p in base.parameters()}
    memo |= {id(block): nn.Identity() for number, block in enumerate(blocks) if number not in numbers}
    model = copy.deepcopy(base, memo)
    copied = model.get_submodule(name)
    assert isinstance(copied, nn.ModuleList)
    for number in reversed(range(len(blocks))):
        if number not in numbers:
            del copied[number]
    config = model.config.get_text_config()
    if types := getattr(config, "layer_types", None):  # the model looks them up by place
        others = [kind for number, kind in enumerate(types) if number not in numbers]
        _give_types(config, [*(types[number] for number in numbers), *others])
    return model


def _give_types(config: PretrainedConfig, types: list[str]) -> None:
    """Give a configuration the types of its blocks. Some compute them from other options, and cannot be given any."""
    name, kind = config.attribute_map.get("layer_types", "layer_types"), type(config)
    if isinstance(getattr(kind, name, None), property):
        config.__class__ = type(kind.__name__, (kind,), {name: types})
    else:
        config.layer_types = types


def last_block_alone(model: PreTrainedModel) -> PreTrainedModel:
    """A model of another's last block, as in `few_blocks`; the model itself if that block needs what others compute
    (Gemma 3n's reads the keys and values of an earlier one)."""
    alone = few_blocks(model, [len(decoder_blocks(model)[1]) - 1])
    return model if error_on_text(alone) else alone


def error_on_text(model: PreTrainedModel) -> str:
    """Run a model on two tokens of text; returns its error, empty if there is none."""
    tokens = torch.ones(1, 2, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), without_dropout(model):
            model(input_ids=tokens, attention_mask=tokens, use_cache=False)
    except Exception as error:  # a missing key, attribute or argument, each model in its own way
        return f"{type(error).__name__}: {error}"
    return ""


def kinds_of_blocks(model: PreTrainedModel) -> list[int]:
    """Numbers of the first two blocks, and of the first one of every further kind: with other layers, or with another
    attention (such as a sliding window)."""
    kinds: dict[object, int] = {}
    for number, kind in enumerate(kind_of_each_block(model)):
        kinds.setdefault(kind, number)
    return sorted({*range(min(2, len(decoder_blocks(model)[1]))), *kinds.values()})


def kind_of_each_block(model: PreTrainedModel) -> list[tuple[object, ...]]:
    """The kind of each decoder block: its attention (such as a sliding window), and its layers with their sizes."""
    blocks = decoder_blocks(model)[1]
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(blocks)
    return [
        (kind, *map(type, block.modules()), *(weight.shape for weight in block.parameters()))
        for kind, block in zip(types, blocks)
    ]


def trial_batch(rows: list[Tensor], device: torch.device, *, packed: bool = False) -> Batch:
    """A batch of rows of tokens, all of which carry loss, to try a model out."""
    marks = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    return make_batch(rows, marks, torch.arange(len(rows)), 0, device, packed=packed)


def find_probe(model: PreTrainedModel, which: str = "v") -> Probe:
    """Find the probe in the last block of a causal language model without adapters.

    The layers are tried out in a model of that block alone, since no other changes what they do in it.

    Args:
        model: The base model, on any device, in any floating-point type.
        which: ``--selection.probe``: v, q, k, o or mlp; or the name of a linear layer of the last block, in full or a
            unique ending.

    Raises:
        UserError: No layer, or more than one, has this role or name. Lists the layers.
    """
    prefix, modules = decoder_blocks(model)
    block = f"{prefix}.{len(modules) - 1}"
    linears = linear_layers(modules[-1], block)
    if which in ROLES:
        alone = last_block_alone(model)
        with without_dropout(alone):
            return Probe(block, *find_role(alone, linear_layers(decoder_blocks(alone)[1][-1], block), which))
    named = [name for name in linears if name == which or name.endswith("." + which)]
    if len(named) != 1:
        raise UserError(
            f"--selection.probe {which!r} does not name one linear layer of the last block; {listing(linears)}"
        )
    return Probe(block, named[0], torch.arange(width(linears[named[0]])))


def linear_layers(block: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Layers with a two-dimensional weight that peft can adapt, by qualified name."""
    return {
        f"{prefix}.{name}": module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit", "Linear8bitLt")
    }


def sample_of(config: PretrainedConfig) -> PreTrainedModel:
    """A model of one block of each kind, the last block at its end: frozen, in float32 on the CPU, reproducible.

    Its weights are random, its vocabulary and its MLP tiny; its attention has the full width.

    Args:
        config: Configuration of the whole model.
    """
    return _sampled(without_weights(_narrowed(config), torch.float32))


def sample_of_model(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """A sample (see `sample_of`) of a loaded model, with the named attention."""
    config = _narrowed(model.config)
    config._attn_implementation = attention
    with torch.device("meta"):
        whole = type(model)(config)  # ``from_config`` would shard the weights while a trainer runs ZeRO-3
    in_float32: PreTrainedModel = whole.float()
    return _sampled(in_float32)


def _sampled(model: PreTrainedModel) -> PreTrainedModel:
    kinds = kind_of_each_block(model)
    last = len(kinds) - 1
    others = {kind: number for number, kind in reversed([*enumerate(kinds)]) if kind != kinds[last]}
    return few_blocks(model, sorted((*others.values(), last))).requires_grad_(False)


def in_last_block(model: nn.Module, found: Probe) -> Probe:
    """The probe found in the last block of a smaller model, in that of the whole model, which is as wide."""
    prefix, blocks = decoder_blocks(model)
    name = f"{prefix}.{len(blocks) - 1}"
    return Probe(name, name + found.layer.removeprefix(found.block), found.rows)


def of_sample(sample: nn.Module, found: Probe, model: nn.Module) -> Probe:
    """The probe found in a sample, in the last block of the whole model, whose MLP is wider."""
    probe = in_last_block(model, found)
    if len(found.rows) < width(sample.get_submodule(found.layer)):
        return probe
    return replace(probe, rows=torch.arange(width(model.get_submodule(probe.layer))))


def _narrowed(of: PretrainedConfig) -> PretrainedConfig:
    whole = copy.deepcopy(of)
    config = whole.get_text_config()
    config.vocab_size = _SAMPLE_VOCABULARY
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    for name in _MLP_WIDTHS:
        if isinstance(found := getattr(config, name, None), int):
            setattr(config, name, min(found, _SAMPLE_MLP))
    return whole
