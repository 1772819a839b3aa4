"""GPTQ and AWQ: linear modules of several libraries, run live and never written.

Their codes were chosen by calibration (Frantar et al., arXiv 2210.17323; Lin et al., arXiv 2306.00978): rounding other
numbers to the same grid would undo what makes such a weight good.  Recognised by the names of packages and classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, final

from lorahub.errors import Incompatible
from lorahub.files.header import TensorInfo
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.storages.storage import Coded, Held, Storage, class_names, device_of, own_tensors
from lorahub.storages.stored import Read, Settings, Stored

if TYPE_CHECKING:
    from torch import nn

__all__ = ["GPTQAndAWQ", "lorahub_storages"]

_PACKAGES = ("gptqmodel", "auto_gptq", "awq", "autoawq")
_PACKED = ("qweight", "qzeros", "scales", "g_idx")
_METHODS: Mapping[str, str] = MappingProxyType({"awq": "AWQ", "wqlinear": "AWQ", "autoawq": "AWQ"})
"""Part of a class's name, in lower case -> the method; GPTQ where there is none of these."""


@final
class GPTQAndAWQ:
    """GPTQ and AWQ layers."""

    name = "gptq-awq"
    library = "gptqmodel"

    def holds(self, module: nn.Module) -> Mapping[str, Held]:
        """The weight that a packed linear module stands for."""
        names = class_names(module)
        if not any(name.partition(".")[0] in _PACKAGES for name in names):
            return {}
        if not hasattr(module, "qweight") or not (hasattr(module, "in_features") and hasattr(module, "out_features")):
            return {}
        method = next((said for part, said in _METHODS.items() if part in names[0].lower()), "GPTQ")
        return {"weight": _Weight(module, method)}

    def stored(self, settings: Settings, tensors: Mapping[str, TensorInfo], read: Read) -> tuple[Stored, ...] | None:
        """Refuse: their codes are packed by each library in its own way.

        Raises:
            Incompatible: it is one of theirs.
        """
        method = settings.get("quant_method")
        if method not in ("gptq", "awq"):
            return None
        raise Incompatible(
            f"a checkpoint of {str(method).upper()} is read by its own library only",
            "merge into the base in 16 bits that it was made from; or load it and attach the adapter live",
        )


@final
@dataclass(frozen=True, slots=True)
class _Weight:
    """The weight of a GPTQ or AWQ linear module."""

    module: Any
    method: str

    scales = "kept"

    @property
    def storage(self) -> str:
        return f"{self.method} int{self.bits}"

    @property
    def bits(self) -> int:
        return int(getattr(self.module, "bits", 0) or getattr(self.module, "w_bit", 4))

    @property
    def op(self) -> Literal["linear", "embedding", ""]:
        return "linear"

    @property
    def identity(self) -> int:
        return id(self.module)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self.module.out_features), int(self.module.in_features))

    @property
    def dtype(self) -> torch.dtype:
        scales = getattr(self.module, "scales", None)
        return torch.float16 if scales is None else scales.dtype

    @property
    def hidden(self) -> tuple[str, ...]:
        return tuple(sorted(own_tensors(self.module).intersection(_PACKED)))

    @property
    def refusal(self) -> str:
        return f"{self.method} chose its codes with calibration data, and rounding to the nearest of them is not that"

    def read(self) -> Coded:
        raise Incompatible(
            f"a weight cannot be read, because it is packed by {self.method}", "attach the adapter live instead"
        )

    def write(self, coded: Coded) -> None:
        raise Incompatible(f"a weight cannot be changed, because {self.refusal}", "attach the adapter live instead")


@hookimpl
def lorahub_storages() -> list[Storage]:
    """The storage of this file."""
    return [GPTQAndAWQ()]
