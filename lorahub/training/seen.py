"""What modules are given while a model runs: for beginnings that look at it.

Runs the model as it is, without gradients and in the mode that it is in.  Knows no kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorahub.bases.layout import Target
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.opening import Base
from lorahub.training.grounds import Inputs, Terrain

if TYPE_CHECKING:
    from torch import nn

__all__ = ["seen"]


def seen(base: Base, terrain: Terrain, targets: Sequence[Target], batches: Iterable[Any] | None) -> Inputs:
    """What gives a module's inputs, as rows [n, in * prod(k)]; None for modules that were not called, or no batches.

    Args:
        base: the live base.
        terrain: where targets lie.
        targets: what is trained.
        batches: what the model is called with: a mapping by keyword, a tuple or list in order, anything else alone.

    Raises:
        UsageError: there is no batch in them.
    """
    if batches is None:
        return lambda _target: None
    model = base.model
    assert model is not None
    rows: dict[str, list[torch.Tensor]] = {}
    names = {base.index.parameters[terrain.layouts[target].pieces[0].parameter].stored_as for target in targets}
    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(_keeping(rows, name)) for name in names
    ]
    try:
        ran = _run(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    if not ran:
        raise UsageError("batches holds none", "give one or more, as the model is called with them")

    def inputs(target: Target) -> Callable[[], torch.Tensor] | None:
        piece = terrain.layouts[target].pieces[0]
        found = rows.get(base.index.parameters[piece.parameter].stored_as)
        if not found:
            return None
        return lambda: _rows(torch.cat(found), base, terrain, target)

    return inputs


def _keeping(rows: dict[str, list[torch.Tensor]], name: str) -> Callable[..., None]:
    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            rows.setdefault(name, []).append(args[0].detach())

    return keep


def _run(model: nn.Module, batches: Iterable[Any]) -> int:
    count = 0
    with torch.no_grad():
        for batch in batches:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    return count


def _rows(given: torch.Tensor, base: Base, terrain: Terrain, target: Target) -> torch.Tensor:
    """Inputs as rows; of a convolution, one for each place that its kernel meets."""
    info = base.index.parameters[terrain.layouts[target].pieces[0].parameter]
    module: Any = terrain.model.get_submodule(info.stored_as.rpartition(".")[0])
    if info.role != "conv":
        return given.reshape(-1, given.shape[-1]).float()
    if len(module.kernel_size) != 2 or module.groups != 1 or isinstance(module.padding, str):
        raise UsageError(f"{target.module}: inputs are looked at for convolutions of pictures without groups only")
    places = torch.nn.functional.unfold(
        given.float(), module.kernel_size, module.dilation, module.padding, module.stride
    )
    return places.transpose(1, 2).reshape(-1, places.shape[1])
