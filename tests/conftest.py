"""For all tests: nothing is looked up on the network, and processes that tests start inherit that."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
