from __future__ import annotations

import warnings

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colm_scale.data.answers import final_answer, is_correct, program_value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 pens cost 3 * 4 = 12 dollars.\nThe answer is 12", "12"),
        ("the ANSWER is  1,234,567 .", "1234567"),
        ("The answer is 1. No: the answer is 2.", "2"),
        ("The answer is", ""),
        ("The answer is 1,23", "1,23"),
        ("The answer is 2.50", "2.50"),
        ("The answer is x = 3\n", "x = 3"),
        ("a = 2\nanswer = a * 3", "6"),
        ("answer = 5\nb = 7", "5"),
        ("a = 2\nb = a - 5", "-3"),
        ("3 * x + 4 = 10 ", "3 * x + 4 = 10"),
        ("  Two\n WORDS ", "two words"),
        ("", ""),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a = 7 // 2", 3),
        ("a = 7 % 4", 3),
        ("a = -(2 + 3) * 4", -20),
        ("\n  a = 1\n\n  b = a + 1\n", 2),
        ("a = 1\na = a + 1", 2),
        ("a = 1000000000000000000", 10**18),
        ("a = 1000000000000000001", None),
        ("a = 1000000000000 * 1000000000000", None),
        ("a = b", None),
        ("a = 1 / 2", None),
        ("a = 2 ** 3", None),
        ("a = 1 // 0", None),
        ("a = 1 % 0", None),
        ("a = b = 1", None),
        ("a += 1", None),
        ("a = 1\nb", None),
        ("a = (1 +\n2)", None),
        ("a = True", None),
        ("a = print(1)", None),
        ("a = 1.5", None),
        ("a = 1if", None),
        ("a, b = 1", None),
        ("x + 3 = 5", None),
        ("import os", None),
        ("a = " + "-" * 1900 + "1", None),
        ("a = " + "(" * 900 + "1" + ")" * 900, None),
        ("a = " + "1+" * 990 + "1", None),
        ("a = 1\n" * 1000, None),
        ("", None),
    ],
)
def test_program_values(text, value):
    assert program_value(text) == value


PROGRAM_LIKE = st.text(alphabet="abx_ 0123456789\n+-*/%()=", max_size=60)
LINES = st.lists(
    st.sampled_from(["a = 1", "answer = a", "b = a // 0", "if a", "x = (", "The answer is 3", "\x00", "a = 1 (2)"])
)


@given(st.text() | PROGRAM_LIKE | LINES.map("\n".join))
@example("lambda = 1")
@example("a = \ud800")
@example("a = 9" + "9" * 1990)
def test_no_text_raises_or_warns(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        answer = final_answer(text)
        program_value(text)
    assert is_correct(text, text)
    assert isinstance(answer, str)


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_programs_evaluate_as_python_does(expression):
    try:
        expected = eval(expression)
    except ZeroDivisionError:
        expected = None
    assert program_value(f"answer = {expression}") == expected


@given(st.integers(0, 10**12))
def test_thousands_commas_and_styles_do_not_matter(number):
    references = [f"So.\nThe answer is {number:,}.", f"the answer is {number}", f"half = {number}\nanswer = half"]
    assert {final_answer(text) for text in references} == {str(number)}


@pytest.mark.parametrize(
    ("generated", "right"),
    [
        ("The answer is 12.", True),
        ("answer = 3 * 4", True),
        ("12", True),
        ("The answer is 13", False),
        ("", False),
    ],
)
def test_answers_are_compared_across_styles(generated, right):
    assert is_correct(generated, "The answer is 12") is right
