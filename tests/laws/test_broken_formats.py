"""A format that breaks a law is told so in a sentence, law by law."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorahub.deltas.lora import LoRA
from lorahub.errors import CannotCarry
from lorahub.findings import Claim
from lorahub.testing import FORMAT_LAWS, FormatCase

sys.path.append(str(Path(__file__).parents[2] / "examples" / "plugin_format"))
from lorahub_slashed import CONFIG, FILE, Slashed


class Whole:
    """``Slashed``, with methods of its own in the place of some."""

    name = "slashed"

    def __init__(self) -> None:
        self.sound = Slashed()

    def claims(self, files: Any) -> Claim | None:
        return self.sound.claims(files)

    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        return self.sound.read(files, kinds, index)

    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        return self.sound.write(deltas, kinds, hints)


class Greedy(Whole):
    def claims(self, files: Any) -> Claim | None:
        return Claim(1.0, "why not")


class Doubtful(Whole):
    def claims(self, files: Any) -> Claim | None:
        return Claim(7.0, "very sure") if super().claims(files) else None


class Opens(Whole):
    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        (files.folder / FILE).read_bytes()
        return super().read(files, kinds, index)


class Computes(Whole):
    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        torch.zeros(1).add_(1)
        return super().read(files, kinds, index)


class Rounds(Whole):
    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        rounded = {
            target: replace(delta, up=delta.up.bfloat16().to(delta.up.dtype)) if isinstance(delta, LoRA) else delta
            for target, delta in deltas.items()
        }
        return super().write(rounded, kinds, hints)


class Flattens(Whole):
    """Modules under names in which dots and underscores are one."""

    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        return super().write({replace(at, module=flat(at.module)): each for at, each in deltas.items()}, kinds, hints)

    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        reading = super().read(files, kinds, index)
        named = {flat(module): module for module in ("layers.2.q", "layers.10.k", "head")}
        groups = tuple(replace(each, module=named.get(each.module, each.module)) for each in reading.groups)
        return replace(reading, groups=groups)


def flat(module: str) -> str:
    return module.replace(".", "_")


class Forgets(Whole):
    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        return replace(super().read(files, kinds, index), findings=())


class Halves(Whole):
    """Takes a module for whole whatever is there of it."""

    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        header = files.headers[FILE]
        lost = [key for key in header.tensors if key.endswith("/A") and key[:-1] + "B" not in header.tensors]
        kept = {key: info for key, info in header.tensors.items() if key not in lost}
        reading = super().read(replace(files, headers={FILE: replace(header, tensors=kept)}), kinds, index)
        if not lost or not reading.groups:
            return reading
        slots = dict(list(reading.groups[0].slots.items())[:1])
        halves = [
            replace(reading.groups[0], module="half", slots={"down": replace(slots["down"], key=key)}) for key in lost
        ]
        return replace(reading, groups=(*reading.groups, *halves))


class Trusts(Whole):
    def read(self, files: Any, kinds: Any, index: Any) -> Any:
        known = {"scale": files.configs[CONFIG].get("scale", 1.0)}
        return super().read(replace(files, configs={CONFIG: known}), kinds, index)


class Drops(Whole):
    """Writes what it has words for, and says nothing of the rest."""

    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        known = {at: each for at, each in deltas.items() if isinstance(each, LoRA) and at.parameter == "weight"}
        if not known and all(each.kind != "law-unknown" for each in deltas.values()):
            raise CannotCarry("there is no word for any of it")
        return super().write(known, kinds, hints)


class Fickle(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        self.count += 1
        return replace(super().write(deltas, kinds, hints), metadata={"count": str(self.count)})


class Silent(Whole):
    def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
        try:
            return super().write(deltas, kinds, hints)
        except CannotCarry:
            raise CannotCarry("no") from None


BROKEN: dict[type[Whole], tuple[str, str]] = {
    Greedy: ("claims_are_honest", "slashed: it claims a folder without weights"),
    Doubtful: ("claims_are_honest", "a claim is more than 0 and at most 1, and this one is 7.0"),
    Opens: ("headers_are_enough", "lora as it writes it: reading opens a file"),
    Computes: ("headers_are_enough", "reading headers calls torch: zeros"),
    Rounds: ("what_is_written_reads_back", "layers.2.q.weight, layers.10.k.weight, head.weight read back otherwise"),
    Flattens: ("no_two_slots_are_spelled_alike", "cannot be told from others that it wrote"),
    Forgets: ("every_key_is_accounted_for", "has not accounted for 1 of 7 tensors, first: nobody.knows.this"),
    Halves: ("half_a_change_is_no_change", "is read as lora without its up"),
    Trusts: ("unknown_fields_are_told", "nobody_knows_this may change the arithmetic, and passes unnoticed"),
    Drops: ("writing_is_plain", "a change of a kind that nobody knows is written as if it were known"),
    Fickle: ("writing_is_plain", "written twice, the same adapter gives other files"),
    Silent: ("writing_is_plain", "layers.2.q.weight cannot be written, and the error names no target"),
}
SPOILT = {cls.__name__: cls for cls in BROKEN}


@pytest.mark.parametrize("name", SPOILT)
def test_a_format_that_breaks_a_law_is_told(name: str) -> None:
    law, sentence = BROKEN[SPOILT[name]]
    with pytest.raises(AssertionError) as told:
        FORMAT_LAWS[law](SPOILT[name](), FormatCase())
    assert sentence in str(told.value)


def test_every_law_is_broken_once() -> None:
    assert {law for law, _ in BROKEN.values()} == set(FORMAT_LAWS)


def test_a_format_that_writes_nothing_needs_a_folder() -> None:
    class Reads(Whole):
        def write(self, deltas: Any, kinds: Any, hints: Any) -> Any:
            raise CannotCarry("it is read only")

    with pytest.raises(AssertionError, match="writes none of the kinds, and FormatCase has no folder"):
        FORMAT_LAWS["what_is_written_reads_back"](Reads(), FormatCase())


def test_a_format_whose_module_imports_torch_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(sys.modules[Slashed.__module__].__file__ or "").read_text()
    (tmp_path / "hasty_format.py").write_text(source.replace("from typing", "import torch\nfrom typing", 1))
    monkeypatch.syspath_prepend(str(tmp_path))
    import hasty_format

    with pytest.raises(AssertionError, match=r"importing hasty_format imports torch; use lorahub\.lazy"):
        FORMAT_LAWS["headers_are_enough"](hasty_format.Slashed(), FormatCase())
