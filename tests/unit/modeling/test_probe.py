from __future__ import annotations

import pytest
import torch
from support.families import FAMILIES, PROBES, ROWS, base_model
from torch import nn

from colm_scale.errors import UserError
from colm_scale.modeling.probe import decoder_blocks, find_probe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_values_of_the_last_block_are_found(family, dtype):
    model = base_model(family, dtype)
    probe = find_probe(model)
    assert probe.layer == PROBES[family]
    assert probe.rows.tolist() == list(ROWS[family])
    assert probe.layer.startswith(probe.block + ".")
    assert probe.block == PROBES[family].split(".self_attn")[0]
