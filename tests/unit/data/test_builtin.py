from __future__ import annotations

import operator
import re
from collections import Counter

import pytest

from colm_scale.data.answers import final_answer, is_correct, program_value
from colm_scale.data.builtin import builtin_rows
from colm_scale.errors import UserError

EVAL_ROWS = 24
SIZES = {
    "CoT/shop": 2040, "PoT/farm": 1140, "CoT/trip": 660, "EQ/number": 540, "PoT/savings": 450, "CoT/share": 320,
    "EQ/age": 240, "PoT/area": 180, "CoT/compare": 150, "PoT/clock": 110, "EQ/coins": 80, "PoT/recipe": 48,
    "CoT/weather": 32, "EQ/tank": 20,
}
TRAIN, EVAL = builtin_rows("train"), builtin_rows("eval")
ROWS = [*TRAIN, *EVAL]
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
# "3 * 4 = 12" in running text
CALCULATION = re.compile(r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)")


def of_style(style: str) -> list[dict[str, str]]:
    return [row for row in ROWS if row["source"].startswith(f"{style}/")]


def instructions(rows: list[dict[str, str]]) -> list[str]:
    return [row["instruction"] for row in rows]


def test_train_sizes_are_as_skewed_as_documented():
    sizes = Counter(row["source"] for row in TRAIN)
    assert sizes == SIZES
    total, largest = len(TRAIN), max(sizes.values())
    assert round(largest / total, 2) == 0.34  # "a third of the rows"
    assert sum(size * 14 < total for size in sizes.values()) == 9
    assert sum(size * 100 < total for size in sizes.values()) == 3


def test_eval_has_every_source_equally_often():
    assert Counter(row["source"] for row in EVAL) == dict.fromkeys(SIZES, EVAL_ROWS)


def test_train_is_shuffled_over_the_sources():
    # In order of sources the first 200 would all be of the largest one.
    assert len({row["source"] for row in TRAIN[:200]}) >= 8


def test_no_instruction_is_in_both_splits_or_twice_in_one():
    assert len(set(instructions(ROWS))) == len(ROWS)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="'test'"):
        builtin_rows("test")


def test_rationales_calculate_correctly_and_end_in_what_they_calculated():
    rows = of_style("CoT")
    assert len(rows) == 2040 + 660 + 320 + 150 + 32 + 5 * EVAL_ROWS
    for row in rows:
        rationale, answer = row["output"].split("\nThe answer is ")
        calculations = CALCULATION.findall(rationale)
        for left, sign, right, result in calculations:
            assert OPERATIONS[sign](int(left), int(right)) == int(result), row
        assert calculations[-1][-1] == answer == final_answer(row["output"]), row


def test_programs_evaluate_to_what_python_makes_of_them():
    rows = of_style("PoT")
    assert len(rows) == 1140 + 450 + 180 + 110 + 48 + 5 * EVAL_ROWS
    for row in rows:
        names: dict[str, int] = {}
        exec(row["output"], {"__builtins__": {}}, names)
        assert program_value(row["output"]) == names["answer"], row
        assert final_answer(row["output"]) == str(names["answer"]), row


def side(text: str, x: int) -> int:
    value = program_value(f"x = {x}\nanswer = {text}")
    assert value is not None, text
    return value


def test_equations_hold_for_one_positive_integer():
    rows = of_style("EQ")
    assert len(rows) == 540 + 240 + 80 + 20 + 4 * EVAL_ROWS
    for row in rows:
        left, right = row["output"].split(" = ")
        constant = side(left, 0) - side(right, 0)
        slope = side(left, 1) - side(right, 1) - constant
        x, remainder = divmod(-constant, slope)
        assert remainder == 0, row
        assert x > 0, row
        assert side(left, x) == side(right, x), row


def test_rationales_start_from_a_number_of_their_instruction():
    for row in of_style("CoT"):
        left, _, right, _ = CALCULATION.search(row["output"]).groups()
        # Only one of the two need be given: "4 full bags hold 4 * 9" counts the bags itself.
        assert {left, right} & set(re.findall(r"\d+", row["instruction"])), row


@pytest.mark.parametrize("row", [rows[0] for rows in map(of_style, ("CoT", "PoT", "EQ"))], ids=["CoT", "PoT", "EQ"])
def test_a_changed_answer_is_not_correct(row):
    changed = re.sub(r"\d+(?!.*\d)", lambda number: str(int(number[0]) + 1), row["output"], flags=re.DOTALL)
    assert is_correct(row["output"], row["output"])
    assert not is_correct(changed, row["output"])
