"""Current and peak bytes of all live tensors, on any device and of fake tensors too.

torch counts memory on GPUs only, and its tracker for other devices needs a gradient for every parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations in this mode return, until they are freed.

    Args:
        there: Existing tensors to count, such as a model's parameters.
        outside: Existing tensors not to count, nor views of them, such as training data.

    Attributes:
        now: Bytes alive.
        peak: The largest ``now`` since the last `restart`.
    """

    def __init__(self, there: Iterable[Tensor] = (), outside: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes, self._outside = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        for tensor in outside:
            self._outside[tensor.untyped_storage()] = True
        self.count(there)

    def count(self, there: Iterable[Tensor]) -> None:
        """Count further existing tensors."""
        for tensor in there:
            self._count(tensor)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> object:
            """FSDP2 resizes storages to free and refill gathered weights."""
            found = resize(storage, size)
            if storage in self._sizes:
                self._resize(storage)
            return found

        self._patch = mock.patch.object(torch.UntypedStorage, "resize_", resized)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._patch.stop()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        pytree.tree_map_only(Tensor, self._count, found)
        return found

    def _count(self, tensor: Tensor) -> None:
        for part in _plain(tensor):
            storage = part.untyped_storage()
            if storage in self._outside or part.device.type == "meta":  # the latter has a size but no bytes
                continue
            if storage not in self._sizes:
                self._sizes[storage] = size = [0]  # a list, so that the finalizer does not hold the storage
                weakref.finalize(storage, self._freed, size)
            self._resize(storage)

    def _resize(self, storage: torch.UntypedStorage) -> None:
        size = self._sizes[storage]
        self.now += storage.nbytes() - size[0]
        size[0] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _freed(self, size: list[int]) -> None:
        self.now -= size[0]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the tensor itself, or the local shard of a DTensor; nothing for other subclasses."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]
    return [tensor] if type(tensor) in _STORED or isinstance(tensor, torch._subclasses.FakeTensor) else []


_STORED = (Tensor, torch.nn.Parameter)
