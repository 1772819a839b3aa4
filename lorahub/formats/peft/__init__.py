"""PEFT's folder: ``adapter_config.json`` beside ``adapter_model.safetensors``.

The config says which type of adapter it is and how its factors are scaled; the tensor names say which module each
slot belongs to.  Which slots there are, how they are spelled and what a config field means, the kinds declare.  What
no kind, config field or name accounts for becomes a finding with the keys it concerns.  No number is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import Choice
from lorahub.deltas.kind import JSON, Group, Kind, Spelling
from lorahub.errors import UnsupportedFormat
from lorahub.findings import Claim, Finding, Verdict
from lorahub.formats.families import representatives
from lorahub.formats.format import AdapterFiles, Format, Part, Reading, Written, one_of
from lorahub.formats.peft.bare import group_bare
from lorahub.formats.peft.completion import complete
from lorahub.formats.peft.config import CONFIG, base_claim, field_findings
from lorahub.formats.peft.configless import looked_at
from lorahub.formats.peft.fits import suffixes
from lorahub.formats.peft.groups import group_factors, tensor_ref
from lorahub.formats.peft.keys import MODEL, Names, Stems, take_apart
from lorahub.formats.peft.lookalikes import lookalike, named_by_peft
from lorahub.formats.peft.owner import Owner
from lorahub.formats.peft.parameters import attention_outputs, in_order, owners
from lorahub.formats.peft.replication import replication
from lorahub.formats.peft.targets import unfilled, unsaved
from lorahub.formats.peft.types import PeftType, type_of
from lorahub.formats.peft.write import FILE, write
from lorahub.formats.peft.written import written_choice
from lorahub.hookspecs import hookimpl

__all__ = ["PeftFormat", "lorahub_formats"]

_KEPT = ("auto_mapping", "modules_to_save", "peft_type", "peft_version", "task_type")
"""Config fields that are worth keeping, and that ``write`` puts back."""


@final
class PeftFormat:
    """Reads and writes PEFT adapters."""

    name = "peft"

    def claims(self, files: AdapterFiles) -> Claim | None:
        """Sure where the config names a ``peft_type`` and the tensors are named so; less so by the names alone.

        A config beside tensors of other names may be somebody else's: there every format that knows the names is surer.
        """
        if not files.headers:
            return None
        config = files.configs.get(CONFIG, {})
        named = named_by_peft(files.headers, config, FILE)
        if isinstance(config.get("peft_type"), str):
            if not named:
                return Claim(0.3, f"{CONFIG} has a peft_type, though no tensor is named as PEFT names them")
            other = bool(lookalike(files.headers.values()))
            early = bool(config.get("enable_lora"))  # a layout of its own: ``peft_merged``
            return Claim(0.5 if other or early else 1.0, f"{CONFIG} has a peft_type")
        return Claim(0.5, f"tensor names begin with {MODEL}") if named else None

    def read(self, files: AdapterFiles, kinds: Sequence[Kind], index: BaseIndex | None) -> Reading:
        """Account for every key of the weights file.

        Raises:
            UnsupportedFormat: several files could hold the weights.
            IntegrityError: a config field has a type that PEFT never writes.
        """
        file = _weights_file(files)
        header = files.headers[file]
        config = files.configs.get(CONFIG, {})
        tag = config.get("peft_type")
        if not isinstance(tag, str):
            seen = looked_at(file, header, kinds, index)
            return Reading(format=self.name, file=file, groups=seen.groups, shared=seen.shared, findings=seen.findings)
        about = type_of(tag, config)
        ways = [
            (kind, spelling)
            for kind in kinds
            for spelling in kind.spellings
            if not (about and about.part)
            and (spelling.format, spelling.tag) == (self.name, tag)
            and spelling.when(config)
        ]
        stems = Stems(index)
        found = take_apart(header.tensors, suffixes(ways, shared=False), suffixes(ways, shared=True), stems)
        attentions = attention_outputs(found)
        owned = owners(found, header, config, stems, index, attentions)
        choice = Choice(files.compat or written_choice(header))
        layers: dict[str, JSON] = {}
        about_layers: list[Finding] = []
        if any(_LAYERS in spelling.fields for _, spelling in ways):
            layers, about_layers = replication(config, found, stems, index, choice)
        factors = group_factors(found, ways, header, config, stems, owned, choice)
        whole = group_bare(found, header, config, stems, index)
        completed = complete(factors, ways, config, index)
        groups = (*completed.groups, *whole.groups) if whole.groups else completed.groups
        findings = [*about_layers, *factors.findings, *completed.findings, *whole.findings, *_about_names(found)]
        findings += _unfulfilled(config, found, owned)
        left = [*whole.unknown, *found.foreign]
        parts: dict[str, Part] = {}
        if ways:
            present = {group.kind for group in representatives(groups)}
            spellings = [spelling for _, spelling in ways]
            findings += field_findings(config, spellings, [way for kind, way in ways if kind.name in present])
            findings += _unknown(left)
            findings += unfilled(config, found, whole.groups, stems, index)
            findings += unsaved(config, found, whole.groups, stems, index)
        else:
            findings.append(_no_kind(tag, about, left, others=bool(groups)))
            if about and about.part and left:
                tensors = {key: tensor_ref(header, key) for key in left}
                parts[about.part] = Part(kind=about.part, reason=about.reason, tensors=tensors)
        repo, revision, notes = base_claim(config)
        return Reading(
            format=self.name,
            file=file,
            groups=groups,
            shared=completed.shared,
            parts=parts,
            findings=(*findings, *notes),
            base_repo=repo,
            base_revision=revision,
            hints=_hints(config, groups) | layers | in_order(owned) | _undecided(choice, ways, index) | choice.hint(),
        )

    def write(self, deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
        """Spell the deltas as PEFT would; see ``lorahub.formats.peft.write.write``."""
        return write(deltas, kinds, hints)


def _undecided(choice: Choice, ways: Sequence[tuple[Kind, Spelling]], index: BaseIndex | None) -> dict[str, JSON]:
    """A choice that may decide something once a base is known."""
    waits = index is None and any(spelling.disputed_on for _, spelling in ways)
    return {"compat": choice.compat} if waits and choice.compat else {}


def _weights_file(files: AdapterFiles) -> str:
    if FILE in files.headers:
        return FILE
    if len(files.headers) == 1:
        return next(iter(files.headers))
    raise UnsupportedFormat(
        f"{files.folder} holds several weights files: {', '.join(sorted(files.headers))}",
        one_of(files, files.headers),
    )


def _no_kind(tag: str, about: PeftType | None, keys: Sequence[str], *, others: bool) -> Finding:
    """A ``peft_type`` that no registered kind reads, by name, and why."""
    if about is None:
        message = f"peft_type {tag!r} is none that PEFT 0.21 or lorahub knows"
    elif about.part:
        message = f"this is {about.title} (peft_type {tag}), which cannot be merged: {about.reason}"
    else:
        message = f"this is {about.title} (peft_type {tag}), a weight change that no installed kind reads"
        message += f"; {about.reason}" if about.reason else ""
    partly = others and about is not None and bool(about.part)
    return Finding(
        code="kind-unsupported",
        axis="format",
        level=Verdict.DEGRADED if partly else Verdict.INCOMPATIBLE,
        message=message,
        where=tuple(keys),
        remedy=_way_on(about) if about else "",
        allowable=partly,
    )


def _way_on(about: PeftType) -> str:
    """What to do with an adapter of a type that no kind reads."""
    if about.live:
        return "lorahub.attach(model, [FOLDER]) attaches it"
    return "load it with the library that made it" if about.part else "lorahub plugins"


def _unknown(keys: Sequence[str]) -> list[Finding]:
    if not keys:
        return []
    return [
        Finding(
            code="key-unknown",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{len(keys)} tensors are no slot of any kind and are not explained by {CONFIG}",
            where=tuple(keys),
            remedy=f"if they replace modules of the base, name those in modules_to_save of {CONFIG}; "
            "to leave them out: --allow key-unknown",
            allowable=True,
        )
    ]


def _unfulfilled(config: Mapping[str, JSON], found: Names, owned: Mapping[str, Owner]) -> list[Finding]:
    """Fields that speak of tensors of their own, which the file does not have."""
    lacking = {
        "target_parameters": not any(owner.named != owner.module and not owner.twice for owner in owned.values()),
        "trainable_token_indices": not any(_TOKENS in suffixes for suffixes in found.factors.values()),
    }
    return [
        Finding(
            code="slot-missing",
            axis="integrity",
            level=Verdict.INCOMPATIBLE,
            message=f"{CONFIG} has {name}, and the file has no tensors for it",
            where=(name,),
            remedy="fetch the file again, or ask its author",
        )
        for name, missing in lacking.items()
        if missing and config.get(name) and found.factors
    ]


_LAYERS = "layer_replication"
_TOKENS = "token_adapter.trainable_tokens_delta"


def _about_names(found: Names) -> list[Finding]:
    """Adapter names inside keys: harmless where there is one, two adapters in one file where there are more."""
    if not found.adapters:
        return []
    adapters = sorted(found.adapters)
    where = tuple(key for name in adapters for key in found.adapters[name])
    if len(adapters) == 1:
        return [
            Finding(
                code="adapter-name-in-key",
                axis="format",
                level=Verdict.EXACT,
                message=f"tensors are named as in a model's memory, with the adapter's name {adapters[0]!r} inside",
                where=where,
            )
        ]
    return [
        Finding(
            code="several-adapters",
            axis="integrity",
            level=Verdict.INCOMPATIBLE,
            message=f"the file holds tensors of several adapters: {', '.join(map(repr, adapters))}",
            where=where,
            remedy="save each adapter into a folder of its own",
        )
    ]


def _hints(config: Mapping[str, JSON], groups: Sequence[Group]) -> dict[str, JSON]:
    hints: dict[str, JSON] = {name: config[name] for name in _KEPT if config.get(name)}
    if config.get("fan_in_fan_out") is True:
        hints["fan_in_fan_out"] = True
    if not any(each.role for each in representatives(groups)):
        return hints
    roles: dict[str, JSON] = {
        Target(group.component, group.module, group.parameter).name: group.role for group in groups if group.role
    }
    if roles:
        hints["roles"] = roles
    return hints


@hookimpl
def lorahub_formats() -> list[Format]:
    """PEFT."""
    return [PeftFormat()]
