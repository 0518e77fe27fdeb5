"""Bytes of all tensors that are alive, and the most there were: on any device, and on fake tensors, which have none.

torch counts memory on GPUs only, and its tracker for other devices wants every parameter to have a gradient.
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
    """Counts the storages that operations within it return, until they are freed.

    Args:
        there: Tensors that exist already and are to be counted, such as a model's parameters.
        outside: Tensors that exist already and are not, such as training data, though parts of them are used.

    Attributes:
        now: Bytes alive.
        peak: The largest ``now`` since the last `restart`.
    """

    def __init__(self, there: Iterable[Tensor] = (), outside: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = WeakIdKeyDictionary()
        for tensor in outside:
            self._sizes[tensor.untyped_storage()] = None
        self.count(there)

    def count(self, there: Iterable[Tensor]) -> None:
        """Count tensors that no operation within it has returned."""
        for tensor in there:
            self._count(tensor)

    def restart(self) -> None:
        """Forget the peak."""
        self.peak = self.now

    def __enter__(self) -> LiveBytes:
        resize = torch.UntypedStorage.resize_

        # How FSDP2 frees gathered weights, and fills them again.
        def resized(storage: torch.UntypedStorage, size: int) -> object:
            found = resize(storage, size)
            if self._sizes.get(storage) is not None:
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
            if storage not in self._sizes:
                self._sizes[storage] = size = [0]  # the finalizer is not to hold the storage
                weakref.finalize(storage, self._freed, size)
            if self._sizes[storage] is not None:
                self._resize(storage)

    def _resize(self, storage: torch.UntypedStorage) -> None:
        size = self._sizes[storage]
        self.now += storage.nbytes() - size[0]
        size[0] = storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _freed(self, size: list[int]) -> None:
        self.now -= size[0]


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those it consists of (a DTensor's shard)."""
    if hasattr(tensor, "_local_tensor"):
        return [tensor._local_tensor]
    return [tensor] if type(tensor) in _STORED or isinstance(tensor, torch._subclasses.FakeTensor) else []


_STORED = (Tensor, torch.nn.Parameter)
