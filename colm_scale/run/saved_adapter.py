"""What stands beside the weights of a saved adapter, so that other programs can use its folder as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from colm_scale.base import BASE_MODEL
from colm_scale.config import ModelConfig, RowConfig
from colm_scale.data.encoding import read_chat_template

_CONFIG = "adapter_config.json"


def of_run(tokenizer: PreTrainedTokenizerBase, config: RowConfig) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with the chat template of ``--data.chat_template``, if that is given."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = read_chat_template(config) or own.chat_template
    return own


def name_base(folder: Path, model: ModelConfig) -> None:
    """Write the base model into an adapter's configuration: a hub id, or a folder by its absolute path.

    Args:
        folder: As peft has saved it.

    Raises:
        OSError: The file cannot be written.
    """
    base = Path(model.name or BASE_MODEL)
    facts = json.loads((folder / _CONFIG).read_text("utf-8"))
    place = str(base.resolve()) if base.is_dir() else model.name
    facts |= {"base_model_name_or_path": place, "revision": model.revision}
    (folder / _CONFIG).write_text(json.dumps(facts, indent=2), "utf-8")
