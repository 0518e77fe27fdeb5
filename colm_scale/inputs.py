"""What a run reads before it loads a model; whatever can be wrong with it is found out here, cheapest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.config import RunConfig
from colm_scale.data.builtin import Split
from colm_scale.data.examples import Examples, tokenise
from colm_scale.data.labels import labelled
from colm_scale.data.readers import builtin_as_rows, read_rows
from colm_scale.data.sampler import CandidateSampler, Sampler
from colm_scale.data.stream import survey
from colm_scale.distributed.engines import check_optimizer, sharding
from colm_scale.distributed.group import Group
from colm_scale.distributed.stream import StreamedSampler, share_survey
from colm_scale.errors import UserError
from colm_scale.modeling.load import check_adapter, check_kernels, check_model, context_length, load_tokenizer
from colm_scale.modeling.proxy import check_proxy
from colm_scale.selection.quota import kept_sources
from colm_scale.sources.cluster import check_installed


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything but the model.

    Attributes:
        sampler: Draws the candidates.
        source_names, sizes: ``[Q]`` names, and ``[Q]`` int64 training examples of each source.
        kept: ``[Q]`` bool, sources all of whose candidates are trained on.
        protected: ``[Q]`` int64, protected examples of each source.
        digest: Of the training data.
        eval: Held-out examples.
        ds_config: What DeepSpeed is given; None under other engines.
    """

    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    source_names: tuple[str, ...]
    sizes: Tensor
    kept: Tensor
    protected: Tensor
    digest: str
    eval: Examples | None
    ds_config: dict | None


def read_inputs(config: RunConfig, group: Group) -> Inputs:
    """Read and check.

    Raises:
        UserError: On the rank that found it; see `Group.together`.
    """
    with group.together():
        ds_config = _check_ranks(config, group)
        sharded = sharding(config, ds_config)
        config.selection.check_own()
        check_kernels(config.model, config.train, sharded)
        _check_derivative(config, sharded)
        if config.sources.refresh_every:
            check_installed("sklearn")
        model = check_model(config.model)
        check_adapter(config.lora)
        tokenizer = load_tokenizer(config.model)
        longest = config.data.max_length or context_length(model)
        check_proxy(config, model, tokenizer, longest)
    training = _streamed if config.data.streaming else _held
    sampler, names, sizes, protected, digest = training(config, tokenizer, longest, group)
    with group.together():
        kept = kept_sources(sizes, names, config.selection.kept_sources, config.selection.quantile)
        held_out = None
        if config.data.eval or not config.data.train:
            held_out = _read(config, "eval", tokenizer, longest, names)
    return Inputs(tokenizer, sampler, names, sizes, kept, protected, digest, held_out, ds_config)


_Training = tuple[Sampler, tuple[str, ...], Tensor, Tensor, str]
"""Sampler, source names, their sizes, how many of each are protected, and the digest of the data."""


def _held(config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int, group: Group) -> _Training:
    """Training data that every rank reads and holds."""
    with group.together():
        train = _read(config, "train", tokenizer, longest)
        sampler = CandidateSampler(train, config.selection.candidates, config.train.seed)
    digest = train.digest()
    group.agree(digest, "training data")
    return sampler, train.source_names, train.sizes, train.protected_sizes, digest


def _streamed(config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int, group: Group) -> _Training:
    """Training data that the first rank reads as it is needed."""
    with group.together():
        surveyed = survey(config.data.train, config.data) if group.is_first else None
    surveyed = share_survey(surveyed, group)
    with group.together():
        sampler = StreamedSampler(config, surveyed, tokenizer, longest, group)
    return sampler, surveyed.source_names, surveyed.sizes, surveyed.protected_sizes, surveyed.digest


def check_even_shares(candidates: int, ranks: int) -> None:
    """Refuse candidates that ranks cannot share evenly.

    Raises:
        UserError: They cannot.
    """
    if candidates % ranks:
        raise UserError(
            f"--selection.candidates is {candidates}, which {ranks} ranks cannot share evenly: "
            f"give a multiple of {ranks}"
        )


def _check_ranks(config: RunConfig, group: Group) -> dict | None:
    """What depends on the number of ranks, and the configuration of DeepSpeed."""
    from colm_scale.distributed.ds_config import read_ds_config

    check_even_shares(config.selection.candidates, group.world_size)
    if config.engine == "single" and group.world_size > 1:
        raise UserError(f"--engine single runs one process, but there are {group.world_size}: leave --engine out")
    if config.engine == "ddp" and group.world_size == 1:
        raise UserError("--engine ddp needs several processes: start it with torchrun, or leave --engine out")
    ds_config = read_ds_config(config, group.world_size) if config.ds_config else None
    check_optimizer(config, ds_config)
    return ds_config


def _check_derivative(config: RunConfig, sharded: str | None) -> None:
    selection = config.selection
    exact = selection.method == "colm" and selection.estimator == "zeroth_order" and selection.derivative == "exact"
    if exact and sharded == "zero3" and selection.proxy is None and selection.proxy_blocks is None:
        raise UserError(
            f"--selection.derivative exact differentiates in forward mode, for which ZeRO-3 (--ds_config "
            f"{config.ds_config}) has no rules: use --selection.derivative finite, --selection.estimator last_layer, "
            f"or --engine fsdp"
        )


def _read(
    config: RunConfig,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    source_names: Sequence[str] | None = None,
) -> Examples:
    specs = getattr(config.data, split)
    rows = read_rows(specs, config.data) if specs else builtin_as_rows(split, config.data)
    if split == "train":
        rows = list(labelled(rows, config.data.sources))
    return tokenise(rows, tokenizer, config.data, longest, source_names)
