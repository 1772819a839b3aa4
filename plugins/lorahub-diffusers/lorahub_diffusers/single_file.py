"""The framework "diffusers-single-file": checkpoints of a whole pipeline in one file, under their makers' names.

What people download as ``model.safetensors`` and what ComfyUI and sd-scripts read and write: diffusion model,
autoencoder and text encoders together, or an original diffusion model alone.  Recognised by names; parameters are
called as a pipeline of diffusers calls them, so that adapters in any spelling find them, and are stored as they were.
Reads headers alone; a live model is another framework's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub.bases.framework import BaseFiles, Created, Edits, whole_layouts
from lorahub.bases.index import BaseIndex, BaseRef, ParameterInfo
from lorahub.bases.layout import Layout, Target
from lorahub.bases.site import Site
from lorahub.bases.torch_module import in_order
from lorahub.deltas.kind import JSON
from lorahub.errors import UnsupportedFormat, UsageError
from lorahub.files.header import TensorInfo
from lorahub.findings import Claim
from lorahub_diffusers.framework import class_of
from lorahub_diffusers.roles import role_of
from lorahub_diffusers.single_file_names import ALIKE, Named, named, told_apart

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["SingleFile"]

_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "stable-diffusion": "Stable Diffusion 1, 2 or XL",
        "stable-diffusion-3": "Stable Diffusion 3",
        "hunyuan-video": "HunyuanVideo",
        "flux-2": "FLUX.2",
        "flux": "FLUX.1",
        "wan": "Wan",
        "z-image": "Z-Image",
        "lumina-2": "Lumina-Image 2.0",
        "ltx-video": "LTX-Video",
        "sana": "Sana",
        "auraflow": "AuraFlow",
        "mochi": "Mochi",
        "qwen-image": "Qwen-Image",
        "hidream": "HiDream",
    }
)
"""Model -> how people call it."""

_CLASSES: Mapping[str, str] = MappingProxyType({"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"})
"""Component -> the class whose roles its modules have."""

_FIRST = "transformer:img_in.weight"

_PRESETS: Mapping[str, str] = MappingProxyType(
    {"attention": "linear", "all-linear": "linear", "all-conv": "conv", "all-embedding": "embedding"}
)
_ATTENTION = re.compile(r"(^|[._:])\w*attn\d?[._]")
_EMBEDDING = re.compile(r"(^|\.)(token_embedding|position_embedding|shared|embed_tokens|relative_attention_bias)$")


class SingleFile:
    """Original checkpoints of diffusion models, in one file."""

    name = "diffusers-single-file"
    requires = ""

    def claims(self, files: BaseFiles) -> Claim | None:
        """By names that only an original checkpoint has, or by those of a model without a configuration."""
        model, _ = told_apart(files.tensors)
        if model in ALIKE and class_of(files.config):
            return None
        return Claim(0.95, f"its names are those of an original checkpoint of {_TITLES[model]}") if model else None

    def claims_model(self, model: nn.Module) -> Claim | None:
        """None: live models are the framework's that made them."""
        return None

    def index(self, ref: BaseRef, files: BaseFiles) -> BaseIndex:
        """The base's index from headers, under a pipeline's names.

        Raises:
            UnsupportedFormat: it is no such checkpoint, or says twice what is one parameter of a pipeline.
        """
        stored = files.tensors
        model, prefix = told_apart(stored)
        if not model:
            raise UnsupportedFormat(
                f"{files.folder} holds no original checkpoint that is known", "known are " + ", ".join(_TITLES.values())
            )
        found = named(stored, model, prefix)
        parameters: dict[str, ParameterInfo] = {}
        for name, one in found.items():
            canonical = f"{one.component}:{one.name}"
            if canonical in parameters:
                raise UnsupportedFormat(
                    f"{name} and {parameters[canonical].stored_as} are one parameter of a pipeline ({canonical})",
                    "keep the checkpoint of one model in the file",
                )
            parameters[canonical] = _info(name, one, stored[name])
        extras = {
            name: ParameterInfo(shape=info.shape, dtype=info.dtype, stored_as=name)
            for name, info in stored.items()
            if name not in found
        }
        return BaseIndex(
            ref=ref,
            framework=self.name,
            parameters=in_order(parameters.items()),
            aliases=tuple(_aliases(parameters)),
            extras=in_order(extras.items()),
        )

    def index_model(self, model: nn.Module, ref: BaseRef) -> BaseIndex:
        """Refused.

        Raises:
            UnsupportedFormat: always.
        """
        raise UnsupportedFormat(f"{type(model).__name__} is a live model, and no file", "lorahub plugins")

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Whole parameters."""
        return whole_layouts(index, targets)

    def targets(self, index: BaseIndex, preset: str) -> list[Target]:
        """The weights that a preset names: "attention", "all-linear", "all-conv" or "all-embedding".

        Raises:
            UsageError: no such preset.
        """
        if preset not in _PRESETS:
            raise UsageError(f"there is no preset '{preset}'", f"presets: {', '.join(_PRESETS)}")
        found = []
        for name, info in index.parameters.items():
            module, _, parameter = name.rpartition(".")
            if parameter != "weight" or info.role != _PRESETS[preset]:
                continue
            if preset != "attention" or _ATTENTION.search(f"{module}."):
                component, _, path = module.partition(":")
                found.append(Target(component, path, parameter))
        return found

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """None, but for nothing: such a file has no configuration in which more could be written down."""
        return None if created else Edits()

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """Nothing, for the first layer of Flux: whoever reads such a file goes by its shape."""
        return Edits() if name == _FIRST and "transformer:single_blocks.0.linear1.weight" in index.parameters else None

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """None: nothing is tied."""
        return None

    def companions(self, files: BaseFiles) -> tuple[str, ...]:
        """None: one file is all there is."""
        return ()

    def parameters(self, model: nn.Module, index: BaseIndex) -> Mapping[str, torch.Tensor]:
        """Refused, as ``index_model``.

        Raises:
            UnsupportedFormat: always.
        """
        raise UnsupportedFormat(f"{type(model).__name__} is a live model, and no file", "lorahub plugins")

    def site(self, model: nn.Module, name: str) -> Site | None:
        """None."""
        return None

    def open_base(self, folder: Path, *, dtype: str | None = None) -> nn.Module:
        """Refused: such a file says too little to build a pipeline from it alone.

        Raises:
            UnsupportedFormat: always.
        """
        raise UnsupportedFormat(
            f"{folder} is the checkpoint of a pipeline in one file, without the configuration of its models",
            "open it with diffusers and give the live pipeline: StableDiffusionPipeline.from_single_file(...)",
        )


def _info(stored_as: str, one: Named, info: TensorInfo) -> ParameterInfo:
    shape = tuple(info.shape)
    module, _, parameter = one.name.rpartition(".")
    is_table = parameter == "weight" and _EMBEDDING.search(module)
    role = "embedding" if is_table else role_of(_CLASSES.get(one.component, ""), {}, one.name, shape)
    return ParameterInfo(
        shape=shape,
        dtype=info.dtype,
        stored_as=stored_as,
        transposed=one.transposed,
        component=one.component,
        role=role,
    )


def _aliases(parameters: Collection[str]) -> list[tuple[str, str]]:
    """Text encoders have had their modules below ``text_model.``, and not."""
    components = sorted({name.partition(":")[0] for name in parameters if name.startswith("text_encoder")})
    result = []
    for component in components:
        below = f"{component}:text_model."
        lies_below = any(name.startswith(below) for name in parameters)
        result.append((below, f"{component}:") if lies_below else (f"{component}:", below))
    return result
