"""A store gives back what was kept last of each example, for as many steps as it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colm_scale.randomness import generator
from colm_scale.records import long_tensor
from colm_scale.sketch.store import SketchStore


def keep(store: SketchStore, step: int, *ids: int) -> None:
    """Rows that tell whose they are and when they were made."""
    numbers = long_tensor(ids)
    steps = torch.full_like(numbers, step)
    store.add(numbers, steps, torch.stack([numbers, steps], dim=1).float())


def found(store: SketchStore, step: int, *ids: int) -> list[int | None]:
    """The step in which each example's row was made, None where there is none."""
    places = store.find(long_tensor(ids), step)
    return [_made(store, id_, place) for id_, place in zip(ids, places)]


def _made(store: SketchStore, id_: int, place: Tensor) -> int | None:
    if place < 0:
        return None
    rows, steps = store.at(place.view(1))
    assert rows.tolist() == [[id_, int(steps)]]
    return int(steps)


def test_a_row_counts_for_so_many_steps_and_no_longer():
    store = SketchStore(3, 12)
    keep(store, 5, 70, 80)
    assert found(store, 6, 80, 90, 70) == [5, None, 5]
    assert found(store, 8, 70) == [5]
    assert found(store, 9, 70) == [None]


def test_nothing_is_found_in_an_empty_store():
    assert found(SketchStore(3, 4), 1, 0, 1) == [None, None]


def test_the_last_row_of_an_example_counts():
    store = SketchStore(3, 4)
    keep(store, 1, 70)
    keep(store, 5, 70, 80)
    assert found(store, 6, 70, 80) == [5, 5]
    store.add(long_tensor([90, 90]), long_tensor([6, 6]), torch.tensor([[0.0, 0.0], [90.0, 6.0]]))
    assert found(store, 7, 90) == [6]


def test_the_oldest_give_way_when_there_is_no_room():
    store = SketchStore(100, 3)
    for step, id_ in enumerate((70, 80, 90, 60), 1):
        keep(store, step, id_)
    assert found(store, 5, 70, 80, 90, 60) == [None, 2, 3, 4]


@pytest.mark.parametrize(("reuse", "examples"), [(1, 40), (4, 40), (50, 10), (7, 23)])
def test_what_counts_never_gives_way(reuse, examples):
    """Of random examples, some of them twice in a step, those that are new are kept, as a run does."""
    drawn, count = generator(0, "store"), 6
    store, made = SketchStore(reuse, min(reuse * count, examples)), {}
    for step in range(1, 60):
        ids = torch.randint(examples, (count,), generator=drawn).tolist()
        expected = [made[id_] if step - made.get(id_, -reuse) <= reuse else None for id_ in ids]
        assert found(store, step, *ids) == expected
        new = [id_ for id_, age in zip(ids, expected) if age is None]
        keep(store, step, *new)
        made |= dict.fromkeys(new, step)


@pytest.mark.parametrize("examples", [9, 40])
def test_a_store_that_is_saved_and_loaded_goes_on_alike(examples):
    drawn, count, reuse = generator(1, "store"), 6, 5
    store = SketchStore(reuse, min(reuse * count, examples))
    for step in range(1, 40):
        ids = torch.randint(examples, (count,), generator=drawn).tolist()
        other = SketchStore(reuse, min(reuse * count, examples))
        state = store.state(step - 1)
        other.add(**state)
        assert found(other, step, *range(examples)) == found(store, step, *range(examples))
        assert len(state["ids"]) == sum(made is not None for made in found(store, step, *range(examples)))
        if step % 7 == 0:
            store = other
        keep(store, step, *[id_ for id_, made in zip(ids, found(store, step, *ids)) if made is None])
