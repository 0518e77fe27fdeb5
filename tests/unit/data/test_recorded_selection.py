from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from colm_scale.data.recorded_selection import SelectionRecord, index_of, recorded_steps
from colm_scale.errors import TrainingError, UserError
from colm_scale.records import Candidates, long_tensor

STEPS = [
    {
        "step": 1, "candidates": [7, 3, 9], "sources": ["a", "b", "a"], "selected": [3, 7], "weights": [1.0, 0.1],
        "kept": 1,
    },
    # An example that comes twice, at the seam of two epochs.
    {
        "step": 2, "candidates": [9, 7, 9], "sources": ["a", "a", "a"], "selected": [9, 9], "weights": [2.5, 3.0],
        "kept": 0,
    },
]


def written(folder, steps=STEPS, end="\n"):
    lines = [json.dumps(step) for step in steps]
    (folder / "selection.jsonl").write_text("\n".join(lines) + end * bool(lines), "utf-8")
    return str(folder)


def candidates(step: int, ids: list[int]) -> Candidates:
    n = len(ids)
    return Candidates(step, torch.arange(n), long_tensor(ids), torch.zeros(n).long(), torch.ones(n).long())


def changed(line: int, **values) -> list[dict]:
    return [row | values if number == line else row for number, row in enumerate(STEPS, 1)]


def test_a_step_comes_back_as_it_was_selected(tmp_path):
    record = SelectionRecord(written(tmp_path))
    assert (record.steps, record.most_selected, record.rows_digest) == (2, 2, None)
    found = record.selection(candidates(1, [7, 3, 9]))
    assert found.positions.tolist() == [1, 0]
    assert torch.equal(found.weights, torch.tensor([1.0, 0.1]))
    assert found.kept == 1


def test_names_hold_until_others_come(tmp_path):
    numbered = [
        {**STEPS[0], "names": ["a", "b"], "sources": [0, 1, 0]},
        {**STEPS[1], "sources": [0, 0, 0]},
        {**STEPS[1], "step": 3, "names": ["c", "a"], "sources": [1, 1, 0]},
    ]
    found = recorded_steps(Path(written(tmp_path, numbered)) / "selection.jsonl")
    assert [step.sources for step in found] == [["a", "b", "a"], ["a", "a", "a"], ["a", "a", "c"]]
    named = SelectionRecord(written(tmp_path, STEPS)).digest
    assert SelectionRecord(written(tmp_path, numbered[:2])).digest == named


@pytest.mark.parametrize("sources", [[0, 1, 2], [0, -1, 0], [0, None, 0], 5])
def test_a_source_without_a_name_is_refused(sources, tmp_path):
    numbered = [{**STEPS[0], "names": ["a", "b"], "sources": sources}]
    with pytest.raises(UserError, match=r"line 1 is not a step of a selection\.jsonl"):
        SelectionRecord(written(tmp_path, numbered))


def test_an_example_that_comes_twice_is_taken_twice(tmp_path):
    found = SelectionRecord(written(tmp_path)).selection(candidates(2, [9, 7, 9]))
    assert found.positions.tolist() == [0, 2]


def test_other_candidates_are_refused_by_name(tmp_path):
    record = SelectionRecord(written(tmp_path))
    with pytest.raises(TrainingError, match=r"step 1: .*: id 4 in place of 3"):
        record.selection(candidates(1, [7, 4, 9]))
    with pytest.raises(TrainingError, match=r"step 3: .* holds 2 steps"):
        record.candidates(3)


def test_data_that_it_fits_is_accepted(tmp_path):
    SelectionRecord(written(tmp_path)).check(long_tensor([3, 7, 8, 9]), long_tensor([0, 1, 0, 1]), ["b", "a"])


@pytest.mark.parametrize(
    ("ids", "sources", "words"),
    [
        ([3, 7, 8], [0, 1, 0], ["step 1: id 9", "not among the training examples"]),
        ([7, 3, 9], [1, 0, 0], ["step 1: id 9", "source 'a', but 'b' in this data"]),
    ],
)
def test_data_that_it_does_not_fit_is_refused_with_step_and_id(tmp_path, ids, sources, words):
    with pytest.raises(UserError) as refused:
        SelectionRecord(written(tmp_path)).check(long_tensor(ids), long_tensor(sources), ["b", "a"])
    for word in words:
        assert word in str(refused.value)


def test_a_line_that_was_not_written_to_its_end_is_left_out(tmp_path):
    assert SelectionRecord(written(tmp_path, end="")).steps == 1


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (changed(2, step=3), "line 2 is step 3, but must be step 2"),
        (changed(2, selected=[9, 4]), "line 2: step 2 has selected id 4, which was not a candidate"),
        (changed(1, selected=[7, 7]), "line 1: step 1 has selected id 7, which was not a candidate"),
        (changed(1, weights=[1.0]), "line 1 is not a step .* do not fit together"),
        (changed(1, weights=[1.0, None]), "line 1 is not a step"),
        (changed(1, weights=[1.0, 0.0]), "line 1 is not a step"),
        (changed(1, kept=3), "line 1 is not a step"),
        (changed(1, candidates=["x", 3, 9]), "line 1 is not a step"),
        ([[1, 2]], "line 1 is not a step"),
        ([], "holds no step"),
    ],
)
def test_a_damaged_record_is_refused_by_line(tmp_path, steps, words):
    with pytest.raises(UserError, match=words):
        SelectionRecord(written(tmp_path, steps))


def test_a_record_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        SelectionRecord(str(tmp_path / "selection.jsonl"))


def test_the_digest_is_of_what_is_trained_on(tmp_path):
    first = SelectionRecord(written(tmp_path)).digest
    assert SelectionRecord(written(tmp_path)).digest == first
    assert SelectionRecord(written(tmp_path, changed(1, weights=[1.0, 0.2]))).digest != first


def test_places_of_ids():
    assert index_of(long_tensor([5, 2, 9, 1]), long_tensor([9, 1, 5])).tolist() == [2, -1, 0, 1]
