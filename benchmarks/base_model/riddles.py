"""Problems with an unknown x for pretraining, in other words than the equations of the built-in mixture."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from stories import PEOPLE, SINGLE, THINGS, Riddle


def secret(rng: Random) -> Riddle:
    """A secret number that goes through one or two operations."""
    x, k, d, kind = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 30), rng.randrange(5)
    start = rng.choice(("Take a secret number", "A number is hidden", "There is an unknown number", "Choose a number"))
    end = rng.choice(("the result is", "now it is", "this makes", "you see"))
    if kind == 0:
        return Riddle(f"{start}; {k} times it, plus {d}: {end} {k * x + d}.", f"{k} * x + {d} = {k * x + d}", x)
    if kind == 1:
        d = rng.randint(1, k * x - 1)
        return Riddle(f"{start}; {k} times it, less {d}: {end} {k * x - d}.", f"{k} * x - {d} = {k * x - d}", x)
    if kind == 2:
        text = rng.choice((f"plus {d}, then the sum times {k}", f"first add {d}, then multiply all by {k}"))
        return Riddle(f"{start}; {text}: {end} {k * (x + d)}.", f"{k} * (x + {d}) = {k * (x + d)}", x)
    if kind == 3:
        return Riddle(f"{start}; {d} more: {end} {x + d}.", f"x + {d} = {x + d}", x)
    d = rng.randint(1, x)
    return Riddle(f"{start}; {d} less: {end} {x - d}.", f"x - {d} = {x - d}", x)


def years(rng: Random) -> Riddle:
    """An unknown age."""
    (old, young), x = rng.sample(PEOPLE, 2), rng.randint(3, 20)
    k, d, kind = rng.randint(2, 5), rng.randint(2, 25), rng.randrange(4)
    if kind == 0:
        text = rng.choice((f"Take the age of {young} {k} times and {d} more years: that is {old}, who is {k * x + d}.",
                           f"{old}, {k * x + d} years old, is {d} years more than {k} times as old as {young}."))
        return Riddle(text, f"{k} * x + {d} = {k * x + d}", x)
    if kind == 1:
        text = rng.choice((f"{young} will have the age of {x + d} after {d} years.",
                           f"Wait {d} years, then {young} is {x + d} years old."))
        return Riddle(text, f"x + {d} = {x + d}", x)
    if kind == 2:
        text = rng.choice((f"{old} was {x} when we met {d} years ago.", f"The age of {old} was {x}, {d} years before."))
        return Riddle(text, f"x - {d} = {x}", x + d)
    text = rng.choice((f"{old} is older than {young} by {d} years, and both are {2 * x + d} together.",
                       f"The sum of two ages is {2 * x + d}; {old} has {d} years more than {young}."))
    return Riddle(text, f"x + (x + {d}) = {2 * x + d}", x)


def money(rng: Random) -> Riddle:
    """An unknown count of equal things; the equation is written from either side."""
    who, value, x = rng.choice(PEOPLE), rng.choice((2, 3, 4, 5, 6, 8, 10, 20)), rng.randint(2, 12)
    rest = rng.randint(1, 19)
    total, gift, thing = value * x + rest, rng.choice(SINGLE), rng.choice(THINGS)
    text = rng.choice((f"{who} pays {total} cents for some {thing}, {value} cents each, and a {gift} for {rest} cents.",
                       f"There are {total} cents in a purse: {rest} cents, and coins of {value} cents.",
                       f"{rest} cents and a number of {value} cent coins make {total} cents."))
    equation = rng.choice((f"{total} = {rest} + {value} * x", f"{total} = {value} * x + {rest}",
                           f"{value} * x + {rest} = {total}"))
    # The side is said in the text, so that the form of the equation can be known.
    side = "Total on the left." if equation.startswith(f"{total} =") else "Total on the right."
    order = " Rest first." if f"= {rest}" in equation else ""
    return Riddle(f"{text} {side}{order}", equation, x)


def draining(rng: Random) -> Riddle:
    """Something that decreases by the same amount every time."""
    rate, x, left = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 40)
    full = rate * x + left
    what, unit = rng.choice((("tank", "litres"), ("purse", "coins"), ("candle", "cm"), ("box", "sweets"),
                             ("pond", "litres"), ("bag", "nuts")))
    period = rng.choice(("hour", "day", "minute", "week"))
    text = rng.choice((f"The {what} has {full} {unit} and loses {rate} per {period}; then only {left} are there.",
                       f"From {full} {unit} in a {what} {rate} {unit} go away each {period} until {left} stay.",
                       f"A {what} of {full} {unit} gets {rate} {unit} less in every {period}. At last it has {left}."))
    return Riddle(text, f"{full} - {rate} * x = {left}", x)


def filling(rng: Random) -> Riddle:
    """Something that increases by the same amount every time."""
    rate, x, start = rng.randint(2, 9), rng.randint(2, 12), rng.randint(1, 40)
    what, unit = rng.choice((("tank", "litres"), ("box", "coins"), ("tree", "cm"), ("bag", "stones")))
    text = rng.choice((f"A {what} starts with {start} {unit} and gets {rate} more each day until it has "
                       f"{start + rate * x}.",
                       f"The {what} holds {start} {unit}. With {rate} {unit} added every day it comes to "
                       f"{start + rate * x}."))
    return Riddle(text, f"{start} + {rate} * x = {start + rate * x}", x)


RIDDLES: tuple[Callable[[Random], Riddle], ...] = (secret, secret, years, years, money, draining, filling)
