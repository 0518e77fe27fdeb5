"""Parsing of command lines and configuration files; an error is one line that names the value and its place.

Options come from dataclasses, whose docstrings are the help. A YAML file (``--config FILE``) sets any option of a run,
and the command line overrides it. jsonargparse renders the help and checks values; this module checks names and tracks
where each option was set.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Collection, Container, Iterator, Sequence
from dataclasses import MISSING
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace, set_parsing_settings

from colm_scale.config import RunConfig, as_yaml
from colm_scale.config.commands import PlanConfig
from colm_scale.config.removed import check_option, check_value, is_harmless
from colm_scale.errors import UserError


class Options(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Options)

_HINT = "see --help for all options"
_DRY_RUN = "Prepare the run up to its first step, print what it would do and what a rank needs, and write nothing."
_PLAN = (
    "Estimate memory, bytes, time and the largest batches of a run, without a GPU and without weights. The options are "
    "those of colm-scale train, and at the end those of the plan itself."
)
_NUMBER = re.compile(r"[-+]?[.\d]+([eE][-+]?\d+)?")
_SELECTING = ("selection.", "sources.", "profile.")


def parse(arguments: Sequence[str]) -> RunConfig:
    """Parse the command line of a run.

    Raises:
        UserError: An option is unknown (the message names the closest one) or has a wrong value.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    return _run(_run_parser("train"), arguments)[0]


def parse_train(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    """Parse ``colm-scale train``: as `parse`, and whether ``--dry-run`` is set."""
    parser = _run_parser("train")
    parser.add_extra("dry-run", action="store_true", help=_DRY_RUN)
    config, _ = _run(parser, ["--dry-run" if word == "--dry_run" else word for word in arguments])
    return config, "dry-run" in parser.stated


def parse_plan(arguments: Sequence[str]) -> tuple[RunConfig, PlanConfig]:
    """Parse ``colm-scale plan``: as `parse`, and the options of the plan."""
    parser = _run_parser("plan")
    parser.description = _PLAN
    parser.add_class_arguments(PlanConfig, "plan")
    parser.types |= option_types(PlanConfig, "plan.")
    config, made = _run(parser, arguments)
    return config, made.plan


def parse_own(command: str, options: type[T], arguments: Sequence[str]) -> T:
    """Parse the options of a command that starts no run, the fields of the dataclass ``options``.

    A first field without a default is the command's subject, which is written without its name: ``colm-scale explain
    RUN``, or several words if it is a list.

    Raises:
        UserError: As `parse`; also if the subject is missing.
    """
    parser = _new_parser(command, options)
    first = dataclasses.fields(options)[0]
    if first.default is MISSING and first.default_factory is MISSING:
        parser.subject, several = first.name, _takes_several(parser.types[first.name])
        parser.prog += f" {_one(first.name)}{'...' if several else ''}"
    return _made(options, _read(parser, arguments))


def read_trained(path: Path) -> RunConfig:
    """Read the configuration that a run has saved, except the options of its selection.

    Work with the adapter does not depend on those, and older versions had others.

    Raises:
        UserError: The file cannot be read, or is not a configuration.
    """
    return _run(_run_parser("train"), ["--config", str(path)], leave_out=_SELECTING)[0]


def option_types(config_class: type[Options] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Return the type of every option by name, e.g. ``{"train.steps": "int | None"}``."""
    types: dict[str, str] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            types |= option_types(hint, f"{prefix}{field.name}.")
        else:
            parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            written = (part.__name__ if isinstance(part, type) else str(part) for part in parts)
            types[prefix + field.name] = " | ".join(written).replace("NoneType", "None").replace("typing.", "")
    return types


class _Parser(ArgumentParser):
    """Renders the help, and checks the values found by `_read`.

    Attributes:
        types: Type of every option; empty for an option without a value.
        extras: Options that are not part of a configuration.
        subject: The option that is written without its name; empty if there is none.
        stated: Where each option was set (empty: on the command line), and its value.
    """

    types: dict[str, str]
    extras: set[str]
    subject: str = ""
    stated: dict[str, tuple[str, str]]

    def add_extra(self, name: str, **settings: Any) -> None:
        """Declare an option that is not part of a configuration."""
        self.add_argument(f"--{name}", default=SUPPRESS, **settings)
        self.types[name] = "" if "action" in settings else "str"
        self.extras.add(name)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report the wrong value and its place in one line."""
        found = re.search(r"(?:Parser|Validation) key \"?([\w.]+)\"?:", message)
        if found and found[1] in self.stated:
            place, value = self.stated[found[1]]
            raise UserError(f"{place}--{found[1]} is {value!r}, but must be {_readable(self.types[found[1]])}")
        raise UserError(f"{'; '.join(filter(None, map(str.strip, message.splitlines())))} ({_HINT})")


def _new_parser(command: str, options: type[Options]) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    usage = "%(prog)s [OPTIONS]"
    parser = _Parser(prog=f"colm-scale {command}", usage=usage, description=options.__doc__, allow_abbrev=False)
    parser.types, parser.extras, parser.stated = option_types(options), set(), {}
    parser.add_class_arguments(options, as_group=False)
    return parser


def _run_parser(command: str) -> _Parser:
    parser = _new_parser(command, RunConfig)
    parser.add_extra("config", help="YAML file with options; the command line overrides it.")
    parser.add_extra("print_config", action="store_true", help="Print all options as a file for --config, and exit.")
    parser.add_extra("local_rank", help=SUPPRESS)  # the DeepSpeed launcher passes it
    return parser


def _made(options: type[T], made: Namespace) -> T:
    return options(**{field.name: getattr(made, field.name) for field in dataclasses.fields(options)})


def _run(parser: _Parser, arguments: Sequence[str], leave_out: tuple[str, ...] = ()) -> tuple[RunConfig, Namespace]:
    made = _read(parser, arguments, leave_out)
    config = _made(RunConfig, made)
    if "print_config" in parser.stated:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config, made


def _read(parser: _Parser, arguments: Sequence[str], leave_out: tuple[str, ...] = ()) -> Namespace:
    """Read the files and the command line.

    Args:
        leave_out: Prefixes of option names to ignore in files.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(parser)
    given = _split(parser, arguments)
    files = [path for name, path in given if name == "config" and name in parser.extras]
    options = parser.types.keys() - parser.extras
    mappings = tuple(f"{name}." for name, kind in parser.types.items() if kind.startswith("dict["))
    entries = [entry for path in files for entry in _entries(path, options) if not entry[1].startswith(leave_out)]
    for place, name, value in [*entries, *(("", name, value) for name, value in given)]:
        if place and is_harmless(name, value):
            continue
        if not name.startswith(mappings):  # the option itself checks its keys
            _check_name(place, name, value, options if place else parser.types)
        parser.stated[name] = (place, value if isinstance(value, str) else json.dumps(value, default=str))
    words = [f"--{name}={value}" for name, (_, value) in parser.stated.items() if name not in parser.extras]
    made: Namespace = parser.instantiate(parser.parse_args(words))
    return made


def _show_help(parser: _Parser) -> NoReturn:
    """Print the help without jsonargparse's own additions: a file per group, and ``--name+``."""
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.option_strings[-1].removeprefix("--") not in (*parser.types, "help"):
            action.help = SUPPRESS
    parser.print_help()
    raise SystemExit(0)


def _check_name(place: str, name: str, value: object, options: Collection[str]) -> None:
    """Refuse an unknown or removed option, or a removed value."""
    try:
        check_value(name, value)
        if name not in options:
            check_option(name)
            near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
            written = name if place else f"--{name}"  # as written there
            raise UserError(f"unknown option {written}{f': did you mean --{near[0]}?' if near else ''} ({_HINT})")
    except UserError as error:
        raise UserError(f"{place}{error}") from None


def _split(parser: _Parser, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Split a command line into options with their values; words that belong to no option are the subject."""
    given: list[tuple[str, list[str]]] = []
    loose: list[str] = []
    more, waiting = False, False  # whether the last option takes several words, and whether it still needs one
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given.append((name, [value] if equals else []))
            kind = parser.types.get(name, "str")
            more, waiting = _takes_several(kind), bool(kind) and not equals
        else:
            (given[-1][1] if more or waiting else loose).append(word)
            waiting = False
    if parser.subject and parser.subject not in dict(given):
        if not loose:
            raise UserError(f"{parser.prog}: {_one(parser.subject)} is missing ({_HINT})")
        given.append((parser.subject, loose))
    elif loose:
        raise UserError(f"{loose[0]!r} belongs to no option ({_HINT})")
    return [(name, _joined(name, words, parser.types.get(name, ""))) for name, words in given]


def _takes_several(kind: str) -> bool:
    return "list[" in kind or "tuple[" in kind


def _one(subject: str) -> str:
    return subject.removesuffix("s").upper()


def _joined(name: str, words: Sequence[str], kind: str) -> str:
    """Join the words of an option: a list may be written ``a.jsonl b.jsonl`` or ``[a.jsonl, b.jsonl]``."""
    if not words and kind == "bool":
        return "true"
    if not words and kind:
        raise UserError(f"--{name} has no value, but must be {_readable(kind)}")
    if not _takes_several(kind):
        if len(words) > 1:
            raise UserError(f"expected one {_one(name)}, but got {len(words)}: {' '.join(words)} ({_HINT})")
        return "".join(words)
    one = words[0] if len(words) == 1 else ""
    if one.startswith("[") or one == "null" or ("float" in kind and _NUMBER.fullmatch(one)):
        return one
    return json.dumps(list(words)) if "list[" in kind else f"[{', '.join(words)}]"


def _readable(kind: str) -> str:
    """Describe a type in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    kind = kind.replace("dict[str, str]", "{NAME: TEXT, ...}").replace("dict[str, float]", "{NAME: NUMBER, ...}")
    choices = re.sub(r"Literal\[(.*?)\]", r"one of \1", kind.replace(" | None", "").replace(" | ", " or "))
    return re.sub(r"\b(int|float|bool|str)\b(?!')", lambda name: words[name[0]], choices)


def _entries(path: str, options: Container[str]) -> list[tuple[str, str, Any]]:
    """Read place, name and value of each option in a YAML file."""
    try:
        with open(path, encoding="utf-8") as file:
            loader = yaml.SafeLoader(file.read())
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            found = _walk(loader, root, "", options)
            return [(f"--config {path} line {line}: ", name, value) for line, name, value in found]
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not a UTF-8 text file") from None
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"--config {path}{line}: not YAML ({problem})") from None
    kind = "a list" if isinstance(root, yaml.SequenceNode) else "a value" if root else "nothing"
    raise UserError(f"--config {path} contains {kind}, but must contain options in the format of --print_config")


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, options: Container[str]
) -> Iterator[tuple[int, str, Any]]:
    """Yield line, name and value of each option below a node."""
    loader.flatten_mapping(node)
    for key, below in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(below, yaml.MappingNode) and name not in options:
            yield from _walk(loader, below, f"{name}.", options)
        else:
            yield key.start_mark.line + 1, name, loader.construct_object(below, deep=True)
