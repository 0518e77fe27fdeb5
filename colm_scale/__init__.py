"""CoLM mini-batch coresets inside sharded LoRA fine-tuning."""

__version__ = "0.1.0"
