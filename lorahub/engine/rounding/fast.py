"""``fast``: at least 99.99 % of the elements equal the float64 result rounded once.

None of the others is off by more than one unit in the last place of the larger of weight and result.  Products go onto
weights in one pass of a compiled kernel (``kernels``); where there is none, those of bfloat16 factors go onto bfloat16
weights in one pass of PyTorch's own, and all else is summed window by window.  Sums are float32 where that is
enough and float64 where it is not (``_ENOUGH``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import MappingProxyType
from typing import final

from lorahub.engine.folding.recipes import (
    Factors,
    Launchable,
    Launching,
    Notable,
    Noting,
    Recipe,
    Stretch,
    joined,
    leading,
)
from lorahub.engine.folding.sums import Change, Sums
from lorahub.engine.folding.windows import sample
from lorahub.engine.kernels.choice import merger, native, noter
from lorahub.engine.kernels.merge_c import Notes, Packed
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.nearest import round_into
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch

__all__ = ["FAST", "KERNEL_PLAIN", "Fast", "Product", "float32_is_float32", "has_kernel", "told_of_kernels"]

KERNEL_PLAIN = "kernel-plain"
"""Code of the finding that a device has a compiled kernel for what was merged there, and it could not run."""

_ENOUGH = {"bfloat16": 0.125, "float16": 0.02}
"""How large a change of low rank may be, over the weights, for float32 sums to keep the promise; any for 8 bits, and
float32 is summed in float64.

Measured up to rank 512 as the share of elements that differ from float64 rounded once.  bfloat16: 2 to 4 in 100,000 for
a change of a tenth of the weights, 7 to 20 where it is as large.  float16 keeps three bits more: 4 to 6 at 0.02.
"""

_LEAST = 1 << 16  # multiplications in a window below which the library's kernel is another one


@final
@dataclass(frozen=True, slots=True)
class Fast:
    """The default mode."""

    @property
    def spelled(self) -> str:
        """Its name."""
        return "fast"

    def fault(self, step: Step, role: str) -> str:
        """Nothing is."""
        return ""

    def sums(self, storage: torch.dtype) -> torch.dtype:
        """Float32 for bfloat16 and 8-bit storage, float64 for anything finer.

        Float16 keeps eleven bits: the roundings of a float32 sum reach them in more than one of ten thousand elements
        where a change is as large as its weight.
        """
        return torch.float32 if storage.itemsize < 4 and storage != torch.float16 else torch.float64

    def round(self, total: torch.Tensor, out: torch.Tensor, name: str, first: int) -> None:
        """To the nearest, ties to even."""
        round_into(total, out)

    def product(self, factors: Sequence[Factors], sums: Sums) -> Recipe:
        """See ``Product``."""
        return Product(factors, sums)


FAST = Fast()


@final
@dataclass(frozen=True, slots=True)
class _Look:
    """Some rows before they are folded.

    Attributes:
        pick: which, of a stretch.
        share: for how many each stands.
        kept: what they held.
        added: what is added to them.
    """

    pick: slice
    share: float
    kept: torch.Tensor
    added: torch.Tensor

    def change(self, at: Stretch) -> Change:
        """What became of them."""
        return Change.of(self.kept, self.added, at.out[self.pick].to(self.kept.dtype).flatten(1), self.share)


@final
class Product(Notable, Launchable):
    """Low-rank changes alone, as one product."""

    def __init__(self, factors: Sequence[Factors], sums: Sums) -> None:
        self._factors, self._weight = factors, leading(factors)
        self._made: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._to_nearest = sums.mode == FAST  # as compiled kernels round; other modes round what is summed here
        storage = sums.storage
        self._kernel = native().kernel if self._to_nearest and sums.device.type == "cpu" else None
        if self._kernel is not None and not self._kernel.takes(storage, sum(len(each.down) for each in factors)):
            self._kernel = None
        self._native = _native(factors, sums) if self._kernel is None else None
        self._packed: Packed | None = None
        self._short = torch.float32 if storage.itemsize < 4 and float32_is_float32() else torch.float64
        self._enough = _ENOUGH.get(str(storage).removeprefix("torch."))

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``; the rows that are measured decide the dtype of the sums."""
        if self._is_compiled(at):
            here = at.together()
            if (change := self._foreseen(here)) is not None:
                self._compiled(here, 1.0)
                at.take(here)
                return change
        look = self._look(at)
        if not self._is_enough(float(look.kept.norm()), float(look.added.norm())):
            self._add(at, sums, torch.float64)
        elif not self._launched(at) and (self._native is None or not self._native.fold(at, self._weight)):
            self._add(at, sums, self._short)
        return look.change(at)

    def noting(self, at: Stretch, sums: Sums) -> Noting | None:
        """See ``Notable``."""
        if not self._is_compiled(at) or not at.lies_together:
            return None
        change = self._foreseen(at)
        return None if change is None else Noting(partial(self._compiled, at, 1.0), lambda: change)

    def put(self, at: Stretch, sign: float = 1.0) -> None:
        """See ``Notable``."""
        here = at.together()
        if self._kernel is not None:
            self._compiled(here, sign)
        else:
            ready = self.launching(here, None)
            assert ready is not None  # as when it was noted
            noter(at.out.device, at.out.dtype).run.put([replace(ready.patch, scale=ready.patch.scale * sign)])
        at.take(here)

    def operands(self, at: Stretch, sign: float = 1.0) -> tuple[torch.Tensor, ...]:
        """See ``Notable``."""
        packed = self._pack(at)
        return packed.up[at.rows], packed.down, torch.tensor(self._weight * sign, dtype=torch.float64)

    def launching(self, at: Stretch, saved: torch.Tensor | None) -> Launching | None:
        """See ``Launchable``."""
        if not self._to_nearest or not has_kernel(at.out.device, at.out.dtype):
            return None
        if not at.stays or not at.lies_together:
            return None
        up, down = self._joined(self._stored(torch.float32), at.out.device)
        return Launching(at.patch(up[at.rows], down, self._weight, saved), self._suffices)

    def _pack(self, at: Stretch) -> Packed:
        if self._packed is None:
            assert self._kernel is not None
            dtype = self._stored(torch.float32 if at.out.dtype.itemsize < 4 else torch.float64)
            self._packed = self._kernel.pack(*joined(self._factors, at.out.device, dtype), at.out.dtype)
        return self._packed

    def _stored(self, wide: torch.dtype) -> torch.dtype:
        """``bfloat16`` where that holds the joined factors, as they are stored; ``wide`` elsewhere."""
        alike = {(each.up.dtype, each.down.dtype, each.weight) for each in self._factors}
        return torch.bfloat16 if alike == {(torch.bfloat16, torch.bfloat16, self._weight)} else wide

    def _compiled(self, at: Stretch, sign: float, notes: Notes | None = None, first: int = 0) -> bool:
        """Fold a stretch by the CPU's kernel; whether all results are finite."""
        assert self._kernel is not None
        before, out = at.untouched.view(len(at.out), -1), at.out.view(len(at.out), -1)
        return self._kernel.add(self._pack(at), at.rows, self._weight * sign, before, out, notes, first)

    def _foreseen(self, at: Stretch) -> Change | None:
        """What the CPU's kernel will do to the weights; None where that takes wider sums than it has."""
        assert self._kernel is not None
        pick, share = sample(at.out.shape)
        before = at.untouched.view(len(at.out), -1)
        change = self._kernel.look(self._pack(at), at.rows, self._weight, before, pick).times(share)
        return change if self._suffices(change) else None

    def _suffices(self, change: Change) -> bool:
        return self._is_enough(math.sqrt(change.before), math.sqrt(change.added))

    def _is_compiled(self, at: Stretch) -> bool:
        """Whether the CPU's kernel can fold these rows."""
        return self._kernel is not None and at.stays

    def _look(self, at: Stretch) -> _Look:
        pick, share = sample(at.out.shape)
        up, down = self._joined(self._short, at.out.device)
        added = torch.mm(up[at.rows][pick], down).mul_(self._weight)
        return _Look(pick, share, at.start(pick, self._short).flatten(1), added)

    def _is_enough(self, weights: float, change: float) -> bool:
        """Whether float32 sums of 16-bit weights keep the promise, by the norms of some rows; not where one is NaN."""
        return self._enough is None or change <= self._enough * weights

    def _launched(self, at: Stretch) -> bool:
        """Add the product by the compiled kernel of the device; False, with nothing done, where there is none."""
        ready = self.launching(at, None)
        if ready is not None:
            merger(at.out.device, at.out.dtype).run([ready.patch])()
        return ready is not None

    def _add(self, at: Stretch, sums: Sums, dtype: torch.dtype) -> None:
        up, down = self._joined(dtype, at.out.device)
        for part in at.parts():
            total = part.scratch("total", dtype).copy_(part.untouched)
            total.view(total.shape[0], -1).addmm_(up[part.rows], down, alpha=self._weight)
            sums.mode.round(total, part.out, sums.name, part.first)

    def _joined(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._made.get(dtype)
        if found is None:
            found = self._made[dtype] = joined(self._factors, device, dtype)
        return found


@final
@dataclass(frozen=True, slots=True)
class _Compiled:
    """The compiled kernel of a sort of device.

    Attributes:
        stored: names of the dtypes that it merges into.
        reason: why it does not run on a device for weights of a dtype, or "".
        remedy: what to do about that.
    """

    stored: frozenset[str]
    reason: Callable[[torch.device, torch.dtype], str]
    remedy: str

    def takes(self, storage: torch.dtype) -> bool:
        """Whether it merges into weights of this dtype."""
        return str(storage).removeprefix("torch.") in self.stored


_COMPILED: Mapping[str, _Compiled] = MappingProxyType(
    {
        "cuda": _Compiled(
            frozenset({"bfloat16", "float16"}),
            lambda device, storage: merger(device, storage).reason,
            "for speed: install the triton that this PyTorch asks for, and see that it runs on the device",
        ),
        "cpu": _Compiled(
            frozenset({"bfloat16", "float16", "float32"}),
            lambda _device, _storage: native().reason,
            "for speed: install a C compiler, or name one that works (CC=gcc); LORAHUB_KERNELS=off wants none",
        ),
    }
)
"""Sort of device -> its compiled kernel."""


def has_kernel(device: torch.device, storage: torch.dtype) -> bool:
    """Whether a device beyond the CPU has a kernel that merges into weights of a dtype."""
    return _COMPILED["cuda"].takes(storage) and merger(device, storage).name != "torch"


def told_of_kernels(
    steps: Iterable[Step], forms: Mapping[str, tuple[torch.device, torch.dtype]]
) -> tuple[Finding, ...]:
    """Where the compiled kernel should have merged in this mode and could not, and why: a note for each reason.

    Args:
        steps: what was merged.
        forms: parameter -> the device and dtype that it has.
    """
    plain: dict[tuple[str, str, str], list[str]] = {}
    for step in steps:
        device, storage = forms[step.out]
        kernel = _COMPILED.get(device.type)
        if (
            kernel is not None
            and step.terms
            and step.products
            and kernel.takes(storage)
            and (reason := kernel.reason(device, storage))
        ):
            plain.setdefault((str(device), reason, kernel.remedy), []).append(step.out)
    return tuple(
        Finding(
            code=KERNEL_PLAIN,
            axis="libraries",
            level=Verdict.EXACT,
            message=f"parameters on {device} were merged without the compiled kernel, more slowly and as near to the "
            f"float64 result: {reason}",
            where=tuple(names),
            remedy=remedy,
        )
        for (device, reason, remedy), names in plain.items()
    )


@final
@dataclass(frozen=True, slots=True)
class _Native:
    """Factors that the storage dtype holds exactly."""

    up: torch.Tensor
    down: torch.Tensor

    def fold(self, at: Stretch, weight: float) -> bool:
        """Add the product where the weights lie; False, with nothing done, where another kernel would do it."""
        rows = at.out.shape[0]
        if rows * self.down.numel() < _LEAST or not weight or at.untouched.dtype != at.out.dtype:
            return False
        target = at.out if at.out.is_contiguous() else at.scratch("native", at.out.dtype)
        if target.data_ptr() != at.untouched.data_ptr():
            target.copy_(at.untouched)
        target.view(rows, -1).addmm_(self.up[at.rows], self.down, alpha=weight)
        if target is not at.out:
            at.out.copy_(target)
        return True


def _native(factors: Sequence[Factors], sums: Sums) -> _Native | None:
    """The factors in storage dtype, the weights' ratios within, where nothing is rounded by that; or None."""
    if sums.storage != torch.bfloat16 or sums.device.type != "cpu" or sums.mode != FAST or not _sums_in_float32():
        return None
    up, down = joined(factors, sums.device, torch.float64)
    short = up.to(sums.storage), down.to(sums.storage)
    exact = torch.equal(short[0].double(), up) and torch.equal(short[1].double(), down)
    return _Native(*short) if exact else None


@cache
def _sums_in_float32() -> bool:
    """Whether this machine multiplies bfloat16 in hardware, sums in float32 and rounds once: tried, not believed."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - it has no public name
        return False
    generator = torch.Generator().manual_seed(0)
    up, down, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((64, 64), (64, 96), (64, 96)))
    expected = (weight.double() + 0.37 * (up.double() @ down.double())).bfloat16()
    found = weight.clone().addmm_(up, down, alpha=0.37)
    return int((found != expected).sum()) <= 6  # of 6144; summing in bfloat16 misses thousands


def float32_is_float32() -> bool:
    """Whether products of float32 are that, and the user has not asked PyTorch to make them of something shorter."""
    try:
        return str(torch.get_float32_matmul_precision()) == "highest"
    except RuntimeError:  # set for some backends and not for others, so that PyTorch has no one answer
        return False
