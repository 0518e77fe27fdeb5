"""Everything that --selection.shares can be, as text, from a command line or YAML, or in a file; and what it cannot."""

from __future__ import annotations

import pytest

from colm_scale.config import SelectionConfig, as_yaml
from colm_scale.config.command_line import parse
from colm_scale.config.shares import is_file, parse_shares, read_shares
from colm_scale.errors import UserError

RATIOS = {"math": 3.0, "code": 1.0}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("equal", "equal"),
        ("proportional", "proportional"),
        ("0.5", 0.5),
        (" 1e-3 ", 0.001),
        (1, 1.0),
        ("mine.yaml", "mine.yaml"),
        ("here/MINE.JSON", "here/MINE.JSON"),
        ("{math: 3, code: 1}", RATIOS),
        ('{"math": 3, "code": 1.0}', RATIOS),
        ({"math": 3, "code": 1}, RATIOS),
        ("{math: 3, code: 0}", {"math": 3.0, "code": 0.0}),
        ("{on: 1, 7: 2, CoT/shop: .5}", {"on": 1.0, "7": 2.0, "CoT/shop": 0.5}),
    ],
)
def test_a_name_a_number_ratios_or_a_path(value, expected):
    found = parse_shares(value)
    assert found == expected
    assert type(found) is type(expected)
    assert parse_shares(found) == found
    assert is_file(found) == str(value).lower().endswith((".yaml", ".json"))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("eqal", "is 'eqal', but must be proportional, equal, a number that is 0 or more, ratios like"),
        ("", "is '', but must be"),
        ("-1", "is -1.0, but must be"),
        ("nan", "is nan, but must be"),
        ("inf", "is inf, but must be"),
        (True, "is True, but must be"),
        (None, "is None, but must be"),
        ({}, "gives no source a share"),
        ("{}", "gives no source a share"),
        ("{a: 0, b: 0.0}", "gives no source a share: at least one must be above 0"),
        ("{a: x}", "gives 'a' 'x', but must give a number that is 0 or more"),
        ("{a: -2}", "gives 'a' '-2', but must give"),
        ({"a": float("nan")}, "gives 'a' nan, but must give"),
        ({"a": True}, "gives 'a' True, but must give"),
        ({"a": 10**400}, "gives 'a' 1000"),
        ("{a: }", "gives 'a' '', but must give"),
        ("{a: {b: 1}}", "gives 'a' '(map)', but must give"),
        ("{a: 1, a: 2}", "names 'a' twice"),
        ({1: 2.0}, "names 1, but a source's name must be text"),
        ("{a", "line 1: not YAML"),
    ],
)
def test_what_is_none_of_them_is_one_clear_error(value, said):
    with pytest.raises(UserError) as refused:
        parse_shares(value)
    assert str(refused.value).startswith("--selection.shares ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("s.yaml", "# mine\nmath: 3\ncode: 1\n"),
        ("s.yml", "{math: 3, code: 1}"),
        ("s.json", '{\n\t"math": 3,\n\t"code": 1\n}'),
    ],
)
def test_a_file_of_ratios_is_read_when_options_are_resolved(tmp_path, name, content):
    (tmp_path / name).write_text(content, "utf-8")
    config = SelectionConfig(shares=str(tmp_path / name))
    assert config.shares == str(tmp_path / name)
    assert config.resolved().shares == read_shares(str(tmp_path / name)) == RATIOS
    assert SelectionConfig(shares=str(tmp_path / name), preset="paper").resolved().shares == "proportional"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("s.yaml", "math: 3\n code: ]", "s.yaml line 2: not YAML"),
        ("s.json", '{"math": 3,\n "code" 1}', "s.json line 2: not JSON"),
        ("s.yaml", "- math\n", "s.yaml must contain only a number for each source"),
        ("s.yaml", "", "s.yaml must contain only a number for each source"),
        ("s.json", "[1]", "s.json must contain only an object with a number for each source"),
        ("s.json", '{"a": 1, "a": 2}', "s.json names 'a' twice"),
        ("s.yaml", "a: 1\nb: -1\n", "s.yaml gives 'b' '-1', but must give a number that is 0 or more"),
        ("s.json", '{"a": NaN}', "s.json gives 'a' nan, but must give"),
        ("s.yaml", "a: 0\n", "s.yaml gives no source a share"),
        ("s.json", "{}", "s.json gives no source a share"),
        ("s.yaml", b"\xff\xfe\xfa", "s.yaml is not a UTF-8 text file"),
        ("s.yaml", None, "s.yaml: No such file or directory"),
    ],
)
def test_a_file_that_holds_none_is_one_clear_error(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        SelectionConfig(shares=str(path)).resolved()
    assert str(refused.value).startswith("--selection.shares ")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_ratio_of_nothing_contradicts_a_floor_from_a_file_too(tmp_path):
    (tmp_path / "s.yaml").write_text("a: 1\nb: 0\n", "utf-8")
    with pytest.raises(UserError, match=r"--selection.coverage_floor 0.1 .* --selection.shares gives b no quota"):
        SelectionConfig(shares=str(tmp_path / "s.yaml"), coverage_floor=0.1).resolved()


@pytest.mark.parametrize(
    ("words", "shares", "kept"),
    [
        (["--selection.shares", "{math: 3, code: 1}"], RATIOS, None),
        (["--selection.shares=equal"], "equal", None),
        (["--selection.shares", "0.5"], 0.5, None),
        (["--selection.shares", "s.yaml"], "s.yaml", None),
        (["--selection.kept_sources", "0.3"], "proportional", 0.3),
        (["--selection.kept_sources", "1"], "proportional", 1.0),
        (["--selection.kept_sources", "a", "b"], "proportional", ["a", "b"]),
        (["--selection.kept_sources", "a"], "proportional", ["a"]),
        (["--selection.kept_sources", "0.3", "b"], "proportional", ["0.3", "b"]),
        (["--selection.kept_sources", '["0.3"]'], "proportional", ["0.3"]),
        (["--selection.kept_sources", "[]"], "proportional", []),
    ],
)
def test_command_line_and_yaml_say_the_same(tmp_path, words, shares, kept):
    config = parse(words)
    assert (config.selection.shares, config.selection.kept_sources) == (shares, kept)
    (tmp_path / "c.yaml").write_text(as_yaml(config), "utf-8")
    assert parse(["--config", str(tmp_path / "c.yaml")]) == config


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_the_sources_is_one(share):
    with pytest.raises(UserError, match=rf"--selection.kept_sources is {share}, but must be in \[0, 1\], or names"):
        SelectionConfig(kept_sources=share)
