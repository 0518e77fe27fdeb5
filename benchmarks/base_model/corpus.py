"""The synthetic, seeded pretraining corpus of the base model: ``document(rng)`` draws one short text.

The corpus teaches arithmetic, assignments, equations and word problems. It shares no form with the built-in mixture: it
has no ``The answer is``, no program that assigns ``answer``, and no instruction template of the mixture.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from prose import SENTENCES
from riddles import RIDDLES
from stories import STORIES, Story

from colm_scale.data.answers import program_value

_OPERATIONS = ("+", "-", "*", "//")
_PHRASES = {"+": ("plus", "and"), "-": ("minus", "less"), "*": ("times", "multiplied by"), "//": ("divided by", "over")}


def documents(seed: int) -> Iterator[str]:
    """Draw an endless stream of documents, equal for equal seeds."""
    rng = Random(f"{seed}:corpus")
    while True:
        yield document(rng)


def document(rng: Random) -> str:
    """Draw one document of 5 to 120 tokens."""
    draw = rng.random()
    if draw < 0.16:
        return "\n".join(fact(rng) for _ in range(rng.randint(2, 6)))
    if draw < 0.24:
        return assignments(rng)
    if draw < 0.32:
        return equation(rng)
    if draw < 0.36:
        return chain(rng)
    if draw < 0.38:
        return rng.choice(SENTENCES)
    if draw < 0.78:
        return told(rng)
    return riddle(rng)


def operands(rng: Random, op: str) -> tuple[int, int, int]:
    """Draw ``(left, right, result)`` of one operation, in the range that the model should master."""
    if op == "+":
        left, right = rng.randint(1, 99), rng.randint(1, 99)
        return left, right, left + right
    if op == "-":
        left = rng.randint(2, 120)
        right = rng.randint(1, left)
        return left, right, left - right
    left, right = rng.randint(2, 12), rng.randint(2, 12)
    if rng.random() < 0.25:
        left, right = rng.randint(2, 9), rng.choice((15, 20, 25, 30, 40, 50, 60))
    if rng.random() < 0.5:
        left, right = right, left
    return (left, right, left * right) if op == "*" else (left * right, right, left)


def fact(rng: Random) -> str:
    """Draw one operation, in one of several notations."""
    op = rng.choice(_OPERATIONS)
    left, right, result = operands(rng, op)
    sign, phrase = ("/" if op == "//" and rng.random() < 0.5 else op), rng.choice(_PHRASES[op])
    return rng.choice((
        f"{left} {sign} {right} = {result}",
        f"{left} {sign} {right} = {result}",
        f"{left} {sign} {right} = {result}",
        f"{result} is {left} {phrase} {right}",
        f"{left} {phrase} {right} is {result}",
        f"What is {left} {phrase} {right}? {result}",
        f">>> {left} {sign} {right}\n{result}",
    ))


def chain(rng: Random) -> str:
    """Draw two operations, the second on the result of the first."""
    left, right, middle = operands(rng, rng.choice("+-*"))
    last = rng.randint(1, 30)
    sign, end = rng.choice((("+", middle + last), ("-", middle - last)) if middle >= last else (("+", middle + last),))
    return rng.choice((
        f"Start with {left}. {'' if middle < left else 'Now '}reach {middle}, then {sign} {last}: {end}",
        f"{left} and {right} lead to {middle}; {middle} {sign} {last} = {end}",
        f"{middle} {sign} {last} = {end}, so {end} {'-' if sign == '+' else '+'} {last} = {middle}",
    ))


def assignments(rng: Random) -> str:
    """Draw assignments to names, and the value of the last one."""
    names = rng.sample(("a", "b", "c", "n", "m", "cost", "total", "rest", "start", "first", "second", "sum"), 3)
    op = rng.choice(_OPERATIONS)
    left, right, middle = operands(rng, op)
    last = rng.randint(1, 30)
    sign, end = ("-", middle - last) if middle >= last and rng.random() < 0.5 else ("+", middle + last)
    head = rng.choice((f"{names[0]} = {left}\n{names[1]} = {names[0]} {op} {right}",
                       f"{names[0]} = {right}\n{names[1]} = {left} {op} {names[0]}",
                       f"{names[1]} = {left} {op} {right}"))
    if rng.random() < 0.4:
        return head + rng.choice((f"\nprint({names[1]})\n{middle}", f"\n{names[1]} is {middle}"))
    end_text = rng.choice((f"\nprint({names[2]})\n{end}", f"\n{names[2]} is {end}"))
    return f"{head}\n{names[2]} = {names[1]} {sign} {last}{end_text}"


def equation(rng: Random) -> str:
    """Draw a linear equation and its solution."""
    x, k, d, kind = rng.randint(1, 20), rng.randint(2, 9), rng.randint(1, 30), rng.randrange(6)
    text = (f"{k} * x + {d} = {k * x + d}", f"{k} * x - {d} = {k * x - d}", f"x + {d} = {x + d}",
            f"{k} * (x + {d}) = {k * (x + d)}", f"{k * x + d} - {k} * x = {d}", f"{k * x + d} = {d} + {k} * x")[kind]
    return rng.choice((f"{text}, so x = {x}", f"Solve {text}. x is {x}", f"x = {x} fits {text}",
                       f"If {text} then x = {x}"))


def told(rng: Random) -> str:
    """Draw a word problem with its answer, in one of several forms."""
    story = rng.choice(STORIES)(rng)
    plain, values = worked(story)
    answer = values[-1]
    sums = [f"{text} = {value}" for text, value in zip(plain, values, strict=True)]
    by_name = [f"{name} = {expression.format_map(Same())}" for name, expression in story.steps]
    lines = [f"{name} = {value}" for name, value in story.given.items()] + by_name
    inline = [f"{name} = {text}" for (name, _), text in zip(story.steps, half_named(story), strict=True)]
    last, unit = story.steps[-1][0], story.unit
    style = rng.randrange(10)
    if style == 0:
        return f"Q: {story.text} A: {answer}"
    if style <= 2:
        return f"Q: {story.text} Work: {'; '.join(sums)}. A: {answer}".replace("//", "/")
    if style <= 4:
        words = " Then ".join(f"{text} {unit}." for text in sums).replace("//", "/")
        return f"{story.text}\nWe find {words} So it is {answer}."
    if style == 5:
        return f"Problem: {story.text}\n{', '.join(sums)}\nResult: {answer} {unit}".replace("//", "/")
    if style <= 7:
        return "\n".join((f"Task: {story.text}", *lines, f"print({last})", f"{answer}"))
    if style == 8:
        return "\n".join((f"{story.text} Program:", *inline, f"print({last})", f"{answer}"))
    return f"{story.text} As code: {'; '.join(inline)}. {last} is {answer}"


def riddle(rng: Random) -> str:
    """Draw a problem with an unknown, its equation and solution, in one of several forms."""
    drawn = rng.choice(RIDDLES)(rng)
    text, formula, x = drawn.text, drawn.equation, drawn.x
    return rng.choice((
        f"{text} Equation: {formula}. x: {x}",
        f"Let x be unknown. {text} So {formula}, x = {x}.",
        f"Find x: {text}\n[{formula}]\nx is {x}",
        f"Q: {text} In signs? A: {formula}",
        f"Q: {text} Which x? A: {x}",
        f"{formula} says: {text}",
    ))


class Same(dict):
    """Formats ``{name}`` as the name itself."""

    def __missing__(self, key: str) -> str:
        return key


def worked(story: Story) -> tuple[list[str], list[int]]:
    """Return each step with all names replaced by numbers, and its value."""
    known: dict[str, int] = dict(story.given)
    texts, values = [], []
    for name, expression in story.steps:
        text = expression.format_map(known)
        value = program_value(f"{name} = {text}")
        assert value is not None, f"{text} is no program"
        known[name] = value
        texts.append(text)
        values.append(value)
    return texts, values


def half_named(story: Story) -> list[str]:
    """Return each step with given numbers written out and computed values by name."""
    known: dict[str, str | int] = dict(story.given)
    texts = []
    for name, expression in story.steps:
        texts.append(expression.format_map(known))
        known[name] = name
    return texts
