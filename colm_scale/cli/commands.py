"""One function per subcommand; each imports its room when it runs, so that a mistyped option is answered at once.

All raise a UserError for wrong input.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from colm_scale.config.command_line import parse_own, parse_plan, parse_train
from colm_scale.config.commands import (
    DoctorConfig,
    ExplainConfig,
    MergeConfig,
    PreviewConfig,
    ReportOptions,
    ScoreConfig,
    SourcesOptions,
)
from colm_scale.errors import UserError

_REPLAY_USAGE = """usage: colm-scale replay RUN [OPTIONS]

Trains on the examples that the run in the folder RUN has selected, step by step and with the same weights, without
sketching or selecting: on any number of ranks, with any engine, with another model. Takes the options of
`colm-scale train` (see its --help), with those of RUN as defaults; --selection.* comes from the record, and
--output_dir is a new folder unless given.
"""


def train(arguments: Sequence[str]) -> NoReturn:
    """Train, or with ``--dry-run`` print what a run would do; exit with 0 done, 1 training failed, 143 told to stop."""
    config, dry = parse_train(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost peer is one line, not pages of C++ frames
    from colm_scale.run import dry_run
    from colm_scale.run import train as training

    code = dry_run.run(config) if dry else training.run(config)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # with sys.exit, a thread left running by a library now and then crashes the process in teardown


def replay(arguments: Sequence[str]) -> NoReturn:
    """Train on the selections that another run has recorded."""
    if {"-h", "--help"} & set(arguments):
        print(_REPLAY_USAGE, end="")
        raise SystemExit(0)
    launched = [word for word in arguments if word.startswith("--local_rank")]  # the DeepSpeed launcher puts it first
    given = [word for word in arguments if word not in launched]
    if not given or given[0].startswith("-"):
        raise UserError("colm-scale replay RUN [OPTIONS]: RUN is missing, the folder of the run to replay")
    folder, options = Path(given[0]), given[1:]
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run directory: it has no config.yaml")
    names = {word.removeprefix("--").split("=")[0] for word in options if word.startswith("--")}
    if selection := sorted(name for name in names if name.startswith("selection.")):
        raise UserError(f"--{selection[0]} has no effect here, the selection is {folder}'s record: leave it out")
    own = ["--selection.method=replay", f"--selection.replay={folder}"]
    defaults = ["--output_dir=null", "--resume=none", "--train.forward_reuse=off"]
    train(["--config", str(folder / "config.yaml"), *defaults, *launched, *own, *options])


def merge(arguments: Sequence[str]) -> None:
    """Merge an adapter into its base model, and print how close the result is to the adapted model."""
    options = parse_own("merge", MergeConfig, arguments)
    from colm_scale.adapter.merge import export
    from colm_scale.run.process import quieten

    quieten()
    merged = export(options)
    for note in merged.notes:
        print(note)
    if merged.difference is not None:
        print(
            f"merged and adapted model: logits differ by at most {merged.difference:.3g} (the largest is "
            f"{merged.largest:.3g}), the likeliest next token is the same after {merged.same_tokens:.1%} of the tokens"
        )
    print(f"written: {merged.place}, {merged.total_bytes / 1e6:,.1f} MB of weights")


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate an adapter on held-out data; exit with another code than 0 if the evaluation fails."""
    options = parse_own("eval", ScoreConfig, arguments)
    from colm_scale.adapter.score import score

    if code := score(options):
        raise SystemExit(code)


def doctor(arguments: Sequence[str]) -> NoReturn:
    """Check the machine, and exit with 0 no problem, 1 a problem."""
    options = parse_own("doctor", DoctorConfig, arguments)
    from rich.console import Console

    from colm_scale.doctor.examine import examine
    from colm_scale.doctor.finding import as_json, exit_code, show

    findings = examine(options)
    if findings or os.environ.get("RANK", "0") == "0":
        if options.json:
            print(as_json(findings))
        else:
            show(findings, Console())
    sys.stdout.flush()
    os._exit(exit_code(findings))  # even if a check has left a thread hanging


def explain(arguments: Sequence[str]) -> None:
    """Print what a run trained on, left out and favoured, and write the files."""
    config = parse_own("explain", ExplainConfig, arguments)
    from rich.console import Console

    from colm_scale.explain import explain as explaining
    from colm_scale.explain.plots import check_drawable, draw
    from colm_scale.explain.show import as_json, tables, write

    if config.plots:
        check_drawable()
    found = explaining.explain(Path(config.run), config.alpha)
    folder = Path(config.out or f"{config.run}/explain")
    try:
        write(found, config.top, folder)
        if config.plots:
            draw(found, folder)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written: {error.strerror or error}") from None
    if config.format == "json":
        print(json.dumps(as_json(found, config.top), indent=2, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(tables(found, config.top), soft_wrap=True)
    console.print(f"written to {folder}", markup=False, highlight=False, soft_wrap=True)


def plan(arguments: Sequence[str]) -> None:
    """Print what a run with these options needs."""
    config, plan_config = parse_plan(arguments)
    from colm_scale.plan.plan import make_plan
    from colm_scale.plan.show import shown
    from colm_scale.run.prepare import resolve
    from colm_scale.run.process import quieten

    quieten()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing runs here, so DeepSpeed need not look for a GPU
    print(shown(make_plan(resolve(config), plan_config)), end="")


def preview(arguments: Sequence[str]) -> None:
    """Print what a run would learn of its data."""
    options = parse_own("preview", PreviewConfig, arguments)
    from rich.console import Console

    from colm_scale.run.preview import preview as pages
    from colm_scale.run.process import quieten

    quieten()
    console = Console(width=None if sys.stdout.isatty() else 200)
    for page in pages(options, colours=console.is_terminal):
        if isinstance(page, str):
            print(page)
        else:
            console.print(page, soft_wrap=True, highlight=False)


def report(arguments: Sequence[str]) -> None:
    """Write an HTML page about runs."""
    options = parse_own("report", ReportOptions, arguments)
    from colm_scale.reporting.page import write_page

    output = Path(options.output)
    for sentence in write_page(options.runs, output):
        print(sentence)
    print(f"report: {output} ({output.stat().st_size / 1e3:,.0f} kB)")


def sources(arguments: Sequence[str]) -> None:
    """Find the sub-populations of data without labels, write them down and report."""
    options = parse_own("sources", SourcesOptions, arguments)
    from colm_scale.run.process import quieten
    from colm_scale.sources.discover import discover

    quieten()
    print(discover(options), end="")
