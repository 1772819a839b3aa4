"""The base of a training, as a record describes it: by its files, or by the live model's structure, or by its name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from lorahub.bases.index import BaseRef
from lorahub.bases.open import index_base, index_live
from lorahub.deltas.kind import JSON
from lorahub.errors import BaseMismatch, Degraded, LorahubError, UnsupportedFormat
from lorahub.fetching import Source, as_ref
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch
from lorahub.names import COMMIT
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.publishing.recorded import drafted
from lorahub.record_fields import BaseRecord
from lorahub.records import AdapterRecord
from lorahub_transformers.origin import Origin, digest_of_files, origin_of

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TrainedBase"]

T = TypeVar("T")


class TrainedBase:
    """The base of one training; its files are hashed in the background from the moment that this is made.

    Attributes:
        said: what there is to say of it.
    """

    def __init__(self, model: nn.Module, given: Source | None, *, compat: str | None) -> None:
        """Look where the model came from.

        Args:
            model: the base, adapters in it or not.
            given: what it is, where somebody says so.
            compat: whose result counts where PEFT's is not the declared one.
        """
        self._model, self._compat = model, compat
        load_registry()  # here, so that no thread meets plugins that are half loaded
        self._origin = origin_of(model) if given is None else _named(given)
        self.said: list[Finding] = list(self._origin.said)
        config: dict[str, JSON] = json.loads(cast("Any", model).config.to_json_string())
        self._quantised = {key: config[key] for key in ("quantization_config",) if config.get(key)}
        origin = self._origin
        self._files = _Later(lambda: _open(given, origin))
        self._bases: list[Base] | None = None

    def drafted(self, folder: Path, fields: Mapping[str, object]) -> AdapterRecord:
        """The record of an adapter in ``folder`` that was trained on this base.

        Raises:
            UnsupportedFormat, IntegrityError: the adapter cannot be read.
            RecordError: a field does not follow the schema.
        """
        if self._bases is None:
            self._bases = list(self._open())
        for base in self._bases:
            try:
                return drafted(folder, base, compat=self._compat, fields=fields)
            except (BaseMismatch, Degraded) as error:
                self._say("base-changed", f"the adapter does not fit {base.index.ref}: {error.message}")
        named = {"repo_id": self._origin.repo, "revision": self._origin.commit}
        known = {key: value for key, value in named.items() if value}
        bare = BaseRecord.checked(**known) if "repo_id" in known else None
        return drafted(folder, named=bare, compat=self._compat, fields=fields)

    def _open(self) -> Iterator[Base]:
        """The base by its files and by its structure, whichever can be had."""
        weights = ""
        try:
            found, weights = self._files.result()
            if found is not None:
                yield replace(found, index=replace(found.index, config={**found.index.config, **self._quantised}))
        except LorahubError as error:
            self._say("base-unread", f"the files of the base cannot be looked at: {error.message}", error.hint)
            found = None
        ref = BaseRef(repo=self._origin.repo, commit=self._origin.commit)
        try:
            bare = _skeleton(self._model)
            framework, index = index_live(bare, load_registry().frameworks)
        except Exception as error:  # noqa: BLE001 - classes of any origin are built here; what they need is unknown
            self._say(
                "base-structure-unknown", f"{type(self._model).__name__} cannot be built without weights: {error}"
            )
            return
        known = {**index.config, **self._quantised}
        yield Base(
            index=replace(index, ref=ref, weights="" if found else weights, config=known),
            framework=framework,
            model=bare,
        )

    def _say(self, code: str, message: str, remedy: str = "") -> None:
        finding = Finding(code=code, axis="base", level=Verdict.UNVERIFIED, message=message, remedy=remedy)
        if finding not in self.said:
            self.said.append(finding)


def _named(given: Source) -> Origin:
    """What a reference says of a base before anybody looks."""
    ref = as_ref(given, bare=True)
    commit = ref.selector if ref.selector and COMMIT.fullmatch(ref.selector) else ""
    return Origin(repo=ref.repo or "", commit=commit)


def _open(given: Source | None, origin: Origin) -> tuple[Base | None, str]:
    """The base by its files, where an index can be made of them, and the digest of its weights."""
    if given is not None:
        opened = open_base(given, digest=True)
        return opened, opened.index.weights
    if origin.files is None:
        return None, ""
    weights = digest_of_files(origin.files)
    ref = BaseRef(repo=origin.repo, commit=origin.commit)
    try:
        framework, index = index_base(origin.files, ref, load_registry().frameworks, weights=weights)
    except UnsupportedFormat:  # they are quantised: hashed, and the structure is the live model's
        return None, weights
    return Base(index=index, framework=framework, files=origin.files), weights


def _skeleton(model: nn.Module) -> nn.Module:
    """The model as its class builds it, without weights, adapters or quantisation."""
    config: Any = copy.deepcopy(cast("Any", model).config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with torch.device("meta"):
        bare: nn.Module = type(model)(config)
    return bare


class _Later(Generic[T]):
    """What a function gives, called in a thread that nobody waits for unless it is asked."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._value: T
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="lorahub-base", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._value = self._make()
        except Exception as error:  # noqa: BLE001 - raised where the result is asked for
            self._error = error

    def result(self) -> T:
        """What it gave, or the error it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
