from __future__ import annotations

import torch

from colm_scale.data.batching import collate
from colm_scale.data.examples import Examples
from colm_scale.records import long_tensor

CPU = torch.device("cpu")
# Three examples of 3, 5 and 2 tokens. The padding id, 9, is also a token of the first.
EXAMPLES = Examples(
    tokens=torch.tensor([1, 9, 3, 11, 12, 13, 14, 15, 21, 22], dtype=torch.int32),
    labelled=torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0, 1]).bool(),
    offsets=long_tensor([0, 3, 8, 10]),
    ids=long_tensor([0, 1, 2]),
    sources=long_tensor([0, 0, 0]),
    protected=torch.zeros(3, dtype=torch.bool),
    source_names=("a",),
    dropped={},
    cut={},
)


def test_rows_are_padded_on_the_right_in_the_order_asked_for():
    batch = collate(EXAMPLES, long_tensor([2, 1, 0]), long_tensor([40, 3, 17]), 9, CPU)
    assert batch.input_ids.tolist() == [[21, 22, 9, 9, 9], [11, 12, 13, 14, 15], [1, 9, 3, 9, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [
        [-100, 22, -100, -100, -100],
        [-100, -100, 13, -100, 15],
        [-100, 9, 3, -100, -100],
    ]
    assert batch.positions.tolist() == [40, 3, 17]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.positions)} == {torch.int64}


def test_the_width_is_that_of_the_longest_in_the_micro_batch():
    assert collate(EXAMPLES, long_tensor([0, 2]), long_tensor([0, 1]), 9, CPU).input_ids.shape == (2, 3)
    assert collate(EXAMPLES, long_tensor([2]), long_tensor([0]), 9, CPU).input_ids.shape == (1, 2)


def test_a_batch_that_only_keeps_step_has_a_row_but_no_position():
    batch = collate(EXAMPLES, long_tensor([2]), long_tensor([]), 9, CPU)
    assert batch.input_ids.tolist() == [[21, 22]]
    assert batch.positions.tolist() == []


def test_tensors_go_to_the_device_and_positions_stay():
    batch = collate(EXAMPLES, long_tensor([0]), long_tensor([5]), 9, torch.device("meta"))
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {"meta"}
    assert batch.positions.device.type == "cpu"


def test_the_examples_are_not_written_to():
    before = EXAMPLES.digest()
    batch = collate(EXAMPLES, long_tensor([1]), long_tensor([0]), 9, CPU)
    batch.input_ids.zero_()
    assert EXAMPLES.digest() == before
