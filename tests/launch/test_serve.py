"""The lines of docs/serve.md, as far as the packages for them are here: those of peft, transformers and our commands
are run. For vLLM, the saved folder is compared with what its loader takes (``vllm/lora/peft_helper.py``, in 2026)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import ROOT, SMALL
from transformers import AutoModelForCausalLM, AutoTokenizer

from colm_scale.adapter.find import find
from colm_scale.adapter.score import harness_line
from colm_scale.base import BASE_MODEL
from colm_scale.config import LoraConfig

PAGE = (ROOT / "docs/serve.md").read_text("utf-8")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM takes as ``--max-lora-rank``; 16 by default."""
PROMPT = "What is 7 + 5?"


def block(section: str, number: int = 0) -> str:
    """An indented block of a section of the page, without its indent and line breaks in commands."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    lines = blocks[number].strip("\n").splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines).replace("\\\n", "")


@pytest.fixture(scope="module", params=["plain", "rslora"])
def trained(forked, tmp_path_factory, request) -> Path:
    """A run of 2 steps, fast enough to be seen in what is generated."""
    folder = tmp_path_factory.mktemp("serve")
    options = ["--lora.use_rslora", str(request.param == "rslora").lower(), "--train.learning_rate", "0.05"]
    forked.run("train", [*SMALL, *options, "--output_dir", str(folder / "run")], folder / "log").succeeded()
    return folder / "run"


def generated(code: str, trained: Path, capsys) -> tuple[torch.Tensor, str]:
    """The tokens and the text of the page's lines for this run."""
    found: dict = {}
    exec(code.replace("runs/mine", str(trained)), found)
    return found["answer"][0], capsys.readouterr().out.strip()


def test_peft_and_the_merged_model_generate_the_same(trained, forked, tmp_path, capsys):
    tokens, text = generated(block("peft and transformers"), trained, capsys)
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    words = shlex.split(block("Merged into its base model"))
    assert words[:2] == ["colm-scale", "merge"]
    options = [word.replace("runs/mine", str(trained)).replace("my-model", str(tmp_path / "m")) for word in words[2:]]
    forked.run("merge", [*options, "--dtype", "float32"], tmp_path / "log").succeeded()
    found: dict = {}
    exec(block("Merged into its base model", 1).replace("my-model", str(tmp_path / "m")), found)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "m")(PROMPT, return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype="auto")
    merged, plain = (m.eval().generate(**prompt, max_new_tokens=16, do_sample=False)[0] for m in (found["model"], base))
    assert torch.equal(merged, tokens)
    assert not torch.equal(plain, tokens)


def test_the_folder_is_what_vllm_takes(trained):
    facts = json.loads((trained / "adapter/adapter_config.json").read_text("utf-8"))
    assert facts["peft_type"] == "LORA"
    assert facts["bias"] == "none"
    for key in ("modules_to_save", "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"):
        assert not facts.get(key), key
    assert not facts.get("use_bdlora")
    assert not facts.get("use_qalora")
    assert facts["init_lora_weights"] is True
    assert facts["r"] <= int(re.findall(r"--max-lora-rank (\d+)", block("vLLM"))[0])
    assert isinstance(facts["target_modules"], list)
    weights = load_file(trained / "adapter/adapter_model.safetensors")
    assert all(re.fullmatch(r"base_model\.model\.[\w.]+\.lora_[AB]\.weight", name) for name in weights)


def test_the_lines_for_vllm_are_about_an_adapter_of_the_default_rank():
    words = shlex.split(block("vLLM"))
    assert words[:2] == ["vllm", "serve"]
    assert int(words[words.index("--max-lora-rank") + 1]) == LoraConfig().rank
    assert LoraConfig().rank in RANKS
    listed = ", ".join(map(str, RANKS[:-1])) + f" and {RANKS[-1]}"
    assert f"one of {listed} (default 16)" in PAGE
    request = shlex.split(block("vLLM", 1))
    assert json.loads(request[-1])["model"] == words[words.index("--lora-modules") + 1].partition("=")[0]


def test_the_line_for_lm_evaluation_harness_is_the_one_that_eval_prints(trained):
    found = find(str(trained), "best", "microsoft/phi-2", trust_remote_code=False)
    printed = harness_line(found, found.config, "gsm8k").replace("dtype=float32", "dtype=bfloat16")
    line = shlex.join(shlex.split(block("lm-evaluation-harness")))
    assert line.replace("runs/mine", str(trained.absolute())) == printed
