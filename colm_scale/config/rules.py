"""Combinations of options that are refused: what each must not be, and the line that says so.

The checks run these rules, and docs/support.md lists them. What depends on a model is found by trying, and not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from colm_scale.config.user_functions import is_own
from colm_scale.errors import UserError

if TYPE_CHECKING:
    from colm_scale.config import DataConfig, RunConfig, SelectionConfig, TrainConfig

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Rule(Generic[Options]):
    """A combination of options that is refused.

    Attributes:
        example: Options that are such a combination, as on the command line, on this number of ``ranks``.
        broken: Whether options are.
        says: The error.
    """

    example: str
    broken: Callable[[Options], object]
    says: Callable[[Options], str]
    ranks: int = 1


def refusal(of: Options, rules: Iterable[Rule[Options]]) -> str:
    """The line of the first rule that options break; empty if they break none."""
    return next((rule.says(of) for rule in rules if rule.broken(of)), "")


def check(of: Options, rules: Iterable[Rule[Options]]) -> None:
    """Check options.

    Raises:
        UserError: They break a rule.
    """
    if found := refusal(of, rules):
        raise UserError(found)


def _reuse(of: SelectionConfig) -> str:
    return f"--selection.reuse {of.reuse}"


def _floor(of: SelectionConfig) -> str:
    return f"--selection.coverage_floor {of.coverage_floor}"


def _without_quota(of: SelectionConfig) -> list[str]:
    return [name for name, ratio in of.shares.items() if not ratio] if isinstance(of.shares, dict) else []


TRAIN: tuple[Rule[TrainConfig], ...] = (
    Rule(
        "--train.steps 100 --train.epochs 1",
        lambda of: of.steps is not None and of.epochs is not None,
        lambda of: f"--train.steps {of.steps} and --train.epochs {of.epochs} exclude each other: leave one out",
    ),
)
DATA: tuple[Rule[DataConfig], ...] = (
    Rule(
        "--data.streaming true",
        lambda of: of.streaming and not of.train,
        lambda of: "--data.streaming true requires --data.train: add it, or leave --data.streaming out",
    ),
    Rule(
        "--data.sources sources.jsonl",
        lambda of: of.sources and not of.train,
        lambda of: f"--data.sources {of.sources} requires --data.train: add it, or leave --data.sources out (the "
        "built-in data has sources)",
    ),
)
SELECTION: tuple[Rule[SelectionConfig], ...] = (
    Rule(
        "--selection.method replay",
        lambda of: (of.method == "replay") != (of.replay is not None),
        lambda of: "--selection.method replay and --selection.replay FILE belong together: add the other",
    ),
    Rule(
        "--selection.coverage_floor 0.2 --selection.method random",
        lambda of: of.coverage_floor and of.method == "random",
        lambda of: f"{_floor(of)} requires quotas, and --selection.method random has none; use stratified",
    ),
    Rule(
        "--selection.coverage_floor 0.2 --selection.shares '{math: 1, code: 0}'",
        lambda of: of.coverage_floor and _without_quota(of),
        lambda of: f"{_floor(of)} trains on some of every source, but --selection.shares gives "
        f"{', '.join(_without_quota(of))} no quota: leave one out",
    ),
    Rule(
        "--selection.coverage_floor 0.8",
        lambda of: of.method in ("colm", "stratified") and of.coverage_floor * of.candidates > of.budget,
        lambda of: f"{_floor(of)} asks for more than --selection.budget {of.budget} of --selection.candidates "
        f"{of.candidates} can give: use at most {of.budget / of.candidates:.6g}, or a larger budget",
    ),
    Rule(
        "--selection.reuse 3 --selection.compression columns",
        lambda of: of.own_parts and of.reuse and (of.estimator, of.compression) == ("last_layer", "columns"),
        lambda of: f"{_reuse(of)} compares sketches of several steps, and --selection.compression columns compares "
        "others in each: leave one out",
    ),
    Rule(
        "--selection.reuse 3 --selection.estimator mine.py:sketch",
        lambda of: of.own_parts and of.reuse and is_own(of.estimator),
        lambda of: f"{_reuse(of)} works only with the package's estimators, not with --selection.estimator "
        f"{of.estimator}: leave it out",
    ),
    Rule(
        "--selection.weights cluster --selection.ranking matching",
        lambda of: of.own_parts and of.weights == "cluster" and of.ranking != "facility",
        lambda of: "--selection.weights cluster counts the candidates a medoid represents, and --selection.ranking "
        f"{of.ranking} picks no medoids: use --selection.ranking facility, or --selection.weights unbiased",
    ),
)
FORWARD_REUSE: tuple[Rule[RunConfig], ...] = (
    Rule(
        "--train.forward_reuse device --selection.method stratified",
        lambda of: of.selection.method != "colm",
        lambda of: f"it reuses the candidates' forward, and method {of.selection.method} has none",
    ),
    Rule(
        "--train.forward_reuse device --selection.estimator length",
        lambda of: of.selection.estimator == "length",
        lambda of: "it reuses the candidates' forward, and estimator length has none",
    ),
    Rule(
        "--train.forward_reuse device --selection.estimator mine.py:sketch",
        lambda of: is_own(of.selection.estimator),
        lambda of: f"it reuses the candidates' forward, and --selection.estimator {of.selection.estimator} may not "
        "run one",
    ),
    Rule(
        "--train.forward_reuse device",
        lambda of: not of.train.activation_checkpointing,
        lambda of: "it requires activation checkpointing, --train.activation_checkpointing true",
    ),
    Rule(
        "--train.forward_reuse device --train.activation_checkpointing true --lora.dropout 0.1",
        lambda of: of.lora.dropout,
        lambda of: f"it requires identical forwards each time, and --lora.dropout is {of.lora.dropout}",
    ),
)
"""Why forward reuse is impossible. Where it is not asked for, a run does without, and gives this as the reason."""
RUN: tuple[Rule[RunConfig], ...] = (
    Rule(
        "--train.packing on --model.attention eager",
        lambda of: of.train.packing == "on" and of.model.attention in ("eager", "flash_attention_2"),
        lambda of: "--train.packing on requires attention sdpa and contradicts --model.attention "
        f"{of.model.attention}: leave one out",
    ),
    Rule(
        "--sources.refresh_every 50 --selection.kept_sources '[math]'",
        lambda of: of.sources.refresh_every and not of.reclusters and isinstance(of.selection.kept_sources, list),
        lambda of: f"--sources.refresh_every {of.sources.refresh_every} without --data.sources chooses the kept "
        "sources again, but --selection.kept_sources names them: leave one out",
    ),
    Rule(
        "--engine deepspeed",
        lambda of: of.engine == "deepspeed" and of.ds_config is None,
        lambda of: "--engine deepspeed requires --ds_config: add it, for instance --ds_config zero2",
    ),
    Rule(
        "--engine fsdp --ds_config zero3",
        lambda of: of.ds_config is not None and of.engine in ("single", "ddp", "fsdp"),
        lambda of: f"--ds_config {of.ds_config} contradicts --engine {of.engine}: leave one out",
    ),
    Rule(
        "--resume auto",
        lambda of: of.resume == "auto" and of.output_dir is None,
        lambda of: "--resume auto looks for checkpoints in the run's directory: name it with --output_dir",
    ),
)
