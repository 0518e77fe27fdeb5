"""The selector in a loop of one's own."""

from __future__ import annotations

import math

import pytest
import torch
from support import worker
from support.families import base_model
from torch.nn.utils.rnn import pad_sequence

from colm_scale.config import ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.errors import UserError
from colm_scale.integrations import CoresetSelector

SELECTION = worker.CASES["last_layer"].selection
RUN = RunConfig(selection=SELECTION, train=TrainConfig(micro_batch_tokens=96))


def batch(indices: torch.Tensor) -> dict[str, object]:
    """As a collator makes it."""
    examples = worker.examples()
    tokens, marks = zip(*[examples.example(int(index)) for index in indices])
    labels = [row.long().masked_fill(~mask, -100) for row, mask in zip(tokens, marks)]
    return {
        "input_ids": pad_sequence([row.long() for row in tokens], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones(len(row)) for row in tokens], batch_first=True),
        "source": [examples.source_names[source] for source in examples.sources[indices]],
    }


def selector(run: RunConfig | SelectionConfig = RUN) -> CoresetSelector:
    data = worker.examples()
    return CoresetSelector(worker.model()[0].model, run, dict(zip(data.source_names, data.sizes.tolist())))


def test_the_loss_is_the_mean_over_the_coreset_s_examples_of_their_means():
    """Known from a plain forward of each example alone."""
    one, given = selector(), batch(torch.arange(24))
    coreset = one.select(given)
    loss = sum(float(one.loss(micro_batch)) for micro_batch in coreset.micro_batches)
    expected, model = [], worker.model()[0].model.eval()
    for position in coreset.selection.positions.tolist():
        length = int(given["attention_mask"][position].sum())
        row = {name: given[name][position : position + 1, :length] for name in ("input_ids", "labels")}
        with torch.no_grad():
            expected.append(float(model(**row).loss))
    assert len(expected) == 12
    assert loss == pytest.approx(sum(expected) / 12, abs=1e-5)
    assert one.finish().loss == pytest.approx(loss, abs=1e-6)


def test_ids_count_the_candidates_and_steps_go_on():
    one = selector()
    assert one.select(batch(torch.arange(24))).candidates.ids.tolist() == list(range(24))
    second = one.select(batch(torch.arange(24, 48)))
    assert second.candidates.step == 2
    assert second.candidates.ids.tolist() == list(range(24, 48))


def test_a_report_has_no_loss_unless_every_loss_came_from_the_selector():
    one = selector()
    one.select(batch(torch.arange(24)))
    assert math.isnan(one.finish().loss)
    assert one.finish() is None


def test_a_skipped_step_teaches_the_moments_nothing():
    one = selector()
    learned = []
    for applied in (False, True, False):
        coreset = one.select(batch(torch.arange(24)))
        for micro_batch in coreset.micro_batches:
            one.loss(micro_batch)
        assert one.finish(applied=applied).applied == applied
        learned.append((one.state.moment_steps, one.state.tensors(1)["moments"]))
    assert [steps for steps, _ in learned] == [0, 1, 1]
    assert not any(average.any() for average in learned[0][1].values())
    assert all(torch.equal(average, learned[2][1][name]) for name, average in learned[1][1].items())


def test_the_state_goes_on():
    first, second = selector(), selector()
    for start in (0, 24):
        coreset = first.select(batch(torch.arange(start, start + 24)))
        for micro_batch in coreset.micro_batches:
            first.loss(micro_batch)
    first.finish()
    second.step = first.step
    second.state.put_back(first.state.moment_steps, first.state.tensors(2))
    rest = batch(torch.arange(48, 72))
    assert second.select(rest).selection.positions.equal(first.select(rest).selection.positions)


def test_micro_batches_keep_to_the_budget_of_tokens():
    for micro_batch in selector().select(batch(torch.arange(24))).micro_batches:
        assert micro_batch.batch.input_ids.numel() <= 96


def test_wrong_input_is_named():
    with pytest.raises(UserError, match=r"model\.name='a/b' has no effect here"):
        selector(RunConfig(model=ModelConfig(name="a/b")))
    with pytest.raises(UserError, match="this model has none: add adapters"):
        CoresetSelector(base_model("llama"), SELECTION, {"a": 1})
    given = batch(torch.arange(24))
    with pytest.raises(UserError, match="'z', which is not among the sources: a, b, c, d, e"):
        selector().select(given | {"source": ["z"] * 24})
    with pytest.raises(UserError, match="labels are not the tokens themselves"):
        selector().select(given | {"labels": given["labels"] + 1})


def test_a_model_without_adapters_can_be_trained_on_what_needs_no_sketch():
    model = base_model("llama", vocab_size=worker.VOCABULARY)
    selection = SelectionConfig(candidates=24, budget=12, method="stratified")
    one = CoresetSelector(model, selection, dict.fromkeys("abcde", 9))
    coreset = one.select(batch(torch.arange(24)))
    sum(one.loss(micro_batch) for micro_batch in coreset.micro_batches).backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
