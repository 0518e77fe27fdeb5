"""How many options there are: who adds one takes one away."""

from __future__ import annotations

from colm_scale.config import SelectionConfig
from colm_scale.config.command_line import option_types

MOST = 83
MOST_OF_THE_SELECTION = 18


def test_there_are_few_options():
    assert len(option_types()) <= MOST


def test_there_are_few_options_of_the_selection():
    assert len(option_types(SelectionConfig)) <= MOST_OF_THE_SELECTION
