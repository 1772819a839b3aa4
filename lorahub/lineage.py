"""What base an adapter was probably made for, where nothing records it: from its header's metadata, or from its shapes.

Shapes tell an architecture and no more: a Pony and an Illustrious adapter have the same ones, so such a family is named
only where the metadata names it, and what shapes alone say ends in "-shaped".  Tables; a guess changes nothing.
Widths and depths are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import repeat
from operator import or_
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from lorahub.deltas.kind import Group, Kind
from lorahub.formats.families import Groups, by_module
from lorahub.shapes import Binding, ShapeMisfit, unify

__all__ = ["Guess", "Module", "guess", "label_of", "modules_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What the base may be.

    Attributes:
        label: for people: "SDXL-shaped", "Pony Diffusion (SDXL)".
        architecture: "SDXL", "Flux", ...; "" where only a family is named.
        family: "Pony Diffusion", "Illustrious", ...; only from metadata.
        source: "metadata" or "shapes".
        evidence: which key or module says so.
    """

    label: str
    architecture: str
    family: str = ""
    source: str
    evidence: str

    def document(self) -> dict[str, str]:
        """JSON-ready values."""
        return {
            "label": self.label,
            "architecture": self.architecture,
            "family": self.family,
            "source": self.source,
            "evidence": self.evidence,
        }


class Module(NamedTuple):
    """A module that changes.

    Attributes:
        path: with underscores for dots, component in front.
        inputs: how many it has, or None.
        place: component and module, and its place among all; what orders it.
    """

    path: str
    inputs: int | None
    place: tuple[str, str, int] = ("", "", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One architecture by its modules; the first row that fits decides.

    Attributes:
        name: of the architecture.
        having: each occurs in some path.
        lacking: none occurs in any.
        ends: a path ends in one of these, ...
        widths: ... and has one of these numbers of inputs; empty: any.
        beyond: some number in a path that follows ``having[0]`` is at least this.
        dotted: the module's own name, where it has dots, ends in one of these; empty: any.
    """

    name: str
    having: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    beyond: int = 0
    dotted: tuple[str, ...] = ()


_TO = ("to_q", "to_k", "to_v")
_CROSS = ("attn2_to_k", "attn2_to_v")
_JOINT = ("attn_to_q", "attn_to_k", "attn_to_v", "attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj")
_WAN = ("self_attn_q", "self_attn_k", "self_attn_v", "cross_attn_q", "attn1_to_q", "attn1_to_k", "attn2_to_q")
_FLAT_ATTENTION = (".img_attn_qkv", ".img_attn_proj", ".txt_attn_qkv", ".txt_attn_proj")  # Flux: .img_attn.qkv
_UNET = ("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks")

_ROWS: tuple[_Row, ...] = (
    *(_Row(name="SDXL", having=(part,), ends=_CROSS, widths=(2048,)) for part in _UNET),
    *(_Row(name="SD2", having=(part,), ends=_CROSS, widths=(1024,)) for part in _UNET),
    *(_Row(name="SD1", having=(part,), ends=_CROSS, widths=(768,)) for part in _UNET),
    *(_Row(name="SDXL", having=("transformer_blocks_", part), beyond=1) for part in _UNET),
    *(_Row(name="UNet", having=(part,)) for part in _UNET),
    _Row(name="Flux.2", having=("to_qkv_mlp_proj",)),
    _Row(name="Flux.2", having=("single_transformer_blocks",), ends=(*_JOINT, "proj_out"), widths=(6144,)),
    _Row(name="Flux.2", having=("double_blocks",), ends=("attn_qkv",), widths=(6144,)),
    _Row(name="HunyuanVideo", having=("double_blocks_",), widths=(3072,), dotted=_FLAT_ATTENTION),
    _Row(name="HunyuanVideo", having=("double_blocks_",), ends=("_fc1", "_mod_linear"), widths=(3072,)),
    _Row(name="HunyuanVideo", having=("double_blocks_",), beyond=19, widths=(3072,)),
    _Row(name="HunyuanVideo", having=("single_blocks_",), beyond=38, widths=(3072,)),
    _Row(name="HunyuanVideo", having=("refiner",), ends=("attn_qkv",), widths=(3072,)),
    _Row(name="Flux", having=("double_blocks",), widths=(3072,)),
    _Row(name="Flux", having=("single_blocks",), widths=(3072,)),
    _Row(name="Flux", having=("single_transformer_blocks",), widths=(3072,)),
    _Row(name="Qwen-Image", having=("transformer_blocks", "img_mlp")),
    _Row(name="Qwen-Image", having=("transformer_blocks", "txt_mlp")),
    _Row(name="Qwen-Image", having=("transformer_blocks", "img_mod")),
    _Row(name="Qwen-Image", having=("transformer_blocks_",), ends=_JOINT, widths=(3072,), beyond=19),
    _Row(name="Flux", having=("transformer_blocks", "ff_context"), widths=(3072,)),
    _Row(name="SD3.5 Large", having=("joint_blocks",), widths=(2432,)),
    _Row(name="SD3", having=("joint_blocks",), widths=(1536,)),
    _Row(name="SD3.5 Large", having=("transformer_blocks",), ends=_JOINT, widths=(2432,)),
    _Row(name="SD3", having=("transformer_blocks",), ends=_JOINT, widths=(1536,)),
    _Row(name="HiDream", having=("double_stream_blocks",)),
    _Row(name="HiDream", having=("single_stream_blocks",)),
    _Row(name="LTX-Video", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(2048,)),
    _Row(name="LTX-2", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(4096,)),
    _Row(name="Sana 1.6B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(2240,)),
    _Row(name="PixArt", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(1152,)),
    _Row(name="CogVideoX-2B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(1920,)),
    _Row(name="CogVideoX-5B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(3072,)),
    _Row(name="Wan 14B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(5120,)),
    _Row(name="Wan 2.2 5B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(3072,)),
    _Row(name="Wan 1.3B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(1536,)),
    _Row(name="Cosmos 2B", having=("blocks",), ends=("self_attn_q_proj", "cross_attn_q_proj"), widths=(2048,)),
    _Row(name="Z-Image", having=("layers",), ends=("attention_qkv", *_TO), widths=(3840,)),
    _Row(name="Lumina 2", having=("layers",), ends=("attention_qkv", "attn_to_q", "attn_to_k"), widths=(2304,)),
    _Row(name="SDXL text encoder", having=("te2_text_model",), widths=(1280,)),
    _Row(name="SDXL text encoder", having=("text_encoder_2_text_model",), widths=(1280,)),
    _Row(name="CLIP-L text encoder", having=("text_model_encoder_layers",), ends=("_proj", "fc1"), widths=(768,)),
    _Row(name="SD2 text encoder", having=("text_model_encoder_layers",), ends=("_proj", "fc1"), widths=(1024,)),
)

_LAYERED: tuple[tuple[str, tuple[str, ...], Mapping[tuple[int, int], str]], ...] = (
    (
        "decoder",
        ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_qkv_proj", "mlp_gate_proj"),
        {
            (576, 30): "SmolLM2-135M",
            (896, 24): "Qwen2.5-0.5B",
            (1024, 28): "Qwen3-0.6B",
            (1152, 26): "Gemma-3-1B",
            (1536, 28): "Qwen2.5-1.5B",
            (2048, 16): "Llama-3.2-1B",
            (2048, 18): "Gemma-2B",
            (2048, 22): "TinyLlama-1.1B",
            (2048, 24): "SmolLM2-1.7B",
            (2048, 28): "Qwen3-1.7B",
            (2048, 36): "Qwen2.5-3B",
            (2304, 26): "Gemma-2-2B",
            (2560, 32): "Phi-2",
            (2560, 34): "Gemma-3-4B",
            (2560, 36): "Qwen3-4B",
            (3072, 28): "Llama-3.2-3B",
            (3072, 32): "Phi-3-mini",
            (3584, 28): "Qwen2.5-7B",
            (3584, 42): "Gemma-2-9B",
            (3840, 48): "Gemma-3-12B",
            (4096, 32): "Llama-2-7B, Llama-3-8B, Mistral-7B",
            (4096, 36): "Qwen3-8B",
            (4608, 46): "Gemma-2-27B",
            (5120, 40): "Llama-2-13B, Qwen3-14B, Mistral-Nemo-12B",
            (5120, 48): "Qwen2.5-14B",
            (5120, 64): "Qwen2.5-32B, Qwen3-32B",
            (5376, 62): "Gemma-3-27B",
            (8192, 80): "Llama-3-70B, Qwen2.5-72B",
        },
    ),
    (
        "GPT-2",
        ("attn_c_attn", "mlp_c_fc"),
        {(768, 6): "DistilGPT2", (768, 12): "GPT-2", (1024, 24): "GPT-2 medium", (1280, 36): "GPT-2 large"},
    ),
    (
        "fused-attention decoder",
        ("attention_query_key_value", "self_attention_query_key_value"),
        {
            (768, 12): "Pythia-160M",
            (2048, 24): "BLOOM-1.7B, Pythia-1.4B",
            (2560, 32): "Pythia-2.8B",
            (4096, 30): "BLOOM-7B",
            (4096, 32): "Pythia-6.9B",
            (4544, 32): "Falcon-7B",
        },
    ),
    (
        "encoder",
        ("attention_self_query", "attention_self_value", "attention_attention_query", "attention_attention_value"),
        {(768, 12): "BERT-base, RoBERTa-base, ViT-base", (1024, 24): "BERT-large, RoBERTa-large, ViT-large"},
    ),
    (
        "T5",
        ("SelfAttention_q", "SelfAttention_v"),
        {(512, 6): "T5-small", (768, 12): "T5-base", (1024, 24): "T5-large", (2048, 24): "T5-3B"},
    ),
)
"""What such models are called, how their attention's inputs end, and (width, layers) -> models of that size."""

_FAMILIES: tuple[tuple[str, str], ...] = (
    ("pony", "Pony Diffusion"),
    ("illustrious", "Illustrious"),
    ("noobai", "NoobAI"),
    ("animagine", "Animagine"),
    ("juggernaut", "Juggernaut"),
    ("realvis", "RealVisXL"),
    ("dreamshaper", "DreamShaper"),
    ("anything-v", "Anything"),
)
"""Words in the name of the model that was trained on -> the family of fine-tunes."""

_HASHES: Mapping[str, str] = MappingProxyType(
    {"67ab2fd8ec439a89b3fedb15cc65f54336af163c7eb5e4f2acc98f090a29b0b3": "Pony Diffusion"}
)
"""sha256 of a well-known checkpoint -> its family."""

_NAMED = ("ss_sd_model_name", "modelspec.merged_from", "base_model", "ss_base_model_version", "modelspec.architecture")
"""Metadata that may name a family."""

_STATED = ("ss_base_model_version", "modelspec.architecture", "base_model", "ss_sd_model_name")
"""Metadata that state an architecture."""

_ARCHITECTURES: tuple[tuple[str, str], ...] = (
    ("stable-diffusion-xl", "SDXL"),
    ("sdxl", "SDXL"),
    ("stable-diffusion-v1", "SD1"),
    ("sd_v1", "SD1"),
    ("sd1", "SD1"),
    ("sd_1", "SD1"),
    ("stable-diffusion-v2", "SD2"),
    ("sd_v2", "SD2"),
    ("sd2", "SD2"),
    ("stable-diffusion-3", "SD3"),
    ("sd3", "SD3"),
    ("flux-2", "Flux.2"),
    ("flux2", "Flux.2"),
    ("flux.2", "Flux.2"),
    ("flux", "Flux"),
    ("chroma", "Chroma"),
    ("hunyuan-video", "HunyuanVideo"),
    ("hunyuan_video", "HunyuanVideo"),
    ("hunyuanvideo", "HunyuanVideo"),
    ("wan", "Wan"),
    ("qwen-image", "Qwen-Image"),
    ("qwen_image", "Qwen-Image"),
    ("zimage", "Z-Image"),
    ("z-image", "Z-Image"),
    ("lumina", "Lumina 2"),
    ("hidream", "HiDream"),
    ("ltx", "LTX-Video"),
    ("anima", "Anima"),
)
"""How a stated architecture begins -> its name here; the first fits."""


_Pick: TypeAlias = "Callable[[Iterable[Module]], Module | None]"


def modules_of(groups: Sequence[Group], kinds: Mapping[str, Kind]) -> tuple[Module, ...]:
    """The modules that change, in any order, with their numbers of inputs where the tensors tell."""
    found: list[Module] = []
    if not isinstance(groups, Groups) or groups.apart:
        for at, group in enumerate(groups):
            place = (group.component, group.module, at)
            found.append(Module(_path(group.component, group.module), _inputs(group, kinds[group.kind]), place))
    else:
        for family in groups.families:
            inputs = _inputs(family.like.group, kinds[family.like.group.kind])
            placed = groups.modules(family)
            paths = [_path(component, module) for component, module, _ in placed]
            found += map(Module._make, zip(paths, repeat(inputs), placed))
    return tuple(found)


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def _path(component: str, module: str) -> str:
    return f"{component}_{module}".replace(".", "_").lstrip("_")


def _inputs(group: Group, kind: Kind) -> int | None:
    touch = next(iter(kind.touches(group)), None)
    dims = touch.dims.split() if touch else []
    if touch is None or len(dims) < 2:
        return None
    if dims[1].removeprefix("*").isdigit():  # with a star: times the sizes of a kernel, where there is one
        return int(dims[1].removeprefix("*"))
    bound: Binding = {}
    with suppress(ShapeMisfit, StopIteration):
        for slot in touch.slots:
            if slot in group.slots:
                bound = unify(kind.slot(slot).dims, group.slots[slot].shape, bound, name=slot)
    found = bound.get(dims[1].lstrip("*"))
    if isinstance(found, tuple):
        found = found[0] if found else None
    return found


def label_of(metadata: Mapping[str, str], modules: Callable[[], Sequence[Module]]) -> str:
    """The label of what ``guess`` finds, or ""; modules are asked for only where metadata leave the label open."""
    if stated := _stated(metadata):
        family = _family(metadata)
        return _label(family[0] if family else "", stated[0])
    found = guess(metadata, modules(), _any)
    return found.label if found else ""


def _label(family: str, architecture: str) -> str:
    return (
        f"{family} ({architecture})" if family and architecture and family != architecture else family or architecture
    )


def guess(metadata: Mapping[str, str], modules: Sequence[Module], pick: _Pick | None = None) -> Guess | None:
    """What the base may be, or None where nothing tells; metadata before shapes.

    Args:
        metadata: of the header.
        modules: that change.
        pick: which of several modules is the evidence; the first in natural order by default.
    """
    shaped = _by_shape(modules, pick or _first)
    stated = _stated(metadata)
    family = _family(metadata)
    if family is None and stated is None:
        return shaped
    architecture = stated[0] if stated else shaped.architecture if shaped else ""
    key = family[1] if family else stated[1] if stated else ""
    named = family[0] if family else ""
    evidence = f"{key} says {metadata[key]}"
    if stated and shaped and shaped.architecture.split()[0] not in (architecture.split()[0], "UNet", "CLIP-L"):
        evidence += f", though its shapes are {shaped.label} ({shaped.evidence})"
    label = _label(named, architecture)
    return Guess(label=label, architecture=architecture, family=named, source="metadata", evidence=evidence)


def _stated(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(architecture, key that states it)."""
    for key in _STATED:
        text = metadata.get(key, "").lower()
        for begin, name in _ARCHITECTURES:
            if text.startswith(begin) or text.rpartition("/")[2].startswith(begin):
                return name, key
    return None


def _family(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    """(family, key that names it)."""
    key = "ss_new_sd_model_hash"
    if (known := _HASHES.get(metadata.get(key, "").lower())) is not None:
        return known, key
    for key in _NAMED:
        text = metadata.get(key, "").lower()
        for word, name in _FAMILIES:
            if word in text:
                return name, key
    return None


def _by_shape(modules: Sequence[Module], pick: _Pick) -> Guess | None:
    shown = reduce(or_, map(_shown, [module.path for module in modules]), 0)
    widths = {module.inputs for module in modules}
    for row, having, lacking in _BITS:
        if shown & having != having or shown & lacking or (row.widths and widths.isdisjoint(row.widths)):
            continue
        if module := _fits(row, modules, pick):
            inputs = f"{module.inputs} inputs to " if row.widths else "there is "
            return Guess(
                label=f"{row.name}-shaped",
                architecture=row.name,
                source="shapes",
                evidence=f"{inputs}{module.path}",
            )
    return _layered(modules)


_PARTS = tuple(dict.fromkeys(part for row in _ROWS for part in (*row.having, *row.lacking)))


def _bits(parts: Collection[str]) -> int:
    return sum(1 << at for at, part in enumerate(_PARTS) if part in parts)


_BITS = tuple((row, _bits(row.having), _bits(row.lacking)) for row in _ROWS)
"""Each row with what must occur in some path, and what must not, as bits."""


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def _shown(path: str) -> int:
    """Which parts occur in a path, as bits."""
    return sum(1 << at for at, part in enumerate(_PARTS) if part in path)


def _fits(row: _Row, modules: Sequence[Module], pick: _Pick) -> Module | None:
    """A module that shows it, or None, where what must occur does and the rest does not."""
    if row.beyond and max((_number(module.path, row.having[0]) for module in modules), default=-1) < row.beyond:
        return None
    return pick(
        module
        for module in modules
        if (not row.widths or module.inputs in row.widths)
        and (not row.ends or module.path.endswith(row.ends))
        and (row.ends or not row.having or row.having[0] in module.path)
        and (not row.dotted or module.place[1].endswith(row.dotted))
    )


def _first(modules: Iterable[Module]) -> Module | None:
    """The first in natural order."""
    return min(modules, key=lambda each: (by_module(*each.place[:2]), each.place[2]), default=None)


def _any(modules: Iterable[Module]) -> Module | None:
    """Any of them, for whoever does not ask which."""
    return next(iter(modules), None)


def _number(path: str, before: str) -> int:
    """The number right behind ``before`` in a path, or -1."""
    head = path.partition(before)[2].partition("_")[0]
    return int(head) if head.isdecimal() and len(head) < 6 else -1


def _layered(modules: Sequence[Module]) -> Guess | None:
    """A transformer that only its width and its number of layers tell from others."""
    for what, ends, sizes in _LAYERED:
        own = [module for module in modules if module.path.endswith(ends) and module.inputs is not None]
        first = _first(own)
        if first is None:
            continue
        width = first.inputs
        numbers = [int(part) for module in own for part in module.path.split("_") if part.isdecimal() and len(part) < 6]
        layers = max(numbers, default=-1) + 1
        like = sizes.get((width or 0, layers), "")
        label = f"{what}-shaped: {width} wide, {layers} layers" + (f", as {like}" if like else "")
        return Guess(label=label, architecture=what, source="shapes", evidence=f"{width} inputs to {first.path}")
    return None
