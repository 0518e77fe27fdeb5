"""What a command line asks for, or one line that says what is wrong with it.

Options come from dataclasses: their docstrings are the help, a YAML file sets any of those of a run
(``--config FILE``), and what stands on the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace, set_parsing_settings

from colm_scale.config import RunConfig
from colm_scale.errors import UserError
from colm_scale.planning.config import PlanConfig


class Options(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Options)

_HINT = "see --help for all options"
_DRY_RUN = ("--dry-run", "--dry_run")


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Raises:
        UserError: An option is unknown (names the closest) or has a value it cannot have.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    return _run_config(_parsed(_parser("train"), arguments))


def parse_train(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    """The same for ``colm-scale train``, and whether only to say what the run would do (``--dry-run``)."""
    parser = _parser("train")
    parser.types = {**parser.types, "dry-run": "flag"}
    what = "Do everything up to the first step, say what the run would do and what a rank will need, write nothing."
    parser.add_argument(*_DRY_RUN, action=_Flag, help=what)
    return _run_config(_parsed(parser, arguments)), any(word in _DRY_RUN for word in arguments)


def parse_plan(arguments: Sequence[str]) -> tuple[RunConfig, PlanConfig]:
    """The same for ``colm-scale plan``."""
    parser = _parser("plan")
    parser.add_class_arguments(PlanConfig, "plan")
    made = _parsed(parser, arguments)
    return _run_config(made), made.plan


def parse_own(command: str, options: type[T], arguments: Sequence[str]) -> T:
    """The options of a command that starts no run: those of the dataclass ``options``.

    Its first field, if it has no default, is what the command is about, and written without its name: ``colm-scale
    explain RUN``, or several words where it is a list.

    Raises:
        UserError: As `parse`; also if what the command is about is not given.
    """
    types = option_types(options)
    subject = next((field for field in dataclasses.fields(options) if field.default is dataclasses.MISSING), None)
    if subject is not None and subject.default_factory is not dataclasses.MISSING:
        subject = None
    parser = _new_parser(command, options, types)
    parser.usage = f"colm-scale {command} {_written(subject, types)}[OPTIONS]"
    parser.add_class_arguments(options, as_group=False)
    if subject is not None and not {"-h", "--help"} & set(arguments):
        arguments = _name_subject(subject.name, types, arguments, f"colm-scale {command} {_written(subject, types)}")
    made = parser.instantiate(parser.parse_args(_join_lists(arguments, types)))
    return options(**{field.name: getattr(made, field.name) for field in dataclasses.fields(options)})


def _written(subject: dataclasses.Field[Any] | None, types: Mapping[str, str]) -> str:
    if subject is None:
        return ""
    several = types[subject.name].startswith("list[")
    return f"{subject.name.removesuffix('s').upper()}... " if several else f"{subject.name.upper()} "


def _name_subject(name: str, types: Mapping[str, str], arguments: Sequence[str], usage: str) -> list[str]:
    """``arguments`` with the words that belong to no option, in front, as the option ``name``."""
    words, rest, waiting = [], [], list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        rest.append(word)
        takes_several = types.get(word[2:], "").startswith(("list[", "tuple["))
        while waiting and "=" not in word and not waiting[0].startswith("--"):
            rest.append(waiting.pop(0))
            if not takes_several:
                break
    several = types[name].startswith("list[")
    if not words and f"--{name}" not in {word.split("=")[0] for word in rest}:
        raise UserError(f"{usage.strip()}: {name.removesuffix('s').upper()} is missing ({_HINT})")
    if len(words) > 1 and not several:
        raise UserError(f"{usage.strip()} takes one {name.upper()}, but there are {len(words)}: {' '.join(words)}")
    return [f"--{name}", *words, *rest] if words else rest


def _parser(command: str) -> _Parser:
    parser = _new_parser(command, RunConfig, option_types() | option_types(PlanConfig, "plan."))
    parser.add_argument("--config", action="config", help="YAML file with options; the command line overrides it.")
    parser.add_argument("--local_rank", help=SUPPRESS)  # the DeepSpeed launcher passes it
    parser.add_class_arguments(RunConfig)
    return parser


def _new_parser(command: str, options: type, types: Mapping[str, str]) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=f"colm-scale {command}", description=options.__doc__, allow_abbrev=False)
    parser.types = types
    return parser


def _parsed(parser: _Parser, arguments: Sequence[str]) -> Namespace:
    _check_config_files(parser, arguments)
    made: Namespace = parser.instantiate(parser.parse_args(_join_lists(arguments, option_types())))
    return made


def _run_config(made: Namespace) -> RunConfig:
    return RunConfig(**{field.name: getattr(made, field.name) for field in dataclasses.fields(RunConfig)})


def option_types(config_class: type[Options] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every option (without dashes) and the type it takes, e.g. ``{"train.steps": "int | None"}``."""
    types: dict[str, str] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            types |= option_types(hint, f"{prefix}{field.name}.")
        else:
            types[prefix + field.name] = hint.__name__ if isinstance(hint, type) else str(hint)
    return types


class _Flag(argparse.Action):
    """An option without a value that is no part of a configuration: ``--print_config`` does not show it."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, *_: object) -> None:
        """Nothing: whether it was given is read off the command line."""


class _Parser(ArgumentParser):
    """Says in one line what is wrong, instead of the usage of sixty options."""

    types: Mapping[str, str] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_explained(message, self.types))


def _explained(message: str, types: Mapping[str, str]) -> str:
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return f"unknown option {found[1].split('=')[0]}{_closest(found[1].split('=')[0].lstrip('-'), types)}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return f"unknown option {found[1]}.{found[2]}{_closest(f'{found[1]}.{found[2]}', types)}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return f"unknown option {found[1]}{_closest(found[1], types)}"
    if found := re.search(r"(?:Parser|Validation) key \"?([\w.]+)\"?:", message):
        name = found[1]
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        if name in types and value:
            return f"--{name} is {value[1].strip()!r}, but must be {_readable(types[name])}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{'; '.join(lines)} ({_HINT})"


def _closest(name: str, types: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, [*types, "config"], n=1, cutoff=0.5)
    return f": did you mean --{near[0]}? ({_HINT})" if near else f" ({_HINT})"


def _readable(type_name: str) -> str:
    choices = re.search(r"Literal\[(.*)\]", type_name)
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "dict[str, str]": "{NAME: TEXT, ...}",
    }
    plain = type_name.replace(" | None", "")
    return f"one of {choices[1]}" if choices else words.get(plain, plain)


def _check_config_files(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """Say which file and line is wrong, which the parser does not."""
    for word, following in zip(arguments, [*arguments[1:], ""]):
        name, equals, value = word.partition("=")
        if name != "--config":
            continue
        path = value if equals else following
        text = _yaml(path)
        try:
            parser.parse_string(text)
        except UserError as error:
            raise UserError(f"--config {path}{_place(text, str(error))}: {error}") from None


def _yaml(path: str) -> str:
    """The text of a file with options."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        content = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not a UTF-8 text file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"--config {path}{line}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"--config {path} holds a {type(content).__name__}, but must hold options, as --print_config shows them"
        )
    return text


def _place(text: str, message: str) -> str:
    """The line of the first option in a YAML text that a message names."""

    def lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            yield from lines(value, f"{prefix}{key.value}.")
            yield f"{prefix}{key.value}", key.start_mark.line + 1

    named = set(re.findall(r"[\w.]+", message))
    return next((f" line {line}" for option, line in lines(yaml.compose(text)) if option in named), "")


def _join_lists(arguments: Sequence[str], of: Mapping[str, str]) -> list[str]:
    """Let list options take several words, ``--data.train a.jsonl b.jsonl``, as people write them."""
    types = {f"--{name}": type_name for name, type_name in of.items()}
    joined: list[str] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, value = word.partition("=")
        if not types.get(name, "").startswith(("list[", "tuple[")):
            joined.append(word)
            continue
        values = [value] if equals else []
        while waiting and not waiting[0].startswith("--"):
            values.append(waiting.pop(0))
        if len(values) == 1 and (values[0][:1] == "[" or values[0] == "null"):
            joined += [name, values[0]]
        elif types[name].startswith("tuple["):
            joined += [name, f"[{', '.join(values)}]"]
        else:
            joined += [name, json.dumps(values)]
    return joined
