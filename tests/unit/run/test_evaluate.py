"""Held-out loss and exact match, on one rank with the packaged base model."""

from __future__ import annotations

import pytest
import torch
from support.families import batch_of_rows

from colm_scale.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from colm_scale.data.builtin import builtin_as_rows
from colm_scale.data.examples import tokenise
from colm_scale.distributed.group import Group
from colm_scale.modeling.load import load_model, load_tokenizer
from colm_scale.modeling.losses import ExampleLoss
from colm_scale.run import evaluate
from colm_scale.run.evaluate import HeldOut, HeldOutEvaluator

CPU = torch.device("cpu")
GROUP = Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


@pytest.fixture(scope="module")
def parts():
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ModelConfig())
    examples = tokenise(builtin_as_rows("eval", DataConfig())[: 3 * 24], tokenizer, DataConfig(), 1024)
    return tokenizer, examples, ExampleLoss(load_model(ModelConfig(), torch.float32, CPU))


def evaluator(parts, **options) -> HeldOutEvaluator:
    tokenizer, examples, _ = parts
    sizes, small = torch.tensor([600, 300, 100]), torch.tensor([False, False, True])
    held_out, train = HeldOut(examples, sizes, small, tokenizer), TrainConfig(micro_batch_tokens=256)
    return HeldOutEvaluator(held_out, EvalConfig(**options), train, GROUP)


def test_means_are_over_the_natural_mixture_over_sources_and_over_small_ones(parts):
    _, examples, module = parts
    found = evaluator(parts, generate=0, limit=100)(module, 7)
    with torch.no_grad():
        own = torch.cat(
            [module(batch_of_rows([t.long()], [k])) for t, k in map(examples.example, range(len(examples)))]
        )
    by_source = [float(own[examples.sources == q].mean()) for q in range(3)]
    # float32, padded in other micro-batches than alone.
    assert list(found.losses.values()) == pytest.approx(by_source, rel=1e-4)
    assert found.loss == pytest.approx(0.6 * by_source[0] + 0.3 * by_source[1] + 0.1 * by_source[2], rel=1e-4)
    assert found.loss_by_source == pytest.approx(sum(by_source) / 3, rel=1e-4)
    assert found.small_loss == pytest.approx(by_source[2], rel=1e-4)
    assert found.accuracy is None
    assert found.step == 7


def test_right_answers_are_counted_per_source(parts, monkeypatch):
    tokenizer, examples, module = parts
    answers = {}
    for i in range(len(examples)):
        prompt, reference = examples.prompt_and_reference(i)
        answers[tuple(prompt)] = reference if examples.sources[i] != 1 else [tokenizer.eos_token_id]
    seen = []

    def generate(input_ids, attention_mask, **options):
        seen.append(options)
        prompts = [tuple(row[mask.bool()].tolist()) for row, mask in zip(input_ids, attention_mask)]
        longest = max(len(answers[prompt]) for prompt in prompts)
        said = [answers[p] + [tokenizer.pad_token_id] * (longest - len(answers[p])) for p in prompts]
        return torch.cat([input_ids, torch.tensor(said)], dim=1)

    monkeypatch.setattr(module.model, "generate", generate)
    found = evaluator(parts, generate=4, max_new_tokens=9, limit=100)(module, 0)
    names = examples.source_names
    assert found.accuracies == {names[0]: 1.0, names[1]: 0.0, names[2]: 1.0}
    assert found.accuracy == pytest.approx(2 / 3)
    assert seen[0]["max_new_tokens"] == 9
    assert seen[0]["do_sample"] is False
    assert tokenizer.eos_token_id in seen[0]["eos_token_id"]


def answers_of(parts, monkeypatch, micro_batch_tokens: int) -> dict[str, str]:
    """By reference, the answers of the base to two prompts of each source."""
    tokenizer, examples, module = parts
    held_out = HeldOut(examples, torch.tensor([1, 1, 1]), torch.zeros(3, dtype=torch.bool), tokenizer)
    config = EvalConfig(generate=2, limit=2, max_new_tokens=10)
    train = TrainConfig(micro_batch_tokens=micro_batch_tokens)
    answers = {}
    monkeypatch.setattr(evaluate, "is_correct", lambda answer, reference: answers.update({reference: answer}) or False)
    HeldOutEvaluator(held_out, config, train, GROUP)(module, 0)
    return answers


def test_answers_of_a_batch_padded_on_the_left_are_those_of_one_prompt_at_a_time(parts, monkeypatch):
    together, alone = answers_of(parts, monkeypatch, 4096), answers_of(parts, monkeypatch, 1)
    assert len(set(together.values())) == len(together) == 6
    assert together == alone


def test_every_evaluation_scores_the_same_sample(parts):
    """As many examples of each source, among those that the first and the last score; and it has the same losses."""
    of = evaluator(parts, generate=2, max_new_tokens=1, limit=20, sample=14)
    whole, part = of(parts[2], 0), of(parts[2], 5, whole=False)
    assert (whole.whole, part.whole) == (True, False)
    assert set(whole.counts.values()) == {20}
    assert part.counts == part.sample.counts == whole.sample.counts == dict.fromkeys(whole.counts, 14 // 3)
    # float32, in other micro-batches.
    assert part.losses == pytest.approx(whole.sample.losses, rel=1e-5)
    assert part.loss_by_source == part.sample.loss_by_source == pytest.approx(whole.sample.loss_by_source, rel=1e-5)
    assert part.losses != pytest.approx(whole.losses, rel=1e-3)
    assert (part.accuracy, set(part.accuracies.values())) == (None, {None})
    assert whole.accuracy is not None


def test_a_sample_has_an_example_of_every_source_and_no_more_than_there_are(parts):
    assert set(evaluator(parts, generate=0, sample=1)(parts[2], 5, whole=False).counts.values()) == {1}
    all_of_them = evaluator(parts, generate=0, limit=10, sample=1000)(parts[2], 5, whole=False)
    assert all_of_them.whole
    assert set(all_of_them.counts.values()) == {10}


def test_an_evaluation_draws_nothing_at_random(parts):
    before = torch.random.get_rng_state()
    for whole in (True, False):
        evaluator(parts, generate=1, max_new_tokens=1, limit=3)(parts[2], 0, whole=whole)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_is_above_the_limit_is_counted(parts):
    of = evaluator(parts, generate=0, limit=10)
    assert set(of.left_out["held-out examples above --eval.limit, not evaluated"].values()) == {14}
    assert set(of(parts[2], 0).counts.values()) == {10}
