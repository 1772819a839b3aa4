"""The framework "transformers": bases from their configuration and headers.

Architectures that ``families.py`` lists need neither torch nor transformers.  Of all others the class tells, built on
the meta device where transformers is installed; where it is not, names and shapes are taken as they are, and the index
says so (``declared`` is False).  See ``undeclared``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorahub.bases.calls import site_of
from lorahub.bases.framework import BaseFiles, Created, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo, natural
from lorahub.bases.layout import Layout, Target
from lorahub.bases.site import Site
from lorahub.bases.torch_module import CHILD, in_order, live_entries, live_tensors
from lorahub.deltas.kind import JSON
from lorahub.errors import MissingDependency, UnsupportedFormat, UsageError
from lorahub.files.dtypes import to_torch
from lorahub.findings import Claim
from lorahub.storages.storage import held_in
from lorahub_transformers import heads, parts, undeclared, vocabulary
from lorahub_transformers.families import BY_CLASS, FAMILIES, Family, Head
from lorahub_transformers.fused import fused_layouts
from lorahub_transformers.headed import headed
from lorahub_transformers.layers import layer_list
from lorahub_transformers.names import aliases, is_below, matches, spelling_of
from lorahub_transformers.order import registered
from lorahub_transformers.presets import PRESETS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorahub.live.parts import OpenPart, PartHandle

__all__ = ["COMPANIONS", "Transformers"]

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",  # SentencePiece
    "sentencepiece*",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor*.json",
    "feature_extractor*.json",
    "chat_template*",
    "additional_chat_templates/*",
)
"""Files that a model needs besides its weights, as names with ``*`` for anything."""

_NAME = "transformers"


class Transformers:
    """Transformers models."""

    name = _NAME
    requires = "transformers>=5.4,<6"

    def claims(self, files: BaseFiles) -> Claim | None:
        """By ``model_type`` in ``config.json``."""
        kind = files.config.get("model_type")
        if not isinstance(kind, str):
            return None
        known = kind in FAMILIES
        return Claim(
            0.9 if known else 0.5, f"config.json says model_type {kind!r}{'' if known else ', not in the table'}"
        )

    def claims_model(self, model: nn.Module) -> Claim | None:
        """By the classes a model derives from."""
        classes = {f"{each.__module__}.{each.__qualname__}" for each in type(model).__mro__}
        if "transformers.modeling_utils.PreTrainedModel" not in classes:
            return None
        return Claim(0.9, f"{type(model).__name__} is a transformers model")

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The base's index from ``config.json`` and headers.

        Raises:
            UnsupportedFormat: its weights are quantised.
        """
        _refuse_quantised(files.config, str(files.folder))
        stored = {
            name: ParameterInfo(shape=info.shape, dtype=info.dtype, stored_as=name)
            for name, info in files.tensors.items()
        }
        family = _family(files.config)
        if family is None:
            return undeclared.from_files(ref, files, stored)
        spelling = spelling_of(family, stored)
        named: dict[str, ParameterInfo] = {}
        for name, info in stored.items():
            twin = named.setdefault(spelling.canonical(name), info)
            if twin is not info:
                raise UnsupportedFormat(
                    f"{files.folder} holds one parameter twice, as {twin.stored_as} and as {name}",
                    "load it with transformers and save it again: save_pretrained",
                )
        head = _head(family, _architectures(files.config))
        tied, extras = _tied_in_files(family, head, files.config, named)
        index = _assemble(ref, family, files.config, named, tied, extras)
        return replace(index, registered=registered(family, head, _matrices(index)))

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """The index of a live or meta-device model; what is tied is what shares storage.

        Raises:
            UnsupportedFormat: its weights are quantised in a way that no storage knows, or of a dtype that no
                safetensors file can hold.
        """
        config: dict[str, JSON] = json.loads(cast("Any", model).config.to_json_string())
        if not held_in(model):
            _refuse_quantised(config, f"the live {type(model).__name__}")
        config |= _own_class(config, model)
        family = _family(config)
        if family is None:
            return undeclared.from_model(model, ref, config)
        spelling = spelling_of(family, list(live_tensors(model)))
        head = _head(family, [each.__name__ for each in type(model).__mro__])
        leaders = {leader for leader, _ in head.tied}
        entries, groups = live_entries(model)
        named = {spelling.canonical(name): info for name, info in entries.items()}
        tied: list[tuple[str, ...]] = []
        for group in groups:
            first, *rest = sorted((spelling.canonical(name) for name in group), key=lambda name: name not in leaders)
            info = named.pop(spelling.canonical(group[0]))
            named[first] = replace(info, stored_as=next(name for name in group if spelling.canonical(name) == first))
            tied.append((first, *sorted(rest)))
        weights = (f"{name}.weight" for name, _ in model.named_modules() if name and CHILD not in name.split("."))
        modules = tuple(spelling.canonical(name).removesuffix(".weight") for name in weights)
        return replace(_assemble(ref, family, config, named, tied, {}), registered=modules)

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Whole parameters, and rows of fused ones where the table declares how they lie; see ``fused``."""
        found = whole_layouts(index, targets)
        left = [target for target in targets if target not in found and not target.component]
        return {**found, **dict(fused_layouts(index, left))}

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The parameters of the backbone that a preset names, one of ``presets.PRESETS``.

        Of an architecture that is not in the table they are read off its classes, as a live model has them.

        Raises:
            UsageError: no such preset, or this base has nothing that it means, or nobody knows what.
        """
        if preset not in PRESETS:
            raise UsageError(f"there is no preset '{preset}'", f"presets: {', '.join(PRESETS)}")
        family = _family(index.config)
        names = index.presets.get(preset, ()) if family is None else _named(family, index, preset)
        if not names:
            raise _nothing(index, preset, [each for each in PRESETS if index.presets.get(each)])
        return [Target("", *_split(name)) for name in names]

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """The class, labels and names of a checkpoint with the created head, or its new number of words."""
        family = _family(index.config)
        found = heads.edits(family, index, created, hints) if family else None if created else Edits()
        if found is None and index.declared:
            linear = index.presets.get("all-linear", ()) if family is None else _named(family, index, "all-linear")
            found = vocabulary.resized(index, created, linear)
            if found is None and family is None:
                found = headed(index, created, hints)
        return found

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """``tie_word_embeddings: false``, which unties every pair of the model."""
        family = _family(index.config)
        if family is None:
            return undeclared.untie(index) if names and index.declared else None
        return heads.untie(family, index) if family.unties and names else None

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """Configuration, tokenizer, processor and chat template files."""
        names = {*files.configs, *files.others}
        return tuple(sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in COMPANIONS)))

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name."""
        tensors = live_tensors(model)
        family = _family(index.config)
        if family is None:
            return tensors
        spelling = spelling_of(family, tensors)
        return {spelling.canonical(name): tensor for name, tensor in tensors.items()}

    def site(self, model: nn.Module, name: str) -> Site | None:
        """By the exact class of the module; experts see tokens and not rows of a batch."""
        found = site_of(model, name)
        return replace(found, rows=None) if found and "experts" in name.split(".") else found

    def apply_part(self, model: nn.Module, part: OpenPart, acts: Callable[[], bool]) -> PartHandle:
        """A prompt or a prefix; see ``AppliesParts``.

        Raises:
            UnsupportedKind, BaseMismatch, IntegrityError: it cannot act on this model.
        """
        return parts.apply_part(model, part, acts)

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The model in ``folder``, in the class its configuration names; nothing is fetched and no remote code runs.

        Raises:
            MissingDependency: transformers is not installed.
            UnsupportedFormat: the configuration names no class of transformers.
        """
        try:
            transformers: Any = import_module("transformers")
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise MissingDependency(
                "transformers is needed to open this base", f"pip install '{self.requires}'"
            ) from None
        options = {"local_files_only": True, "trust_remote_code": False}
        names = transformers.AutoConfig.from_pretrained(folder, **options).architectures or ["AutoModel"]
        chosen = getattr(transformers, names[0], None)
        known = (transformers.PreTrainedModel, transformers.AutoModel)
        if not (isinstance(chosen, type) and issubclass(chosen, known)):
            raise UnsupportedFormat(
                f"{folder} is of the class {names[0]!r}, which transformers {transformers.__version__} does not have",
                "remote code is never run: open the model yourself and give the live model",
            )
        model: nn.Module = cast("Any", chosen).from_pretrained(
            folder, dtype=to_torch(dtype) if dtype else "auto", **options
        )
        return model


def _family(config: Mapping[str, JSON]) -> Family | None:
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    own = (BY_CLASS.get((kind, name)) for name in _architectures(config))
    return next(filter(None, own), FAMILIES.get(kind))


def _own_class(config: Mapping[str, JSON], model: nn.Module) -> dict[str, JSON]:
    """What saving a live model would say of its class, where some of its architecture have names of their own."""
    kind = config.get("model_type")
    others = [family for (each, _), family in BY_CLASS.items() if each == kind]
    if not others:
        return {}
    known = {head.name for family in (FAMILIES[str(kind)], *others) for head in family.heads}
    named: list[JSON] = [each.__name__ for each in type(model).__mro__ if each.__name__ in known]
    return {"architectures": named[:1]}


def _architectures(config: Mapping[str, JSON]) -> list[str]:
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _head(family: Family, classes: Iterable[str]) -> Head:
    """The first class the family knows; the bare backbone where it knows none."""
    return next(filter(None, map(family.head, classes)), family.heads[0])


def _refuse_quantised(config: Mapping[str, JSON], what: str) -> None:
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else "unnamed"
        raise UnsupportedFormat(
            f"{what} is quantised (method {method}): its stored tensors are not its weights",
            "merge into the base in 16 bits that it was made from; or into these very weights, which adapters trained "
            "on them were trained with: lorahub dequantise FOLDER -o OUT, then --base OUT",
        )


def _tied_in_files(
    family: Family, head: Head, config: Mapping[str, JSON], named: dict[str, ParameterInfo]
) -> tuple[list[tuple[str, ...]], dict[str, ParameterInfo]]:
    """Groups of tied names, and second copies that the files hold; ``named`` is left with one name of each group."""
    flag = config.get("tie_word_embeddings")
    ties = family.tied if flag is None else bool(flag)
    groups: dict[str, list[str]] = {}
    extras: dict[str, ParameterInfo] = {}
    for leader, other in head.tied:
        if leader not in named and other in named and ties:
            named[leader] = named.pop(other)
        elif other in named:
            if not ties:
                continue
            extras[other] = named.pop(other)
        elif leader not in named or not (ties or not family.unties):
            continue
        groups.setdefault(leader, [leader]).append(other)
    return [(leader, *sorted(others)) for leader, (_, *others) in groups.items()], extras


def _assemble(
    ref: BaseRef,
    family: Family,
    config: Mapping[str, JSON],
    named: Mapping[str, ParameterInfo],
    tied: Iterable[tuple[str, ...]],
    extras: Mapping[str, ParameterInfo],
) -> BaseIndex:
    """The index from canonical names, with what the table knows of each."""
    kept: dict[str, ParameterInfo] = {}
    left: dict[str, ParameterInfo] = dict(extras)
    for name, info in named.items():
        body = name.removeprefix(family.prefix)
        if name.startswith(family.prefix) and any(matches(pattern, body) for pattern in family.leftovers):
            left[name] = info
        else:
            kept[name] = _with_role(family, name, info)
    groups = tuple(sorted(tied))
    modules = {name.rpartition(".")[0] for name in (*kept, *(name for group in groups for name in group))}
    return BaseIndex(
        ref=ref,
        framework=_NAME,
        parameters=in_order(kept.items()),
        aliases=aliases(family, sorted(modules, key=natural)),
        tied=groups,
        extras=in_order(left.items()),
        config=config,
        layers=layer_list(family, config, kept),
    )


def _matrices(index: BaseIndex) -> list[str]:
    """The linear modules and embeddings, tied ones too."""
    weights = [f"{module}.weight" for module in index.modules()]
    known = ((name, index.parameters.get(index.stored(name))) for name in weights)
    return [name.removesuffix(".weight") for name, info in known if info and info.role in ("linear", "embedding")]


def _with_role(family: Family, name: str, info: ParameterInfo) -> ParameterInfo:
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        return replace(info, role="", transposed=False)
    in_backbone = is_below(name, [family.prefix.rstrip(".")]) if family.prefix else True
    for role, patterns in (("linear", family.linear), ("embedding", family.embedding), ("conv", family.conv)):
        if _is_one(family, module, patterns):
            # a module that was put in place of a Conv1D to quantise it has its weight the usual way round
            turned = role == "linear" and family.transposed and not info.storage
            return replace(info, role=role, transposed=turned)
    on_top = not in_backbone or any(name in head.parameters for head in family.heads)
    role = {2: "linear", 4: "conv"}.get(len(info.shape), "") if on_top else ""  # heads have no other matrices
    return replace(info, role=role, transposed=False)


def _named(family: Family, index: BaseIndex, preset: str) -> list[str]:
    """What a preset means by the table."""
    presets = {
        "attention": family.attention,
        "feed-forward": family.feed_forward,
        "all-linear": family.linear,
        "all-conv": family.conv,
        "all-embedding": family.embedding,
    }
    weights = (name for name in index.parameters if _split(name)[1] == "weight")
    return [name for name in weights if _is_one(family, _split(name)[0], presets.get(preset, ()))]


def _nothing(index: BaseIndex, preset: str, others: Collection[str]) -> UsageError:
    """Why a preset names nothing in a base."""
    kind = index.config.get("model_type")
    if not index.declared:
        return UsageError(
            f"what '{preset}' means in the architecture {kind!r} is known from its classes alone, and these were not "
            "at hand",
            "name the modules, or give the live model",
        )
    return UsageError(
        f"there is nothing in the architecture {kind!r} of which it is known to be what '{preset}' means",
        f"name the modules{', or take one of ' + ', '.join(others) if others else ''}",
    )


def _split(name: str) -> tuple[str, str]:
    module, _, parameter = name.rpartition(".")
    return module, parameter


def _is_one(family: Family, module: str, patterns: Iterable[str]) -> bool:
    if not module.startswith(family.prefix):
        return False
    body = module.removeprefix(family.prefix)
    return any(matches(pattern, body) for pattern in patterns)
