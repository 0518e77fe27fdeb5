"""Word problems for pretraining, in other words and with other forms of answers than the built-in mixture.

A story is separate from the forms of its answer: a number, worked steps, a small program or an equation. The same
stories appear in all forms, so that the base model learns what the forms have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

PEOPLE = ("Tom", "Mia", "Ben", "Ana", "Leo", "Eva", "Sam", "Zoe", "Max", "Ida", "Jon", "Kim", "Rosa", "Omar", "Lily",
          "Paul", "Nina", "Emma", "Jack", "Maria")
THINGS = ("pens", "books", "cups", "balls", "hats", "maps", "toys", "bags", "plates", "lamps", "cards", "stamps",
          "shells", "stones", "marbles", "sweets", "grapes", "nuts", "plums", "stickers", "apples", "eggs", "carrots",
          "coins", "boxes", "flowers", "pencils", "tickets", "cookies", "oranges", "chairs", "shirts")
SINGLE = ("cake", "card", "scarf", "kite", "clock", "vase", "pie", "soup", "salad", "bread", "phone", "bike", "game")
RIDES = ("bus", "train", "truck", "boat", "car", "bike", "ship", "plane")
ANIMALS = ("hens", "cows", "sheep", "goats", "pigs", "ducks", "dogs", "horses")
LEGS = {"hens": 2, "ducks": 2, "cows": 4, "sheep": 4, "goats": 4, "pigs": 4, "dogs": 4, "horses": 4}
PLACES = ("garden", "room", "yard", "field", "park", "floor", "wall", "farm")


@dataclass(frozen=True, slots=True)
class Story:
    """A problem whose answer is computed.

    Attributes:
        text: The problem.
        given: Numbers in the text, by name.
        steps: ``(name, expression)``; the expression refers to given or computed values as ``{name}``.
        unit: Unit of the answer.
    """

    text: str
    given: dict[str, int]
    steps: tuple[tuple[str, str], ...]
    unit: str


@dataclass(frozen=True, slots=True)
class Riddle:
    """A problem with an unknown ``x``: its text, its equation and the value of x."""

    text: str
    equation: str
    x: int


def purchase(rng: Random) -> Story:
    who, thing, gift = rng.choice(PEOPLE), rng.choice(THINGS), rng.choice(SINGLE)
    n, price, more = rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 20)
    coin = rng.choice(("dollars", "dollars", "coins", "euros", "cents"))
    text = rng.choice((
        f"The price of one of the {thing} is {price} {coin}. {who} takes {n} of them",
        f"{who} wants {n} {thing}. Each costs {price} {coin}",
        f"In a shop {thing} cost {price} {coin} each, and {who} pays for {n}",
        f"{who} bought {n} {thing}, {price} {coin} for each",
    ))
    given, cost = {thing: n, "price": price}, (("cost", f"{{{thing}}} * {{price}}"),)
    kind = rng.randrange(3)
    if kind == 0:
        return Story(text + rng.choice((". What is the cost?", ". How much money is that?", f". How many {coin}?")),
                     given, cost, coin)
    if kind == 1:
        text += rng.choice((f", then also buys a {gift} for {more} {coin}. What is the sum?",
                            f". A {gift} for {more} {coin} is added. How much altogether?",
                            f" as well as one {gift}, which costs {more} {coin}. Find the whole cost."))
        return Story(text, given | {gift: more}, (*cost, ("total", f"{{cost}} + {{{gift}}}")), coin)
    purse = n * price + more
    text += rng.choice((f". Before that there were {purse} {coin} in the purse. How much stays in it?",
                        f" out of {purse} {coin}. What is the change?",
                        f", and had {purse} {coin} at first. How many {coin} has {who} left?"))
    return Story(text, given | {"purse": purse}, (*cost, ("rest", "{purse} - {cost}")), coin)


def legs(rng: Random) -> Story:
    one, two = rng.sample(ANIMALS, 2)
    a, b = rng.randint(2, 30), rng.randint(2, 30)
    text = rng.choice((f"Count the legs of {a} {one} and {b} {two}.",
                       f"There are {a} {one} and {b} {two} in a {rng.choice(PLACES)}. What is the number of legs?",
                       f"{a} {one} meet {b} {two}. All of their legs?"))
    return Story(text, {one: a, two: b}, (("first", f"{{{one}}} * {LEGS[one]}"), ("second", f"{{{two}}} * {LEGS[two]}"),
                                          ("legs", "{first} + {second}")), "legs")


def laying(rng: Random) -> Story:
    n, each, lost = rng.randint(2, 30), rng.randint(2, 9), rng.randint(2, 20)
    maker, thing = rng.choice((("hens", "eggs"), ("trees", "apples"), ("bags", "nuts"), ("boxes", "pencils"),
                               ("cows", "buckets"), ("shelves", "books")))
    lost = min(lost, n * each - 1)
    text = rng.choice((f"{n} {maker} give {each} {thing} each, and {lost} {thing} break.",
                       f"From every one of {n} {maker} come {each} {thing}. A fox takes {lost} away.",
                       f"There are {each} {thing} for each of the {n} {maker}, but {lost} {thing} are lost."))
    ask = rng.choice((f"How many {thing} stay?", f"How many good {thing} are there now?", "What is left?"))
    return Story(f"{text} {ask}", {maker: n, "each": each, "lost": lost},
                 ((thing, f"{{{maker}}} * {{each}}"), ("rest", f"{{{thing}}} - {{lost}}")), thing)


def herd(rng: Random) -> Story:
    one, two = rng.sample(ANIMALS + THINGS, 2)
    a, b, c = rng.randint(2, 30), rng.randint(2, 30), rng.randint(2, 20)
    given, text = {one: a, two: b, "new": c}, f"There are {a} {one} and {b} {two}."
    if rng.random() < 0.5:
        text += rng.choice((f" Then {c} {one} join them.", f" {c} new {one} arrive.", f" Someone brings {c} {one}."))
        steps = ((one, f"{{{one}}} + {{new}}"), ("all", f"{{{one}}} + {{{two}}}"))
        return Story(text + rng.choice((" How many in all?", " Count them all.")), given, steps, "in all")
    c = min(c, a - 1)
    text += rng.choice((f" Then {c} {one} go away.", f" {c} of the {one} are sold.", f" {c} {one} get lost."))
    steps = ((one, f"{{{one}}} - {{new}}"), ("all", f"{{{one}}} + {{{two}}}"))
    return Story(text + rng.choice((" How many are left in all?", " Count what remains.")), given | {"new": c},
                 steps, "in all")


def ride(rng: Random) -> Story:
    what, hours = rng.choice(RIDES), rng.randint(2, 6)
    speed, rest = rng.choice((10, 12, 15, 20, 25, 30, 40, 50, 60, 80)), rng.randint(1, 9) * 10
    given, way = {"hours": hours, "speed": speed}, (("way", "{hours} * {speed}"),)
    if rng.random() < 0.5:
        text = rng.choice((f"A {what} goes {speed} km in one hour. What distance does it make in {hours} hours?",
                           f"The speed of a {what} is {speed} km per hour. Find its way after {hours} hours.",
                           f"For {hours} hours a {what} drives with a speed of {speed} km per hour. How many km?"))
        return Story(text, given, way, "km")
    goal = hours * speed + rest
    text = rng.choice((f"A {what} has to go {goal} km. It goes {speed} km per hour and {hours} hours are over. "
                       "How long is the rest of the way?",
                       f"{goal} km is the whole way of a {what}. After {hours} hours with {speed} km in each hour, "
                       "what distance is still to go?"))
    return Story(text, given | {"road": goal}, (*way, ("rest", "{road} - {way}")), "km")


def saving(rng: Random) -> Story:
    who, unit = rng.choice(PEOPLE), rng.choice(("dollars", "coins", "stamps", "points", "cards"))
    start, gain, times, out = rng.randint(5, 60), rng.randint(2, 12), rng.randint(2, 9), rng.randint(2, 20)
    period = rng.choice(("week", "day", "month", "year", "hour"))
    text = rng.choice((f"{who} owns {start} {unit} and gets {gain} each {period} for {times} {period}s.",
                       f"At first {who} had {start} {unit}. In every {period} {gain} {unit} are added, "
                       f"{times} {period}s long.",
                       f"A box of {who} holds {start} {unit}; each {period} brings {gain} more. "
                       f"Now {times} {period}s are over."))
    given = {"start": start, "gain": gain, period + "s": times}
    steps = (("sum", f"{{gain}} * {{{period}s}}"), ("money", "{start} + {sum}"))
    if rng.random() < 0.5:
        return Story(text + rng.choice((" How many now?", f" Count the {unit} at the end.")), given, steps, unit)
    text += rng.choice((f" {out} {unit} are spent. What remains?", f" Then {who} gives {out} away. How many now?",
                        f" {who} takes {out} out. How many {unit} stay?"))
    return Story(text, given | {"out": out}, (*steps, ("rest", "{money} - {out}")), unit)


def split(rng: Random) -> Story:
    thing, parts, each = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 12)
    who, over = rng.choice(("children", "people", "friends", "boys", "girls")), rng.randint(0, parts - 1)
    if rng.random() < 0.5:
        text = rng.choice((f"{parts * each} {thing} are given to {parts} {who}, the same number to each.",
                           f"There are {parts * each} {thing} for {parts} {who}. All get the same share.",
                           f"Divide {parts * each} {thing} among {parts} {who}."))
        return Story(text + rng.choice((" What is the share of one?", " How many for each?")),
                     {thing: parts * each, "parts": parts}, (("share", f"{{{thing}}} // {{parts}}"),), thing)
    total = parts * each + over
    given = {thing: total, "size": parts}
    text = rng.choice((f"One full box holds {parts} {thing}. There are {total} {thing}.",
                       f"{total} {thing} are put into full groups of {parts}."))
    if rng.random() < 0.4:
        return Story(text + " How many can be filled?", given, (("full", f"{{{thing}}} // {{size}}"),), "full")
    steps = (("full", f"{{{thing}}} // {{size}}"), ("used", "{full} * {size}"), ("rest", f"{{{thing}}} - {{used}}"))
    return Story(text + rng.choice((" How many stay over?", " What is left over?")), given, steps, "over")


def rectangle(rng: Random) -> Story:
    place, kind = rng.choice(PLACES), rng.randrange(3)
    width, length, side = rng.randint(3, 30), rng.randint(3, 40), rng.randint(2, 8)
    given = {"width": width, "length": length}
    text = rng.choice((f"The {place} has a width of {width} m and a length of {length} m.",
                       f"One side of a {place} is {length} m, the other is {width} m.",
                       f"{length} m long, {width} m wide: this is a {place}."))
    if kind == 0:
        return Story(text + rng.choice((" Compute the area.", " How many square m is it?")), given,
                     (("area", "{width} * {length}"),), "square m")
    if kind == 1:
        return Story(text + rng.choice((" What way is it all around?", " Find the length of the fence.")), given,
                     (("half", "{width} + {length}"), ("fence", "2 * {half}")), "m")
    text += rng.choice((f" A square of {side} m is cut out of it. What area stays?",
                        f" There is a square pond inside, each side {side} m. How much area has the land?"))
    return Story(text, given | {"side": side}, (("pond", "{side} * {side}"), ("area", "{width} * {length}"),
                                                ("land", "{area} - {pond}")), "square m")


def difference(rng: Random) -> Story:
    (one, two), thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
    less, gap, kind = rng.randint(5, 40), rng.randint(2, 40), rng.randrange(3)
    if kind == 0:
        text = rng.choice((f"{one} has {less + gap} {thing}, {two} only {less}. What is the difference?",
                           f"There are {less + gap} {thing} with {one}, but {less} with {two}. How many more?"))
        return Story(text, {"many": less + gap, "few": less}, (("more", "{many} - {few}"),), thing)
    if kind == 1:
        text = rng.choice((f"{two} has {gap} {thing} less than {one}, who has {less + gap}. How many has {two}?",
                           f"{one} counts {less + gap} {thing}; {two} counts {gap} fewer. What does {two} count?"))
        return Story(text, {"many": less + gap, "fewer": gap}, (("few", "{many} - {fewer}"),), thing)
    text = rng.choice((f"{two} has {gap} more {thing} than {one}, who has {less}. What is their sum?",
                       f"{one} counts {less} {thing}; {two} counts {gap} more. How many do both have?"))
    return Story(text, {"few": less, "more": gap}, (("many", "{few} + {more}"), ("both", "{few} + {many}")), thing)


def units(rng: Random) -> Story:
    big, small, factor = rng.choice((("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7),
                                     ("minutes", "seconds", 60), ("years", "months", 12), ("m", "cm", 100),
                                     ("hours", "minutes", 60), ("days", "hours", 24), ("weeks", "days", 7)))
    a, b = rng.randint(2, 30), rng.randint(1, factor - 1)
    text = rng.choice((f"How many {small} are {a} {big} and {b} {small}?", f"Turn {a} {big} {b} {small} into {small}.",
                       f"A film takes {a} {big} and {b} {small}; say it in {small}."))
    return Story(text, {big: a, "more": b}, (("part", f"{{{big}}} * {factor}"), ("time", "{part} + {more}")), small)


def cooking(rng: Random) -> Story:
    food, other = rng.sample(SINGLE, 2)
    item, need, times, over = rng.choice(THINGS), rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 9)
    if rng.random() < 0.5:
        total = need * times + rng.randint(0, need - 1)
        text = rng.choice((f"A cook needs {need} {item} for a {food} and has {total}. How many can the cook make?",
                           f"With {total} {item}, and {need} {item} for one {food}, how often does it work?"))
        return Story(text, {"have": total, "one": need}, (("times", "{have} // {one}"),), "times")
    text = rng.choice((f"One {food} takes {need} {item} and one {other} takes {over}. We make {times} times the {food} "
                       f"and one {other}. How many {item}?",
                       f"{times} of a {food} with {need} {item} each and a {other} with {over} {item}: "
                       f"how many {item}?"))
    return Story(text, {"times": times, "one": need, other: over},
                 ((food, "{times} * {one}"), ("all", f"{{{food}}} + {{{other}}}")), item)


def heat(rng: Random) -> Story:
    start, up, down = rng.randint(5, 40), rng.randint(2, 15), rng.randint(2, 15)
    what = rng.choice(("degrees", "points", "steps", "floors", "m"))
    rise, fall = rng.choice(("rises by", "climbs", "goes up")), rng.choice(("falls by", "sinks", "goes down"))
    if rng.random() < 0.4:
        text = rng.choice((f"It was {start} {what} at dawn, {start + up} {what} at noon. What was the rise?",
                           f"From {start} {what} in the morning it climbs to {start + up}. How much is the change?"))
        return Story(text, {"dawn": start, "noon": start + up}, (("rise", "{noon} - {dawn}"),), what)
    text = rng.choice((f"It starts with {start} {what}, {rise} {up} at noon and {fall} {down} at night.",
                       f"The thermometer was at {start} {what}. First it {rise} {up}, later it {fall} {down}."))
    return Story(text + rng.choice((" Where does it end?", " What is shown at last?")),
                 {"dawn": start, "up": up, "down": down},
                 (("noon", "{dawn} + {up}"), ("night", "{noon} - {down}")), what)


STORIES: tuple[Callable[[Random], Story], ...] = (
    purchase, legs, laying, herd, ride, saving, split, rectangle, difference, units, cooking, heat, purchase,
    difference)
