"""A small pretrained base model and its tokenizer, shipped with the package so that nothing has to be downloaded.

``weights/README.md`` says how they were made; ``python benchmarks/base_model/make.py`` of the source tree makes them
again.
"""

from __future__ import annotations

from pathlib import Path

BASE_MODEL: Path = Path(__file__).parent / "weights"
"""Folder for ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained``."""
