"""The command line: ``colm-scale train ...``, which is also ``launchers/train.py``.

Options come from the dataclasses in `colm_scale.config`: their docstrings are the help, a YAML file sets any of them
(``--config FILE``), and what stands on the command line wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn, get_type_hints

import yaml
from jsonargparse import SUPPRESS, ArgumentParser, set_parsing_settings

from colm_scale.config import RunConfig
from colm_scale.errors import UserError
from colm_scale.planning.config import PlanConfig

_USAGE = """usage: colm-scale COMMAND [OPTIONS]

commands:
  train   fine-tune a model with LoRA on mini-batch coresets; see colm-scale train --help
  plan    what such a run will need, without a GPU and without weights: the same options, and --plan.world_size,
          --plan.memory_gib and others; see colm-scale plan --help
"""
_HINT = "see --help for all options"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``colm-scale`` console command."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if command == "train":
        train(rest[:-1])
    if command == "plan":
        plan(rest[:-1])
    if command in ("", "-h", "--help"):
        print(_USAGE, end="")
        sys.exit(0 if command else 2)
    _fail(f"unknown command {command!r}: the commands are train and plan")


def train(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the options of a run, run it, and exit: 0 done, 1 training failed, 2 wrong input."""
    try:
        config = parse(sys.argv[1:] if arguments is None else list(arguments))
    except UserError as error:
        _fail(str(error))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is told in a line, not in pages of C++ frames
    from colm_scale.trainer import run  # after parsing, so that --help and a typo answer at once

    code = run(config)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: now and then a thread that a library has left running ends a process that is being torn down.
    os._exit(code)


def plan(arguments: Sequence[str]) -> NoReturn:
    """Print what a run with these options will need, and exit: 0, or 2 for wrong input."""
    try:
        config, plan_config = parse_plan(arguments)
        from colm_scale.planning.plan import make_plan
        from colm_scale.planning.show import shown
        from colm_scale.trainer import quieten, resolve

        quieten()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing runs here, so DeepSpeed need not look for a GPU
        print(shown(make_plan(resolve(config), plan_config)), end="")
    except UserError as error:
        _fail(str(error))
    sys.exit(0)


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for.

    Raises:
        UserError: An option is unknown (names the closest) or has a value it cannot have.
        SystemExit: After ``--help`` or ``--print_config``.
    """
    return _run_config(_parsed(_parser("train"), arguments))


def parse_plan(arguments: Sequence[str]) -> tuple[RunConfig, PlanConfig]:
    """The same for ``colm-scale plan``."""
    parser = _parser("plan")
    parser.add_class_arguments(PlanConfig, "plan")
    made = _parsed(parser, arguments)
    return _run_config(made), made.plan


def _parser(command: str) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(prog=f"colm-scale {command}", description=RunConfig.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with options; the command line overrides it.")
    parser.add_argument("--local_rank", help=SUPPRESS)  # the DeepSpeed launcher passes it
    parser.add_class_arguments(RunConfig)
    return parser


def _parsed(parser: _Parser, arguments: Sequence[str]):
    _check_config_files(parser, arguments)
    return parser.instantiate(parser.parse_args(_join_lists(arguments)))


def _run_config(made) -> RunConfig:
    return RunConfig(**{field.name: getattr(made, field.name) for field in dataclasses.fields(RunConfig)})


def option_types(config_class: type = RunConfig, prefix: str = "") -> dict[str, str]:
    """Every option (without dashes) and the type it takes, e.g. ``{"train.steps": "int | None"}``."""
    types: dict[str, str] = {}
    hints = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            types |= option_types(hint, f"{prefix}{field.name}.")
        else:
            types[prefix + field.name] = hint.__name__ if isinstance(hint, type) else str(hint)
    return types


def _every_option() -> dict[str, str]:
    return option_types() | option_types(PlanConfig, "plan.")


class _Parser(ArgumentParser):
    """Says in one line what is wrong, instead of the usage of sixty options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(_explained(message))


def _explained(message: str) -> str:
    if found := re.search(r"unrecognized arguments: (\S+)", message):
        return f"unknown option {found[1].split('=')[0]}{_closest(found[1].split('=')[0].lstrip('-'))}"
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return f"unknown option {found[1]}.{found[2]}{_closest(f'{found[1]}.{found[2]}')}"
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        return f"unknown option {found[1]}{_closest(found[1])}"
    if found := re.search(r"(?:Parser|Validation) key \"?([\w.]+)\"?:", message):
        name, types = found[1], _every_option()
        value = re.search(r"(?:Given|Got) value: (.*)", message)
        if name in types and value:
            return f"--{name} is {value[1].strip()!r}, but must be {_readable(types[name])}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return f"{'; '.join(lines)} ({_HINT})"


def _closest(name: str) -> str:
    near = difflib.get_close_matches(name, [*_every_option(), "config"], n=1, cutoff=0.5)
    return f": did you mean --{near[0]}? ({_HINT})" if near else f" ({_HINT})"


def _readable(type_name: str) -> str:
    choices = re.search(r"Literal\[(.*)\]", type_name)
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
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

    def lines(node: yaml.Node, prefix: str = "") -> Iterator[tuple[str, int]]:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            yield from lines(value, f"{prefix}{key.value}.")
            yield f"{prefix}{key.value}", key.start_mark.line + 1

    named = set(re.findall(r"[\w.]+", message))
    return next((f" line {line}" for option, line in lines(yaml.compose(text)) if option in named), "")


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """Let list options take several words, ``--data.train a.jsonl b.jsonl``, as people write them."""
    types = {f"--{name}": type_name for name, type_name in option_types().items()}
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


def _fail(message: str) -> NoReturn:
    """Exit with 2; the first rank of each run says why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
