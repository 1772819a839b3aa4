"""An adapter that is there already, taken up again: from its files to the tensors that are trained.

Read, checked and placed as for a merge, so that one which PEFT trained is taken up like one of ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from lorahub.adapter import Adapter, AdapterHeader
from lorahub.bases.layout import Target
from lorahub.deltas.kind import JSON
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.merging.preparing import prepare
from lorahub.opening import Base
from lorahub.registry import Registry
from lorahub.sources import Given
from lorahub.training.going_on import going_on, parted, saying
from lorahub.training.made import Made, described
from lorahub.training.seats import Seats, seats_of

__all__ = ["taken_up"]

_DROPOUTS = ("lora_dropout", "vera_dropout")


def taken_up(
    base: Base,
    source: Given,
    registry: Registry,
    *,
    name: str,
    dtype: torch.dtype,
    dropout: float | None,
    named: Mapping[str, str],
    allow: Collection[str],
) -> Made:
    """The adapter as one that is trained.

    Args:
        base: the live base.
        source: the adapter.
        registry: kinds and formats.
        name: what to call it.
        dtype: of what is trained.
        dropout: None: what its file says, or its config.
        named: the base's repository and revision.
        allow: finding codes to accept.

    Raises:
        UsageError: it holds nothing that can be trained on.
        IntegrityError: what its file says of its training cannot be.
        LorahubError: what merging it would raise.
    """
    job = prepare(base, {name: source}, weights=[1.0], allow=allow)
    job.refuse()
    header = job.headers[name]
    adapter = job.adapters(registry)[name]
    assert isinstance(adapter, Adapter)  # nothing is read on demand here
    if adapter.parts:
        raise UsageError(f"{header.label} holds what is no change of a weight, which is not trained here")
    hints = {**header.reading.hints, **adapter.hints}
    roles = {Target(group.component, group.module, group.parameter).name: group.role for group in header.reading.groups}
    listed = hints.get("transposed")
    turned = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    kept = going_on(header.files.headers[header.reading.file].metadata, header.label)
    seats = seats_of(adapter.deltas, registry.kinds, roles=roles, turned=turned, dtype=dtype)
    seats = parted(seats, kept.departed, header.label)
    if dropout is None:
        dropout = _dropout(header) if kept.dropout is None else kept.dropout
    touched = {step.source for step in job.plan.steps if step.source}
    kinds = {seat.kind.name for seat in seats.seats}
    record = described(base, kinds, touched, **named)
    if header.record is not None:
        known = header.record.base if header.record.base and not named.get("repo") else record.base
        record = header.record.changed(version=None, evals=None, files=None, digest=None, modules=None, base=known)
    known_roles: dict[str, JSON] = {each: role for each, role in roles.items() if role}
    return Made(
        base=base,
        seats=_beside(seats, base),
        name=name,
        dropout=dropout,
        hints={**hints, "roles": known_roles, "training": saying(seats, dropout), **_base_hints(named)},
        record=record,
        allow=allow,
    )


def _base_hints(named: Mapping[str, str]) -> dict[str, JSON]:
    return {"base_repo": named["repo"], "base_revision": named.get("revision")} if named.get("repo") else {}


def _dropout(header: AdapterHeader) -> float:
    for config in header.files.configs.values():
        for field in _DROPOUTS:
            value = config.get(field)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
    return 0.0


def _beside(seats: Seats, base: Base) -> Seats:
    """The seats with their tensors where the model is."""
    assert base.model is not None
    device = next((own.device for own in base.model.parameters()), torch.device("cpu"))

    def moved(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {slot: tensor.to(device) for slot, tensor in tensors.items()}

    return Seats(
        seats=tuple(replace(seat, trained=moved(seat.trained), fixed=moved(seat.fixed)) for seat in seats.seats),
        shared={kind: moved(slots) for kind, slots in seats.shared.items()},
    )
