"""How a wrong value is refused."""

from __future__ import annotations

from colm_scale.errors import UserError


def require(condition: bool, option: str, value: object, expected: str) -> None:
    """Refuse the ``value`` of an option, named without its dashes, unless the condition holds."""
    if not condition:
        raise UserError(f"--{option} is {value!r}, but must be {expected}")


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
