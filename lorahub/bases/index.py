"""What a base looks like, without its weights: names, shapes, dtypes, digests.

A base index is canonical for its framework: built from checkpoint headers or from a model on the meta device, it is
the same.  It knows no framework; frameworks make it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from lorahub.bases.layers import LayerList, Repetition
from lorahub.bases.layout import Piece
from lorahub.deltas.kind import JSON

__all__ = ["BaseIndex", "BaseRef", "ParameterInfo", "natural", "structure_digest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """Which base: a repository at a commit, or a local folder.

    Attributes:
        repo: "ns/name", or "" for a base known only as a folder or a live model.
        commit: 40-hex commit, or "".
        subfolder: folder within the repository, or "".
        folder: where it lies on this machine, or "" (never written to records).
    """

    repo: str = ""
    commit: str = ""
    subfolder: str = ""
    folder: str = ""

    def __str__(self) -> str:
        place = self.repo or self.folder or "a live model"
        return f"{place}@{self.commit[:12]}" if self.commit else place


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterInfo:
    """One stored parameter.

    Attributes:
        shape: as stored.
        dtype: safetensors code ("BF16").
        stored_as: the name in the checkpoint's files (or in the live model), where it differs from the canonical one.
        transposed: a linear weight stored [in, out] (GPT-2's Conv1D); declared by the framework.
        component: part of a pipeline, or "".
        role: what its module is, where the framework knows: "linear", "embedding", "conv"; else "".
        turned: of a parameter with three axes, whether it stacks matrices stored [in, out] if it stacks any; None where
            nobody knows, as for files alone.  No part of what a base is.
        storage: what a quantised parameter is stored as ("bitsandbytes nf4"); ``shape`` and ``dtype`` are then those
            of the weight that its codes stand for.  "" for plain tensors.
    """

    shape: tuple[int, ...]
    dtype: str
    stored_as: str
    transposed: bool = False
    component: str = ""
    role: str = ""
    turned: bool | None = field(default=None, compare=False, repr=False)
    storage: str = field(default="", compare=False, repr=False)


@lru_cache(maxsize=1 << 14)  # names of a model, which several tables are sorted by
def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part)


def structure_digest(entries: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    """``sha256:`` over the sorted (name, shape) pairs as JSON: equal skeletons agree whatever their dtype or order."""
    text = json.dumps(sorted([name, list(shape)] for name, shape in entries), separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


_TABLE = re.compile(r"^(wte|shared)$|emb(?!ed_out$)")  # what models call their tables of embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIndex:
    """A base's parameters under canonical names, in natural order.

    Attributes:
        ref: which base this is.
        framework: the registered framework that made it.
        parameters: canonical name -> parameter, sorted by ``natural``.
        aliases: (canonical prefix, other prefix) pairs: a module below the first is also spelled below the second
            (``("bert.", "")``: a bare encoder's adapter says ``encoder.layer.0`` for ``bert.encoder.layer.0``).
        tied: groups of names that share one storage, the one in ``parameters`` first; the others are nowhere else.
        extras: what the files hold besides: buffers of old releases, and second copies of tied parameters.  In no
            digest; a merge copies their bytes, except a second copy of a parameter that changes, which is left out.
        weights: ``sha256:`` over the weight files, or "" where nobody hashed them.
        config: the base's configuration as JSON, for config edits; empty where there is none.
        registered: module paths in the order in which the framework builds the model, or none where nobody knows it.
            Some adapters draw random numbers along that order; it is no part of what a base is.
        declared: the framework knows module types, so transposed and fused storage is declared; False for bare
            headers, where an adapter that claims a transposed base is refused rather than guessed at.
        layers: the list of its like layers, where the framework declares one.  No part of what a base is.
        repeated: how its layers come from those of the base in the files, where it is deeper than that; or None.
        presets: preset -> canonical names of the parameters that it means, where the framework read that off the
            classes of a model rather than from a table.  No part of what a base is.
        elsewhere: name of a parameter that the base does not have itself -> the pieces of it, in parameters that it
            has: what a conversion on loading puts together or takes apart.  No part of what a base is.
    """

    ref: BaseRef
    framework: str
    parameters: Mapping[str, ParameterInfo]
    aliases: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    extras: Mapping[str, ParameterInfo] = field(default_factory=lambda: MappingProxyType({}))
    weights: str = ""
    config: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    declared: bool = True
    registered: tuple[str, ...] = field(default=(), compare=False, repr=False)
    layers: LayerList | None = field(default=None, compare=False, repr=False)
    repeated: Repetition | None = None
    presets: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: MappingProxyType({}), compare=False, repr=False
    )
    elsewhere: Mapping[str, tuple[Piece, ...]] = field(
        default_factory=lambda: MappingProxyType({}), compare=False, repr=False
    )

    @property
    def order(self) -> tuple[str, ...]:
        """Canonical names in natural order."""
        return tuple(self.parameters)

    @property
    def structure(self) -> str:
        """Digest of all names and shapes: the same skeleton."""
        return structure_digest((name, info.shape) for name, info in self.parameters.items())

    def targets(self, names: Collection[str]) -> str:
        """Digest of the names and shapes that an adapter touches; names the base lacks are left out."""
        return structure_digest((name, self.parameters[name].shape) for name in names if name in self.parameters)

    def modules(self) -> dict[str, tuple[str, ...]]:
        """Module path -> the names of its own parameters, in canonical order; tied names too (see ``stored``)."""
        result: dict[str, list[str]] = {}
        tied = [name for group in self.tied for name in group[1:]]
        for name in sorted({*self.parameters, *tied}, key=natural) if tied else self.parameters:
            module, _, parameter = name.rpartition(".")
            result.setdefault(module, []).append(parameter)
        return {module: tuple(parameters) for module, parameters in result.items()}

    def spellings(self, module: str) -> tuple[str, ...]:
        """``module`` and its other names under ``aliases``; the canonical one first."""
        names = [module]
        for canonical, other in self.aliases:
            if f"{module}.".startswith(canonical):
                names.append(other + module[len(canonical) :] if module + "." != canonical else other.rstrip("."))
        return tuple(names)

    def stored(self, name: str) -> str:
        """The name in ``parameters`` that ``name`` shares storage with; ``name`` itself where it is not tied."""
        return next((group[0] for group in self.tied if name in group), name)

    def role(self, name: str) -> str:
        """What the module of a parameter is; "" where the base has none of that name, or nobody knows.

        A name that shares the storage of an embedding is a table of its own (T5's ``encoder.embed_tokens``) or a linear
        head (``lm_head``), which its own name tells.
        """
        own = self.parameters.get(name)
        if own is not None:
            return own.role
        shared = self.parameters.get(self.stored(name))
        if shared is None or shared.role != "embedding":
            return shared.role if shared else ""
        return "embedding" if _TABLE.search(name.rpartition(".")[0].rpartition(".")[2]) else "linear"

    def tied_with(self, name: str) -> tuple[str, ...]:
        """The other names that share storage with ``name``."""
        return tuple(other for group in self.tied if name in group for other in group if other != name)
