"""Which of a run's options count where the training loop is somebody else's."""

from __future__ import annotations

import dataclasses

from colm_scale.config import RunConfig, SelectionConfig
from colm_scale.errors import UserError

LOOP = ("train.seed", "train.optimizer", "train.betas", "train.adam_epsilon")
"""What the training loop decides and the selection must know."""
_READ = (
    *("data.columns.source", "data.columns.protected", "sources.refresh_every"),
    *("train.micro_batch_tokens", "train.loss", "train.packing"),
)


def as_run(coreset: SelectionConfig | RunConfig, also_read: tuple[str, ...] = ()) -> RunConfig:
    """The options of the selection, and of a run beside it, resolved.

    Args:
        coreset: A selection alone, or a run whose other options are their defaults but for those that count here.
        also_read: Names of more options that count.

    Raises:
        UserError: An option that has no effect here is set.
    """
    run = RunConfig(selection=coreset) if isinstance(coreset, SelectionConfig) else coreset
    for name, value, default in _options(run):
        counts = name.startswith("selection.") or name in (*_READ, *also_read)
        if value != default and not counts:
            raise UserError(
                f"{name}={value!r} has no effect here, for the training loop is not colm_scale's own: leave it out"
            )
    return dataclasses.replace(run, selection=run.selection.resolved())


def _options(run: RunConfig) -> list[tuple[str, object, object]]:
    """Name, value and default of every option; each column that is named counts as one."""
    found, defaults = [], RunConfig()
    for section in dataclasses.fields(run):
        value, default = getattr(run, section.name), getattr(defaults, section.name)
        if not dataclasses.is_dataclass(value):
            found.append((section.name, value, default))
            continue
        names = [field.name for field in dataclasses.fields(value) if field.name != "columns"]
        found += [(f"{section.name}.{name}", getattr(value, name), getattr(default, name)) for name in names]
    found += [(f"data.columns.{role}", column, role) for role, column in run.data.columns.items()]
    return found
