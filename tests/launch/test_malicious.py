"""Input that tries to run code. Each case would leave a file behind; none does, and one line says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import SMALL, Outcome, write_rows

from colm_scale.base import BASE_MODEL
from colm_scale.config import DataConfig, LoraConfig, ModelConfig
from colm_scale.data.examples import tokenise
from colm_scale.data.readers import read_rows
from colm_scale.modeling.adapters import add_adapters
from colm_scale.modeling.load import check_model, load_model, load_tokenizer

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class Pickled:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self._command = command

    def __reduce__(self):
        return os.system, (self._command,)


def base(here: Path, *, weights: bool = True, **code: dict) -> str:
    """A copy of the base model, with more in some of its JSON files."""
    left_out = shutil.ignore_patterns(*([] if weights else ["*.safetensors"]))
    shutil.copytree(BASE_MODEL, here / "model", ignore=left_out)
    for name, more in code.items():
        file = here / "model" / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | more), "utf-8")
    return str(here / "model")


def own_code(here: Path, touch: str) -> None:
    (here / "model/mine.py").write_text(f"import os\nos.system({touch!r})\nclass Mine: pass\n", "utf-8")


def adapter(here: Path, touch: str, weights: str) -> list[str]:
    """An adapter whose configuration is right and whose weights are a pickle."""
    model = load_model(ModelConfig(), torch.float32, torch.device("cpu"))
    add_adapters(model, LoraConfig(rank=2), seed=0).save_pretrained(here / "adapter")
    (here / "adapter/adapter_model.safetensors").unlink()
    torch.save({"weight": Pickled(touch)}, here / "adapter" / weights)
    return ["--lora.adapter", str(here / "adapter")]


def yaml_file(here: Path, touch: str) -> list[str]:
    (here / "c.yaml").write_text(f'train:\n  steps: !!python/object/apply:os.system ["{touch}"]\n', "utf-8")
    return ["--config", str(here / "c.yaml")]


def yaml_option(here: Path, touch: str) -> list[str]:
    return ["--train.steps", f'!!python/object/apply:os.system ["{touch}"]']


def template(text: str) -> Callable[[Path, str], list[str]]:
    def make(here: Path, touch: str) -> list[str]:
        (here / "t.jinja").write_text(text.replace("TOUCH", touch), "utf-8")
        write_rows(here / "a.jsonl", [{"messages": CHAT}] * 16)
        return ["--data.train", str(here / "a.jsonl"), "--data.chat_template", str(here / "t.jinja")]

    return make


def pickled_weights(here: Path, touch: str) -> list[str]:
    model = base(here, weights=False)
    torch.save({"weight": Pickled(touch)}, here / "model/pytorch_model.bin")
    return ["--model.name", model]


def model_with_a_pickled_adapter(here: Path, touch: str) -> list[str]:
    adapter(here, touch, "adapter_model.bin")
    shutil.copytree(BASE_MODEL, here / "adapter", dirs_exist_ok=True)
    return ["--model.name", str(here / "adapter")]


def model_code(here: Path, touch: str) -> list[str]:
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    model = base(here, config={"model_type": "mine", "auto_map": auto_map})
    own_code(here, touch)
    return ["--model.name", model]


def tokenizer_code(here: Path, touch: str) -> list[str]:
    more = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    model = base(here, tokenizer_config=more)
    own_code(here, touch)
    return ["--model.name", model]


def loading_script(name: str) -> Callable[[Path, str], list[str]]:
    def make(here: Path, touch: str) -> list[str]:
        (here / "set").mkdir()
        (here / "set/set.py").write_text(f"import os\nos.system({touch!r})\n", "utf-8")
        return ["--data.train", str(here / name)]

    return make


CASES: dict[str, tuple[Callable[[Path, str], list[str]], tuple[str, ...]]] = {
    "a YAML file": (yaml_file, ("c.yaml line 2: not YAML", "python/object/apply:os.system")),
    "a YAML value": (yaml_option, ("--train.steps", "a whole number")),
    "a template that looks around": (
        template("{{ ''.__class__.__mro__ }}"),
        ("a.jsonl line 1: the chat template refuses", "unsafe"),
    ),
    "a template that runs a command": (
        template("{{ cycler.__init__.__globals__.os.system('TOUCH') }}"),
        ("a.jsonl line 1: the chat template refuses", "unsafe"),
    ),
    "a template that never ends": (
        template("{% for i in range(1000000000000) %}{% endfor %}"),
        ("a.jsonl line 1: the chat template refuses", "Range too big"),
    ),
    "a pickled adapter": (
        lambda here, touch: adapter(here, touch, "adapter_model.bin"),
        ("--lora.adapter", "has no adapter_model.safetensors"),
    ),
    "a pickle called safetensors": (
        lambda here, touch: adapter(here, touch, "adapter_model.safetensors"),
        ("--lora.adapter", "its weights cannot be read"),
    ),
    "pickled weights": (pickled_weights, ("--model.name", "no file named model.safetensors")),
    "a model with a pickled adapter": (model_with_a_pickled_adapter, ("--model.name", "adapter_model.safetensors")),
    "a model's code": (model_code, ("brings its own code", "--model.trust_remote_code true")),
    "a tokenizer's code": (tokenizer_code, ("brings its own code", "--model.trust_remote_code true")),
    "a loading script": (loading_script("set"), ("set is a folder without any file of a known format",)),
    "a loading script by name": (loading_script("set/set.py"), ("set.py has no suffix of a known format",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("malicious")


def case_folder(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_").replace("'", "")


@pytest.fixture(scope="module")
def outcomes(forked, folder) -> dict[str, Outcome]:
    jobs = {}
    for name, (make, _) in CASES.items():
        (here := case_folder(folder, name)).mkdir()
        options = make(here, f"touch {here / 'marker'}")
        jobs[here.name] = [*SMALL, "--output_dir", str(here / "run"), *options]
    return forked.run_many(jobs, folder / "output")


@pytest.mark.parametrize("name", CASES)
def test_no_code_of_the_input_is_run_and_one_line_says_what_is_wrong(name, outcomes, folder):
    here = case_folder(folder, name)
    outcome = outcomes[here.name]
    assert not (here / "marker").exists()
    assert len(outcome.errors) == 1, outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    for word in CASES[name][1]:
        assert word in outcome.errors[0], outcome.errors[0]
    assert outcome.code == 2
    assert not (here / "run").exists()


def test_the_pickle_would_run(tmp_path):
    """Or the tests above would find nothing."""
    torch.save(Pickled(f"touch {tmp_path / 'marker'}"), tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


def test_a_model_of_a_known_kind_is_read_without_the_code_it_brings(tmp_path):
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}
    config = ModelConfig(name=base(tmp_path, config={"auto_map": auto_map}))
    own_code(tmp_path, f"touch {tmp_path / 'marker'}")
    assert type(check_model(config)).__module__.startswith("transformers.")
    assert type(load_model(config, torch.float32, torch.device("cpu"))).__module__.startswith("transformers.")
    assert not (tmp_path / "marker").exists()


def test_what_looks_like_a_template_in_the_data_is_text(tmp_path):
    payload = "{{ ''.__class__.__mro__ }}{% set x = 1 %}"
    chat = [{"role": "user", "content": payload}, {"role": "assistant", "content": payload}]
    rows = [{"messages": chat}, {"prompt": payload, "completion": payload}, {"instruction": payload, "output": payload}]
    write_rows(tmp_path / "a.jsonl", rows)
    tokenizer = load_tokenizer(ModelConfig())
    examples = tokenise(read_rows([str(tmp_path / "a.jsonl")], DataConfig()), tokenizer, DataConfig(), 1000)
    assert [tokenizer.decode(examples.example(i)[0]).count(payload) for i in range(3)] == [2, 2, 2]
