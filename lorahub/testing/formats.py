"""The laws every format keeps: nothing is lost, nothing is guessed, and no other format's files are taken for its own.

    from lorahub.testing import check_format
    def test_my_format():
        check_format(MyFormat())

Tries the format on examples of every kind and on files in ``FormatCase.folders``, which a format that only reads needs.
A kind that the format has no word for is refused with ``CannotCarry``, which is no fault.  Knows no spelling.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorahub.errors import CannotCarry, IntegrityError, LorahubError
from lorahub.files.containers import CONTAINERS
from lorahub.files.header import TensorInfo
from lorahub.findings import Finding, Verdict
from lorahub.formats.assembly import account
from lorahub.formats.format import Format, Reading
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit, bind
from lorahub.testing.judging import hold
from lorahub.testing.specimens import (
    FormatCase,
    Specimen,
    adapters,
    differing,
    foreign,
    header_of,
    specimens,
    spelled,
    unknown_adapter,
    writes,
)

__all__ = ["FORMAT_LAWS", "check_format"]

_KEY = "nobody.knows.this"
_FIELD = "nobody_knows_this"
_CLASHES = ("layers.0.q_proj", "layers.0.q.proj", "layers.0_q.proj", "layers_0.q_proj")
"""Modules that are one name where dots and underscores are the same."""


def what_is_written_reads_back(carrier: Format, case: FormatCase) -> None:
    """Law 7: what the format writes it reads back bit for bit, with nothing to say about it, or it refuses."""
    carried = 0
    for kind in case.every_kind.values():
        for deltas, hints in adapters(kind, case):
            says = f"{carrier.name}: {kind.name} on {', '.join(target.name for target in deltas)}"
            specimen = spelled(carrier, case, deltas, hints)
            if specimen is None:
                continue
            carried += 1
            reading = _read(carrier, specimen, case)
            found = [finding.show() for finding in reading.findings if finding.level > Verdict.EXACT]
            hold(not found, f"{says}: what it wrote itself it finds fault with: {'; '.join(found)}")
            changed = differing(reading, specimen, deltas, case)
            hold(not changed, f"{says}: {', '.join(changed)} read back otherwise")
    hold(
        bool(carried or case.folders),
        f"{carrier.name}: it writes none of the kinds, and FormatCase has no folder to try it on",
    )


def no_two_slots_are_spelled_alike(carrier: Format, case: FormatCase) -> None:
    """Law 8: modules whose names are nearly the same are told apart, or refused; so are the slots of each."""
    for kind in case.every_kind.values():
        leaves = [leaf for spelling in kind.spellings if spelling.format == carrier.name for leaf in spelling.leaves]
        for leaf in leaves:
            known = any(slot.covers(leaf.slot) for slot in kind.slots)
            hold(known, f"{carrier.name}: {leaf.suffix} spells {leaf.slot}, which {kind.name} does not have")
        for deltas, hints in adapters(kind, replace(case, modules=_CLASHES), briefly=True):
            specimen = spelled(carrier, case, deltas, hints)
            if specimen is None:
                continue
            changed = differing(_read(carrier, specimen, case), specimen, deltas, case)
            hold(not changed, f"{carrier.name}: {', '.join(changed)} cannot be told from others that it wrote")


def every_key_is_accounted_for(carrier: Format, case: FormatCase) -> None:
    """Each tensor is in one group, shared slot or part, or in a finding; an unknown one stops what would lose it."""
    for specimen in specimens(carrier, case):
        says = f"{carrier.name}: {specimen.label}"
        _accounted(_read(carrier, specimen, case), specimen, says)
        more = _with(specimen, {_KEY: TensorInfo(dtype="F32", shape=(3, 5), start=0, stop=60)})
        try:
            reading = _read(carrier, more, case)
        except LorahubError as error:
            hold(_KEY in str(error), f"{says}: refused for a key that it does not know, and does not name it: {error}")
            continue
        _accounted(reading, more, f"{says}, and {_KEY}")
        named = [finding for finding in reading.findings if _KEY in finding.where]
        if any(f"{group.module}.{group.parameter}" == _KEY for group in reading.groups):
            continue  # where whole parameters go under their own names, this is one
        hold(bool(named), f"{says}: it takes {_KEY}, which nobody knows, for its own")
        hold(_stops(named), f"{says}: {_KEY} would be lost, and the finding does not stop that")


def half_a_change_is_no_change(carrier: Format, case: FormatCase) -> None:
    """Without one of its tensors, or with one of another size, a module is refused or told, and never half read."""
    for specimen in specimens(carrier, case):
        says = f"{carrier.name}: {specimen.label}"
        tensors = specimen.header.tensors
        for key, info in tensors.items():
            others = {name: each for name, each in tensors.items() if name != key}
            if others:
                _whole(carrier, _of(specimen, others), case, f"{says} without {key}")
            for axis in range(len(info.shape)):
                shape = tuple(size + (at == axis) for at, size in enumerate(info.shape))
                resized = _of(specimen, {**tensors, key: replace(info, shape=shape)})
                _whole(carrier, resized, case, f"{says} with {key} of {list(shape)}")


def unknown_fields_are_told(carrier: Format, case: FormatCase) -> None:
    """A config field that nobody knows stops merging, unless it is null and can switch nothing on."""
    for specimen in specimens(carrier, case):
        for name, config in specimen.files.configs.items():
            says = f"{carrier.name}: {specimen.label}: {name}"
            for value in (3, None):
                configs = {**specimen.files.configs, name: {**config, _FIELD: value}}
                other = replace(specimen, files=replace(specimen.files, configs=configs))
                try:
                    found = _read(carrier, other, case).findings
                except LorahubError as error:
                    hold(value is not None, f"{says}: a field that is null is refused: {error}")
                    hold(_FIELD in str(error), f"{says}: refused, and {_FIELD} is not named: {error}")
                    continue
                named = [each for each in found if _FIELD in (each.message, *each.where) or _FIELD in each.message]
                if value is None:
                    hold(not _stops(named), f"{says}: a field that is null stops it")
                else:
                    hold(_stops(named), f"{says}: {_FIELD} may change the arithmetic, and passes unnoticed")


def headers_are_enough(carrier: Format, case: FormatCase) -> None:
    """Claims and readings come from headers and configs: no tensor is read, nothing is computed, torch not imported."""
    nowhere = Path(os.devnull) / "no-such-folder"
    for specimen in specimens(carrier, case):
        away = replace(specimen, files=replace(specimen.files, folder=nowhere))
        try:
            with _no_arithmetic():
                carrier.claims(away.files)
                _read(carrier, away, case)
        except OSError as error:
            hold(False, f"{carrier.name}: {specimen.label}: reading opens a file: {error}")
    loads = _imports_torch(type(carrier).__module__, tuple(sys.path))
    hold(not loads, f"{carrier.name}: importing {type(carrier).__module__} imports torch; use lorahub.lazy")


def claims_are_honest(carrier: Format, case: FormatCase) -> None:
    """Its own files are claimed, more surely than by any other format; what is not its own is left to its owner."""
    others = [each for each in case.every_format.values() if each.name != carrier.name]
    for specimen in specimens(carrier, case):
        says = f"{carrier.name}: {specimen.label}"
        claim = carrier.claims(specimen.files)
        if claim is None:
            raise AssertionError(f"{says}: it does not claim its own files")
        hold(0 < claim.score <= 1, f"{says}: a claim is more than 0 and at most 1, and this one is {claim.score}")
        hold(bool(claim.reason), f"{says}: its claim gives no reason")
        for other in others:
            theirs = other.claims(specimen.files)
            sure = theirs is not None and theirs.score >= claim.score
            hold(not sure, f"{says}: {other.name} is as sure that they are its own: {theirs}")
    for what, files in foreign():
        hold(carrier.claims(files) is None, f"{carrier.name}: it claims {what}")
    for other in others:
        for specimen in specimens(other, replace(case, folders=()), briefly=True):
            mine, theirs = carrier.claims(specimen.files), other.claims(specimen.files)
            taken = mine is not None and theirs is not None and mine.score >= theirs.score
            hold(not taken, f"{carrier.name}: it claims {specimen.label} of the format {other.name}: {mine}")


def writing_is_plain(carrier: Format, case: FormatCase) -> None:
    """The same deltas give the same files; they are of a known container, and configs are JSON; none is lost unsaid."""
    carried = False
    for kind in case.every_kind.values():
        for deltas, hints in adapters(kind, case, briefly=True):
            before = {target: _bits(delta.tensors()) for target, delta in deltas.items()}
            if not writes(carrier, case, deltas, hints):
                continue
            carried = True
            one, two = (carrier.write(deltas, case.kinds_given, {**case.hints, **hints}) for _ in range(2))
            says = f"{carrier.name}: {kind.name}"
            hold(one.file.endswith(tuple(CONTAINERS)), f"{says}: {one.file} is no file of weights by its name")
            alike = _bits(one.tensors) == _bits(two.tensors) and (one.metadata, one.configs) == (
                two.metadata,
                two.configs,
            )
            hold(alike, f"{says}: written twice, the same adapter gives other files")
            text = all(isinstance(each, str) for pair in one.metadata.items() for each in pair)
            hold(text, f"{says}: metadata that is no text")
            try:
                same = json.loads(json.dumps(one.configs, allow_nan=False)) == one.configs
            except (TypeError, ValueError):
                same = False
            hold(same, f"{says}: its configs are no JSON")
            after = {target: _bits(delta.tensors()) for target, delta in deltas.items()}
            hold(before == after, f"{says}: writing changes the adapter")
    unknown = unknown_adapter(case.modules)
    try:
        carrier.write(unknown, case.kinds_given, case.hints)
    except CannotCarry as error:
        named = any(target.name in str(error) for target in unknown)  # a long list is cut
        first = next(iter(unknown)).name
        hold(named or not carried, f"{carrier.name}: {first} cannot be written, and the error names no target")
    else:
        hold(False, f"{carrier.name}: a change of a kind that nobody knows is written as if it were known")


FORMAT_LAWS: Mapping[str, Callable[[Format, FormatCase], None]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            claims_are_honest,
            headers_are_enough,
            what_is_written_reads_back,
            no_two_slots_are_spelled_alike,
            every_key_is_accounted_for,
            half_a_change_is_no_change,
            unknown_fields_are_told,
            writing_is_plain,
        )
    }
)
"""Name -> law; each takes a format and a case and raises ``AssertionError``."""


def check_format(carrier: Format, case: FormatCase | None = None) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold.

    Args:
        carrier: the format.
        case: kinds that are not registered, names that it demands, folders of its files; see ``FormatCase``.
    """
    given = case or FormatCase()
    for law in FORMAT_LAWS.values():
        law(carrier, given)


def _read(carrier: Format, specimen: Specimen, case: FormatCase) -> Reading:
    return carrier.read(specimen.files, case.kinds_given, specimen.index)


def _accounted(reading: Reading, specimen: Specimen, says: str) -> None:
    try:
        account(reading, specimen.header)
    except IntegrityError as error:
        raise AssertionError(f"{says}: {error.message}") from error


def _whole(carrier: Format, specimen: Specimen, case: FormatCase, says: str) -> None:
    """Whether every group that is read has all its slots, of sizes that go together."""
    try:
        reading = _read(carrier, specimen, case)
    except LorahubError:
        return
    told = {key for finding in reading.findings if finding.level >= Verdict.DEGRADED for key in finding.where}
    for group in reading.groups:
        kind = case.every_kind[group.kind]
        keys = {ref.key for ref in group.slots.values()}
        shared = {slot for name, slot in reading.shared if name == kind.name}
        if told & keys:
            continue
        absent = [
            slot.name
            for slot in kind.slots
            if not slot.optional and not slot.many and not slot.shared and slot.name not in group.slots
        ]
        absent += [slot.name for slot in kind.slots if slot.shared and not slot.optional and slot.name not in shared]
        hold(not absent, f"{says}: {group.module} is read as {kind.name} without its {', '.join(absent)}")
        for touch in kind.touches(group):
            refs = {slot: group.slots.get(slot) for slot in touch.slots}
            try:
                bind(tuple((slot, kind.slot(slot).dims, ref.shape) for slot, ref in refs.items() if ref is not None))
            except ShapeMisfit as error:
                raise AssertionError(f"{says}: {group.module} is read, and does not fit together: {error}") from error


def _stops(findings: list[Finding]) -> bool:
    return any(finding.level >= Verdict.DEGRADED for finding in findings)


def _with(specimen: Specimen, tensors: Mapping[str, TensorInfo]) -> Specimen:
    return _of(specimen, {**specimen.header.tensors, **tensors})


def _of(specimen: Specimen, tensors: Mapping[str, TensorInfo]) -> Specimen:
    """The same file with other tensors."""
    header = header_of(specimen.header, tensors)
    files = replace(specimen.files, headers={**specimen.files.headers, specimen.file: header})
    return replace(specimen, files=files)


def _bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()),
        )
        for name, tensor in tensors.items()
    }


@contextmanager
def _no_arithmetic() -> Iterator[None]:
    """While it lasts, every call of torch is a fault."""

    class Forbid(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, called: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(f"reading headers calls torch: {getattr(called, '__name__', called)}")

    mode: Any = Forbid()  # torch leaves its methods untyped
    with mode:
        yield


@cache  # the classes of a module are imported together
def _imports_torch(module: str, path: tuple[str, ...]) -> bool:
    """Whether a fresh interpreter has torch once it imported the module; false where the module cannot be imported."""
    code = f"import sys; sys.path[:] = {list(path)!r}; import {module}; sys.exit(33 * ('torch' in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 33  # noqa: S603 - its own interpreter
