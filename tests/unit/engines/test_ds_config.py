from __future__ import annotations

import json
from pathlib import Path

import pytest

from colm_scale.config import RunConfig, SelectionConfig, TrainConfig
from colm_scale.engines.ds_config import read_ds_config
from colm_scale.errors import UserError

SHIPPED = sorted((Path(__file__).parents[3] / "ds_configs").glob("*.json"))
RANKS = 4
# What DeepSpeed is told: its arithmetic sees one micro-batch of one per rank, the engine does the rest.
DECIDED = {
    "train_batch_size": RANKS,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.5,
    "zero_allow_untested_optimizer": True,
}


def read(path: Path, world_size: int = RANKS) -> dict:
    train = TrainConfig(max_grad_norm=0.5, dtype="bfloat16", schedule="linear")
    return read_ds_config(RunConfig(ds_config=str(path), train=train, selection=SelectionConfig(budget=8)), world_size)


@pytest.fixture
def written(tmp_path):
    """A function that writes a configuration and reads it back as a run does."""

    def write(content: object) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read(path)

    return write


def test_there_are_shipped_files():
    names = ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload")
    assert [path.stem for path in SHIPPED] == list(names)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_accepted_and_kept(path):
    given = json.loads(path.read_text("utf-8"))
    offloads = "offload_optimizer" in given["zero_optimization"]
    assert read(path) == given | DECIDED | ({"zero_force_ds_cpu_optimizer": False} if offloads else {})


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_goes_by_its_name(path):
    assert read(Path(path.stem)) == read(path)


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero2").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert read(Path("zero2"))["zero_optimization"] == {"stage": 1}


def test_a_name_that_none_has():
    with pytest.raises(UserError, match=r"--ds_config zero4 is neither a file nor one of zero1, zero2, zero2_offload"):
        read(Path("zero4"))


def test_the_decisions_are_written_in_and_the_topology_is_left_alone(written):
    given = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}, "comms_logger": {}}
    assert written(given) == given | DECIDED | {"zero_force_ds_cpu_optimizer": False}


def test_the_batch_is_as_large_as_there_are_ranks(tmp_path):
    (tmp_path / "ds.json").write_text("{}", encoding="utf-8")
    assert [read(tmp_path / "ds.json", ranks)["train_batch_size"] for ranks in (1, 2, 8)] == [1, 2, 8]


def test_auto_and_equal_values_are_accepted(written):
    assert written(dict.fromkeys(DECIDED, "auto")) == DECIDED
    assert written({"train_batch_size": 8, "gradient_clipping": 0.5}) == DECIDED  # 8 is the run's budget


def test_what_is_switched_off_or_auto_is_left_out(written):
    keys = ["optimizer", "scheduler", "amp", "fp16", "bf16", "bfloat16", "torch_autocast", "data_types"]
    assert written(dict.fromkeys(keys, "auto")) == DECIDED
    assert written({key: {"enabled": False} for key in keys}) == DECIDED


@pytest.mark.parametrize(
    ("key", "theirs", "ours", "option"),
    [
        ("train_batch_size", 256, "8", "--selection.budget"),
        ("train_micro_batch_size_per_gpu", 8, "decided per step", "--train.micro_batch_tokens"),
        ("gradient_accumulation_steps", 16, "decided per step", "--train.micro_batch_tokens"),
        ("gradient_clipping", 1.0, "0.5", "--train.max_grad_norm"),
        ("optimizer", {"type": "Lamb"}, "adamw", "--train.optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "linear", "--train.schedule"),
        ("amp", {"enabled": True}, "bfloat16", "--train.dtype"),
        ("fp16", {"enabled": True}, "bfloat16", "--train.dtype"),
        ("bf16", {"enabled": "auto"}, "bfloat16", "--train.dtype"),
        ("bfloat16", {"enabled": True}, "bfloat16", "--train.dtype"),
        ("torch_autocast", {"enabled": True}, "bfloat16", "--train.dtype"),
        ("data_types", {"grad_accum_dtype": "fp16"}, "bfloat16", "--train.dtype"),
    ],
)
def test_a_contradiction_names_file_key_both_values_and_the_option(written, tmp_path, key, theirs, ours, option):
    with pytest.raises(UserError) as caught:
        written({key: theirs})
    message = str(caught.value)
    shown = json.dumps(theirs) if isinstance(theirs, dict) else repr(theirs)
    for part in (str(tmp_path / "ds.json"), key, shown, ours, option, "remove the key"):
        assert part in message


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages_that_are_supported(written, stage):
    assert written({"zero_optimization": {"stage": stage}})["zero_optimization"] == {"stage": stage}


@pytest.mark.parametrize("stage", [4, -1, 2.5, "2", None, [], {}, True])
def test_a_stage_out_of_range_is_named(written, stage):
    with pytest.raises(UserError, match=r"zero_optimization\.stage is .*must be one of \(0, 1, 2, 3\)") as caught:
        written({"zero_optimization": {"stage": stage}})
    assert f"stage is {stage!r}," in str(caught.value)


@pytest.mark.parametrize("section", [2, "stage 2", [1], None])
def test_a_section_that_is_no_object_is_refused(written, section):
    with pytest.raises(UserError, match="zero_optimization"):
        written({"zero_optimization": section})


def test_auto_within_the_section_is_left_to_deepspeed(written):
    section = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
    assert written({"zero_optimization": section})["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    ("key", "hint"),
    [("zero_optimisation", "did you mean zero_optimization"), ("moe", "use one of zero_optim")],
)
def test_a_key_that_deepspeed_would_ignore_is_refused(written, key, hint):
    with pytest.raises(UserError, match=f"{key} would have no effect here: {hint}"):
        written({key: {"stage": 2}})


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"stage": 2, "overlap_com": True}, r"zero_optimization\.overlap_com is True: Extra inputs"),
        ({"stage": 2, "reduce_bucket_size": -1}, r"zero_optimization\.reduce_bucket_size is -1"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, r"offload_param\.device is 'nvme', but must be 'cpu'"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, r"zero_hpz_partition_size is not supported: checkpoints"),
        ({"stage": 2, "compute_grad_norm": False}, "compute_grad_norm is not supported"),
    ],
)
def test_a_wrong_key_of_the_section_is_named(written, section, named):
    with pytest.raises(UserError, match=named):
        written({"zero_optimization": section})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--ds_config .*nowhere\.json: No such file"):
        read(tmp_path / "nowhere.json")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)


def test_no_json_is_named_with_its_line(written):
    with pytest.raises(UserError, match=r"ds\.json line 3: not JSON"):
        written('{\n  "zero_optimization": {\n    "stage": two\n  }\n}')


def test_no_text_is_named(tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read(tmp_path / "ds.json")


@pytest.mark.parametrize(("content", "kind"), [([], "list"), (3, "int"), ("null", "NoneType")])
def test_json_that_is_no_object_is_refused(written, content, kind):
    with pytest.raises(UserError, match=f"holds a {kind}, but must be a JSON object"):
        written(content)
