from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.threads import on_ranks

from colm_scale.config import DataConfig, ModelConfig, RunConfig, SelectionConfig, TrainConfig
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.data.stream import BlockStream, Survey, survey
from colm_scale.distributed.group import Group, PeerFailed
from colm_scale.errors import TrainingError, UserError
from colm_scale.modeling.load import load_tokenizer
from colm_scale.records import Candidates
from colm_scale.run.streaming import StreamedSampler, share_survey

LONGEST, N, STEPS = 16, 6, 20
ROWS = 45
"""Of which every ninth is too long: 40 examples, so that 20 steps of 6 are three epochs."""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ModelConfig())


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.jsonl"
    write(path, ROWS)
    return path


def write(path: Path, rows: int) -> None:
    records = [
        {
            "source": "odd" if number % 2 else "even",
            "prompt": f"{number} + 1?",
            "completion": "la " * 30 if number % 9 == 4 else f"{number + 1}",
            "protected": number % 5 == 0,
        }
        for number in range(rows)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def run_config(data: Path, count: int = N, **options) -> RunConfig:
    return RunConfig(
        data=DataConfig(train=[str(data)], streaming=True, **{"shuffle_rows": 11, **options}),
        selection=SelectionConfig(candidates=count, budget=1),
        train=TrainConfig(seed=4),
    )


def sampler_of(config: RunConfig, tokenizer, group: Group) -> StreamedSampler:
    surveyed = survey(config.data.train, config.data) if group.is_first else None
    return StreamedSampler(config, share_survey(surveyed, group), tokenizer, LONGEST, group)


def alone() -> Group:
    return Group(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))


def content(sampler: StreamedSampler, candidates: Candidates) -> dict:
    """Everything that a step sees, as plain values."""
    examples = sampler.examples
    assert candidates.lengths.tolist() == examples.lengths.tolist()
    pairs = [examples.example(index) for index in candidates.indices.tolist()]
    return {
        "step": candidates.step,
        "indices": candidates.indices.tolist(),
        "ids": candidates.ids.tolist(),
        "sources": [examples.source_names[source] for source in candidates.sources.tolist()],
        "protected": candidates.protected.tolist(),
        "examples": [(tokens.tolist(), labelled.tolist()) for tokens, labelled in pairs],
        "types": [tensor.dtype for tensor in (candidates.ids, candidates.sources, candidates.lengths, *pairs[0])],
    }


def run(sampler: StreamedSampler, first: int, last: int) -> list[dict]:
    return [content(sampler, sampler(step)) for step in range(first, last + 1)]


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_candidates_are_the_examples_of_the_data(data, tokenizer, overlong):
    config = run_config(data, overlong=overlong)
    whole = tokenise(read_rows(config.data.train, config.data), tokenizer, config.data, LONGEST)
    index = {number: place for place, number in enumerate(whole.ids.tolist())}
    sampler = sampler_of(config, tokenizer, alone())
    assert len(sampler.examples) == 0
    for step in range(1, STEPS + 1):
        candidates = sampler(step)
        assert candidates.step == step
        assert candidates.indices.tolist() == list(range(N))
        assert sampler.examples.source_names == whole.source_names
        for position, number in enumerate(candidates.ids.tolist()):
            for drawn, expected in zip(sampler.examples.example(position), whole.example(index[number])):
                assert drawn.dtype == expected.dtype
                assert drawn.tolist() == expected.tolist()
            assert candidates.sources[position] == whole.sources[index[number]]
            assert candidates.protected[position] == whole.protected[index[number]] == (number % 5 == 0)
            assert candidates.lengths[position] == whole.lengths[index[number]]
    assert (sampler.dropped, sampler.cut) == (whole.dropped, whole.cut)


def test_every_example_is_a_candidate_once_per_epoch(data, tokenizer):
    steps = run(sampler_of(run_config(data), tokenizer, alone()), 1, STEPS)
    drawn = [number for step in steps for number in step["ids"]]
    usable = [number for number in range(ROWS) if number % 9 != 4]
    assert [sorted(drawn[start : start + 40]) for start in (0, 40, 80)] == [usable] * 3


def test_candidates_of_data_without_protected_rows_say_so(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n" + '{"prompt": "c", "completion": "d"}')
    assert sampler_of(run_config(path, 2), tokenizer, alone())(1).protected is None


@pytest.mark.parametrize("shuffle_rows", [4, 11, ROWS])
@pytest.mark.parametrize("done", [0, 1, 7, 19])
def test_a_run_goes_on_as_if_it_had_not_stopped(data, tokenizer, done, shuffle_rows):
    config = run_config(data, shuffle_rows=shuffle_rows)
    unbroken = sampler_of(config, tokenizer, alone())
    expected = run(unbroken, 1, STEPS)
    stopped = sampler_of(config, tokenizer, alone())
    assert run(stopped, 1, done) == expected[:done]
    resumed = sampler_of(config, tokenizer, alone())
    counts = resumed.dropped
    resumed.load(json.loads(json.dumps(stopped.state())))
    assert resumed.state() == stopped.state()
    assert run(resumed, done + 1, STEPS) == expected[done:]
    assert resumed.state() == unbroken.state()
    assert resumed.dropped == {"even": 3, "odd": 2}
    assert resumed.dropped is counts  # a report may hold it from the beginning


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_what_the_first_one_reads(data, tokenizer, ranks):
    config = run_config(data)
    expected = run(sampler_of(config, tokenizer, alone()), 1, STEPS)

    def work(group: Group) -> tuple[list, list, list, dict]:
        # Only the first rank has the file.
        own = config if group.is_first else run_config(Path("nowhere.jsonl"))
        stopped = sampler_of(own, tokenizer, group)
        before = run(stopped, 1, 7)
        state = group.share_json(stopped.state())
        resumed = sampler_of(own, tokenizer, group)
        resumed.load(state)
        group.take_traffic()
        after = run(resumed, 8, STEPS)
        return before + after, group.take_traffic()["stream"], stopped.state() == state

    tokens = sum(len(tokens) for step in expected[7:] for tokens, _ in step["examples"])
    for rank, (drawn, traffic, knows_state) in enumerate(on_ranks(ranks, work)):
        assert drawn == expected
        assert traffic == (STEPS - 7) * 24 * N + 4 * tokens
        assert knows_state == (rank == 0)


def test_the_survey_is_equal_on_every_rank(data):
    chat = {"messages": [{"role": "assistant", "content": "hi"}]}
    data.with_name("größe.jsonl").write_text(json.dumps(chat))
    specs = [str(data), str(data.with_name("größe.jsonl"))]
    found = survey(specs, DataConfig())
    for shared in on_ranks(2, lambda group: share_survey(found if group.is_first else None, group)):
        assert isinstance(shared, Survey)
        assert shared.source_names == found.source_names == ("even", "größe", "odd")
        assert shared.sizes.tolist() == found.sizes.tolist() == [23, 1, 22]
        assert shared.protected_sizes.tolist() == found.protected_sizes.tolist() == [5, 0, 4]
        assert shared.sizes.dtype == shared.protected_sizes.dtype == torch.int64
        assert (shared.rows, shared.digest, shared.first_chat) == (46, found.digest, f"{specs[1]} line 1")


def test_data_that_changes_ends_the_run_on_every_rank(data, tokenizer):
    def work(group: Group) -> int:
        sampler = sampler_of(run_config(data), tokenizer, group)
        if group.is_first:
            write(data.with_name("other.jsonl"), ROWS - 1)
            data.with_name("other.jsonl").replace(data)
        drawn = 0
        while drawn < 10 * ROWS:
            run(sampler, 1, 1)
            drawn += N
        return drawn

    first, *others = on_ranks(3, work)
    assert isinstance(first, TrainingError)
    assert f"it had {ROWS} rows and now has {ROWS - 1}" in str(first)
    assert [str(error) for error in others] == ["rank 0 failed"] * 2
    assert all(isinstance(error, PeerFailed) for error in others)


def test_a_state_that_cannot_be_returned_to_ends_the_run_on_every_rank(data, tokenizer):
    def work(group: Group) -> None:
        sampler = sampler_of(run_config(data), tokenizer, group)
        if group.is_first:
            data.unlink()
        sampler.load({"epoch": 0, "block": 1, "offset": 1, "dropped": {}, "cut": {}})

    first, other = on_ranks(2, work)
    assert isinstance(first, TrainingError)
    assert "data.jsonl does not exist" in str(first)
    assert isinstance(other, PeerFailed)


def test_more_candidates_than_rows_are_refused_on_every_rank(data, tokenizer):
    errors = on_ranks(2, lambda group: sampler_of(run_config(data, ROWS + 1), tokenizer, group))
    assert [type(error) for error in errors] == [UserError] * 2
    assert "--selection.candidates is 46, but there are only 45 training examples: use at most 45" in str(errors[0])


def test_more_candidates_than_usable_examples_are_refused_by_the_first_step(data, tokenizer):
    run(sampler_of(run_config(data, 40), tokenizer, alone()), 1, 3)
    with pytest.raises(UserError, match=r"is 41, but there are only 40 .*\(5 were dropped\): use at most 40"):
        sampler_of(run_config(data, 41), tokenizer, alone())(1)


def test_only_the_first_rank_opens_a_stream(data, tokenizer, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "colm_scale.run.streaming.BlockStream", lambda *options: opened.append(1) or BlockStream(*options)
    )
    on_ranks(3, lambda group: sampler_of(run_config(data), tokenizer, group))
    assert opened == [1]
