"""Checks of option values."""

from __future__ import annotations

from colm_scale.errors import UserError


def require(condition: bool, option: str, value: object, expected: str) -> None:
    """Refuse the ``value`` of an option, named without its dashes, unless the condition holds."""
    if not condition:
        raise UserError(f"--{option} is {value!r}, but must be {expected}")


def require_least(options: object, section: str, **least: int) -> None:
    """Refuse an option of a ``section`` (``train.``) that is below its least; None passes."""
    for name, bound in least.items():
        value = getattr(options, name)
        expected = f"at least {bound}" if bound else "0 or more"
        require(value is None or value >= bound, f"{section}{name}", value, expected)


def require_positive(options: object, section: str, *names: str) -> None:
    """Refuse an option of a ``section`` that is 0 or below; None passes."""
    for name in names:
        value = getattr(options, name)
        require(value is None or value > 0, f"{section}{name}", value, "positive")
