"""Options and values of earlier versions, each with its replacement."""

from __future__ import annotations

from typing import NamedTuple

from colm_scale.errors import UserError

_NEGATIVE = "docs/negative_results.md says why"
_SHARES = "use --selection.shares proportional, equal, an exponent such as 0.5, or the ratios of the sources"
_KEPT = "use --selection.kept_sources with a number"


class Removed(NamedTuple):
    """A removed option.

    Attributes:
        default: Its default, which matches today's behaviour; the files of older runs may contain it.
        way_out: Its replacement, or the page that explains the removal.
    """

    default: object
    way_out: str


OPTIONS = {
    **{
        f"data.{role}_column": Removed(role, f"use --data.columns '{{{role}: COLUMN}}'")
        for role in ("source", "protected", "instruction", "input", "output", "prompt", "completion", "messages")
    },
    "fsdp.param_dtype": Removed("stored", "parameters are gathered in the type that --train.dtype gives them"),
    "profile.match_every": Removed(0, "run benchmarks/gradient_match.py"),
    "selection.allocation": Removed("proportional", _SHARES),
    "selection.allocation_exponent": Removed(0.5, _SHARES),
    "selection.allocation_floor": Removed(1, _SHARES),
    "selection.derivative": Removed("finite", "--selection.estimator last_layer is exact and cheaper"),
    "selection.float32_blocks": Removed(2, "it is 2 now"),
    "selection.joint": Removed(False, "each source is ranked separately"),
    "selection.kept_cap": Removed(1.0, f"it starves small sources, {_NEGATIVE}"),
    "selection.kept_quantile": Removed(0.5, _KEPT),
    "selection.kept_rule": Removed("average", _KEPT),
    "selection.largest_group": Removed(8192, "it is 8192 now"),
    "selection.perturbation": Removed(1e-3, "it is 1e-3 now"),
    "selection.probe_blocks": Removed(1, "it is 1 now"),
    "selection.proxy": Removed(None, _NEGATIVE),
    "selection.proxy_blocks": Removed(None, _NEGATIVE),
    "selection.refresh_every": Removed(0, "use --sources.refresh_every"),
    "sources.dimensions": Removed(64, "it is 64 now"),
    "track.name": Removed(None, "trackers take the name of --output_dir"),
}

VALUES = {
    ("selection.allocation", "equal"): "use --selection.shares equal",
    ("selection.allocation", "excess_loss"): "use --selection.shares equal",
    ("selection.allocation", "none"): "every source has a quota now, see --selection.shares",
    ("selection.allocation", "temperature"): "use --selection.shares with an exponent such as 0.5",
    ("selection.compression", "kronecker"): "use --selection.compression countsketch",
    ("selection.estimator", "loss"): "use the function loss in docs/examples, --selection.estimator FILE.py:loss",
    ("selection.overflow", "shares"): "use --selection.overflow subset",
    **{
        ("selection.ranking", name): f"use --selection.ranking benchmarks/rankings.py:{name}"
        for name in ("importance", "pursuit", "top")
    },
}
"""Removed values of current options, and values of removed options that have their own replacement."""


def check_option(name: str) -> None:
    """Refuse a removed option.

    Raises:
        UserError: The option was removed; the message names the replacement.
    """
    if name in OPTIONS:
        raise UserError(f"--{name} was removed: {OPTIONS[name].way_out}")


def check_value(name: str, value: object) -> None:
    """Refuse a removed value.

    Raises:
        UserError: The value was removed; the message names the replacement.
    """
    if isinstance(value, str) and (name, value) in VALUES:
        raise UserError(f"--{name} {value} was removed: {VALUES[name, value]}")


def is_harmless(name: str, value: object) -> bool:
    """Return True for a removed option at its default, as in the files of most older runs."""
    return name in OPTIONS and OPTIONS[name].default == value
