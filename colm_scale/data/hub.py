"""Data sets of the hub, by name, configuration and split: ``ORG/NAME``, ``ORG/NAME:SPLIT``, ``ORG/NAME:CONFIG:SPLIT``.

``ORG/NAME:CONFIG`` is the configuration's split ``train``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from colm_scale.errors import UserError

_PART = r"[^:\[\]]+"
_SPEC = re.compile(
    rf"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>{_PART})(?=:))?(:(?P<split>{_PART}(\[[^\[\]]*\]({_PART})?)*))?"
)
_TRAIN = "train"
_PATIENCE_SECONDS = 5.0
"""Longest wait for the hub's first answer."""


@dataclass(frozen=True, slots=True)
class HubSet:
    """A data set of the hub.

    Attributes:
        config: Empty for its only or default configuration.
        split: As `datasets.load_dataset` takes it, for instance ``test[:100]``.
    """

    name: str
    config: str = ""
    split: str = _TRAIN

    def __str__(self) -> str:
        return ":".join(filter(None, (self.name, self.config, self.split)))

    def load(self, *, streaming: bool) -> Any:
        """Load it. Raises whatever the library, the network and the data set's own files raise."""
        import datasets

        config = (self.config,) if self.config else ()
        with _without_retries():
            return datasets.load_dataset(self.name, *config, split=self.split, streaming=streaming)


def parsed(spec: str) -> HubSet | None:
    """Read the name of a hub data set, as if one part after ``ORG/NAME`` were a split; None if it cannot be one."""
    found = _SPEC.fullmatch(spec)
    return HubSet(found["name"], found["config"] or "", found["split"] or _TRAIN) if found else None


def resolved(spec: str) -> str:
    """Find out which configuration is meant, and return the spec with it.

    A spec stays as it is if the hub does not say which configurations there are: loading it will say why.

    Raises:
        UserError: The configuration is missing, unknown or ambiguous.
    """
    found = parsed(spec)
    if found is None:
        return spec
    try:
        configs, default = _configurations(found.name)
    except Exception:  # the hub, the network and the data set's own files each fail in their own way
        return spec
    if found.config and found.config not in configs:
        raise UserError(f"{found.name} has no configuration {found.config!r}{_offer(found, found.config, configs)}")
    given = spec.removeprefix(found.name)[1:]
    if not found.config and given in configs:
        if default and given != default and given in _splits(found.name, default):
            raise UserError(
                f"{found.name} has a configuration and a split {given!r}: write {found.name}:{given}:{_TRAIN} or "
                f"{found.name}:{default}:{given}"
            )
        return str(HubSet(found.name, given))
    if not found.config and not default:
        raise UserError(f"{found.name} has several configurations{_offer(found, given, configs)}")
    return spec


def _offer(found: HubSet, given: str, configs: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(given, configs, n=1)
    split = found.split if found.config or not near else ""  # else what is like a configuration was read as the split
    offered = HubSet(found.name, [*near, *configs][0], split)
    hint = f"; did you mean {offered}?" if near else f": name one, as in {offered}."
    return f"{hint} It has {', '.join(configs)}"


@lru_cache
def _configurations(name: str) -> tuple[tuple[str, ...], str]:
    """Return the configurations of a data set, and the one that is used if none is named; empty if none is."""
    import datasets

    with _without_retries():
        if datasets.config.HF_HUB_OFFLINE and not Path(name).is_dir():
            configs = _cached_configurations(name)
            return configs, configs[0] if len(configs) == 1 else ""
        configs = tuple(datasets.get_dataset_config_names(name))
        return configs, datasets.get_dataset_default_config_name(name) or ""


def _cached_configurations(name: str) -> tuple[str, ...]:
    """List the configurations in the library's cache. Raises FileNotFoundError if there are none."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    organisation, own = name.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE) / f"{organisation}___{camelcase_to_snakecase(own)}"
    if not (found := tuple(sorted(path.name for path in folder.glob("*") if path.is_dir()))):
        raise FileNotFoundError(folder)
    return found


def _splits(name: str, config: str) -> list[str]:
    import datasets

    with _without_retries():
        return list(datasets.get_dataset_split_names(name, config))


@contextmanager
def _without_retries() -> Iterator[None]:
    """Use what is on this machine alone if the hub does not answer: the library would try for half a minute."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not hub_answers()
    try:
        yield
    except ConnectionError as error:
        if before or hub_answers():
            raise
        raise ConnectionError("the hub does not answer, and its cache on this machine has none of this name") from error
    finally:
        config.HF_HUB_OFFLINE = before


def use_cache_without_hub(name: str) -> None:
    """Switch the hub's library offline for this process, if ``name`` is nothing here and the hub does not answer.

    It then finds what is in its cache, and says at once what is not: it would try for half a minute, for every file.
    """
    from huggingface_hub import constants

    if not Path(name).exists() and not hub_answers():
        constants.HF_HUB_OFFLINE = True


@lru_cache
def hub_answers() -> bool:
    """Tell whether the hub can be reached; asks it once."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)
    except Exception:  # of whichever library it uses for requests
        return False
    return True
