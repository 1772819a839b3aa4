"""The framework "diffusers-pipeline": whole pipelines, on disk and live, as bases with components.

Each component is indexed by whatever framework claims it, found through the registry: UNets and transformers by
"diffusers", text encoders by "transformers".  Its parameters then stand behind its name, as ``unet:conv_in.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import BaseFiles, Created, Edits, Framework, Widens
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Piece, Target
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.pipelines import PIPELINE
from lorahub.bases.site import Site
from lorahub.bases.torch_module import in_order
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.files.dtypes import to_torch
from lorahub.findings import Claim
from lorahub.formats.token_vectors import KIND as WORDS
from lorahub.plugins import load_registry
from lorahub_diffusers.framework import REQUIRES, class_of, import_diffusers, usual_dtype
from lorahub_diffusers.unwrapped import own_path, unwrapped
from lorahub_diffusers.vectors import LOADER
from lorahub_diffusers.view import as_view, config_of, is_pipeline, is_view, models_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorahub.live.parts import OpenPart, PartHandle

__all__ = ["DENOISERS", "Part", "PipelineIndex", "Pipelines"]

DENOISERS = ("unet", "transformer", "transformer_2", "transformer_ref", "prior", "decoder")
"""Components that presets mean, where a pipeline has them."""

_NAME = "diffusers-pipeline"
_PLAIN = "torch"
_ALONG = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".vocab")
"""How files of schedulers, tokenizers and processors end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One component.

    Attributes:
        framework: what names it.
        index: its own, without the component's name.
    """

    framework: Framework
    index: BaseIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineIndex(BaseIndex):
    """The index of a pipeline, and those of its components.

    Attributes:
        parts: component -> what it is.
    """

    parts: Mapping[str, Part] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)


class Pipelines:
    """Pipelines of diffusers."""

    name = _NAME
    requires = REQUIRES

    def claims(self, files: BaseFiles) -> Claim | None:
        """By ``_class_name`` in ``model_index.json``."""
        kind = class_of(files.configs.get(PIPELINE, {}))
        return Claim(0.9, f"{PIPELINE} says _class_name {kind!r}") if kind and files.parts else None

    def claims_model(self, model: nn.Module) -> Claim | None:
        """The view of a pipeline, which ``as_module`` makes."""
        return Claim(0.9, "a pipeline of diffusers") if is_view(model) else None

    def as_module(self, given: object) -> nn.Module | None:
        """The view of a pipeline."""
        return as_view(given) if is_pipeline(given) else None

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The index of all components from their headers; one that cannot be named is taken by names and shapes."""
        frameworks = load_registry().frameworks

        def one(part: BaseFiles) -> Part:
            try:
                framework, index = index_base(part, ref, frameworks)
            except UnsupportedFormat:  # such as a quantised text encoder, which most adapters leave alone
                framework = frameworks[_PLAIN]
                index = framework.index(ref, part)
            return Part(framework=framework, index=index)

        parts = {component: one(part) for component, part in files.parts.items()}
        return _joined(ref, files.configs.get(PIPELINE, {}), parts)

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """The index of all components of a view.

        Raises:
            UnsupportedFormat: as the framework of a component.
        """
        frameworks = load_registry().frameworks
        parts = {}
        for component, child in model.named_children():
            framework, index = index_live(unwrapped(child), frameworks)
            parts[component] = Part(framework=framework, index=index)
        return _joined(ref, config_of(model), parts)

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """As the framework of each component has them."""
        found: dict[Target, Layout] = {}
        for component, part in _parts(index).items():
            own = {replace(target, component=""): target for target in targets if target.component == component}
            for target, layout in part.framework.layouts(part.index, list(own)).items():
                pieces = tuple(_behind(piece, component) for piece in layout.pieces)
                found[own[target]] = Layout(target=own[target], pieces=pieces)
        return found

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """What a preset names in the denoisers, or in one component: "attention", "text_encoder:attention".

        Raises:
            UsageError: no such preset or component, or there are none of these modules.
        """
        parts = _parts(index)
        named, colon, preset = preset.rpartition(":")
        chosen = [named] if colon else [each for each in DENOISERS if each in parts]
        if colon and named not in parts:
            raise UsageError(f"the pipeline has no component {named!r}", f"components: {', '.join(parts)}")
        if not chosen:
            raise UsageError(
                "none of the pipeline's components is known to be the one that adapters are for",
                f"name one: {next(iter(parts), 'COMPONENT')}:{preset}",
            )
        return [
            replace(target, component=component)
            for component in sorted(chosen)
            for target in parts[component].framework.targets(parts[component].index, preset)
        ]

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """Those of each component; keys of configurations stand behind its name and a colon."""
        parts = _parts(index)
        if any(name.partition(":")[0] not in parts for name in created):
            return None
        edits = _together(
            parts,
            lambda component, part: part.framework.edits(part.index, _within(created, component), hints),
            {name.partition(":")[0] for name in created},
        )
        if edits is None:
            return None
        saved = {name: name.replace(":", ".", 1) for name in created if name not in index.parameters}
        return replace(edits, renamed=MappingProxyType({**saved, **edits.renamed}))

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """As ``edits``."""
        own = dict.fromkeys(names)
        return _together(
            _parts(index),
            lambda component, part: part.framework.untie(part.index, list(_within(own, component))),
            {name.partition(":")[0] for name in names},
        )

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """As ``edits``, of the component whose layer it is."""
        component, _, own = name.partition(":")

        def ask(_: str, part: Part) -> Edits | None:
            framework = part.framework
            return framework.widening(part.index, own, shape) if isinstance(framework, Widens) else None

        return _together(_parts(index), ask, [component])

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """``model_index.json``, the components' own, and those of schedulers, tokenizers and processors."""
        frameworks = load_registry().frameworks
        said = files.configs.get(PIPELINE, {})
        there = {*files.configs, *files.others}
        found = {PIPELINE} & there
        for component in said:
            own = {name for name in there if name.startswith(f"{component}/")}
            part = files.parts.get(component)
            if part is None:
                found |= {name for name in own if name.endswith(_ALONG)}
                continue
            claims = {name: each.claims(part) for name, each in frameworks.items()}
            best = max((claim.score, name) for name, claim in claims.items() if claim)[1]
            found |= {f"{component}/{name}" for name in frameworks[best].companions(part)}
        return tuple(sorted(found & there))

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """The live tensors by canonical name."""
        children = {name: unwrapped(child) for name, child in model.named_children()}
        return {
            f"{component}:{name}": tensor
            for component, part in _parts(index).items()
            for name, tensor in part.framework.parameters(children[component], part.index).items()
        }

    def site(self, model: nn.Module, name: str) -> Site | None:
        """As the framework of the component has it."""
        component, _, rest = name.partition(".")
        own = model.get_submodule(component)
        if (path := own_path(own, rest)) != rest:
            own, rest = unwrapped(own), path
        frameworks = load_registry().frameworks.values()
        framework = max(frameworks, key=lambda each: claim.score if (claim := each.claims_model(own)) else 0.0)
        return framework.site(own, rest)

    def apply_part(self, model: nn.Module, part: OpenPart, acts: Callable[[], bool]) -> PartHandle:
        """Refuse it: words go into tokenizers, which the view of a pipeline does not hold.

        Raises:
            UnsupportedKind: always, with what to call for words.
        """
        words = part.kind == WORDS
        raise UnsupportedKind(
            f"'{part.name}' is {part.kind}: {part.reason}" + ("" if words else ", and pipelines have no place for it"),
            LOADER if words else "attach it to the model that it was made for: pipe.text_encoder",
        )

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """The view of the pipeline in ``folder``; nothing is fetched and no remote code runs.

        Raises:
            MissingDependency: diffusers is not installed.
        """
        diffusers = import_diffusers(self.requires)
        stored = dtype or _usual_dtype(survey_base(folder))
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=to_torch(stored), local_files_only=True)
        for model in models_of(pipe).values():
            model.eval()
        return as_view(pipe)


def _joined(ref: BaseRef, config: Mapping[str, JSON], parts: Mapping[str, Part]) -> PipelineIndex:
    """One index of several; names in files and in the view are the component's own behind its name and a dot."""

    def infos(component: str, given: Mapping[str, ParameterInfo]) -> Iterator[tuple[str, ParameterInfo]]:
        for name, info in given.items():
            stored = f"{component}.{info.stored_as}"
            yield f"{component}:{name}", replace(info, component=component, stored_as=stored)

    parameters = (pair for component, part in parts.items() for pair in infos(component, part.index.parameters))
    extras = (pair for component, part in parts.items() for pair in infos(component, part.index.extras))
    adapted = [part for component, part in parts.items() if component in DENOISERS or "text_encoder" in component]
    return PipelineIndex(
        ref=ref,
        framework=_NAME,
        parameters=in_order(parameters),
        aliases=tuple(
            (f"{component}:{own}", f"{component}:{other}")
            for component, part in parts.items()
            for own, other in part.index.aliases
        ),
        tied=tuple(
            tuple(f"{component}:{name}" for name in group)
            for component, part in parts.items()
            for group in part.index.tied
        ),
        extras=in_order(extras),
        config=config,
        declared=all(part.index.declared for part in adapted),
        parts=MappingProxyType(dict(sorted(parts.items()))),
    )


def _parts(index: BaseIndex) -> Mapping[str, Part]:
    assert isinstance(index, PipelineIndex)  # of this framework there are no others
    return index.parts


def _behind(piece: Piece, component: str) -> Piece:
    return replace(piece, parameter=f"{component}:{piece.parameter}")


def _within(given: Mapping[str, Any], component: str) -> dict[str, Any]:
    """What is of one component, under its own names."""
    start = f"{component}:"
    return {name.removeprefix(start): value for name, value in given.items() if name.startswith(start)}


def _together(
    parts: Mapping[str, Part], ask: Callable[[str, Part], Edits | None], components: Iterable[str]
) -> Edits | None:
    """The edits of several components as those of one base."""
    config: dict[str, JSON] = {}
    removed: list[str] = []
    renamed: dict[str, str] = {}
    copied: dict[str, str] = {}
    missing: list[str] = []
    for component in sorted(components):
        found = ask(component, parts[component])
        if found is None:
            return None
        config |= {f"{component}:{key}": value for key, value in found.config.items()}
        removed += [f"{component}:{name}" for name in found.removed]
        renamed |= {f"{component}:{name}": f"{component}.{saved}" for name, saved in found.renamed.items()}
        copied |= {f"{component}:{name}": f"{component}:{source}" for name, source in found.copied.items()}
        missing += [f"{component}:{name}" for name in found.missing]
    return Edits(
        config=MappingProxyType(config),
        removed=tuple(removed),
        renamed=MappingProxyType(renamed),
        copied=MappingProxyType(copied),
        missing=tuple(missing),
    )


def _usual_dtype(files: BaseFiles) -> str:
    """The dtype of the denoiser, or else of the first weights."""
    part = next((files.parts[each] for each in DENOISERS if each in files.parts), next(iter(files.parts.values())))
    return usual_dtype(part)
