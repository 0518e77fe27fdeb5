"""Held-out loss and exact match of an adapter, and of its base beside it, on one process or several."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from colm_scale.adapter.find import Trained, adapted, find
from colm_scale.config import RunConfig
from colm_scale.config.tools import ScoreConfig
from colm_scale.data.examples import Examples, tokenise
from colm_scale.data.readers import builtin_as_rows, read_rows
from colm_scale.distributed.group import Group
from colm_scale.distributed.watch import Watch
from colm_scale.errors import UserError
from colm_scale.modeling.load import check_kernels, check_model, context_length, load_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.modeling.packing import use_packing
from colm_scale.records import long_tensor
from colm_scale.reporting.run_directory import finite
from colm_scale.reporting.summary import Evaluation
from colm_scale.run import process
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator
from colm_scale.selection.quota import kept_sources

_WIDTH = 110


@dataclass(frozen=True, slots=True)
class Scores:
    """What the first rank has found.

    Attributes:
        data: Where the examples are from.
        adapter, base: The adapted model, and the model without the adapter if that was asked for.
        left_out: Examples that were not evaluated or cut, by reason and source.
    """

    data: list[str]
    adapter: Evaluation
    base: Evaluation | None
    left_out: dict[str, dict[str, int]]


def score(options: ScoreConfig) -> int:
    """Evaluate on all ranks, and show on the first what was found; the exit code, as that of `process.run`.

    Raises:
        UserError: There is no such adapter, base model or data.
    """
    trained = find(options.run, options.adapter, options.model, trust_remote_code=options.trust_remote_code)
    config = _config(options, trained)
    found: list[Scores] = []
    code = process.run(config, partial(_score, options=options, trained=trained, found=found))
    for scores in found:
        line = harness_line(trained, config, options.tasks)
        if options.out is not None:
            _write(Path(options.out), trained, scores, line)
        _show(scores, trained, line)
    return code


def harness_line(trained: Trained, config: RunConfig, tasks: str) -> str:
    """The command of lm-evaluation-harness (0.4.10 and later) for the adapter."""
    if trained.weights is not None:
        return f"# export the adapter first: colm-scale merge {shlex.quote(str(trained.folder))} --adapter_only true"
    model = {"pretrained": trained.base, "peft": trained.folder.absolute(), "dtype": config.train.dtype}
    if config.model.revision:
        model["revision"] = config.model.revision
    words = ["lm_eval", "run", "--model", "hf", "--model_args", ",".join(f"{k}={v}" for k, v in model.items())]
    words += ["--tasks", tasks, "--batch_size", "auto"]
    return shlex.join([*words, *(["--trust_remote_code"] if config.model.trust_remote_code else [])])


def _config(options: ScoreConfig, trained: Trained) -> RunConfig:
    """The run's, as far as it says how to evaluate."""
    config = trained.config
    given = {name: getattr(options, name) for name in ("generate", "max_new_tokens", "limit")}
    evaluation = {name: value for name, value in given.items() if value is not None}
    train = dataclasses.replace(config.train, threads=options.threads)
    if options.dtype != "run":
        train = dataclasses.replace(train, dtype=options.dtype)
    if options.micro_batch_tokens is not None:
        train = dataclasses.replace(train, micro_batch_tokens=options.micro_batch_tokens)
    return dataclasses.replace(
        config,
        resume="none",
        model=dataclasses.replace(config.model, attention="auto"),  # the run's may need a GPU
        train=train,
        eval=dataclasses.replace(config.eval, **evaluation),
    )


def _score(
    config: RunConfig, group: Group, watch: Watch, options: ScoreConfig, trained: Trained, found: list[Scores]
) -> bool:
    """The job of all ranks."""
    torch.set_num_threads(config.train.threads or max(1, (os.cpu_count() or 1) // group.local_world_size))
    names = list(trained.sources)
    with group.together():
        check_kernels(config.model, config.train, None)
        longest = config.data.max_length or context_length(check_model(config.model, "model"))
        tokenizer = load_tokenizer(config.model, "model")
        data, examples = _examples(config, options, tokenizer, longest, names)
    group.agree(examples.digest(), "held-out data")
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
        found.append(Scores(data, evaluations[0], evaluations[1] if options.base else None, left_out))
    return True


def _examples(
    config: RunConfig, options: ScoreConfig, tokenizer: PreTrainedTokenizerBase, longest: int, names: list[str]
) -> tuple[list[str], Examples]:
    """The held-out examples and where they are from; sources that were trained on come first, in the run's order."""
    specs = options.data or config.data.eval
    if specs is None and config.data.train:
        raise UserError(f"{options.run}: the run had no held-out data; give some with --data FILE")
    rows = read_rows(specs, config.data) if specs else builtin_as_rows("eval", config.data)
    examples = tokenise(rows, tokenizer, config.data, longest, names or None)
    return specs or ["built-in held-out split"], examples


def _module(config: RunConfig, trained: Trained, group: Group) -> ExampleLoss:
    with group.together():
        flash = config.train.packing == "off"
        dtype = getattr(torch, config.train.dtype)
        base = load_model(config.model, dtype, group.device, "model", prefers_flash=flash)
        padded_because = use_packing(base, config.train.packing, group.device)
        module = ExampleLoss(adapted(base, trained))
        module.padded_because = padded_because
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
        console.print("no mean over the natural mixture: the run does not say how large these sources are")
    console.print(f"with lm-evaluation-harness (pip install 'lm_eval[hf]'):\n  {line}", soft_wrap=True)


def _table(scores: Scores) -> Table:
    """A row per source, and the means; of each number the base's first, if it is known."""
    found = [evaluation for evaluation in (scores.base, scores.adapter) if evaluation is not None]
    table = Table(box=box.SIMPLE, caption="base -> adapter" if len(found) > 1 else None, caption_justify="left")
    table.add_column("source")
    for heading in ("examples", "held-out loss", "right answers"):
        table.add_column(heading, justify="right")
    for name, count in scores.adapter.counts.items():
        losses, accuracies = [of.losses[name] for of in found], [of.accuracies[name] for of in found]
        table.add_row(name, f"{count:,}", _said(losses, ".3f"), _said(accuracies, ".1%"))
    table.add_section()
    table.add_row("natural mixture", "", _said([of.loss for of in found], ".3f"), "")
    means = [of.loss_by_source for of in found], [of.accuracy for of in found]
    table.add_row("mean over sources", "", _said(means[0], ".3f"), _said(means[1], ".1%"))
    table.add_row("small sources", "", _said([of.small_loss for of in found], ".3f"), "")
    return table


def _said(values: Sequence[float | None], form: str) -> str:
    return " -> ".join("-" if value is None else f"{value:{form}}" for value in values)
