"""LoRA-ViT's files and those of its descendants for SAM: ``w_a_000``, ``w_b_000``, queries and values in turn.

https://github.com/JamesQFreeman/LoRA-ViT, and SAM LoRA and SAMed after it.  Two pairs of factors a block change the
query and the value rows of a fused ``qkv``, or two layers of their own; which blocks, the order says, and a
base proves.  No alpha is stored.  LoRA-ViT multiplies by ``alpha // r``, a division of integers that gives 0 where
alpha is below r, and the others by 1; an alpha that people state is taken in LoRA-ViT's sense.  A head is stored as
``fc_768in_10out``, without its bias; SAMed stores further parameters under their own names.  Read only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.errors import CannotCarry
from lorahub.files.header import Header
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.comfy import only_file
from lorahub.formats.format import AdapterFiles, Format, Reading, Written
from lorahub.formats.peft.keys import Stems
from lorahub.formats.plain import about_config, alpha_unknown, stated_number, whole_parameters
from lorahub.formats.suffixes import Row, unknown_keys
from lorahub.hookspecs import hookimpl

__all__ = ["LoraVitFormat", "lorahub_formats"]

_SLOTS = ("q_down", "q_up", "v_down", "v_up")
_FUSED = ("qkv", "to_qkv")
_SEPARATE = (("proj_q", "proj_v"), ("q_proj", "v_proj"), ("query", "value"))
"""What models call their projections: fused, or queries and values apart."""
_HEADS = ("fc", "head")
"""What the head is called: by the models LoRA-ViT began with, and by timm's."""


@final
class LoraVitFormat:
    """Reads LoRA-ViT's positional factors."""

    name = "lora-vit"
    rows = (Row(kind="qv-lora", leaves=tuple(Leaf(slot=slot, suffix=slot) for slot in _SLOTS)),)
    writes: frozenset[str] = frozenset()

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure by the names of the first pair."""
        for header in files.headers.values():
            if "w_a_000" in header.tensors and "w_b_000" in header.tensors:
                return Claim(0.95, "tensors are named w_a_000 and w_b_000")
        return None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: an alpha is stated that is no number.
        """
        file = only_file(files)
        header = files.headers[file]
        alpha = stated_number(files, file, "lora_alpha")
        factors = {key for key in header.tensors if _parsed(key)}
        findings: list[Finding] = []
        groups: list[Group] = []
        if fault := _fault(header, factors):
            findings.append(_finding("slot-misfit", fault, factors))
        else:
            blocks = [[f"w_{side}_{at + turn:03d}" for turn in (0, 1) for side in "ab"] for at in _evens(factors)]
            modules, why = _places(header, blocks, index)
            if why:
                findings.append(_unplaced(why, factors, known=index is not None))
            groups = list(_groups(header, blocks, modules, alpha))
        stems = Stems(index)
        heads = [key for key in header.tensors if key.startswith("fc_") and key.endswith("out") and "in_" in key]
        if len(heads) == 1:
            groups.append(_head(header, heads[0], stems))
            findings.append(_biasless(heads))
        others = [key for key in header.tensors if key not in factors and (key not in heads or len(heads) > 1)]
        whole, left = whole_parameters(header, others, stems, groups)
        findings += [] if alpha is not None else [alpha_unknown(file, f"{file} holds no alpha, as LoRA-ViT saves")]
        if alpha is not None and any(group.options.get("scale") == 0 for group in groups):
            findings.append(_floored(alpha, factors))
        return Reading(
            format=self.name,
            file=file,
            groups=(*groups, *whole),
            findings=(
                *findings,
                *unknown_keys(left, "are no factor and no parameter of a module"),
                *about_config(files, ("lora_alpha",)),
            ),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Refused.

        Raises:
            CannotCarry: always.
        """
        raise CannotCarry("the format 'lora-vit' is read only: it has no names and no scale", "write another: peft")


def _parsed(key: str) -> tuple[str, int] | None:
    """Side and position of ``w_a_000``."""
    position = key[4:]
    fits = key.startswith(("w_a_", "w_b_")) and position.isascii() and position.isdigit() and len(position) == 3
    return (key[2], int(position)) if fits else None


def _evens(factors: set[str]) -> range:
    return range(0, len(factors) // 2, 2)


def _fault(header: Header, factors: set[str]) -> str:
    """What is wrong with positions and shapes, or ""."""
    count = len(factors) // 2
    if count % 2 or factors != {f"w_{side}_{at:03d}" for side in "ab" for at in range(count)}:
        return f"{len(factors)} factors are no pairs for query and value of each block in turn"
    for at in range(count):
        down, up = (header.tensors[f"w_{side}_{at:03d}"].shape for side in "ab")
        others = tuple(header.tensors[f"w_{side}_{at ^ 1:03d}"].shape for side in "ab")
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0] or (down, up) != others:
            return f"w_a_{at:03d} {list(down)} and w_b_{at:03d} {list(up)} do not fit together or beside the other"
    return ""


def _places(
    header: Header, blocks: Sequence[Sequence[str]], index: BaseIndex | None
) -> tuple[list[tuple[str, ...]], str]:
    """The module, or the two, that each block's factors change, and what is not known about it."""
    spelled: list[tuple[str, ...]] = [(f"blocks.{at}.attn.{_FUSED[0]}",) for at in range(len(blocks))]
    if index is None:
        return spelled, f"{len(blocks)} blocks are told by their order alone; which modules those are, a base tells"
    candidates = [(found, bands) for found, bands in _candidates(index) if found]
    fitting = [
        found
        for found, bands in candidates
        if len(found) == len(blocks)
        and all(
            _weight(index, module) == (bands * header.tensors[block[1]].shape[0], header.tensors[block[0]].shape[1])
            for block, each in zip(blocks, found, strict=True)
            for module in each
        )
    ]
    if len(fitting) == 1:
        return fitting[0], ""
    if not candidates:  # another part of the adapted model, which placement says
        return spelled, ""
    counts = " or ".join(str(len(found)) for found, _ in candidates)
    return spelled, (
        f"{len(blocks)} blocks are adapted, and this base has {counts} attention layers that could be meant, "
        f"of which {'several' if fitting else 'none'} fit all shapes"
    )


def _candidates(index: BaseIndex) -> Iterator[tuple[list[tuple[str, ...]], int]]:
    """Every way to see a base's attention layers, in order: fused ones of three bands, or two layers of one."""
    ends: dict[str, list[str]] = {}
    for module in index.modules():
        ends.setdefault(module.rpartition(".")[2], []).append(module)
    for end in _FUSED:
        yield [(module,) for module in ends.get(end, ())], 3
    for pair in _SEPARATE:
        queries, values = (ends.get(end, []) for end in pair)
        yield list(zip(queries, values, strict=False)) if len(queries) == len(values) else [], 1


def _weight(index: BaseIndex, module: str) -> tuple[int, ...]:
    info = index.parameters.get(f"{module}.weight")
    return info.shape if info else ()


def _groups(
    header: Header, blocks: Sequence[Sequence[str]], modules: Sequence[tuple[str, ...]], alpha: float | None
) -> Iterator[Group]:
    for block, names in zip(blocks, modules, strict=True):
        slots = {slot: _ref(header, key) for slot, key in zip(_SLOTS, block, strict=True)}
        rank = slots["q_down"].shape[0]
        options: dict[str, JSON] = {"scale": 1.0, "scale_rule": "1, alpha is unknown", "rank": rank}
        if alpha is not None:
            options = {"scale": float(alpha // rank), "scale_rule": "alpha//r", "alpha": alpha, "rank": rank}
        if len(names) == 1:
            yield Group(module=names[0], kind="qv-lora", slots=slots, options=options)
            continue
        for side, module in zip("qv", names, strict=True):
            pair = {"down": slots[f"{side}_down"], "up": slots[f"{side}_up"]}
            yield Group(module=module, kind="lora", slots=pair, options=options)


def _ref(header: Header, key: str) -> TensorRef:
    info = header.tensors[key]
    return TensorRef(key=key, shape=info.shape, dtype=info.dtype)


def _head(header: Header, key: str, stems: Stems) -> Group:
    module = next((name for name in _HEADS if stems.find(name)), _HEADS[-1])
    return Group(module=module, kind="replace", slots={"value": _ref(header, key)})


def _finding(code: str, message: str, where: set[str]) -> Finding:
    return Finding(
        code=code,
        axis="integrity",
        level=Verdict.INCOMPATIBLE,
        message=message,
        where=tuple(sorted(where)),
        remedy="fetch the file again, or ask its author",
    )


def _unplaced(message: str, where: set[str], *, known: bool) -> Finding:
    return Finding(
        code="layout-undeclared" if known else "base-needed",
        axis="placement" if known else "base",
        level=Verdict.INCOMPATIBLE if known else Verdict.UNVERIFIED,
        message=message,
        where=tuple(sorted(where)),
        remedy="name the base it was trained on: --base BASE",
    )


def _biasless(where: Sequence[str]) -> Finding:
    return Finding(
        code="head-without-bias",
        axis="format",
        level=Verdict.UNVERIFIED,
        message="the head's weight is in the file and its bias is not, as LoRA-ViT saves: the base's own is kept",
        where=tuple(where),
    )


def _floored(alpha: float, where: set[str]) -> Finding:
    return Finding(
        code="alpha-void",
        axis="format",
        level=Verdict.UNVERIFIED,
        message=f"alpha {alpha:g} is below the rank, and LoRA-ViT multiplies by alpha // r, which is 0: the factors "
        "had no effect when they were trained, and have none here",
        where=tuple(sorted(where)),
    )


@hookimpl
def lorahub_formats() -> list[Format]:
    """LoRA-ViT's."""
    return [LoraVitFormat()]
