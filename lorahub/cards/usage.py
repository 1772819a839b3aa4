"""Which framework loads an adapter as it lies there, and the lines that load it.

A table from layouts to frameworks: one is named only where it reads this layout and these kinds itself.  lorahub's own
commands hold for every layout.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lorahub.adapter import AdapterHeader
from lorahub.deltas.kind import JSON
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.types import TYPES
from lorahub.records import AdapterRecord

__all__ = ["Snippet", "Usage", "usage_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snippet:
    """Lines to copy: a heading, their language, and the text."""

    title: str
    language: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How an adapter is used.

    Attributes:
        library: the Hub's name of the framework that loads it, or "" where none does as it lies there.
        task: the Hub's task, where the files say so.
        snippets: the framework's lines, then lorahub's.
    """

    library: str
    task: str
    snippets: tuple[Snippet, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What the lines are made from: texts safe between quotes, "" where unknown."""

    header: AdapterHeader
    record: AdapterRecord
    repo: str
    subfolder: str
    version: str
    base: str
    commit: str
    library: str
    config: Mapping[str, JSON] = field(default_factory=dict)

    @property
    def at(self) -> str:
        """``, subfolder="ink", revision="v1.2.0"``, what there is of it."""
        return "".join(f", {name}={json.dumps(value)}" for name, value in self.place.items())

    @property
    def place(self) -> Mapping[str, str]:
        """Where in the repository it lies, in the words of the frameworks."""
        said = {"subfolder": self.subfolder, "revision": f"v{self.version}" if self.version else ""}
        return {name: value for name, value in said.items() if value}

    @property
    def base_revision(self) -> str:
        return f', revision="{self.commit}"' if self.commit else ""

    @property
    def ref(self) -> str:
        """The adapter as lorahub names it."""
        return "/".join(filter(None, [f"{self.repo}@{self.version}" if self.version else self.repo, self.subfolder]))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loader:
    """A framework that reads one layout.

    Attributes:
        library: what the Hub calls it.
        reads: whether it takes this adapter.
        lines: how it does, or None where lines would not say more.
    """

    library: str
    reads: Callable[[_Look], bool]
    lines: Callable[[_Look], Snippet | None]


_CLASSES: Mapping[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task -> the class that loads the base."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


def usage_of(header: AdapterHeader, record: AdapterRecord, *, repo: str, subfolder: str = "") -> Usage:
    """The framework that loads an adapter, and the lines for it and for lorahub.

    Args:
        header: the adapter.
        record: its record.
        repo: "ns/name".
        subfolder: where in it, "" for its root.
    """
    base = record.base
    config = header.files.configs.get(CONFIG, {})
    look = _Look(
        header=header,
        record=record,
        repo=repo,
        subfolder=subfolder,
        version=record.version or "",
        base=(base.repo_id if base else None) or "",
        commit=(base.revision if base else None) or "",
        library=(base.library if base else None) or "",
        config=config,
    )
    loader = next((each for each in _LOADERS.get(header.format, ()) if each.reads(look)), None)
    lines = loader.lines(look) if loader else None
    causal = loader is not None and loader.library == "peft" and config.get("task_type") == "CAUSAL_LM"
    return Usage(
        library=loader.library if loader else "",
        task="text-generation" if causal else "",  # what other tasks mean depends on the base
        snippets=(*((lines,) if lines else ()), _lorahub(look), *((_live(look),) if header.kinds else ())),
    )


_RETIRED = frozenset({"BONE"})
"""Types that PEFT no longer has."""


def _peft(look: _Look) -> bool:
    """Under the names that PEFT looks for, of a type that it has."""
    named = look.config.get("peft_type")
    return look.header.reading.file == "adapter_model.safetensors" and named in TYPES and named not in _RETIRED


def _peft_lines(look: _Look) -> Snippet:
    lines = ["from peft import PeftModel"]
    if look.library == "timm":
        lines = [
            "import timm",
            *lines,
            "",
            f'base = timm.create_model("hf-hub:{look.base or "BASE"}", pretrained=True)',
        ]
    elif look.library == "diffusers":
        component = next(iter(look.record.components), "")
        part = component if _NAME.fullmatch(component) else "unet"
        lines = ["from diffusers import DiffusionPipeline", *lines, "", _pipeline(look)]
        lines += [f'pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, "{look.repo}"{look.at})']
        return Snippet(title="With diffusers and PEFT", language="python", text="\n".join(lines))
    else:
        named = _CLASSES.get(str(look.config.get("task_type")), "")
        architecture = (look.record.base.architecture if look.record.base else None) or ""
        model = named or (architecture if _NAME.fullmatch(architecture) else "AutoModel")
        loaded = f'{model}.from_pretrained("{look.base or "BASE"}"{look.base_revision})'
        lines = [*lines, f"from transformers import {model}", "", f"base = {loaded}"]
    lines += [f'model = PeftModel.from_pretrained(base, "{look.repo}"{look.at})']
    if _transformers(look):
        place = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in look.place.items())
        options = f", adapter_kwargs={{{place}}}" if place else ""
        lines += [f'# or, in the base itself: base.load_adapter("{look.repo}"{options})']
    return Snippet(title="With PEFT", language="python", text="\n".join(lines))


def _transformers(look: _Look) -> bool:
    """Whether transformers' own models load it: plain LoRA of theirs, with no part that it replaces."""
    plain = look.config.get("peft_type") == "LORA" and not look.config.get("modules_to_save")
    return plain and look.library in {"", "transformers"} and look.config.get("task_type") in _CLASSES


def _pipeline(look: _Look) -> str:
    return f'pipeline = DiffusionPipeline.from_pretrained("{look.base or "BASE"}"{look.base_revision})'


_DIFFUSERS = re.compile(
    r"(unet|transformer|text_encoder|text_encoder_2)\..+"
    r"\.(lora_[AB]|lora\.(up|down)|lora_linear_layer\.(up|down)|lora_magnitude_vector)(\.weight)?"
    r"|(unet|transformer|text_encoder|text_encoder_2)\..+\.alpha"
)
"""Keys that ``load_lora_weights`` takes as they are; it drops those of ``dora_scale``."""

_KOHYA = re.compile(
    r"lora_(unet_(down|mid|up|input|middle|output|double|single)_blocks?|te[12]?)_.+"
    r"\.(lora_(up|down)\.weight|alpha)"
)
"""Keys that it converts: UNets in either spelling, Flux, and their text encoders."""


def _every(keys: re.Pattern[str]) -> Callable[[_Look], bool]:
    """Where every key of the file is one of these."""
    return lambda look: all(map(keys.fullmatch, look.header.files.headers[look.header.reading.file].tensors))


def _any(_look: _Look) -> bool:
    return True


def _diffusers_lines(look: _Look) -> Snippet:
    file = json.dumps(look.header.reading.file)
    lines = ["from diffusers import DiffusionPipeline", "", _pipeline(look)]
    lines += [f'pipeline.load_lora_weights("{look.repo}", weight_name={file}{look.at}, adapter_name="default")']
    strength = look.record.strength.recommended if look.record.strength else None
    lines += [f'pipeline.set_adapters("default", {strength:g})'] if strength is not None else []
    return Snippet(title="With diffusers", language="python", text="\n".join(lines))


def _mlx_lines(look: _Look) -> Snippet:
    folder = f'"$(lorahub pull -q {shlex.quote(look.ref)})"'
    text = f'mlx_lm.generate --model {look.base or "BASE"} --adapter-path {folder} --prompt "..."'
    return Snippet(title="With MLX", language="bash", text=text)


def _gguf_lines(look: _Look) -> Snippet:
    file = f'"$(lorahub pull -q {shlex.quote(look.ref)})"/{shlex.quote(look.header.reading.file)}'
    return Snippet(title="With llama.cpp", language="bash", text=f"llama-cli -m BASE.gguf --lora {file}")


def _nothing(_look: _Look) -> None:
    return None


_LOADERS: Mapping[str, tuple[_Loader, ...]] = {
    "peft": (_Loader(library="peft", reads=_peft, lines=_peft_lines),),
    "diffusers": (_Loader(library="diffusers", reads=_every(_DIFFUSERS), lines=_diffusers_lines),),
    "kohya": (_Loader(library="diffusers", reads=_every(_KOHYA), lines=_diffusers_lines),),
    "adapterhub": (_Loader(library="adapter-transformers", reads=_any, lines=_nothing),),
    "mlx": (_Loader(library="mlx", reads=_any, lines=_mlx_lines),),
    "gguf": (_Loader(library="gguf", reads=_any, lines=_gguf_lines),),
}
"""Layout -> who reads it; lorahub reads them all."""


def _weighted(look: _Look) -> str:
    """The reference, with the recommended weight where that is not 1."""
    strength = look.record.strength.recommended if look.record.strength else None
    return f"{look.ref}:{strength:g}" if strength is not None and strength != 1 else look.ref


def _lorahub(look: _Look) -> Snippet:
    """The commands, with the base where it is known."""
    base = f"{look.base}@{look.commit}" if look.base and look.commit else look.base or "BASE"
    return Snippet(
        title="With lorahub",
        language="bash",
        text="\n".join(
            [
                "pip install lorahub-core",
                f"lorahub pull {look.ref}",
                *(
                    [
                        f"lorahub check {look.ref} --base {base}",
                        f"lorahub merge {_weighted(look)} --base {base} -o merged",
                    ]
                    if look.header.kinds
                    else [f"lorahub inspect {look.ref}"]  # it changes no weights
                ),
            ]
        ),
    )


def _live(look: _Look) -> Snippet:
    """On a model that is in memory."""
    lines = [
        "import lorahub",
        "",
        f'with lorahub.attach(model, ["{_weighted(look)}"]):',
        "    ...  # the model acts with it",
    ]
    return Snippet(title="On a model in memory", language="python", text="\n".join(lines))
