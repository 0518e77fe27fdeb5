"""The ``colm-scale`` console command: runs the subcommand, and prints an error in its input as one line."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from colm_scale.cli import commands
from colm_scale.cli.output import keep_writing
from colm_scale.errors import UserError

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], str]] = {
    "train": (commands.train, "fine-tune a model with LoRA on mini-batch coresets"),
    "merge": (commands.merge, "merge an adapter into its base model, or export the adapter alone"),
    "eval": (commands.evaluate, "evaluate an adapter: held-out loss and exact match, source by source"),
    "doctor": (commands.doctor, "check versions, devices, network, compiler and disk of this machine"),
    "replay": (commands.replay, "train on the recorded selections of another run: the options of train"),
    "explain": (commands.explain, "show the sources and examples a run trained on, left out, and favoured"),
    "plan": (commands.plan, "estimate what a run needs, without GPU or weights: the options of train, and --plan.*"),
    "preview": (commands.preview, "show what a run would learn of its data, before anything is trained"),
    "report": (commands.report, "write an HTML page about one or several runs"),
    "sources": (commands.sources, "find the sub-populations of data without labels, for --data.sources"),
}
"""Every subcommand: its function, which takes the arguments after its name, and its line in the help."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a subcommand and exit: 0 done, 2 wrong input, other codes by subcommand.

    Args:
        arguments: The command line without the program's name; by default that of the process.
    """
    keep_writing()
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs advice when imported, even if unused
    try:
        COMMANDS[command][0](arguments)
    except UserError as error:
        _fail(str(error))
    sys.exit(0)


def train(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run ``colm-scale train``; the entry point of the launchers."""
    keep_writing()
    run("train", sys.argv[1:] if arguments is None else arguments)


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "".join(f"  {name:{width}}  {text}\n" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: colm-scale COMMAND [OPTIONS]\n\ncommands:\n{lines}\n"
        f"colm-scale COMMAND --help explains a command's options.\n"
    )


def _fail(message: str) -> NoReturn:
    """Exit with 2; only rank 0 prints why."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)
