"""What a command line asks for, or one line that says what is wrong with it.

Options come from dataclasses: their docstrings are the help, a YAML file sets any of those of a run
(``--config FILE``), and what stands on the command line wins. jsonargparse makes the help and checks values; names,
and where a name stands, are looked up here.
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
from colm_scale.config.plan import PlanConfig
from colm_scale.config.removed import check_option, check_value, is_harmless
from colm_scale.errors import UserError


class Options(Protocol):
    """An instance of any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Options)

_HINT = "see --help for all options"
_DRY_RUN = "Do everything up to the first step, say what the run would do and what a rank will need, write nothing."
_NUMBER = re.compile(r"[-+]?[.\d]+([eE][-+]?\d+)?")
_SELECTING = ("selection.", "sources.", "profile.")


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Raises:
        UserError: An option is unknown (names the closest) or has a value it cannot have.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    return _run(_run_parser("train"), arguments)[0]


def parse_train(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    """The same for ``colm-scale train``, and whether only to say what the run would do (``--dry-run``)."""
    parser = _run_parser("train")
    parser.add_extra("dry-run", action="store_true", help=_DRY_RUN)
    config, _ = _run(parser, ["--dry-run" if word == "--dry_run" else word for word in arguments])
    return config, "dry-run" in parser.stated


def parse_plan(arguments: Sequence[str]) -> tuple[RunConfig, PlanConfig]:
    """The same for ``colm-scale plan``."""
    parser = _run_parser("plan")
    parser.add_class_arguments(PlanConfig, "plan")
    parser.types |= option_types(PlanConfig, "plan.")
    config, made = _run(parser, arguments)
    return config, made.plan


def parse_own(command: str, options: type[T], arguments: Sequence[str]) -> T:
    """The options of a command that starts no run: those of the dataclass ``options``.

    Its first field, if it has no default, is what the command is about, and written without its name: ``colm-scale
    explain RUN``, or several words where it is a list.

    Raises:
        UserError: As `parse`; also if what the command is about is not given.
    """
    parser = _new_parser(command, options)
    first = dataclasses.fields(options)[0]
    if first.default is MISSING and first.default_factory is MISSING:
        parser.subject, several = first.name, _takes_several(parser.types[first.name])
        parser.prog += f" {_one(first.name)}{'...' if several else ''}"
    return _made(options, _read(parser, arguments))


def read_trained(path: Path) -> RunConfig:
    """The configuration that a run has saved, without how its examples were selected: nothing that is done with the
    adapter depends on that, and an older version may have had other options for it.

    Raises:
        UserError: The file cannot be read, or is not a configuration.
    """
    return _run(_run_parser("train"), ["--config", str(path)], leave_out=_SELECTING)[0]


def option_types(config_class: type[Options] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every option (without dashes) and the type it takes, e.g. ``{"train.steps": "int | None"}``."""
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
    """Makes the help, and checks values that `_read` has found.

    Attributes:
        types: Every option and the type it takes; empty for one that takes no word.
        extras: Options that are no part of a configuration.
        subject: The option that is written without its name.
        stated: Where each option was set (empty: on the command line), and to what.
    """

    types: dict[str, str]
    extras: set[str]
    subject: str | None = None
    stated: dict[str, tuple[str, str]]

    def add_extra(self, name: str, **settings: Any) -> None:
        """Declare an option that is no part of a configuration."""
        self.add_argument(f"--{name}", default=SUPPRESS, **settings)
        self.types[name] = "" if "action" in settings else "str"
        self.extras.add(name)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say in one line which value is wrong, and where it stands."""
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
    parser.add_extra("print_config", action="store_true", help="Print all options as such a file, and exit.")
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
    """What files and the command line say.

    Args:
        leave_out: Beginnings of names in files that are of no interest.
    """
    if {"-h", "--help"} & set(arguments):
        _show_help(parser)
    given = _split(parser, arguments)
    files = [path for name, path in given if name == "config" and name in parser.extras]
    options = parser.types.keys() - parser.extras
    entries = [entry for path in files for entry in _entries(path, options) if not entry[1].startswith(leave_out)]
    for place, name, value in [*entries, *(("", name, value) for name, value in given)]:
        if place and is_harmless(name, value):
            continue
        _check_name(place, name, value, options if place else parser.types)
        parser.stated[name] = (place, value if isinstance(value, str) else json.dumps(value, default=str))
    words = [f"--{name}={value}" for name, (_, value) in parser.stated.items() if name not in parser.extras]
    made: Namespace = parser.instantiate(parser.parse_args(words))
    return made


def _show_help(parser: _Parser) -> NoReturn:
    """Print the help, without what jsonargparse would read besides: a file for each group, and ``--name+``."""
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.option_strings[-1].removeprefix("--") not in (*parser.types, "help"):
            action.help = SUPPRESS
    parser.print_help()
    raise SystemExit(0)


def _check_name(place: str, name: str, value: object, options: Collection[str]) -> None:
    """Refuse an option that was removed, or that there never was."""
    try:
        check_value(name, value)
        if name not in options:
            check_option(name)
            near = difflib.get_close_matches(name, list(options), n=1, cutoff=0.5)
            written = name if place else f"--{name}"  # as it stands there
            raise UserError(f"unknown option {written}{f': did you mean --{near[0]}?' if near else ''} ({_HINT})")
    except UserError as error:
        raise UserError(f"{place}{error}") from None


def _split(parser: _Parser, arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Every option of a command line with its value; words that belong to none are what the command is about."""
    given: list[tuple[str, list[str]]] = []
    loose: list[str] = []
    more, waiting = False, False  # whether the last option takes any number of words, and whether it still takes one
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
    """The words of an option as one: a list may be written ``a.jsonl b.jsonl`` or ``[a.jsonl, b.jsonl]``."""
    if not words and kind:
        raise UserError(f"--{name} is given no value, but must be {_readable(kind)}")
    if not _takes_several(kind):
        if len(words) > 1:
            raise UserError(f"there are {len(words)} where one {_one(name)} is taken: {' '.join(words)} ({_HINT})")
        return "".join(words)
    one = words[0] if len(words) == 1 else ""
    if one.startswith("[") or one == "null" or ("float" in kind and _NUMBER.fullmatch(one)):
        return one
    return json.dumps(list(words)) if "list[" in kind else f"[{', '.join(words)}]"


def _readable(kind: str) -> str:
    """A type in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    choices = re.sub(r"Literal\[(.*?)\]", r"one of \1", kind.replace(" | None", "").replace(" | ", " or "))
    return re.sub(r"\b(int|float|bool|str)\b(?!')", lambda name: words[name[0]], choices)


def _entries(path: str, options: Container[str]) -> list[tuple[str, str, Any]]:
    """Place, name and value of each option in a YAML file."""
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
    raise UserError(f"--config {path} holds {kind}, but must hold options, as --print_config shows them")


def _walk(
    loader: yaml.SafeLoader, node: yaml.MappingNode, prefix: str, options: Container[str]
) -> Iterator[tuple[int, str, Any]]:
    """Line, name and value of each option below a node."""
    loader.flatten_mapping(node)
    for key, below in node.value:
        name = f"{prefix}{key.value}"
        if isinstance(below, yaml.MappingNode) and name not in options:
            yield from _walk(loader, below, f"{name}.", options)
        else:
            yield key.start_mark.line + 1, name, loader.construct_object(below, deep=True)
