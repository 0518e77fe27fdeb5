"""Configurations and splits of hub data sets. The library loads them from a folder here."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from colm_scale.config import DataConfig
from colm_scale.data import hub
from colm_scale.data.files import files_of
from colm_scale.data.readers import each_row, read_rows
from colm_scale.errors import UserError


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub._configurations.cache_clear()


def data_set(*configs: str, default: str = "") -> None:
    """Write ``org/set`` with the given configurations, each with the splits train and test."""
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", *(["  default: true"] if config == default else []), "  data_files:"]
        for split in ("train", "test"):
            file = Path("org/set", config, f"{split}.jsonl")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f'{{"prompt": "{config}", "completion": "{split}"}}\n')
            lines.append(f"  - {{split: {split}, path: {config}/{split}.jsonl}}")
    Path("org/set/README.md").write_text("\n".join([*lines, "---"]))


def read(*specs: str) -> list[tuple[str, ...]]:
    rows = read_rows(specs, DataConfig())
    if not any("[" in spec for spec in specs):  # the library streams whole splits
        assert list(each_row(specs, DataConfig(), streaming=True)) == rows
    return [(row.source, row.prompt, row.completion) for row in rows]


def error_of(*specs: str) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(specs, DataConfig())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("specs", "rows"),
    [
        (["org/set:main"], [("org/set", "main", "train")]),
        (["org/set:main:test[:1]"], [("org/set", "main", "test")]),
        (["org/set:main", "org/set:extra"], [("org/set:main", "main", "train"), ("org/set:extra", "extra", "train")]),
        (["org/set:main", "org/set:main:test"], [("org/set:train", "main", "train"), ("org/set:test", "main", "test")]),
        (
            ["org/set:main:train", "org/set:extra:test", "org/set:extra"],
            [
                ("org/set:main", "main", "train"),
                ("org/set:test", "extra", "test"),
                ("org/set:extra:train", "extra", "train"),
            ],
        ),
    ],
)
def test_configurations_are_read_and_name_sources_where_they_tell_them_apart(specs, rows):
    data_set("main", "extra")
    assert read(*specs) == rows


def test_a_default_configuration_needs_no_name():
    data_set("main", "extra", default="main")
    assert read("org/set:test") == [("org/set", "main", "test")]
    assert read("org/set:extra") == [("org/set", "extra", "train")]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("org/set:test", "org/set has several configurations: name one, as in org/set:main:test. It has main, extra"),
        ("org/set:mian", "org/set has several configurations; did you mean org/set:main? It has main, extra"),
        (
            "org/set:mian:test",
            "org/set has no configuration 'mian'; did you mean org/set:main:test? It has main, extra",
        ),
    ],
)
def test_a_configuration_that_is_missing_or_unknown_is_said_before_anything_is_read(spec, said):
    data_set("main", "extra")
    Path("bad.jsonl").write_text("no JSON")
    assert error_of("bad.jsonl", spec) == said


def test_a_name_that_is_a_configuration_and_a_split_is_refused():
    data_set("main", "test", default="main")
    assert error_of("org/set:test").endswith("'test': write org/set:test:train or org/set:main:test")
    assert read("org/set:test:train") == [("org/set", "test", "train")]


def test_an_unknown_split_is_named_with_those_there_are():
    data_set("main")
    message = error_of("org/set:main:dev")
    assert "a split 'dev' and a configuration 'main'" in message
    assert "['train', 'test']" in message


def test_configurations_in_the_cache_are_found_without_a_hub():
    data_set("main", "extra")
    for config in ("main", "extra"):
        datasets.load_dataset("org/set", config)
    shutil.rmtree("org")
    Path("cache/set").rename("cache/org___set")
    hub._configurations.cache_clear()
    sources = [row.source for row in read_rows(["org/set:main:test", "org/set:extra"], DataConfig())]
    assert sources == ["org/set:main", "org/set:extra"]
    assert error_of("org/set:mian:test").endswith("did you mean org/set:main:test? It has extra, main")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    for offline in (datasets.config, constants):
        monkeypatch.setattr(offline, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    hub.hub_answers.cache_clear()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits to try again"))
    message = error_of("org/none:main:test")
    assert message.startswith("org/none is not a file or folder here, and cannot be loaded from the hub")
    assert message.endswith("the hub does not answer, and its cache on this machine has none of this name")
    assert not datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    "spec", ["./data/set", "./set", "../set", "/data/set", "a/b/c", "data/set.ndjson", "org/set::"]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(spec, monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda: pytest.fail("it asks the hub"))
    with pytest.raises(UserError, match="is neither a file"):
        files_of(spec)
