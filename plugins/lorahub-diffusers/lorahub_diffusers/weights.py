"""Where an adapter acts in a pipeline, and how strongly: plans moved to a component, and weights as merges have them.

A weight is a number; a dictionary over components, and over blocks in one, as diffusers' ``set_adapters`` takes it; or
any rule of a recipe: kohya's block weights (``{"blocks": [1, 0, ...]}``), layers, patterns, B-LoRA's presets.
"""

from __future__ import annotations

from dataclasses import replace

from lorahub.bases.layout import Piece
from lorahub.engine.planning.plan import Plan
from lorahub.merging.apart import Weight, factors, targets_of, weighted

__all__ = ["Weight", "factors", "placed_in", "targets_of", "weighted"]


def placed_in(plan: Plan, component: str) -> Plan:
    """The plan for one model as that for a pipeline which has the model as a component."""

    def there(piece: Piece) -> Piece:
        return replace(piece, parameter=f"{component}:{piece.parameter}")

    steps = tuple(
        replace(
            step,
            out=f"{component}:{step.out}",
            source=f"{component}:{step.source}" if step.source else None,
            stored_as=f"{component}.{step.stored_as}" if step.stored_as else "",
            terms=tuple(
                replace(
                    term,
                    piece=there(term.piece),
                    siblings={name: there(piece) for name, piece in term.siblings.items()},
                )
                for term in step.terms
            ),
        )
        for step in plan.steps
    )
    return replace(plan, steps=steps)
