"""``colm-scale report`` as users type it."""

from __future__ import annotations

import sys

import pytest
from support.runs import write_run

from colm_scale.cli.main import main


def report(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    with pytest.raises(SystemExit) as ended:
        main(["report", *arguments])
    return ended.value.code, *capsys.readouterr()


def test_it_says_where_the_page_is_and_what_is_missing(tmp_path, capsys):
    runs = [write_run(tmp_path / "a", planned=6), write_run(tmp_path / "b", evaluated=False)]
    output = tmp_path / "page.html"
    code, said, errors = report(capsys, *map(str, runs), "--output", str(output))
    assert (code, errors) == (0, "")
    assert said.splitlines() == [
        "a: 4 of 6 steps are recorded: the run is in progress, or was stopped.",
        "b: There is no evaluations.jsonl.",
        "b: No evaluation is recorded, so there is no held-out loss.",
        f"report: {output} ({output.stat().st_size / 1e3:,.0f} kB)",
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "colm-scale report RUN...: RUN is missing"),
        (["nowhere"], "nowhere is not a run directory: it has no metrics.jsonl"),
        (["nowhere", "--outptu", "x"], "unknown option --outptu: did you mean --output?"),
    ],
)
def test_wrong_input_is_one_line(capsys, arguments, words):
    code, said, errors = report(capsys, *arguments)
    assert (code, said) == (2, "")
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1


def test_without_the_extra_it_names_it(tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("colm_scale.reporting.page.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, _, errors = report(capsys, str(write_run(tmp_path / "run")))
    assert code == 2
    assert errors == "error: colm-scale report requires jinja2: pip install 'colm_scale[report]'\n"
