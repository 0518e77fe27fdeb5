"""What ran: configuration and environment, differences first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from colm_scale.reporting.page.parts import Section, Table
from colm_scale.reporting.page.read import Run

_OF_EACH_RUN = ("output_dir", "command")
"""What always differs, and says nothing."""


def configuration(runs: Sequence[Run]) -> Section:
    """Every option."""
    return _compared("configuration", "Configuration", "option", [run.config for run in runs], runs)


def environments(runs: Sequence[Run]) -> Section:
    """Versions, devices, commit."""
    return _compared("environment", "Environment", "fact", [run.environment for run in runs], runs)


def _compared(id: str, title: str, what: str, found: Sequence[Mapping[str, object]], runs: Sequence[Run]) -> Section:
    names = dict.fromkeys(name for of_run in found for name in of_run)
    rows = [[name, *(_shown(of_run, name) for of_run in found)] for name in names]
    different = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in _OF_EACH_RUN]
    head = [what, *(run.name for run in runs)]
    tables = [Table(caption=f"All {what}s", head=head, rows=rows, folded=True, words=True)] if rows else []
    if different:
        tables.insert(0, Table(caption="What differs between the runs", head=head, rows=different, words=True))
    same = " The runs do not differ here." if len(runs) > 1 and rows and not different else ""
    return Section(id=id, title=title, text=f"{len(rows)} {what}s.{same}", tables=tables)


def _shown(found: Mapping[str, object], name: str) -> str:
    value = found.get(name)
    if name not in found or value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
