"""What is added to the output of a module whose weight tensor parallelism shards: every process adds its own part.

A weight that is cut by outputs gives some of the outputs, to which their own rows of ``up`` belong.  One that is cut by
inputs sees some of them, which meet their own columns of ``down``, and gives one part of a sum; what is added is one
part of it too, and nothing is sent.  Only where the module has made the sum already, as Transformers does within the
call, the product between the factors is summed over the processes before it goes on: r numbers for each token.
FSDP2 is not meant: its modules compute with whole weights.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias, final

from lorahub.bases.placements import Runs, held_positions, is_sharded
from lorahub.deltas.delta import LowRank
from lorahub.errors import Incompatible
from lorahub.lazy import torch
from lorahub.live.entries import ByRow, Entry

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["Parts", "has_part", "is_part", "refused"]

_MERGE = "merge the adapter instead: lorahub.merge(model, ...), which every process does with its own part"

_Act: TypeAlias = "Entry | ByRow"


def has_part(act: _Act, x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether a module's input or output is only this process's part of it."""
    if not _is_one_of_many():
        return False
    if is_sharded(x) or is_sharded(y):
        return True
    out, width = act.spot.sizes()
    if act.site.op == "linear":
        return bool(y.shape[-1] != out or x.shape[-1] != width)
    return act.site.op == "embedding" and y.shape[-1] != width


def is_part(weight: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a weight that a module computes with is only this process's part of it."""
    return is_sharded(weight) or (_is_one_of_many() and tuple(weight.shape) != shape)


def _is_one_of_many() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refused(name: str, why: str, hint: str = _MERGE) -> Incompatible:
    """What to raise where an adapter cannot act on a parameter in parts."""
    return Incompatible(f"{name} is tensor-parallel, and {why}", hint)


@final
class Parts:
    """What is added at one spot, cut to what is here; remembered for the next call."""

    def __init__(self) -> None:
        self._last: tuple[_Act, tuple[int, int, bool], _Act] | None = None

    def add(self, act: _Act, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What ``act.add`` gives for the whole module, as far as it is this process's part.

        Args:
            act: what is added.
            x: the module's input or its part, as a ``DTensor`` or not.
            y: its output, likewise; may be one part of a sum.

        Raises:
            Incompatible: it cannot be told which part is here, gradients are wanted, or what is added has no factors.
        """
        if torch.is_grad_enabled() and (x.requires_grad or act.anew):
            raise refused(
                act.spot.place.name,
                "gradients do not go through what adapters add there",
                "call the model in torch.no_grad(); adapters train on models that FSDP2 shards",
            )
        if is_sharded(y) and _is_sum(y) and act.site.op == "embedding":  # every process can look all words up
            y = _replicated(y)
        given, here = _local(x), _local(y)
        part = self._here(act, given, here, summed=not (is_sharded(y) and _is_sum(y)))
        return _like(y, part.add(given, here)) if is_sharded(y) else part.add(given, here)

    def _here(self, act: _Act, given: torch.Tensor, here: torch.Tensor, *, summed: bool) -> _Act:
        key = (0 if act.site.op == "embedding" else given.shape[-1], here.shape[-1], summed)
        last = self._last
        if last is None or last[0] is not act or last[1] != key:
            last = self._last = act, key, _cut(act, key)
        return last[2]


def _cut(act: _Act, sizes: tuple[int, int, bool]) -> _Act:
    """What is added to some of the outputs for some of the inputs; whether the sum over all inputs is made already."""
    (given, here, summed), site, name = sizes, act.site, act.spot.place.name
    if site.op not in {"linear", "embedding"}:
        raise refused(name, f"nothing is known of parts of a {site.op}")
    if (isinstance(act, Entry) and (act.owns or act.changes)) or (isinstance(act, ByRow) and act.others):
        raise refused(name, "only changes of low rank can be added in parts")
    out, width = act.spot.sizes()
    if site.op == "linear" and not summed and given == width:
        raise refused(name, "it gives part of a sum for whole inputs")
    # of an embedding all rows are here, and its outputs are what others have for inputs
    along = ((out, out), (here, width)) if site.op == "embedding" else ((here, out), (given, width))
    rows, cols = (
        slice(None) if size == whole else _index(_axes(act)[axis], size, name)
        for axis, (size, whole) in enumerate(along)
    )
    over = _groups(act) if given != width and summed and site.op == "linear" else ()
    if isinstance(act, Entry):
        stack = act.stack
        assert stack is not None
        return replace(act, stack=replace(stack, up=stack.up[rows], down=stack.down[:, cols]), over=over)
    if over:
        raise refused(name, "rows of a batch cannot take adapters of their own where its sums are made within the call")
    factors = {each: LowRank(low.up[rows], low.down[:, cols], low.scale) for each, low in act.factors.items()}
    return replace(act, factors=factors)


def _sharded(act: _Act) -> DTensor:
    raw = act.spot.place.raw()
    if not is_sharded(raw):
        raise refused(act.spot.place.name, "nothing says which rows and columns of its weight are here")
    return raw


def _axes(act: _Act) -> tuple[Runs, Runs]:
    """The rows and the columns of the logical weight that are here."""
    one, other = held_positions(act.spot.place.name, _sharded(act))[:2]
    return (other, one) if act.site.transposed else (one, other)


def _groups(act: _Act) -> tuple[ProcessGroup, ...]:
    """The processes that have the other columns of the logical weight."""
    raw, axis = _sharded(act), 0 if act.site.transposed else 1
    return tuple(raw.device_mesh.get_group(n) for n, each in enumerate(raw.placements) if each.is_shard(axis))


def _index(runs: Runs, size: int, name: str) -> slice | torch.Tensor:
    if sum(map(len, runs)) != size:
        raise refused(
            name, f"{sum(map(len, runs))} rows or columns of its weight are here, and it computes with {size}"
        )
    if len(runs) == 1:
        return slice(runs[0].start, runs[0].stop)
    return torch.tensor([position for run in runs for position in run])


def _is_sum(tensor: DTensor) -> bool:
    """Whether the processes' tensors are still to be added up."""
    return any(placement.is_partial() for placement in tensor.placements)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if is_sharded(tensor) else tensor


def _replicated(tensor: DTensor) -> DTensor:
    """With the sums made."""
    whole = import_module("torch.distributed.tensor").Replicate()
    return tensor.redistribute(placements=[whole if each.is_partial() else each for each in tensor.placements])


def _like(tensor: DTensor, here: torch.Tensor) -> DTensor:
    """``here`` as this process's part of what ``tensor`` is a part of."""
    found: DTensor = type(tensor).from_local(
        here, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return found
