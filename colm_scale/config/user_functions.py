"""The user's own functions in a selection, named FILE.py:FUNCTION or MODULE:FUNCTION."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from colm_scale.errors import UserError

FORM = "FILE.py:FUNCTION or MODULE:FUNCTION"


def is_own(name: str) -> bool:
    """Return True if an option's value names a function of the user rather than a part of the package."""
    module, colon, function = name.partition(":")
    return bool(module and colon) and function.isidentifier()


def load_own(option: str, name: str, parameters: int) -> Callable[..., Any]:
    """Load the function that ``--option name`` names; its file runs once per process.

    Args:
        parameters: Number of parameters it must take.

    Raises:
        UserError: The file cannot be read or run, or has no such function.
    """
    place, _, called = name.partition(":")
    try:
        function = getattr(_module(place), called, None)
    except Exception as error:  # the user's code can raise anything
        raise UserError(f"--{option} {name}: {place} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"--{option} {name}: there is no function {called} in {place}")
    found: Callable[..., Any] = function
    try:
        inspect.signature(function).bind(*[None] * parameters)
    except TypeError:
        raise UserError(
            f"--{option} {name}: {called}{inspect.signature(function)} must take {parameters} arguments, see "
            f"docs/CONTRIBUTING.md"
        ) from None
    return found


@cache
def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    loader = SourceFileLoader(f"own:{place}", str(path))  # a unique module name
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    loader.exec_module(module)
    return module
