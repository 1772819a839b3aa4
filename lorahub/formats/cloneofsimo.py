"""cloneofsimo/lora's files: factors by position, ``unet:0:up``, or a bare list of up, down, up, down ...

https://github.com/cloneofsimo/lora, the first LoRA for Stable Diffusion.  A safetensors file names the part of the
pipeline, the classes below which layers were adapted, and tokens with their vectors; a list (unpacked from ``.pt``)
says nothing but for the file's name.  Positions become modules with a base only, where one walk over it fits all
shapes (``traversal``); without one they stay positions.  The scale is 1.  Read only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from lorahub import strict_json
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry, IntegrityError
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Part, Reading, Written
from lorahub.formats.marks import Mark
from lorahub.formats.suffixes import Row, unknown_keys
from lorahub.formats.token_vectors import left_out, part_of
from lorahub.formats.traversal import Pair, Walk, walks
from lorahub.hookspecs import hookimpl

__all__ = ["CloneofsimoFormat", "lorahub_formats"]

_EMBED = "<embed>"
_LONGEST = 4096

_UNET = ("CrossAttention", "Attention", "GEGLU")
_USUAL: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "unet": (_UNET, _UNET[:2], ("ResnetBlock2D", *_UNET)),
    "text_encoder": (("CLIPAttention",), ("CLIPAttention", "CLIPMLP")),
}
"""Part of the pipeline -> the classes its releases adapted, the usual ones first; for files that do not say."""

_LISTED = ".text_encoder."
"""In the name of a list that is the text encoder's; the U-Net's has no such word."""


@dataclass(slots=True)
class _Places:
    """The factors of one part: position -> direction -> key; and the sets of classes that could be meant."""

    classes: tuple[tuple[str, ...], ...]
    keys: dict[int, dict[str, str]] = field(default_factory=dict)

    def pairs(self, header: Header) -> tuple[Pair, ...]:
        """The sizes at each position."""
        result = []
        for _, found in sorted(self.keys.items()):
            up, down = header.tensors[found["up"]].shape, header.tensors[found["down"]].shape
            result.append(Pair(up[0], down[1], down[2:]))
        return tuple(result)


@final
class CloneofsimoFormat:
    """Reads cloneofsimo/lora's positional files."""

    name = "cloneofsimo"
    rows = (Row(kind="lora", leaves=(Leaf(slot="up", suffix="up"), Leaf(slot="down", suffix="down"))),)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where keys read ``part:position:up``; less so for a list that alternates between factors."""
        for header in files.headers.values():
            if _OWN.on([header]):
                return Claim(0.95, "tensors are named by part, position and direction")
            if _is_list(header):
                return Claim(0.7, "tensors are a list of factors, up and down in turn")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: a list of classes in the header is none, or a rank in it is another than the tensors have.
        """
        file = only_file(files)
        header = files.headers[file]
        places, others = _sorted(header, file)
        tokens = [key for key in others if header.metadata.get(key) == _EMBED]
        left = [key for key in others if key not in tokens]
        groups: list[Group] = []
        findings: list[Finding] = []
        for part, found in places.items():
            if wrong := _faults(part, found, header):
                findings.append(wrong)
                continue
            walk, said = _placed(part, found, header, index)
            findings += said
            groups += _groups(part, found, header, walk)
        parts: dict[str, Part] = {token: part_of(header, [token]) for token in tokens}
        return Reading(
            format=self.name,
            file=file,
            groups=tuple(groups),
            parts=parts,
            findings=(
                *findings,
                *left_out(parts, others=bool(groups)),
                *unknown_keys(left, "are at no position and no token's vectors"),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always; positions mean nothing without the class they were counted in.
        """
        raise CannotCarry("the format 'cloneofsimo' is read only: it has no names", "write another: diffusers")


def _parsed(key: str) -> tuple[str, int, str] | None:
    """(part, position, direction) of a key."""
    part, _, rest = key.partition(":")
    position, _, direction = rest.partition(":")
    fits = part and position.isascii() and position.isdigit() and len(position) < 6 and direction in ("up", "down")
    return (part, int(position), direction) if fits else None


_OWN = Mark(lambda key: _parsed(key) is not None, ends=(":up", ":down"))


def _is_list(header: Header) -> bool:
    """Whether tensors are called by places, and every two of them are factors of one rank."""
    if not next(iter(header.tensors), "").isdigit():  # which spares nearly every file the sorting
        return False
    keys = sorted(header.tensors)
    if len(keys) < 2 or len(keys) % 2 or any(not key.isdigit() or int(key) != at for at, key in enumerate(keys)):
        return False
    shapes = [header.tensors[key].shape for key in keys]
    pairs = zip(shapes[::2], shapes[1::2], strict=True)
    return all(len(up) == len(down) >= 2 and up[1] == down[0] for up, down in pairs)


def _sorted(header: Header, file: str) -> tuple[dict[str, _Places], list[str]]:
    """Parts with their factors, and the keys that are at no position."""
    places: dict[str, _Places] = {}
    if _is_list(header):
        part = "text_encoder" if _LISTED in file else "unet"
        places[part] = _Places(_USUAL[part])
        for at, key in enumerate(sorted(header.tensors)):
            places[part].keys.setdefault(at // 2, {})[("up", "down")[at % 2]] = key
        return places, []
    others = []
    for key in header.tensors:
        if parsed := _parsed(key):
            part, position, direction = parsed
            if part not in places:
                places[part] = _Places(_classes(header, part))
            places[part].keys.setdefault(position, {})[direction] = key
        else:
            others.append(key)
    return places, others


def _classes(header: Header, part: str) -> tuple[tuple[str, ...], ...]:
    """The classes that the header lists for a part, or the usual ones where it lists none.

    Raises:
        IntegrityError: it lists something else.
    """
    text = header.metadata.get(part)
    if text is None:
        return _USUAL.get(part, ())
    try:
        listed = strict_json.read(text, limit=_LONGEST)
    except strict_json.NotStrict:
        listed = None
    if not isinstance(listed, list) or not all(isinstance(each, str) for each in listed):
        raise IntegrityError(f"the header says {part} = {text[:80]!r}, which is no list of classes", "fetch it again")
    return (tuple(listed),)


def _faults(part: str, found: _Places, header: Header) -> Finding | None:
    """What is wrong with positions, halves and ranks, for all keys of a part."""
    wrong: list[str] = []
    for position, keys in sorted(found.keys.items()):
        where = f"{part}:{position}"
        if len(keys) < 2:
            wrong.append(f"{where} has only {next(iter(keys))}")
            continue
        up, down = header.tensors[keys["up"]].shape, header.tensors[keys["down"]].shape
        if len(up) != len(down) or len(up) < 2 or up[1] != down[0] or any(size != 1 for size in up[2:]) or not up[1]:
            wrong.append(f"{where} has up {list(up)} and down {list(down)}")
        said = header.metadata.get(f"{where}:rank", str(down[0] if down else 0))
        if said != str(down[0] if down else 0):
            wrong.append(f"{where} has rank {said[:20]} in the header, and down {list(down)}")
    if not wrong and sorted(found.keys) != list(range(len(found.keys))):
        wrong.append(f"{part} has {len(found.keys)} positions, the last {max(found.keys)}")
    if not wrong:
        return None
    return Finding(
        code="slot-misfit",
        axis="integrity",
        level=Verdict.INCOMPATIBLE,
        message=f"factors by position do not fit together: {wrong[0]}",
        where=tuple(sorted(key for keys in found.keys.values() for key in keys.values())),
        remedy="fetch the file again, or ask its author",
    )


def _placed(part: str, found: _Places, header: Header, index: BaseIndex | None) -> tuple[Walk | None, list[Finding]]:
    """The one walk over the base that fits, or None and why; a base without that part needs no words here."""
    keys = tuple(sorted(key for each in found.keys.values() for key in each.values()))
    below = ", ".join(found.classes[0]) if found.classes else "classes that it does not name"
    said = f"{part} has {len(found.keys)} changes by position below {below}"
    if index is None:
        return None, [_finding("base-needed", f"{said}; which modules those are, a base tells", keys)]
    pairs = found.pairs(header)
    met = [walk for classes in found.classes for walk in walks(index, classes) if walk.component in ("", part)]
    every = list({(walk.component, walk.modules): walk for walk in met}.values())
    fitting = [walk for walk in every if len(walk.modules) == len(pairs) and _fits(walk, pairs, index)]
    if len(fitting) == 1:
        return fitting[0], []
    if not every:
        return None, []
    counts = " or ".join(str(count) for count in sorted({len(walk.modules) for walk in every}))
    why = f"{len(fitting)} walks over it fit alike" if fitting else f"it has {counts} such layers, or others' shapes"
    return None, [_finding("layout-undeclared", f"{said}, and this base is no place for them: {why}", keys)]


def _fits(walk: Walk, pairs: Sequence[Pair], index: BaseIndex) -> bool:
    prefix = f"{walk.component}:" if walk.component else ""
    for module, pair in zip(walk.modules, pairs, strict=True):
        info = index.parameters.get(f"{prefix}{module}.weight")
        if info is None or (pair.out, pair.into) != info.shape[:2] or (pair.kernel or ()) != _kernel(info.shape, pair):
            return False
    return True


def _kernel(shape: tuple[int, ...], pair: Pair) -> tuple[int, ...]:
    """The kernel of a weight; a matrix may be a pointwise convolution in the base."""
    rest = shape[2:]
    return () if not pair.kernel and all(size == 1 for size in rest) else rest


def _finding(code: str, message: str, where: tuple[str, ...]) -> Finding:
    known = code != "base-needed"
    return Finding(
        code=code,
        axis="placement" if known else "base",
        level=Verdict.INCOMPATIBLE if known else Verdict.UNVERIFIED,
        message=message,
        where=where,
        remedy="name the base it was trained on: --base BASE",
    )


def _groups(part: str, found: _Places, header: Header, walk: Walk | None) -> list[Group]:
    """One for each position, under the base's names where they are known."""
    groups = []
    for position, keys in sorted(found.keys.items()):
        slots = {}
        for direction in ("down", "up"):
            info = header.tensors[keys[direction]]
            slots[direction] = TensorRef(key=keys[direction], shape=info.shape, dtype=info.dtype)
        groups.append(
            Group(
                component=walk.component if walk else part,
                module=walk.modules[position] if walk else str(position),
                kind="lora",
                slots=slots,
                options={"scale": 1.0, "scale_rule": "1, no alpha", "rank": slots["down"].shape[0]},
            )
        )
    return groups


@hookimpl
def lorahub_formats() -> list[Format]:
    """The positional files of cloneofsimo/lora."""
    return [CloneofsimoFormat()]
