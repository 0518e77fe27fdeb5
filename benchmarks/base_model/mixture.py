"""Generates the rows of the built-in mixture: ``python benchmarks/base_model/mixture.py`` writes them into the package.

One function per source draws a problem, ``Random -> (instruction, output)``. Numbers stay small on purpose: a model of
1.7 million parameters has to get them right.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Literal

from colm_scale.base import MIXTURE

NAMES = ("Tom", "Mia", "Ben", "Ana", "Leo", "Eva", "Sam", "Zoe", "Max", "Ida", "Jon", "Kim")
GOODS = ("pens", "books", "cups", "balls", "hats", "maps", "toys", "bags", "plates", "lamps")
GIFTS = ("cake", "card", "scarf", "kite", "clock", "vase")


def _answer(text: str, value: int) -> str:
    return f"{text}\nThe answer is {value}"


def shop(rng: Random) -> tuple[str, str]:
    """Cost, total cost or change of a purchase."""
    name, goods, gift = rng.choice(NAMES), rng.choice(GOODS), rng.choice(GIFTS)
    count, price, extra = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 20)
    cost = count * price
    kind = rng.randrange(3)
    if kind == 0:
        return (
            f"{name} buys {count} {goods} at {price} dollars each. How many dollars does {name} pay?",
            _answer(f"{count} {goods} cost {count} * {price} = {cost} dollars.", cost),
        )
    if kind == 1:
        return (
            f"{name} buys {count} {goods} at {price} dollars each and one {gift} for {extra} dollars. "
            f"What does {name} pay in total?",
            _answer(f"The {goods} cost {count} * {price} = {cost} dollars. With the {gift} that makes "
                    f"{cost} + {extra} = {cost + extra} dollars.", cost + extra),
        )
    purse = cost + extra
    return (
        f"{name} goes to the shop with {purse} dollars and buys {count} {goods} at {price} dollars each. "
        "How many dollars are left?",
        _answer(f"The {goods} cost {count} * {price} = {cost} dollars. Then {purse} - {cost} = {extra} "
                "dollars are left.", extra),
    )


def farm(rng: Random) -> tuple[str, str]:
    """Legs, eggs and herds, as a program."""
    first, second, third = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 20)
    kind = rng.randrange(3)
    if kind == 0:
        return (
            f"On a farm live {first} hens and {second} cows. How many legs do they have together?",
            f"hens = {first} * 2\ncows = {second} * 4\nanswer = hens + cows",
        )
    if kind == 1:
        laid = rng.randint(2, 9)
        return (
            f"A farmer has {first} hens and each hen lays {laid} eggs. The fox eats {third} eggs. "
            "How many eggs remain on the farm?",
            f"eggs = {first} * {laid}\nanswer = eggs - {third}",
        )
    return (
        f"In the barn stand {first} sheep and {second} goats. The farmer brings {third} more sheep. "
        "How many animals are in the barn?",
        f"sheep = {first} + {third}\ngoats = {second}\nanswer = sheep + goats",
    )


def trip(rng: Random) -> tuple[str, str]:
    """Distance at a constant speed."""
    ride = rng.choice(("bus", "train", "truck", "boat", "car"))
    hours, speed = rng.randint(2, 6), rng.choice((10, 12, 15, 20, 25, 30, 40, 50, 60))
    gone, rest = hours * speed, rng.randint(1, 9) * 10
    if rng.random() < 0.5:
        return (
            f"A {ride} travels for {hours} hours at {speed} km per hour. How far does it travel?",
            _answer(f"In {hours} hours the {ride} travels {hours} * {speed} = {gone} km.", gone),
        )
    return (
        f"The road is {gone + rest} km long. A {ride} has been on it for {hours} hours at {speed} km per hour. "
        "How many km remain?",
        _answer(f"The {ride} has done {hours} * {speed} = {gone} km. So {gone + rest} - {gone} = {rest} km remain.",
                rest),
    )


def number(rng: Random) -> tuple[str, str]:
    """A number thought of."""
    x, factor, shift = rng.randint(2, 12), rng.randint(2, 9), rng.randint(1, 30)
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"I think of a number, multiply it by {factor}, add {shift} and get {factor * x + shift}.",
            f"{factor} * x + {shift} = {factor * x + shift}",
        )
    if kind == 1:
        shift = rng.randint(1, factor * x - 1)
        return (
            f"I think of a number, multiply it by {factor}, take away {shift} and get {factor * x - shift}.",
            f"{factor} * x - {shift} = {factor * x - shift}",
        )
    if kind == 2:
        return (
            f"I think of a number, add {shift}, multiply the sum by {factor} and get {(x + shift) * factor}.",
            f"{factor} * (x + {shift}) = {(x + shift) * factor}",
        )
    return f"I think of a number, add {shift} and get {x + shift}.", f"x + {shift} = {x + shift}"


def savings(rng: Random) -> tuple[str, str]:
    """Money in a box after some weeks, as a program."""
    name = rng.choice(NAMES)
    start, weekly, weeks, spent = rng.randint(10, 60), rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 20)
    text = f"{name} has {start} coins in a money box and puts in {weekly} coins every week."
    if rng.random() < 0.5:
        return (
            f"{text} How many coins are in the box after {weeks} weeks?",
            f"start = {start}\nsaved = {weekly} * {weeks}\nanswer = start + saved",
        )
    return (
        f"{text} After {weeks} weeks {name} takes {spent} coins out. How many coins are in the box now?",
        f"start = {start}\nsaved = {weekly} * {weeks}\nspent = {spent}\nanswer = start + saved - spent",
    )


def share(rng: Random) -> tuple[str, str]:
    """Sharing equally, and what stays over."""
    thing = rng.choice(("sweets", "grapes", "nuts", "plums", "stickers"))
    parts, each = rng.randint(2, 9), rng.randint(2, 12)
    total, over = parts * each, rng.randint(1, parts - 1)
    if rng.random() < 0.5:
        return (
            f"{parts} children share {total} {thing} equally. How many {thing} does each child get?",
            _answer(f"Each child gets {total} / {parts} = {each} {thing}.", each),
        )
    return (
        f"Somebody packs {total + over} {thing} into bags of {parts}. How many {thing} do not fill a bag?",
        _answer(f"{each} full bags hold {each} * {parts} = {total} {thing}. That leaves "
                f"{total + over} - {total} = {over}.", over),
    )


def age(rng: Random) -> tuple[str, str]:
    """The age of a person, as an equation."""
    older, younger = rng.sample(NAMES, 2)
    x, factor, years = rng.randint(3, 20), rng.randint(2, 5), rng.randint(2, 25)
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"{older} is {factor * x + years} years old, which is {years} years more than {factor} times "
            f"the age of {younger}. How old is {younger}?",
            f"{factor} * x + {years} = {factor * x + years}",
        )
    if kind == 1:
        return f"In {years} years {younger} will be {x + years}. How old is {younger}?", f"x + {years} = {x + years}"
    if kind == 2:
        return (
            f"{years} years ago {older} was {x}. How old is {older} today?",
            f"x - {years} = {x}",
        )
    return (
        f"{older} is {years} years older than {younger}. Their ages add up to {2 * x + years}. "
        f"How old is {younger}?",
        f"x + (x + {years}) = {2 * x + years}",
    )


def area(rng: Random) -> tuple[str, str]:
    """Area and fence of a rectangle, as a program."""
    place = rng.choice(("garden", "room", "yard", "field", "park"))
    wide, long, cut = rng.randint(3, 30), rng.randint(3, 40), rng.randint(2, 8)
    text = f"A {place} is {wide} m wide and {long} m long."
    kind = rng.randrange(3)
    if kind == 0:
        return f"{text} How large is its area?", f"wide = {wide}\nlong = {long}\nanswer = wide * long"
    if kind == 1:
        return (
            f"{text} How long is a fence around it?",
            f"wide = {wide}\nlong = {long}\nanswer = 2 * (wide + long)",
        )
    return (
        f"{text} A square pond with sides of {cut} m lies in it. How large is the area without the pond?",
        f"wide = {wide}\nlong = {long}\npond = {cut} * {cut}\nanswer = wide * long - pond",
    )


def compare(rng: Random) -> tuple[str, str]:
    """The difference of two collections, or their sum."""
    first, second = rng.sample(NAMES, 2)
    thing = rng.choice(("cards", "stamps", "shells", "stones", "marbles"))
    less, more = rng.randint(5, 40), rng.randint(2, 40)
    many = less + more
    kind = rng.randrange(3)
    if kind == 0:
        return (
            f"{first} owns {many} {thing} and {second} owns {less}. How many more does {first} own than {second}?",
            _answer(f"The difference is {many} - {less} = {more} {thing}.", more),
        )
    if kind == 1:
        return (
            f"{first} owns {many} {thing}, {second} owns {more} fewer. How many does {second} own?",
            _answer(f"{second} owns {many} - {more} = {less} {thing}.", less),
        )
    return (
        f"{first} owns {less} {thing}, {second} owns {more} more than {first}. How many do they own together?",
        _answer(f"{second} owns {less} + {more} = {many} {thing}. Together they own {less} + {many} = {less + many}.",
                less + many),
    )


def clock(rng: Random) -> tuple[str, str]:
    """Hours in minutes, days in hours, weeks in days, as a program."""
    big, small = rng.randint(2, 30), rng.randint(1, 59)
    kind = rng.randrange(3)
    if kind == 0:
        return f"Write {big} hours and {small} minutes in minutes.", f"hours = {big}\nanswer = hours * 60 + {small}"
    if kind == 1:
        small = 1 + small % 23
        return f"Write {big} days and {small} hours in hours.", f"days = {big}\nanswer = days * 24 + {small}"
    small = 1 + small % 6
    return f"Write {big} weeks and {small} days in days.", f"weeks = {big}\nanswer = weeks * 7 + {small}"


def coins(rng: Random) -> tuple[str, str]:
    """An unknown number of equal coins; the sum stands on the left of the equation."""
    name, value = rng.choice(NAMES), rng.choice((2, 5, 10, 20))
    x, rest = rng.randint(2, 12), rng.randint(1, 19)
    return (
        f"The purse of {name} holds {value * x + rest} cents. {rest} cents are loose change, all other coins are "
        f"{value} cent coins. How many {value} cent coins are there?",
        f"{value * x + rest} = {rest} + {value} * x",
    )


def recipe(rng: Random) -> tuple[str, str]:
    """How far ingredients go, as a program."""
    food, other = rng.sample(("cake", "pie", "bread", "soup", "salad"), 2)
    item = rng.choice(("eggs", "apples", "carrots", "spoons of oil"))
    need, batches, over = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 9)
    if rng.random() < 0.5:
        stock = need * batches + rng.randint(0, need - 1)
        return (
            f"The recipe of a {food} asks for {need} {item}. For how many recipes are {stock} {item} enough?",
            f"stock = {stock}\nneed = {need}\nanswer = stock // need",
        )
    return (
        f"The recipe of a {food} asks for {need} {item}, that of a {other} for {over} {item}. How many {item} go "
        f"into {batches} of the first and one of the second?",
        f"{food} = {batches} * {need}\n{other} = {over}\nanswer = {food} + {other}",
    )


def weather(rng: Random) -> tuple[str, str]:
    """Temperatures that rise and fall."""
    start, up, down = rng.randint(5, 30), rng.randint(2, 15), rng.randint(2, 15)
    noon = start + up
    if rng.random() < 0.5:
        return (
            f"At dawn the thermometer shows {start} degrees. It climbs {up} degrees until noon and sinks {down} "
            "degrees until night. What does it show at night?",
            _answer(f"Noon: {start} + {up} = {noon}. Night: {noon} - {down} = {noon - down}.", noon - down),
        )
    return (
        f"At dawn the thermometer shows {start} degrees and at noon {noon} degrees. By how much did it climb?",
        _answer(f"Climb: {noon} - {start} = {up}.", up),
    )


def tank(rng: Random) -> tuple[str, str]:
    """A tank that runs empty: the unknown is subtracted."""
    rate, x, left = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 40)
    full = rate * x + left
    return (
        f"A tank with {full} litres leaks {rate} litres every hour. After how many hours does it hold {left} litres?",
        f"{full} - {rate} * x = {left}",
    )


EVAL_ROWS = 24
# Source -> (rows of the train split, maker). A third of the rows come from one source; nine sources have fewer than
# rows / 14, and three have fewer than one row in a hundred.
SOURCES: dict[str, tuple[int, Callable[[Random], tuple[str, str]]]] = {
    "CoT/shop": (2040, shop),
    "PoT/farm": (1140, farm),
    "CoT/trip": (660, trip),
    "EQ/number": (540, number),
    "PoT/savings": (450, savings),
    "CoT/share": (320, share),
    "EQ/age": (240, age),
    "PoT/area": (180, area),
    "CoT/compare": (150, compare),
    "PoT/clock": (110, clock),
    "EQ/coins": (80, coins),
    "PoT/recipe": (48, recipe),
    "CoT/weather": (32, weather),
    "EQ/tank": (20, tank),
}


def make_rows(split: Literal["train", "eval"], seed: int) -> list[dict[str, str]]:
    """The rows of one split, each with ``source``, ``instruction`` and ``output``; the package has those of seed 0.

    Train rows are shuffled over the sources; eval has 24 rows of every source, source by source. Whatever the seeds,
    no instruction is in both splits, and none is twice in a split.
    """
    rows = [row for source in SOURCES for row in _source_rows(split, seed, source)]
    if split == "train":
        Random(f"{seed}:{split}:order").shuffle(rows)
    return rows


def _source_rows(split: str, seed: int, source: str) -> list[dict[str, str]]:
    """Draw rows of one source, without those of the other split and without repeats."""
    train_rows, maker = SOURCES[source]
    wanted = train_rows if split == "train" else EVAL_ROWS
    rng = Random(f"{seed}:{split}:{source}")
    rows: dict[str, str] = {}
    while len(rows) < wanted:
        instruction, output = maker(rng)
        if held_out(instruction) == (split == "eval"):
            rows.setdefault(instruction, output)
    return [{"source": source, "instruction": text, "output": out} for text, out in rows.items()]


def held_out(instruction: str) -> bool:
    """True for the instructions that belong to eval, one in eight, told by their text: no seed can mix the splits."""
    return hashlib.sha256(instruction.encode()).digest()[0] < 32


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Generates the built-in mixture.")
    parser.add_argument("--out", type=Path, default=MIXTURE, help="folder to write (default: the package's)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "eval"):
        text = "".join(json.dumps(row) + "\n" for row in make_rows(split, seed=0))
        (out / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main()
