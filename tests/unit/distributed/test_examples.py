"""Examples on their way between ranks. What two ranks make of it: tests/unit/integrations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import worker

from colm_scale.data.examples import Examples
from colm_scale.distributed.examples import decoded, encoded, gather_examples
from colm_scale.distributed.group import Group
from colm_scale.errors import TrainingError
from colm_scale.records import long_tensor

ALONE = Group(0, 1, 0, 1, torch.device("cpu"))


def some(indices: list[int]) -> Examples:
    return dataclasses.replace(worker.examples(), protected=torch.arange(96) % 5 == 0).take(long_tensor(indices))


def test_what_is_encoded_comes_back():
    examples = some([3, 5, 0, 90])
    assert decoded(*encoded(examples), examples.source_names).digest() == examples.digest()


def test_the_token_and_the_source_zero_have_a_complement_too():
    examples = dataclasses.replace(some([0]), tokens=torch.zeros_like(some([0]).tokens), sources=long_tensor([0]))
    rows, tokens = encoded(examples)
    assert (tokens < 0).equal(examples.labelled)
    assert rows[1].tolist() == [-1]
    assert decoded(rows, tokens, examples.source_names).digest() == examples.digest()


def test_parts_come_one_after_the_other_and_what_was_left_out_is_added_up():
    first = dataclasses.replace(some([3, 5]), dropped={"a": 1, "c": 2})
    found = gather_examples([first, dataclasses.replace(some([7]), dropped={"c": 1})], ALONE)
    assert found.ids.equal(some([3, 5, 7]).ids)
    assert found.dropped == {"a": 1, "c": 3}
    assert dataclasses.replace(found, dropped={}).digest() == some([3, 5, 7]).digest()


def test_nothing_to_learn_from_at_all_is_an_error():
    empty = decoded(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), ("a",))
    with pytest.raises(TrainingError, match=r"ranks have \[1\] batches with \[0\] examples"):
        gather_examples([empty], ALONE)
