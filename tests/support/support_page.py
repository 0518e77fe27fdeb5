"""docs/support.md, made from the rows of docs/support.jsonl and from the rules that refuse options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from colm_scale.config.command_line import parse
from colm_scale.config.rules import DATA, FORWARD_REUSE, RUN, SELECTION, TRAIN, Rule, refusal
from colm_scale.engines.choose import START, Start
from colm_scale.engines.ds_config import read_ds_config, zero_stage
from colm_scale.errors import UserError
from support.zoo import ZOO

ENGINES = {"one process": "auto", "DDP": "auto", "ZeRO-2": "zero2", "ZeRO-3": "zero3", "FSDP2": "fsdp"}
"""By their names on the page, as `worker.run_config` takes them. All but the first run on two ranks."""
ALONE, PLAIN = "one process", "last_layer"
FEATURES: dict[str, dict[str, dict]] = {
    PLAIN: {"train": {"packing": "off"}},
    "packing": {"train": {"packing": "on"}},
    "forward reuse": {"train": {"activation_checkpointing": True, "forward_reuse": "device"}},
    "4-bit": {"model": {"quantize": "nf4"}},
    "zeroth_order": {"selection": {"estimator": "zeroth_order", "num_probes": 2}},
}
"""By their names on the page, the options of each, by section."""
SYMBOLS = {"works": "✓", "refused": "–", "fails": "✗", "": "·"}
OPTIONS = (*TRAIN, *DATA, *SELECTION, *RUN, *FORWARD_REUSE)
"""The rules that need no more than options."""
HEAD = """# What works with what

Made by `make support` from [support.jsonl](support.jsonl), which has a row for each cell; a test in `make test-all`
runs a sample of the cells again, every family, engine and feature among them, and fails if one is not as its row says.
Rows: {versions}; float32 on a CPU.

**✓ works**: a tiny model of the family (two blocks, random weights, no dropout, read from files) makes two real steps
with selection on two ranks (one in the first column); the selected ids are those of one process, the losses too (to
1e-5), and the saved adapter, loaded by plain peft (into the whole model, if it sees), computes the losses of the
trained model. **–** is refused, **✗** fails, with the line that says why; **·** was not tried. Large models, GPUs and
half precision are not covered by this table. Dropout is drawn apart on each rank, so with it losses depend on the
number of ranks.

## Families

The columns of the engines are for estimator `last_layer` on padded rows (`--train.packing off`); the others for all
five engines: `--train.packing on`; activation checkpointing with forward reuse
(`--train.activation_checkpointing true --train.forward_reuse device`); `--model.quantize nf4`;
`--selection.estimator zeroth_order`. With `--train.packing auto`, the default, a family that cannot be packed is
padded.
"""
TAIL = """
## Options that exclude each other

Refused before anything is read, whatever the model. Table and check are made from the same rules
(`colm_scale/config/rules.py` and, for the ranks, `colm_scale/engines/choose.py`). Whatever depends on the model
(packing, forward reuse, the probe) is tried out before the first step, and what was found is in the table above.

| options | on ranks | line |
|---|---|---|
"""


@dataclass(frozen=True)
class Cell:
    """A cell, and what came of it: ``works``, ``refused`` or ``fails``, the latter two with the line that says why."""

    family: str
    engine: str
    feature: str
    outcome: str = ""
    message: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.family, self.engine, self.feature


def cells(families: Iterable[str] = ZOO) -> list[Cell]:
    """All cells of these families."""
    return [Cell(family, engine, feature) for family in families for feature in FEATURES for engine in ENGINES]


def page(versions: dict[str, str], found: dict[tuple, Cell]) -> str:
    """The page, from the versions and cells of the rows."""
    notes: dict[str, int] = {}
    columns = ["family", "`model_type`", "special", *ENGINES, *(name for name in FEATURES if name != PLAIN)]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|---|{':-:|' * (len(columns) - 3)}"]
    for kind, family in ZOO.items():
        by_feature = {
            name: {engine: found.get((kind, engine, name), Cell(kind, engine, name)) for engine in ENGINES}
            for name in FEATURES
        }
        plain = [_symbol(cell, notes) for cell in by_feature.pop(PLAIN).values()]
        others = [_of_engines(of_feature, notes) for of_feature in by_feature.values()]
        lines.append(f"| {' | '.join([family.name, f'`{kind}`', family.special, *plain, *others])} |")
    said = [f"| {number} | {_text(message)} |" for message, number in notes.items()]
    listed = ["", "| | line |", "|---|---|", *said] if said else []
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    rules = [f"| `{rule.example}` | {rule.ranks} | {_text(line)} |" for rule, line in lines_of_rules()]
    return HEAD.format(versions=packages) + "\n" + "\n".join([*lines, *listed]) + "\n" + TAIL + "\n".join(rules) + "\n"


def lines_of_rules() -> list[tuple[Rule, str]]:
    """The line with which the example of each rule is refused; empty if it is not."""
    found: list[tuple[Rule, str]] = []
    for rule in OPTIONS:
        try:
            parse(shlex.split(rule.example))
            found.append((rule, ""))
        except UserError as error:
            found.append((rule, str(error)))
    for rule in START:
        config = parse(shlex.split(rule.example))
        stage = zero_stage(read_ds_config(config, rule.ranks))
        found.append((rule, refusal(Start(config, stage, rule.ranks), START)))
    return found


def _of_engines(of_feature: dict[str, Cell], notes: dict[str, int]) -> str:
    """One symbol if all engines agree, else that of most and those that differ, by name."""
    symbols = {engine: _symbol(cell, notes) for engine, cell in of_feature.items()}
    kinds = list(symbols.values())
    most = max(kinds, key=kinds.count)
    return "; ".join([most, *(f"{engine} {symbol}" for engine, symbol in symbols.items() if symbol != most)])


def _symbol(cell: Cell, notes: dict[str, int]) -> str:
    symbol = SYMBOLS[cell.outcome]
    return f"{symbol} {notes.setdefault(cell.message, len(notes) + 1)}" if cell.message else symbol


def _text(message: str) -> str:
    """A message in a cell of a table."""
    return re.sub(r"[|<>]", lambda found: f"\\{found[0]}", message)
