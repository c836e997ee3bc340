"""How many bytes autograd keeps for backward, measured by watching what it saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from types import TracebackType

import torch
from torch.autograd.graph import saved_tensors_hooks


class SavedBytes:
    """Within it, what autograd saves is counted once a storage; `peak` is the most that was kept at a time.

    Storages of `parameters` are not counted: they are there anyway.
    """

    def __init__(self, parameters: Iterable[torch.Tensor] = ()) -> None:
        self.now = self.peak = 0
        self._known = {each.untyped_storage().data_ptr() for each in parameters}
        self._kept: Counter[int] = Counter()  # how often each storage is saved, by its address
        self._hooks = saved_tensors_hooks(self._save, lambda saved: saved.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _save(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(tensor, self)

    def _count(self, storage: torch.UntypedStorage, change: int) -> None:
        place = storage.data_ptr()
        if place in self._known:
            return
        before = self._kept[place]
        self._kept[place] = before + change
        if (before == 0) != (before + change == 0):
            self.now += change * storage.nbytes()
            self.peak = max(self.peak, self.now)


class _Saved:
    """A saved tensor; autograd drops it when backward has used it."""

    def __init__(self, tensor: torch.Tensor, counter: SavedBytes) -> None:
        self.tensor, self._counter = tensor, counter
        counter._count(tensor.untyped_storage(), 1)

    def __del__(self) -> None:
        self._counter._count(self.tensor.untyped_storage(), -1)
