"""Runs on chats, as users start them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.commands import SMALL, rows, write_rows
from transformers import AutoTokenizer

from colm_scale.base import BASE_MODEL

DATED = (
    "{{ strftime_now('%Y-%m-%d %H:%M') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {i} plus 1"},
            {"role": "assistant", "content": str(i + 1), **({"reasoning_content": "count on"} if i % 4 == 0 else {})},
        ],
        "source": "ab"[i % 2],
        "note": "n",
    }
    for i in range(32)
]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_resumes_on_another_day(forked, tmp_path, streaming):
    (tmp_path / "dated.jinja").write_text(DATED)
    data = str(write_rows(tmp_path / "data.jsonl", CHATS))
    run = tmp_path / "run"
    options = (
        *(*SMALL, "--data.train", data, "--data.eval", data, "--data.chat_template", str(tmp_path / "dated.jinja")),
        *("--data.left_out", "count", "--data.streaming", streaming, "--checkpoint.every", "1"),
        *("--profile.floor_every", "0", "--output_dir", str(run)),
    )
    outcome = forked.run("train", [*options, "--data.now", "2020-02-29T10:30"], tmp_path / "log").succeeded()
    assert "data.jsonl: columns not read: 'note' (32 rows)" in outcome.stdout
    assert "held-out examples of which the chat template leaves something out: 8 (a 8)" in outcome.stdout
    if streaming == "false":
        assert "training examples of which the chat template leaves something out: 8 (a 8)" in outcome.stdout
    before = [row["loss"] for row in rows(run / "metrics.jsonl")]
    shutil.rmtree(run / "checkpoints/step-00000002")
    forked.run("train", [*options, "--resume", "auto"], tmp_path / "log more").succeeded()
    assert [row["loss"] for row in rows(run / "metrics.jsonl")] == before
    assert AutoTokenizer.from_pretrained(run / "adapter").chat_template == DATED
    assert json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(BASE_MODEL)
    assert str(yaml.safe_load(Path(run / "config.yaml").read_text())["data"]["now"]).startswith("2020-02-29")


def test_a_chat_that_is_not_learned_whole_is_refused_before_the_model_is_loaded(forked, tmp_path):
    data = str(write_rows(tmp_path / "data.jsonl", CHATS))
    options = (*SMALL, "--data.train", data, "--output_dir", str(tmp_path / "run"))
    outcome = forked.run("train", options, tmp_path / "log")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "data.jsonl line 1: the chat template leaves out messages[1].reasoning_content" in outcome.errors[0]
