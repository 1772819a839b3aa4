"""An adapter's deltas, each built from its file when it is asked for, and forgotten.

What is held is one group of tensors for whoever asked, a few that were asked for last, and those that all share.  The
whole file is gone through once before, in pieces, so that what cannot be merged is known before anything is written.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import Group, Kind, TensorRef
from lorahub.errors import NotFinite
from lorahub.files.dtypes import DTYPES, to_torch, torch_shape
from lorahub.files.tensors import FileSource
from lorahub.formats.assembly import build_deltas
from lorahub.formats.format import Reading
from lorahub.formats.pages import Paged, Pages
from lorahub.lazy import torch

__all__ = ["KEPT", "OnDemand"]

KEPT = 24 << 20
"""Bytes of deltas that were asked for last: a stack of experts is asked for once for each of them."""


@final
class OnDemand(Mapping[Target, Delta]):
    """Deltas by target.  May be asked from several threads.

    Attributes:
        content: ``sha256:`` over the bytes of every tensor that a delta is built from.
    """

    def __init__(
        self,
        reading: Reading,
        source: FileSource,
        kinds: Mapping[str, Kind],
        index: BaseIndex | None,
        label: str,
        *,
        kept: int | None = None,
    ) -> None:
        """Go through the tensors once.

        Args:
            reading: what the format made of the file.
            source: the file, which stays open as long as this is used.
            kinds: by name.
            index: the base, for its storage.
            label: what people call the adapter.
            kept: bytes of deltas to remember; ``KEPT`` by default.

        Raises:
            NotFinite: naming the tensors with NaN or infinity.
            IntegrityError: the file ends too early.
        """
        self._reading, self._source, self._kinds, self._index = reading, source, kinds, index
        self._most = KEPT if kept is None else kept
        self._groups = {
            Target(group.component, group.module, touch.parameter): group
            for group in reading.groups
            for touch in kinds[group.kind].touches(group)
        }
        self._shared: dict[str, torch.Tensor] = {}
        self._kept: dict[Target, Mapping[Target, Delta]] = {}
        self._sizes: deque[tuple[tuple[Target, ...], int]] = deque()
        self._lock = threading.Lock()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # for pieces this small, threads cost more at their barrier than they save
        try:
            self.content = self._go_through(label)
        finally:
            torch.set_num_threads(threads)

    def __getitem__(self, target: Target) -> Delta:
        group = self._groups[target]
        with self._lock:
            found = self._kept.get(target)
        if found is None:
            found = build_deltas(replace(self._reading, groups=(group,)), _Of(self, group), self._kinds, self._index)[0]
            self._keep(found)
        return found[target]

    def paged(self, target: Target) -> Paged | None:
        """The delta without its values, where it is one large tensor, row for row that of the parameter; else None."""
        group = self._groups.get(target)
        touches = self._kinds[group.kind].touches(group) if group else ()
        if group is None or len(group.slots) != 1 or len(touches) != 1 or not touches[0].local:
            return None
        (ref,) = group.slots.values()
        moved = ref.transposed or ref.stacked or ref.rows or ref.reshaped or ref.expert is not None
        if moved or not Pages.possible(self._source, ref.key):
            return None
        pages = Pages(self._source, ref.key)
        reading = replace(self._reading, groups=(group,), shared={})
        delta = build_deltas(reading, lambda _: pages.tensor, self._kinds, self._index)[0][target]
        same = [tensor for tensor in delta.tensors().values() if tensor.data_ptr() == pages.tensor.data_ptr()]
        whole = len(same) == 1 and same[0].shape == pages.tensor.shape and same[0].is_contiguous()
        fits = delta.shape() == tuple(pages.tensor.shape) and len(delta.tensors()) == 1
        return Paged(delta=delta, pages=pages) if whole and fits else None

    def __iter__(self) -> Iterator[Target]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def tensor(self, ref: TensorRef) -> torch.Tensor:
        """The tensor of a slot as its file has it; of a stack, where that can be, only the one expert."""
        info = self._source.info(ref.key)
        count = info.shape[0] if info.shape else 0
        if ref.expert is None or count < 2 or info.turned or info.dtype not in DTYPES or info.nbytes % count:
            return self._source.read(ref.key)
        size, dtype, shape = info.nbytes // count, to_torch(info.dtype), torch_shape(info.dtype, info.shape)
        raw = torch.empty(size, dtype=torch.uint8)
        self._source.read_into(ref.key, ref.expert * size, raw.numpy().data)
        return raw.view(dtype).reshape(1, *shape[1:])

    def shared(self, key: str) -> torch.Tensor:
        """A tensor that all groups of a kind share; read once."""
        with self._lock:
            if key not in self._shared:
                self._shared[key] = self._source.read(key)
            return self._shared[key]

    def _keep(self, deltas: Mapping[Target, Delta]) -> None:
        """Remember deltas of one group, at the cost of those that were asked for the longest ago."""
        nbytes = sum(tensor.nbytes for delta in deltas.values() for tensor in delta.tensors().values())
        if nbytes > self._most:
            return
        with self._lock:
            for target in deltas:
                self._kept[target] = deltas
            self._sizes.append((tuple(deltas), nbytes))
            while sum(size for _, size in self._sizes) > self._most:
                for target in self._sizes.popleft()[0]:
                    self._kept.pop(target, None)

    def _go_through(self, label: str) -> str:
        reading = self._reading
        keys = [ref.key for group in reading.groups for ref in group.slots.values()]
        keys += [ref.key for ref in reading.shared.values()]
        sha, bad = hashlib.sha256(), []
        for key in sorted(set(keys)):
            info = self._source.info(key)
            sha.update(f"{key} {info.dtype} {list(info.shape)}\n".encode())
            finite = True
            for chunk in self._source.chunks(key):
                sha.update(chunk)
                finite = finite and _finite(chunk, info.dtype)
            if not finite or (info.dtype not in DTYPES and not bool(torch.isfinite(self._source.read(key)).all())):
                bad.append(key)
        if bad:
            more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
            names = ", ".join(sorted(bad, key=keys.index)[:3])
            raise NotFinite(f"{label}: NaN or infinity in {names}{more}", "its training diverged, or it is damaged")
        return f"sha256:{sha.hexdigest()}"


@final
class _Of:
    """The tensors of one group, by key."""

    def __init__(self, deltas: OnDemand, group: Group) -> None:
        self._deltas = deltas
        self._refs = {ref.key: ref for ref in group.slots.values()}

    def __call__(self, key: str) -> torch.Tensor:
        ref = self._refs.get(key)
        return self._deltas.shared(key) if ref is None else self._deltas.tensor(ref)


def _finite(chunk: memoryview, code: str) -> bool:
    """Whether a piece of a tensor has neither NaN nor infinity; its elements are whole in it."""
    if code not in DTYPES or not chunk:
        return True
    dtype = to_torch(code)
    if not (dtype.is_floating_point or dtype.is_complex):
        return True
    values = torch.frombuffer(chunk, dtype=dtype)
    if dtype.is_complex:
        values = torch.view_as_real(values)
    ends = torch.stack(torch.aminmax(values.float() if dtype.itemsize == 1 else values))  # both are NaN where one is
    return bool(torch.isfinite(ends).all())
