"""``colm-scale replay RUN``: train what a run has selected, elsewhere and without selecting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from colm_scale.cli import train
from colm_scale.errors import UserError

_USAGE = """usage: colm-scale replay RUN [OPTIONS]

Trains the examples that the run in the folder RUN has selected, step by step and with the same weights, without
sketching or selecting anything: on any number of ranks, under any engine, with another model. The options are those of
`colm-scale train` (see its --help); RUN's own are the defaults. --selection.* is the record's, and --output_dir a new
folder, unless it is given.
"""


def run(arguments: Sequence[str]) -> NoReturn:
    """As `train.run`.

    Raises:
        UserError: Wrong input.
    """
    if {"-h", "--help"} & set(arguments):
        print(_USAGE, end="")
        raise SystemExit(0)
    train.run(as_training(arguments))


def as_training(arguments: Sequence[str]) -> list[str]:
    """The options of ``colm-scale train`` that replay the run that ``arguments`` begin with.

    Raises:
        UserError: There is no such run, or an option belongs to the selection.
    """
    launched = [word for word in arguments if word.startswith("--local_rank")]  # what a launcher puts in front
    given = [word for word in arguments if word not in launched]
    if not given or given[0].startswith("-"):
        raise UserError("colm-scale replay RUN [OPTIONS]: RUN is missing, the folder of the run whose picks to train")
    folder, options = Path(given[0]), given[1:]
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run: there is no config.yaml in it")
    names = {word.removeprefix("--").split("=")[0] for word in options if word.startswith("--")}
    if selection := sorted(name for name in names if name.startswith("selection.")):
        raise UserError(f"--{selection[0]} decides what is selected, which is {folder}'s record here: leave it out")
    own = ["--selection.method=replay", f"--selection.replay={folder}"]
    defaults = ["--output_dir=null", "--resume=none", "--train.forward_reuse=off"]
    return ["--config", str(folder / "config.yaml"), *defaults, *launched, *own, *options]
