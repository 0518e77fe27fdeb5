"""The value of ``--selection.shares``: a name, an exponent, ratios by source, or a file with such ratios."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from colm_scale.errors import UserError

Shares = str | float | dict[str, float]

_NAMES = ("proportional", "equal")
_FILES = (".yaml", ".yml", ".json")
_OPTION = "--selection.shares"
_FORMS = (
    f"{', '.join(_NAMES)}, a number that is 0 or more, ratios like {{math: 3, code: 1}}, or a {', '.join(_FILES[:-1])} "
    f"or {_FILES[-1]} file of ratios"
)


def parse_shares(value: object) -> Shares:
    """Parse a name, an exponent, ratios by source, or the path of a file with ratios, any of them also as text.

    Raises:
        UserError: It is none of these, or a number or ratio is negative or not finite.
    """
    if isinstance(value, str):
        value = _from_text(value.strip())
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _ratios(value.items(), _OPTION)
    exponent = _number(value)
    if exponent is None:
        raise UserError(f"{_OPTION} is {value!r}, but must be {_FORMS}")
    return exponent


def is_file(shares: Shares) -> bool:
    """Return True if the ratios must still be read from a file."""
    return isinstance(shares, str) and shares not in _NAMES


def read_shares(path: str) -> dict[str, float]:
    """Read the ratios in a YAML or JSON file.

    Raises:
        UserError: It cannot be read, or does not contain ratios. Names the file, and the line of bad syntax.
    """
    where = f"{_OPTION} {path}"
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is not a UTF-8 text file") from None
    return _ratios(_json(text, where) if path.lower().endswith(".json") else _yaml(text, where), where)


def _from_text(text: str) -> object:
    if text in _NAMES or text.lower().endswith(_FILES):
        return text
    if text.startswith("{"):
        return _ratios(_yaml(text, _OPTION), _OPTION)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{_OPTION} is {text!r}, but must be {_FORMS}") from None


_Entries = Iterable[tuple[object, object]]


def _yaml(text: str, where: str) -> _Entries:
    """Entries of a mapping, exactly as written: a source may be called ``on`` or ``1``."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where} must contain only a number for each source, NAME: NUMBER")
    return [(_written(key), _written(value)) for key, value in node.value]


def _written(node: yaml.Node) -> str:
    return str(node.value) if isinstance(node, yaml.ScalarNode) else f"({node.tag.rpartition(':')[2]})"


def _json(text: str, where: str) -> _Entries:
    try:
        found = json.loads(text, object_pairs_hook=tuple)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} line {error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(found, tuple):
        raise UserError(f"{where} must contain only an object with a number for each source")
    return found


def _ratios(entries: _Entries, where: str) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for name, value in entries:
        ratio = _number(value)
        if not isinstance(name, str):
            raise UserError(f"{where} names {name!r}, but a source's name must be text: put it in quotes")
        if name in ratios:
            raise UserError(f"{where} names {name!r} twice")
        if ratio is None:
            raise UserError(f"{where} gives {name!r} {value!r}, but must give a number that is 0 or more")
        ratios[name] = ratio
    if not any(ratios.values()):
        raise UserError(f"{where} gives no source a share: at least one must be above 0")
    return ratios


def _number(value: object) -> float | None:
    """Parse a finite number that is not negative; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and number >= 0 else None
