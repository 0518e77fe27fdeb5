"""A small pretrained base model, its tokenizer and a mixture of maths problems, so that nothing has to be downloaded.

The scripts in ``benchmarks/base_model`` of the source tree made them and can make them again.
"""

from __future__ import annotations

from pathlib import Path

BASE_MODEL: Path = Path(__file__).parent / "weights"
"""Folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``."""
MIXTURE: Path = Path(__file__).parent / "mixture"
"""Folder with ``train.jsonl.gz`` and ``eval.jsonl.gz``."""
