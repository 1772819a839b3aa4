"""Bases at hand: a folder, a file, a repository or a live model, opened by names and shapes alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import BaseFiles, Framework
from lorahub.bases.index import BaseIndex, BaseRef
from lorahub.bases.open import index_base, index_live, survey_base
from lorahub.bases.torch_module import held_parameters
from lorahub.bases.weights import weights_digest
from lorahub.conversion.naming import own_name
from lorahub.conversion.weights import Read, read_files
from lorahub.errors import NotFound, Unavailable, UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.names import Ref
from lorahub.plugins import load_registry

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Base", "open_base", "recorded_base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base at hand: its index, the framework that names it, and where it is.

    Attributes:
        files: its files, or None for a live model.
        model: the live model, or None for files.
    """

    index: BaseIndex
    framework: Framework
    files: BaseFiles | None = None
    model: nn.Module | None = None

    @contextmanager
    def tensors(self) -> Iterator[Read]:
        """Its parameters by canonical name, on the CPU, from its files or from the live model, whose own they may be.

        Raises:
            IntegrityError: a file is not the one that was surveyed.
        """
        if self.files is not None:
            with read_files(self.files, self.index) as read:
                yield read
        else:
            assert self.model is not None  # a base is files or a model
            live = self.framework.parameters(self.model, self.index)
            held = held_parameters(self.model, self.index)

            def at_hand(name: str) -> torch.Tensor:
                if name in held:
                    return held[name].read().values().cpu()
                return live[name if name in live else own_name(name, self.index)].detach().cpu()

            yield at_hand


def open_base(base: Source | nn.Module | Base, *, digest: bool = False, progress: Progress = quiet) -> Base:
    """A base by its headers (a folder, a file, ``ns/name[@COMMIT]``) or as a live model; no weights are read.

    Args:
        base: what to open.
        digest: hash the weight files too (once; remembered), which tells equal shapes with other weights apart.
        progress: called with (bytes done, bytes in all).
    """
    registry = load_registry()
    if isinstance(base, Base):
        return base
    if not isinstance(base, str | os.PathLike | Ref):
        framework, index = index_live(base, registry.frameworks)
        return Base(index=index, framework=framework, model=base)
    ref = as_ref(base, bare=True)
    if ref.path is not None:
        place = Path(ref.path).expanduser()
        if not place.exists():
            raise NotFound(
                f"there is no base at {place}",
                "give a folder with config.json and safetensors files, or NS/NAME[@COMMIT]",
            )
        where = BaseRef(folder=str(place.resolve()))
    else:
        from lorahub.hub.huggingface import HuggingFaceHub  # noqa: PLC0415 - slow to import, and a folder needs none of it

        bases = HuggingFaceHub()
        try:
            pin = bases.base_pin(ref)
        except Unavailable as error:
            if isinstance(base, Ref):  # somebody said that it is a name
                raise
            raise type(error)(f"{error.message}; nor is there a folder {ref} here", error.hint) from None
        place = bases.pull(pin, progress=lambda _file, done, total: progress(done, total))
        where = BaseRef(repo=pin.repo, commit=pin.commit, subfolder=pin.subfolder, folder=str(place))
    files = survey_base(place)
    framework, index = index_base(
        files, where, registry.frameworks, weights=weights_digest(files, progress=progress) if digest else ""
    )
    return Base(index=index, framework=framework, files=files)


def recorded_base(header: AdapterHeader) -> str:
    """The base that the adapter's record names, as a reference.

    Raises:
        UsageError: it names none that can be fetched.
    """
    recorded = header.record.base if header.record else None
    if recorded and recorded.repo_id:
        return f"{recorded.repo_id}@{recorded.revision}" if recorded.revision else recorded.repo_id
    raise UsageError(
        f"{header.label} does not record a base that can be fetched",
        "name the base: --base FOLDER or --base NS/NAME[@COMMIT]",
    )
