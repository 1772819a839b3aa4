"""Deltas in kohya's and LyCORIS's spelling, module by module, and what there is no word for.

Calls the kinds to take deltas apart; knows no files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Spelling, TensorRef
from lorahub.errors import CannotCarry
from lorahub.files.dtypes import from_torch
from lorahub.formats.flat_names import PREFIXES, take_apart
from lorahub.formats.gather import Ways
from lorahub.formats.modules import flat
from lorahub.lazy import torch

__all__ = ["Draft"]


class Draft:
    """What has been spelled so far, and what could not be."""

    def __init__(self, ways: Ways) -> None:
        self._ways = ways
        self.tensors: dict[str, torch.Tensor] = {}
        self.names: dict[str, str] = {}
        self.lost: dict[str, list[str]] = defaultdict(list)

    def spell(self, component: str, module: str, prefix: str, parameters: Mapping[str, Delta]) -> None:
        """Add one module's tensors."""
        targets = [Target(component, module, parameter).name for parameter in parameters]
        stem = f"{prefix}_{flat(module)}"
        if not prefix or PREFIXES[prefix] != component:
            self.lost[f"there is no prefix for the component {component!r}"] += targets
        elif not module:
            self.lost["a parameter of no module has no name"] += targets
        elif stem in self.names:
            self.lost[f"{stem} would also mean {self.names[stem]}"] += targets
        elif take_apart(f"{stem}.alpha")[0] != prefix:
            self.lost[f"{stem} would be read under another prefix"] += targets
        else:
            try:
                self.tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in self._tensors(parameters).items()}
                self.names[stem] = module
            except CannotCarry as error:
                self.lost[error.message] += targets

    def _tensors(self, parameters: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
        """Suffix -> tensor: factors for the weight, differences beside them or by themselves."""
        whole = {name: delta for name, delta in parameters.items() if delta.kind == "full"}
        rest = {name: delta for name, delta in parameters.items() if name not in whole}
        result: dict[str, torch.Tensor] = {}
        for name, delta in whole.items():
            suffix = {"weight": "diff", "bias": "diff_b"}.get(name)
            way = next(((kind, spelling) for kind, spelling in self._ways if kind.name == "full"), None)
            taken = way[0].dissolve({name: delta}) if way else None
            if suffix is None or way is None or taken is None:
                raise CannotCarry(f"there is no word for a difference on {name}")
            tensors, options = taken
            way[1].config({"": Group(module="", parameter=name, kind="full", slots={}, options=options)})
            result[suffix] = tensors["diff"]
        return result | self._factors(rest) if rest else result

    def _factors(self, parameters: Mapping[str, Delta]) -> dict[str, torch.Tensor]:
        taken = next(
            (
                (kind, spelling, *apart)
                for kind, spelling in self._ways
                if kind.name != "full" and (apart := kind.dissolve(parameters)) is not None
            ),
            None,
        )
        if taken is None:
            raise CannotCarry(
                f"there is no word for {' and '.join(sorted({each.kind for each in parameters.values()}))}"
            )
        kind, spelling, tensors, options = taken
        if kind.name == "dora":
            tensors["magnitude"] = _dora_shape(tensors, options)
        return _spelled(kind, spelling, tensors, options)

    def refusal(self) -> CannotCarry:
        """The error that lists it all."""
        lines = [
            f"{reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for reason, names in sorted(self.lost.items())
        ]
        return CannotCarry("this adapter cannot be written in kohya's spelling\n  " + "\n  ".join(lines))


def _dora_shape(tensors: Mapping[str, torch.Tensor], options: Mapping[str, JSON]) -> torch.Tensor:
    """Lengths with ones on every axis but their own, which tells the axis even beside a square weight."""
    axis, dims = options["axis"], tensors["down"].dim()
    return tensors["magnitude"].reshape([-1 if dim == axis else 1 for dim in range(dims)])


def _spelled(
    kind: Kind, spelling: Spelling, tensors: Mapping[str, torch.Tensor], options: Mapping[str, JSON]
) -> dict[str, torch.Tensor]:
    suffixes = {leaf.slot: leaf for leaf in reversed(spelling.leaves)}
    if missing := sorted(slot for slot in tensors if slot not in suffixes):
        raise CannotCarry(f"there is no word for {', '.join(missing)} of {kind.title}")
    slots = {
        slot: TensorRef(key=slot, shape=tuple(tensor.shape), dtype=from_torch(tensor.dtype))
        for slot, tensor in tensors.items()
    }
    group = Group(module="", kind=kind.name, slots=slots, options=options)
    numbers = spelling.config({"": group})
    result = {
        suffixes[slot].suffix: tensor.transpose(0, 1) if suffixes[slot].transposed else tensor
        for slot, tensor in tensors.items()
    }
    like = next(iter(tensors.values())).dtype
    return result | {name: _number(value, like) for name, value in numbers.items() if isinstance(value, int | float)}


def _number(value: float, like: torch.dtype) -> torch.Tensor:
    """The number as a tensor: in the factors' dtype where that has over eight bits and holds it exactly, or wider."""
    fitting = [like] if like.is_floating_point and like.itemsize > 1 else []  # nobody reads an alpha of eight
    tensors = (torch.tensor(value, dtype=dtype) for dtype in (*fitting, torch.float32))
    return next((each for each in tensors if float(each) == value), torch.tensor(value, dtype=torch.float64))
