"""Held-out loss and exact-match accuracy of an adapter, and of its base model, on one or several ranks."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table

from colm_scale.adapter.find import Trained, adapted, find
from colm_scale.config import DataConfig, RunConfig
from colm_scale.config.commands import ScoreConfig
from colm_scale.data.reading import Reading
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.errors import UserError
from colm_scale.modeling.load import check_kernels, check_model, context_length, load_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import check_flash, use_packing
from colm_scale.records import long_tensor
from colm_scale.reporting.run_directory import finite
from colm_scale.reporting.summary import Evaluation
from colm_scale.run import process
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator
from colm_scale.run.host_data import once_per_host
from colm_scale.selection.quota import kept_sources

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores, on the first rank.

    Attributes:
        data: Files or data sets of the examples.
        adapter: Evaluation of the adapted model.
        base: Evaluation of the base model; None without --base.
        left_out: Examples that were cut or not evaluated, by reason and source.
    """

    data: list[str]
    adapter: Evaluation
    base: Evaluation | None
    left_out: dict[str, dict[str, int]]

    def change(self, value: Callable[[Evaluation], float | None], form: str) -> str:
        """A number of the base model, if it was evaluated, and of the adapted model."""
        values = map(value, [self.base, self.adapter] if self.base else [self.adapter])
        return " -> ".join("-" if value is None else f"{value:{form}}" for value in values)


def score(options: ScoreConfig) -> int:
    """Evaluate on all ranks and print the scores on the first; returns the exit code of `process.run`.

    Raises:
        UserError: The adapter, base model or data does not exist.
    """
    trained = find(options.run, options.adapter, options.model, trust_remote_code=options.trust_remote_code)
    config = _config(options, trained)
    found: list[Scores] = []
    code = process.run(config, partial(_score, options=options, trained=trained, found=found))
    for scores in found:
        line = harness_line(trained, config, options.tasks)
        if options.out:
            _write(Path(options.out), trained, scores, line)
        _show(scores, trained, line)
    return code


def harness_line(trained: Trained, config: RunConfig, tasks: str) -> str:
    """The command with which lm-evaluation-harness (0.4.10 and later) evaluates the adapter."""
    if trained.weights:
        return f"# export the adapter first: colm-scale merge {shlex.quote(str(trained.folder))} --adapter_only true"
    model = {"pretrained": trained.base, "peft": trained.folder.absolute(), "dtype": config.train.dtype}
    if config.model.revision:
        model["revision"] = config.model.revision
    words = ["lm_eval", "run", "--model", "hf", "--model_args", ",".join(f"{k}={v}" for k, v in model.items())]
    words += ["--tasks", tasks, "--batch_size", "auto"]
    return shlex.join([*words, *(["--trust_remote_code"] if config.model.trust_remote_code else [])])


def _config(options: ScoreConfig, trained: Trained) -> RunConfig:
    """The run's configuration, with the given options in place of the run's."""
    config = trained.config
    evaluation = _given(options, "generate", "max_new_tokens", "limit")
    train = _given(options, "micro_batch_tokens") | {"threads": options.threads}
    if options.dtype != "run":
        train["dtype"] = options.dtype
    return dataclasses.replace(
        config,
        resume="none",
        model=dataclasses.replace(config.model, attention="auto"),  # the run's may need a GPU
        train=dataclasses.replace(config.train, **train),
        eval=dataclasses.replace(config.eval, **evaluation),
    )


def _given(options: ScoreConfig, *names: str) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _score(
    config: RunConfig, group: Group, watch: Watch, options: ScoreConfig, trained: Trained, found: list[Scores]
) -> bool:
    """Evaluate on this rank; the first rank adds its scores to ``found``."""
    torch.set_num_threads(config.train.threads or group.cores)
    names = list(trained.sources)
    with group.together():
        check_kernels(config.model, config.train)
        longest = config.data.max_length or context_length(check_model(config.model, "model"))
        tokenizer = load_tokenizer(config.model, "model")
        data = _data(config, options)
    examples = once_per_host(Reading("eval", data, tokenizer, longest, tuple(names)), group).examples
    module = _module(config, trained, group)
    sizes = long_tensor(list(trained.sources.values()))
    small = kept_sources(sizes, names, None)
    held_out = HeldOut(examples, sizes, small, tokenizer)
    evaluator = HeldOutEvaluator(held_out, config.eval, config.train, group, watch.enter)
    evaluations = []
    assert isinstance(module.model, PeftModel)
    for without in (nullcontext(), module.model.disable_adapter())[: 1 + options.base]:
        with without:
            evaluations.append(evaluator(module, 0))
    if group.is_first:
        named = {why.removeprefix("held-out examples "): counts for why, counts in evaluator.left_out.items()}
        left_out = {why.replace("--eval.", "--"): counts for why, counts in named.items() if counts}
        specs = data.eval or ["built-in held-out split"]
        found.append(Scores(specs, evaluations[0], evaluations[1] if options.base else None, left_out))
    return True


def _data(config: RunConfig, options: ScoreConfig) -> DataConfig:
    """Choose the data: that of the options, or else the run's."""
    specs = options.data or config.data.eval
    if specs is None and config.data.train:
        raise UserError(f"{options.run}: the run had no held-out data; add --data FILE")
    return dataclasses.replace(config.data, eval=specs)


def _module(config: RunConfig, trained: Trained, group: Group) -> ExampleLoss:
    train = config.train
    with group.together():
        dtype, flash = getattr(torch, train.dtype), train.packing == "off"
        base = load_model(config.model, dtype, group.device, "model", prefers_flash=flash)
        check_flash(base, config.model.attention, group.device)
        tried = use_packing(base, train.packing, group.device)
        module = ExampleLoss(adapted(base, trained))
        module.padded_because = tried.padded_because
    return module


def _write(path: Path, trained: Trained, scores: Scores, line: str) -> None:
    content = {"folder": str(trained.folder), "model": trained.base, **dataclasses.asdict(scores), "lm_eval": line}
    try:
        path.write_text(json.dumps(finite(content), indent=2), "utf-8")
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None


def _show(scores: Scores, trained: Trained, line: str) -> None:
    console = Console(width=_WIDTH, highlight=False, markup=False)
    console.print(f"{trained.folder} on {trained.base}, evaluated on {', '.join(scores.data)}", soft_wrap=True)
    console.print(_table(scores))
    for why, counts in scores.left_out.items():
        by_source = ", ".join(f"{name} {count}" for name, count in counts.items())
        console.print(f"examples {why}: {sum(counts.values())} ({by_source})", soft_wrap=True)
    if scores.adapter.loss is None:
        console.print("no mean over the natural mixture: the run does not record the size of these sources")
    console.print(f"to use lm-evaluation-harness (pip install 'lm_eval[hf]'):\n  {line}", soft_wrap=True)


def _table(scores: Scores) -> Table:
    """One row per source, then the means."""
    table = Table(box=box.SIMPLE, caption="base -> adapter" if scores.base else None, caption_justify="left")
    table.add_column("source")
    for heading in ("examples", "held-out loss", "accuracy"):
        table.add_column(heading, justify="right")
    for name, count in scores.adapter.counts.items():
        table.add_row(name, f"{count:,}", *_held_out(scores, name))
    table.add_section()
    table.add_row("natural mixture", "", scores.change(lambda evaluation: evaluation.loss, ".3f"), "")
    by_source = scores.change(lambda evaluation: evaluation.loss_by_source, ".3f")
    table.add_row("mean over sources", "", by_source, scores.change(lambda evaluation: evaluation.accuracy, ".1%"))
    table.add_row("small sources", "", scores.change(lambda evaluation: evaluation.small_loss, ".3f"), "")
    return table


def _held_out(scores: Scores, name: str) -> tuple[str, str]:
    """Held-out loss and accuracy of a source."""
    loss = scores.change(lambda evaluation: evaluation.losses[name], ".3f")
    return loss, scores.change(lambda evaluation: evaluation.accuracies[name], ".1%")
