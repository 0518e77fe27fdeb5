"""Finding, merging and exporting adapters of a run that is made by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.families import fill
from transformers import AutoModelForCausalLM, AutoTokenizer

from colm_scale.adapter import merge
from colm_scale.adapter.find import find
from colm_scale.adapter.merge import export
from colm_scale.adapter.score import harness_line
from colm_scale.base import BASE_MODEL
from colm_scale.checkpoint.store import CheckpointFolder
from colm_scale.config import DataConfig, EvalConfig, LoraConfig, ModelConfig, RunConfig, as_yaml
from colm_scale.config.commands import MergeConfig
from colm_scale.errors import UserError
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import load_model

CPU = torch.device("cpu")
SOURCES = [{"name": "b", "examples": 30, "kept": False}, {"name": "a", "examples": 2, "kept": True}]


def adapted(purpose: str) -> PeftModel:
    model = add_adapters(load_model(ModelConfig(), torch.float32, CPU), LoraConfig(rank=4), 0).eval()
    fill((weight for weight in model.parameters() if weight.requires_grad), purpose)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.1)  # adds to a layer about as much as training does
    return model


def logits(model, tokens) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with the best adapter, and a checkpoint with another one."""
    path = tmp_path_factory.mktemp("trained") / "run"
    adapted("best").save_pretrained(path / "adapter")
    last = {f"model.{name}": weight for name, weight in adapted("last").named_parameters() if weight.requires_grad}
    CheckpointFolder(path / "checkpoints", 2).write(7, {"step": 7}, {"adapter": last})
    config = RunConfig(lora=LoraConfig(rank=4), eval=EvalConfig(every=0), output_dir=str(path))
    (path / "config.yaml").write_text(as_yaml(config), "utf-8")
    return path


TOKENS = torch.arange(3, 43).view(2, 20)


def checkpoint(run: Path) -> Path:
    return run / "checkpoints/step-00000007"


@pytest.mark.parametrize(("what", "purpose"), [("run", "best"), ("adapter", "best"), ("checkpoint", "last")])
def test_a_merged_model_is_the_adapted_one_without_peft(run, tmp_path, what, purpose):
    named = {"run": run, "adapter": run / "adapter", "checkpoint": checkpoint(run)}[what]
    merged = export(MergeConfig(run=str(named), output=str(tmp_path / "out/merged")))
    model, info = AutoModelForCausalLM.from_pretrained(merged.place, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any("lora" in name for name, _ in model.named_parameters())
    expected = logits(adapted(purpose), TOKENS)
    # float32: W x + B A x against (W + B A) x.
    assert torch.allclose(logits(model, TOKENS), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(expected, logits(load_model(ModelConfig(), torch.float32, CPU), TOKENS), atol=0.1)
    assert merged.difference <= 1e-4 * merged.largest
    assert merged.same_tokens == 1.0
    vocabularies = [AutoTokenizer.from_pretrained(place).get_vocab() for place in (merged.place, BASE_MODEL)]
    assert vocabularies[0] == vocabularies[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]  # nothing is left beside it


def test_weights_in_half_precision_in_several_files(run, tmp_path):
    options = MergeConfig(run=str(run), output=str(tmp_path / "m"), dtype="bfloat16", shard_size="1MB")
    merged = export(options)
    assert len(list(merged.place.glob("*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(merged.place).dtype == torch.bfloat16
    assert 0 < merged.difference < 0.1 * merged.largest


@pytest.mark.parametrize(("what", "purpose"), [("run", "best"), ("checkpoint", "last")])
def test_the_adapter_alone_is_peft_s(run, tmp_path, what, purpose):
    named = run if what == "run" else checkpoint(run)
    place = export(MergeConfig(run=str(named), output=str(tmp_path / "alone"), adapter_only=True)).place
    assert json.loads((place / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == str(BASE_MODEL)
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)  # it is stored in float16
    model = PeftModel.from_pretrained(base, place)
    assert torch.equal(logits(model, TOKENS), logits(adapted(purpose), TOKENS))


def test_a_base_that_was_quantised_is_merged_whole_and_said_so(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    (path / "config.yaml").write_text(as_yaml(RunConfig(model=ModelConfig(quantize="nf4"))), "utf-8")
    merged = export(MergeConfig(run=str(path), output=str(tmp_path / "m")))
    assert "nf4" in merged.notes[0]
    assert AutoModelForCausalLM.from_pretrained(merged.place).dtype == torch.float32


def test_a_merge_that_went_wrong_is_refused_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)  # the bare base
    with pytest.raises(UserError, match="the merged model is not the adapted one"):
        export(MergeConfig(run=str(run), output=str(tmp_path / "m")))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=r"--output .*m exists already"):
        export(MergeConfig(run=str(run), output=str(tmp_path / "m")))


def test_the_last_adapter_of_a_run_that_kept_its_best(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    assert find(str(path), "last", None, trust_remote_code=False).folder == path / "adapter"  # it was not evaluated
    evaluated = RunConfig(lora=LoraConfig(rank=4), output_dir=str(path))
    without = dataclasses.replace(evaluated, data=DataConfig(train=["a.jsonl"]))
    (path / "config.yaml").write_text(as_yaml(without), "utf-8")
    assert find(str(path), "last", None, trust_remote_code=False).folder == path / "adapter"  # it could not be
    (path / "config.yaml").write_text(as_yaml(evaluated), "utf-8")
    assert find(str(path), "last", None, trust_remote_code=False).weights  # the newest checkpoint
    shutil.copytree(path / "adapter", path / "adapter_last")
    assert find(str(path), "last", None, trust_remote_code=False).folder == path / "adapter_last"
    assert find(str(path), "best", None, trust_remote_code=False).folder == path / "adapter"


def test_sources_are_what_the_run_has_written_down(run):
    assert find(str(run), "best", None, trust_remote_code=False).sources == {}  # by a version that did not
    (run / "run.json").write_text(json.dumps({"sources": SOURCES}), "utf-8")
    assert find(str(run), "best", None, trust_remote_code=False).sources == {"b": 30, "a": 2}
    assert list(find(str(run), "best", None, trust_remote_code=False).sources) == ["b", "a"]  # in the run's order


def test_a_run_s_word_is_not_enough_to_run_a_model_s_code(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run")
    (path / "config.yaml").write_text(as_yaml(RunConfig(model=ModelConfig(trust_remote_code=True))), "utf-8")
    assert not find(str(path), "best", None, trust_remote_code=False).config.model.trust_remote_code


def broken(run: Path, tmp_path: Path, what: str) -> str:
    path = shutil.copytree(run, tmp_path / "run")
    match what:
        case "none":
            return str(tmp_path / "nowhere")
        case "empty":
            (tmp_path / "empty").mkdir()
            return str(tmp_path / "empty")
        case "unfinished":
            shutil.rmtree(path / "adapter")
        case "pickled":
            (path / "adapter/adapter_model.safetensors").rename(path / "adapter/adapter_model.bin")
        case "old option":
            (path / "config.yaml").write_text("train:\n  stepz: 3\n", "utf-8")
        case "other shapes":
            tensors = CheckpointFolder.read(path).tensors["adapter"]
            smaller = {name: weight[:1] for name, weight in tensors.items()}
            CheckpointFolder(path / "checkpoints", 1).write(7, {"step": 7}, {"adapter": smaller})
            return str(path / "checkpoints/step-00000007")
    return str(path)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("none", "there is no such folder"),
        ("empty", "is not a run directory"),
        ("unfinished", "step-00000007 instead"),
        ("pickled", "has no adapter_model.safetensors"),
        ("old option", "config.yaml line 2: unknown option train.stepz"),
        ("other shapes", "does not fit this model"),
    ],
)
def test_what_is_no_adapter_is_said_in_a_line(run, tmp_path, what, words):
    with pytest.raises(UserError) as error:
        export(MergeConfig(run=broken(run, tmp_path, what), output=str(tmp_path / "m")))
    assert words in str(error.value)
    assert "--lora.adapter" not in str(error.value)
    assert not (tmp_path / "m").exists()


def test_wrong_options_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="shard_size is 'big'"):
        MergeConfig(run="x", shard_size="big")
    with pytest.raises(UserError, match="--device warp: there is no such device"):
        export(MergeConfig(run=str(run), output=str(tmp_path / "m"), device="warp"))
    with pytest.raises(UserError, match="--model nowhere/at-all"):
        export(MergeConfig(run=str(run), output=str(tmp_path / "m"), model="nowhere/at-all"))


def test_the_line_for_lm_evaluation_harness(run):
    trained = find(str(run), "best", "org/base", trust_remote_code=True)
    line = harness_line(trained, trained.config, "gsm8k")
    assert line == (
        f"lm_eval run --model hf --model_args pretrained=org/base,peft={run.absolute()}/adapter,dtype=float32 "
        f"--tasks gsm8k --batch_size auto --trust_remote_code"
    )
    of_checkpoint = find(str(checkpoint(run)), "best", None, trust_remote_code=False)
    assert "colm-scale merge" in harness_line(of_checkpoint, of_checkpoint.config, "gsm8k")


def test_the_tolerance_is_known_for_every_type_that_can_be_asked_for():
    assert set(merge._TOLERANCE) == {torch.float32, torch.bfloat16, torch.float16}
