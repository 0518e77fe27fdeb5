from __future__ import annotations

import torch

from colm_scale.data.batching import Batching, collate, make_batch
from colm_scale.data.examples import Examples
from colm_scale.records import Candidates, long_tensor

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
    assert batch.targets.rows.tolist() == [0, 6, 8, 10, 11]  # the tokens before, of rows of 5
    assert batch.targets.tokens.tolist() == [22, 13, 15, 9, 3]
    assert batch.targets.slots.tolist() == [0, 2, 3, 4, 5]
    assert batch.targets.counts.tolist() == [1, 2, 2]
    assert batch.targets.most == 2
    assert batch.positions.tolist() == [40, 3, 17]
    assert {t.dtype for t in tensors(batch)} == {torch.int64}


def test_an_empty_share_takes_the_shortest_example_that_some_rank_has():
    batching = Batching(9, 100, packed=False, device=CPU)
    candidates = Candidates(1, long_tensor([0, 1, 2]), long_tensor([0, 1, 2]), long_tensor([0, 0, 0]), EXAMPLES.lengths)
    (batch,) = batching.share(EXAMPLES, candidates, [[(0, 1)], [()]], 1)
    assert batch.input_ids.tolist() == [[1, 9, 3]], "not the shortest candidate, which no rank has"
    assert not len(batch.positions)
    assert batching.share(EXAMPLES, candidates, [[], []], 1) == []


def test_packed_rows_are_one_row_without_padding():
    batch = collate(EXAMPLES, long_tensor([2, 1, 0]), long_tensor([40, 3, 17]), 9, CPU, packed=True)
    assert batch.input_ids.tolist() == [[21, 22, 11, 12, 13, 14, 15, 1, 9, 3]]
    assert batch.attention_mask is None
    assert batch.packing.position_ids.tolist() == [[0, 1, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.packing.offsets.tolist() == [0, 2, 7, 10]
    assert batch.packing.offsets.dtype == torch.int32
    assert batch.packing.longest == 5
    assert batch.targets.rows.tolist() == [0, 3, 5, 7, 8]
    padded = collate(EXAMPLES, long_tensor([2, 1, 0]), long_tensor([40, 3, 17]), 9, CPU)
    for name in ("tokens", "slots", "counts", "most"):
        assert torch.equal(*(torch.as_tensor(getattr(b.targets, name)) for b in (batch, padded)))


def test_packed_values_are_laid_out_by_example():
    batch = collate(EXAMPLES, long_tensor([2, 0]), long_tensor([40, 17]), 9, CPU, packed=True)
    values = torch.arange(1.0, 11).view(1, 5, 2)
    expected = [[[1, 2], [3, 4], [0, 0]], [[5, 6], [7, 8], [9, 10]]]
    assert batch.by_example(values).tolist() == expected
    assert batch.by_example(values[0]).tolist() == expected
    padded = collate(EXAMPLES, long_tensor([2, 0]), long_tensor([40, 17]), 9, CPU)
    assert padded.by_example(torch.ones(6, 4)).shape == (2, 3, 4)


def test_an_example_without_labels_has_no_target():
    rows, marks = [torch.arange(3), torch.arange(2)], [torch.zeros(3, dtype=torch.bool), torch.tensor([True, False])]
    batch = make_batch(rows, marks, torch.arange(2), 9, CPU)
    assert batch.targets.counts.tolist() == [0, 0]
    assert batch.targets.most == 1
    assert batch.targets.rows.tolist() == []


def tensors(batch):
    targets = batch.targets
    of_targets = (targets.rows, targets.tokens, targets.slots, targets.counts)
    return batch.input_ids, batch.attention_mask, *of_targets, batch.positions


def test_the_width_is_that_of_the_longest_in_the_micro_batch():
    assert collate(EXAMPLES, long_tensor([0, 2]), long_tensor([0, 1]), 9, CPU).input_ids.shape == (2, 3)
    assert collate(EXAMPLES, long_tensor([2]), long_tensor([0]), 9, CPU).input_ids.shape == (1, 2)


def test_a_batch_that_only_keeps_step_has_a_row_but_no_position():
    batch = collate(EXAMPLES, long_tensor([2]), long_tensor([]), 9, CPU)
    assert batch.input_ids.tolist() == [[21, 22]]
    assert batch.positions.tolist() == []


def test_tensors_go_to_the_device_and_positions_stay():
    batch = collate(EXAMPLES, long_tensor([0]), long_tensor([5]), 9, torch.device("meta"))
    assert {t.device.type for t in tensors(batch)[:-1]} == {"meta"}
    assert batch.positions.device.type == "cpu"


def test_the_examples_are_not_written_to():
    before = EXAMPLES.digest()
    batch = collate(EXAMPLES, long_tensor([1]), long_tensor([0]), 9, CPU)
    batch.input_ids.zero_()
    assert EXAMPLES.digest() == before
