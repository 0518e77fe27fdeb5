"""The ``colm-scale`` console command: finds the subcommand and turns what is wrong with its input into one line."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from colm_scale.errors import UserError

COMMANDS = {
    "train": "fine-tune a model with LoRA on mini-batch coresets",
    "merge": "an adapter merged into its base model, as a folder that needs no peft; or the adapter alone",
    "eval": "held-out loss and right answers of an adapter, source by source",
    "doctor": "what would keep a run from working here: versions, devices, network, compiler, disk",
    "replay": "train what another run has selected, without selecting: the same options",
    "explain": "which sources and examples a run has trained on, left out, and favoured",
    "plan": "what such a run will need, without a GPU and without weights: the same options, and --plan.*",
    "report": "one HTML page about one or several runs",
    "sources": "find the sub-populations of data that has no labels, for --data.sources of a run",
}
"""Every command, a module of `colm_scale.cli` with a function ``run(arguments)``, and what it does."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 done, 2 wrong input; a command may have codes of its own."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    if command in ("", "-h", "--help"):
        print(_usage(), end="")
        sys.exit(0 if command else 2)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        meant = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        _fail(f"unknown command {command!r}: {meant}")
    run(command, rest[:-1])


def run(command: str, arguments: Sequence[str]) -> NoReturn:
    """Run one of `COMMANDS` and exit."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises while it is imported, used or not
    try:
        importlib.import_module(f"colm_scale.cli.{command}").run(arguments)
    except UserError as error:
        _fail(str(error))
    sys.exit(0)


def train(arguments: Sequence[str] | None = None) -> NoReturn:
    """``colm-scale train``, for launchers."""
    run("train", sys.argv[1:] if arguments is None else arguments)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "".join(f"  {name:{width}}  {text}\n" for name, text in COMMANDS.items())
    return (
        f"usage: colm-scale COMMAND [OPTIONS]\n\ncommands:\n{commands}\n"
        f"colm-scale COMMAND --help explains a command's options.\n"
    )


def _fail(message: str) -> NoReturn:
    """Exit with 2; the first rank of each run says why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
