"""The inputs of a run, except the model, read and checked in the order of cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colm_scale.clustering.cluster import check_installed
from colm_scale.config import RunConfig
from colm_scale.data.examples import Examples
from colm_scale.data.reading import Reading
from colm_scale.data.recorded_selection import SelectionRecord
from colm_scale.data.sampler import CandidateSampler, RecordedSampler, Sampler
from colm_scale.data.stream import survey
from colm_scale.distributed.group import Group
from colm_scale.engines.choose import checked_ds_config
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import check_adapter, check_trained_further
from colm_scale.modeling.load import check_kernels, check_model, check_vocabulary, context_length, load_tokenizer
from colm_scale.records import Json
from colm_scale.reporting.trackers import check_trackers
from colm_scale.run.host_data import once_per_host
from colm_scale.run.schedule import total_steps
from colm_scale.run.streaming import StreamedSampler, share_survey
from colm_scale.selection.quota import check_names, kept_sources
from colm_scale.selection.shares import check_shares


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything but the model.

    Attributes:
        sampler: Draws the candidates.
        source_names, sizes: ``[Q]`` names, and ``[Q]`` int64 training examples of each source.
        kept: ``[Q]`` bool, sources whose candidates all enter the coreset.
        protected: ``[Q]`` int64, protected examples of each source.
        digest: Of the tokenised training data.
        eval: Held-out examples, if there are any.
        ds_config: DeepSpeed's configuration; empty under other engines.
        notes: Lines on columns of the data that are not read.
        rows_digest: Of the training data's rows, before tokenising.
        record: The selections to replay, in a replay.
    """

    tokenizer: PreTrainedTokenizerBase
    sampler: Sampler
    source_names: tuple[str, ...]
    sizes: Tensor
    kept: Tensor
    protected: Tensor
    digest: str
    eval: Examples | None
    ds_config: Json
    notes: tuple[str, ...] = ()
    rows_digest: str = ""
    record: SelectionRecord | None = None

    @property
    def source_table(self) -> list[dict[str, object]]:
        """Name and training examples of each source, and whether it is kept at the beginning."""
        table = zip(self.source_names, self.sizes.tolist(), self.kept.tolist())
        return [{"name": name, "examples": size, "kept": kept} for name, size, kept in table]


def read_inputs(config: RunConfig, group: Group) -> Inputs:
    """Read and check the inputs.

    Raises:
        UserError: On the rank that detects it; see `Group.together`.
    """
    with group.together():
        if group.is_first:
            check_trackers(config.track)
        ds_config = checked_ds_config(config, group.world_size)
        config.selection.check_own()
        check_kernels(config.model, config.train)
        if config.reclusters:
            check_installed("sklearn")
        model = check_model(config.model)
        check_adapter(config.lora)
        check_trained_further(config.lora)
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(tokenizer, model)
        longest = config.data.max_length or context_length(model)
        record = SelectionRecord(config.selection.replay) if config.selection.replay else None
    group.agree(record.digest if record else "none", "record of selections (--selection.replay)")
    group.agree(str(config.selection.shares), "shares of the sources (--selection.shares)")
    training = _streamed if config.data.streaming else _held
    sampler, names, sizes, protected, digest, rows_digest, notes = training(config, tokenizer, longest, group, record)
    with group.together():
        check_names("data.protected_sources", config.data.protected_sources or (), names)
        kept = kept_sources(sizes, names, config.selection.kept_sources)
        check_shares(config.selection, names, kept, refreshed=config.sources.refresh_every > 0)
        if record:
            digest = f"{digest}, selected as in {record.digest}"
            _check_record(record, rows_digest, total_steps(config, int(sizes.sum())))
    held_out = None
    if config.data.has_held_out:
        found = once_per_host(Reading("eval", config.data, tokenizer, longest, names), group)
        held_out, notes = found.examples, (*notes, *found.notes)
    data = tokenizer, sampler, names, sizes, kept, protected, digest, held_out
    return Inputs(*data, ds_config, notes, rows_digest, record)


_Training = tuple[Sampler, tuple[str, ...], Tensor, Tensor, str, str, tuple[str, ...]]
"""Sampler, source names, examples and protected examples of each source, the digests of data and rows, and notes."""


def _held(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int, group: Group, record: SelectionRecord | None
) -> _Training:
    """Hold the training data, read once per host."""
    found = once_per_host(Reading("train", config.data, tokenizer, longest), group)
    train = found.examples
    with group.together():
        sampler: Sampler = CandidateSampler(train, config.selection.candidates, config.train.seed)
        if record:
            sampler = RecordedSampler(train, record)
    return sampler, train.source_names, train.sizes, train.protected_sizes, found.digest, found.rows_digest, found.notes


def _streamed(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, longest: int, group: Group, _: SelectionRecord | None
) -> _Training:
    """Survey training data that rank 0 streams."""
    with group.together():
        surveyed = survey(config.data.train or [], config.data) if group.is_first else None
    surveyed = share_survey(surveyed, group)
    with group.together():
        sampler = StreamedSampler(config, surveyed, tokenizer, longest, group)
    digest = surveyed.digest
    return sampler, surveyed.source_names, surveyed.sizes, surveyed.protected_sizes, digest, digest, surveyed.notes


def _check_record(record: SelectionRecord, rows_digest: str, steps: int) -> None:
    """Refuse to replay on other data, or more steps than were recorded."""
    if steps > record.steps:
        raise UserError(
            f"{record.file} has {record.steps} steps, but the replay would make {steps}: use --train.steps "
            f"{record.steps} or fewer"
        )
    if record.rows_digest not in (None, rows_digest):
        raise UserError(
            f"{record.file} was written by a run on other rows, although ids and sources are equal: use that run's "
            f"--data.train and --data.template"
        )
