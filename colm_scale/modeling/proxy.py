"""A cheaper model that sketches in place of the one that is trained: another one, or the first blocks of the same.

It is frozen, whole on every rank, and its only adapters are on the probes. Their B matrices stay zero, so that they
change nothing; the gradient of B is what is sketched. No engine, optimizer or checkpoint knows of it.
"""

from __future__ import annotations

import dataclasses
from operator import itemgetter

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from colm_scale.config import LoraConfig, ModelConfig, RunConfig
from colm_scale.errors import UserError
from colm_scale.modeling.load import add_adapters, check_model, context_length, load_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.probe import Probe, decoder_blocks, find_probes, first_blocks

_OPTION = "selection.proxy"


def check_proxy(config: RunConfig, model: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Whether the proxy of ``config``, if it has one, can stand for the model; reads no weights.

    Args:
        model: Configuration of the model that is trained.
        tokenizer: Of the model that is trained.
        longest: Most tokens of an example.

    Raises:
        UserError: There is no such model, it has another tokenizer or a shorter context; or the proxy would have as
            many blocks as the model.
    """
    selection, name = config.selection, config.model.name or "the built-in base"
    if selection.method != "colm":
        return
    if selection.proxy is not None:
        found = check_model(_named(config), _OPTION)
        context = context_length(found, longest)
        if context < longest:
            raise UserError(
                f"--{_OPTION} {selection.proxy} was made for {context} tokens, and examples may have {longest}: "
                f"give --data.max_length {context}, or another proxy"
            )
        _check_tokenizer(selection.proxy, load_tokenizer(_named(config), _OPTION), name, tokenizer)
    if selection.proxy_blocks is not None:
        blocks = getattr(model.get_text_config(), "num_hidden_layers", None)
        if blocks is not None and selection.proxy_blocks >= blocks:
            raise UserError(
                f"--selection.proxy_blocks is {selection.proxy_blocks}, but must be below the {blocks} blocks of {name}"
            )


def load_proxy(config: RunConfig, base: PreTrainedModel, device: torch.device) -> PreTrainedModel | None:
    """The model that sketches, frozen, on ``device``; None if that is the base itself.

    Raises:
        UserError: Its weights cannot be read, see `load_model`.
    """
    if config.selection.proxy is not None:
        return load_model(_named(config), getattr(torch, config.train.dtype), device, _OPTION)
    if config.selection.proxy_blocks is not None:
        return first_blocks(base, config.selection.proxy_blocks).to(device)
    return None


def add_probes(proxy: PreTrainedModel, config: RunConfig) -> tuple[ExampleLoss, tuple[Probe, ...]]:
    """The proxy with adapters of the run's rank on its probes, equal on every rank, and the probes."""
    probes = find_probes(proxy, config.selection.probe, config.selection.probe_blocks)
    layers = [probe.layer for probe in probes]
    adapters = LoraConfig(rank=config.lora.rank, alpha=config.lora.alpha, targets=layers)
    return ExampleLoss(add_adapters(proxy, adapters, config.train.seed)), probes


def describe_proxy(config: RunConfig, proxy: ExampleLoss, model: ExampleLoss) -> str:
    """A line about what sketches; before an engine cuts the model into shards."""
    blocks, of = (len(decoder_blocks(module.causal_model)[1]) for module in (proxy, model))
    what = config.selection.proxy or f"the first {blocks} of its {of} blocks, on the same weights"
    share = proxy.causal_model.num_parameters() / model.causal_model.num_parameters()
    return f"sketched by {what}: {share:.2f} of the model's parameters"


def _named(config: RunConfig) -> ModelConfig:
    return dataclasses.replace(config.model, name=config.selection.proxy, revision=None, quantize="none")


def _check_tokenizer(
    name: str, proxys: PreTrainedTokenizerBase, model_name: str, models: PreTrainedTokenizerBase
) -> None:
    """The proxy reads the ids that the model's tokenizer writes: each must mean the same token to it."""
    theirs = proxys.get_vocab()
    for token, number in sorted(models.get_vocab().items(), key=itemgetter(1)):
        if theirs.get(token) != number:
            raise UserError(
                f"--{_OPTION} {name} has another tokenizer than {model_name}: {token!r} is token {number} of the "
                f"model, and {theirs.get(token, 'none')} of the proxy. Give a model of the same family, or "
                f"--selection.proxy_blocks"
            )
