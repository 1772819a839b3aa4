"""A small storage of int8 rows keeps the laws of ``lorahub.testing``, and breaking each is told in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from lorahub.errors import Incompatible
from lorahub.storages.grid import Grid
from lorahub.storages.stored import Stored
from lorahub.testing import STORAGE_LAWS, StorageCase, check_storage


class Rows(nn.Module):
    """A linear layer of int8 codes and a scale for each row."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.float() * self.scale).T


@dataclass(frozen=True)
class Weight:
    module: Any
    storage: str = "rows int8"
    bits: int = 8
    hidden: tuple[str, ...] = ("codes", "scale")
    scales: str = "kept"
    refusal: str = ""
    op: str = "linear"

    identity = property(lambda self: id(self.module.codes))
    shape = property(lambda self: tuple(self.module.codes.shape))
    dtype = property(lambda self: torch.float32)
    device = property(lambda self: self.module.codes.device)

    def read(self) -> Any:
        return self.grid().copy()

    def grid(self) -> Grid:
        return Grid(
            codes=self.module.codes, scale=self.module.scale, block=(1, self.shape[1]), low=-127, high=127
        )  # fmt: skip

    def write(self, coded: Any) -> None:
        self.module.codes.copy_(coded.codes)
        self.module.scale.copy_(coded.scale)


class Storage:
    name = "rows"
    library = "rows-of-nobody"
    weight: type[Weight] = Weight

    def holds(self, module: Any) -> Mapping[str, Any]:
        return {"weight": self.weight(module)} if isinstance(module, Rows) else {}

    def stored(self, settings: Any, tensors: Any, read: Any) -> Any:
        if settings.get("quant_method") != "rows":
            return None
        names = [name.removesuffix("codes") for name in tensors if name.endswith("codes")]
        return tuple(self.one(name, tensors) for name in names)

    def one(self, name: str, tensors: Any) -> Stored:
        parts = (f"{name}codes", f"{name}scale")
        return Stored(
            name=f"{name}weight",
            shape=tensors[parts[0]].shape,
            dtype="F32",
            parts=parts,
            values=lambda read: read(parts[0]).float() * read(parts[1]),
        )


def build() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    return nn.Sequential(Rows(torch.randn(12, 8, generator=generator)), Rows(torch.randn(6, 12, generator=generator)))


CASE = StorageCase(
    build=build,
    run=lambda model: model(torch.randn(5, 8, generator=torch.Generator().manual_seed(1))),
    noise=1e-5,
    settings={"quant_method": "rows"},
    tensors=build().state_dict(),
)


def test_a_sound_storage_keeps_every_law() -> None:
    check_storage(Storage(), CASE)


class Shared(Weight):
    def read(self) -> Any:
        return self.grid()


@dataclass(frozen=True)
class Plain:
    """Values that are handed out themselves."""

    numbers: torch.Tensor
    nbytes = 1

    def values(self) -> torch.Tensor:
        return self.numbers


class HandsOut(Weight):
    def read(self) -> Any:
        return Plain(self.module.scale.expand(self.shape))


class Wrong(Weight):
    def grid(self) -> Grid:
        return replace(super().grid(), unit=2.0)


class Floor(Grid):
    """Rounds down."""

    def requantised(self, values: torch.Tensor) -> Any:
        return replace(self, codes=(values / self.scale + 1e-3).floor().clamp(-127, 127).to(torch.int8))


class Floors(Weight):
    def read(self) -> Any:
        copied = self.grid().copy()
        return Floor(codes=copied.codes, scale=copied.scale, block=copied.block, low=-127, high=127)


class Drifting(Grid):
    def requantised(self, values: torch.Tensor) -> Any:
        return replace(super().requantised(values), scale=self.scale * 1.01)


class Drifts(Weight):
    def read(self) -> Any:
        copied = self.grid().copy()
        return Drifting(codes=copied.codes, scale=copied.scale, block=copied.block, low=-127, high=127)


class Deaf(Weight):
    def write(self, coded: Any) -> None:
        pass


class KeepsScales(Weight):
    """Undoes the codes and forgets the scales."""

    def write(self, coded: Any) -> None:
        self.module.codes.copy_(coded.codes)
        self.module.scale.copy_(torch.maximum(self.module.scale, coded.scale))


@dataclass(frozen=True)
class Obliging(Weight):
    refusal: str = "it may not be written"


@dataclass(frozen=True)
class Refuses(Weight):
    refusal: str = "it may not be written"

    def read(self) -> Any:
        raise Incompatible("it cannot be read")


@dataclass(frozen=True)
class Silent(Refuses):
    refusal: str = ""


def held(weight: type[Weight], **members: Any) -> Any:
    return type("Broken", (Storage,), {"weight": weight, **members})()


BROKEN: dict[str, tuple[str, Any, str]] = {
    "greedy": (
        "modules_are_recognised",
        held(Weight, holds=lambda self, module: {"weight": Weight(module)}),
        "rows: it claims a plain Linear",
    ),
    "nameless": ("modules_are_recognised", held(Weight, library="???"), "its library, '???', is no requirement"),
    "hands out": (
        "reading_changes_nothing",
        held(HandsOut),
        "rows: 0.weight: writing to what was read changes the model",
    ),
    "wrong scales": ("what_is_read_is_what_runs", held(Wrong), "rows: 0.weight does not compute with what is read"),
    "drifting": (
        "own_values_are_kept",
        held(Drifts),
        "rows: 0.weight: stored again unchanged, 95 of 96 elements change",
    ),
    "rounds down": ("other_values_are_rounded_once", held(Floors), "elements are not rounded to the nearest"),
    "deaf": ("writing_is_what_was_rounded", held(Deaf), "rows: 0.weight: read back, it is not what was written"),
    "shared": ("undoing_gives_every_bit", held(KeepsScales), "rows: 0.weight: undone it has other values"),
    "obliging": (
        "what_cannot_be_written_says_so",
        held(Obliging),
        "it says that nothing can be put there, and takes other numbers",
    ),
    "other files": (
        "files_tell_the_same",
        held(Wrong),
        "rows: 0.weight: files and model have other values",
    ),
    "every file": (
        "files_tell_the_same",
        held(Weight, stored=lambda self, settings, tensors, read: ()),
        "it claims a checkpoint of another method",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_storage_that_breaks_a_law_is_told(name: str) -> None:
    law, storage, sentence = BROKEN[name]
    with pytest.raises(AssertionError) as told:
        STORAGE_LAWS[law](storage, CASE)
    assert sentence in str(told.value)


def test_every_law_is_broken_once() -> None:
    assert {law for law, _, _ in BROKEN.values()} == set(STORAGE_LAWS)


def test_a_weight_that_can_only_be_refused_is_left_alone_and_an_unreadable_one_needs_a_reason() -> None:
    check_storage(held(Refuses), replace(CASE, settings={}, tensors={}))
    with pytest.raises(AssertionError, match=r"0\.weight cannot be read and says no reason"):
        STORAGE_LAWS["reading_changes_nothing"](held(Silent), CASE)
