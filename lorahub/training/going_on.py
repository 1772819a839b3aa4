"""What going on with a training takes that no tensor says, kept in the metadata of the adapter's file.

That is the dropout, and which factors count from where they began: those are written with their start behind them, as
LoRA of twice the rank, which anybody reads, and only the first half is trained.  Knows seats and strings; no files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import final

from lorahub import strict_json
from lorahub.deltas.kind import JSON
from lorahub.errors import IntegrityError
from lorahub.saving import TRAINING
from lorahub.training.seats import Seat, Seats

__all__ = ["GoingOn", "going_on", "parted", "saying"]

_STARTS = ("from_up", "from_down")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GoingOn:
    """What was said where the adapter was saved.

    Attributes:
        dropout: the chance of an input of its path to be dropped; None: nothing was said.
        departed: the parameters, without components, whose factors have their start behind them.
    """

    dropout: float | None = None
    departed: Collection[str] = ()


def saying(seats: Seats, dropout: float) -> dict[str, JSON]:
    """What is to be kept of a training, as the hint ``training``; empty where its tensors say all."""
    departed: list[JSON] = [_name(seat) for seat in seats.seats if seat.fixed.keys() >= {*_STARTS}]
    found: dict[str, JSON] = {"dropout": dropout} if dropout else {}
    return found | ({"departed": departed} if departed else {})


def going_on(metadata: Mapping[str, str], label: str) -> GoingOn:
    """What a file's metadata say.

    Raises:
        IntegrityError: they are not as they were written.
    """
    text = metadata.get(TRAINING)
    if text is None:
        return GoingOn()
    try:
        said = strict_json.read(text, limit=4 * len(text))
    except strict_json.NotStrict as error:
        raise _damaged(label, str(error)) from None
    dropout = said.get("dropout", 0.0) if isinstance(said, dict) else None
    departed = said.get("departed", []) if isinstance(said, dict) else None
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise _damaged(label, "its dropout is no chance")
    if not isinstance(departed, list):
        raise _damaged(label, "departed is no list of parameters")
    names = tuple(name for name in departed if isinstance(name, str))
    if len(names) < len(departed):
        raise _damaged(label, "departed is no list of parameters")
    return GoingOn(dropout=float(dropout), departed=names)


def parted(seats: Seats, departed: Collection[str], label: str) -> Seats:
    """The seats, with the second half of the factors of ``departed`` as the fixed start that it is.

    Raises:
        IntegrityError: there are no such factors.
    """
    if absent := sorted({*departed} - {_name(seat) for seat in seats.seats}):
        raise _damaged(label, f"{absent[0]} is not in it")
    return replace(
        seats, seats=tuple(_parted(seat, label) if _name(seat) in departed else seat for seat in seats.seats)
    )


def _parted(seat: Seat, label: str) -> Seat:
    up, down = seat.trained.get("up"), seat.trained.get("down")
    if up is None or down is None or up.shape[1] != down.shape[0] or down.shape[0] % 2:
        raise _damaged(label, f"{_name(seat)} has no two halves of factors")
    rank = down.shape[0] // 2
    trained = {**seat.trained, "up": up[:, :rank].clone(), "down": down[:rank].clone()}
    fixed = {**seat.fixed, "from_up": up[:, rank:].clone(), "from_down": -down[rank:]}
    return replace(seat, trained=trained, fixed=fixed, options={**seat.options, "rank": rank})


def _name(seat: Seat) -> str:
    return f"{seat.target.module}.{seat.target.parameter}"


def _damaged(label: str, what: str) -> IntegrityError:
    return IntegrityError(
        f"{label}: what its file says of its training cannot be: {what}",
        "go on from a copy that nobody has changed; without these metadata its factors are trained as they are",
    )
