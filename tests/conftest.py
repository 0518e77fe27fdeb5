"""For all tests: nothing is looked up on the network, and processes that tests start inherit that."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("default", deadline=None)  # a busy machine is no failure
settings.load_profile("default")
