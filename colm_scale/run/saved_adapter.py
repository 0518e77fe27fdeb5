"""What stands beside the weights of a saved adapter, so that other programs can use its folder as it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from colm_scale.base import BASE_MODEL
from colm_scale.config import RunConfig
from colm_scale.data.encoding import read_chat_template

_CONFIG = "adapter_config.json"


def complete_adapter(folder: Path, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the tokenizer with the run's chat template, and the base model as a hub id or an absolute folder.

    Args:
        folder: As peft has saved it.

    Raises:
        OSError: A file cannot be written.
    """
    model = config.model
    base = Path(model.name or BASE_MODEL)
    facts = json.loads((folder / _CONFIG).read_text("utf-8"))
    place = str(base.resolve()) if base.is_dir() else model.name
    facts |= {"base_model_name_or_path": place, "revision": model.revision}
    (folder / _CONFIG).write_text(json.dumps(facts, indent=2), "utf-8")
    own = copy.deepcopy(tokenizer)
    own.chat_template = read_chat_template(config.data) or own.chat_template
    own.save_pretrained(folder)
