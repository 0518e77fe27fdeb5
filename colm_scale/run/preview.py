"""``colm-scale preview``: what a run would learn of its data, before anything is trained."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from colm_scale.config import DataConfig
from colm_scale.config.commands import PreviewConfig
from colm_scale.data.encoding import Encoded, encode
from colm_scale.data.examples import DROPPED, REMARKS, count_lines, remarks_on
from colm_scale.data.readers import Columns
from colm_scale.data.reading import Reading
from colm_scale.modeling.load import check_model, check_vocabulary, context_length, load_tokenizer

_ROWS = 2
"""Rows shown of each source."""
_LEARNED = "bold green"
_MARKED = ("[[", "]]")
"""Around what is learned, where there are no colours."""


def preview(config: PreviewConfig, *, colours: bool) -> Iterator[RenderableType | str]:
    """Read, render and tokenise the training data as a run does, and show it.

    Yields:
        With ``json``, a line for each row, and what is said of all of them goes to standard error; else some rows of
        each source, and a table with the counts of all rows.

    Raises:
        UserError: As a run with this data, before it loads the model.
    """
    data, columns = config.data, Columns()
    model, tokenizer = check_model(config.model), load_tokenizer(config.model)
    check_vocabulary(tokenizer, model)
    longest = data.max_length or context_length(model)
    encoded = encode(Reading("train", data, tokenizer, longest).rows(columns), tokenizer, data)
    if config.json:
        return _objects(islice(encoded, config.rows), data, longest, columns)
    return _pages(encoded, config, longest, columns, colours=colours)


def _objects(encoded: Iterator[Encoded], config: DataConfig, longest: int, columns: Columns) -> Iterator[str]:
    counts: dict[str, Counter[str]] = {remark: Counter() for remark in REMARKS}
    for row in encoded:
        found = {
            "row": row.row.where,
            "source": row.row.source,
            "text": row.text,
            "learned": row.learned,
            "tokens": len(row.tokens),
            "label_tokens": int(row.labelled.sum()),
        }
        for remark in remarks_on(row, config, longest):
            counts[remark][row.row.source] += 1
        yield json.dumps(found, ensure_ascii=False)
    for line in (*columns.lines(), *count_lines(counts)):
        print(line, file=sys.stderr)


def _pages(
    encoded: Iterator[Encoded], config: PreviewConfig, longest: int, columns: Columns, *, colours: bool
) -> Iterator[RenderableType]:
    most = _ROWS if config.rows is None else config.rows
    shown: Counter[str] = Counter()
    tallies: dict[str, Counter[str]] = defaultdict(Counter)
    for row in encoded:
        source, remarks = row.row.source, remarks_on(row, config.data, longest)
        tallies[source].update(["rows", *remarks])
        if DROPPED not in remarks:
            tallies[source]["tokens"] += min(len(row.tokens), longest)
            tallies[source]["learned"] += int(row.labelled[:longest].sum())
        if shown[source] < most:
            shown[source] += 1
            yield _shown(row, remarks, colours=colours)
    heads = ("rows", "tokens", "learned", *REMARKS)
    table = Table("source", title="all rows")
    for head in heads:
        table.add_column(head, justify="right")
    for source, tally in sorted(tallies.items()):
        table.add_row(source, *(f"{tally[head]:,}" for head in heads))
    yield table
    yield from columns.lines()
    yield from count_lines({remark: {source: tally[remark] for source, tally in tallies.items()} for remark in REMARKS})


def _shown(row: Encoded, remarks: list[str], *, colours: bool) -> Text:
    """Write a row with what is learned of it in colour, or between marks."""
    counts = f"{len(row.tokens):,} tokens, {int(row.labelled.sum()):,} learned"
    text = Text(f"{row.row.source} | {', '.join([row.row.where, counts, *remarks])}\n", style="bold")
    begin, end = ("", "") if colours else _MARKED
    done = 0
    for first, last in row.spans:
        text.append(row.text[done:first], style="not bold")
        text.append(f"{begin}{row.text[first:last]}{end}", style=_LEARNED)
        done = last
    return text.append(f"{row.text[done:]}\n", style="not bold")
