"""What acts on a pipeline, made part of its weights: everything is decided before anything changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorahub.adapter import Adapter
from lorahub.bases.torch_module import held_parameters
from lorahub.engine.changing.merge import Merged, merge_into
from lorahub.engine.changing.sharding import local_parts
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.planning.plan import Plan
from lorahub.engine.undoing.keeper import Policy as Undo
from lorahub.errors import UsageError
from lorahub.merging.preparing import prepare
from lorahub.opening import Base
from lorahub.plugins import load_registry
from lorahub_diffusers.held import Held
from lorahub_diffusers.weights import factors, targets_of, weighted

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Landing", "prepared"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """A merge that nothing stands against, for what this process holds of the pipeline.

    Attributes:
        base: the pipeline.
        model: its view.
        plan: with the weights of each component and block in it.
        parameters: canonical name -> the live tensor.
        adapters: by name, read.
    """

    base: Base
    model: nn.Module
    plan: Plan
    parameters: Mapping[str, torch.Tensor]
    adapters: Mapping[str, Adapter]

    def run(self, undo: Undo) -> Merged:
        """Change the weights; an error leaves every one as it was."""
        held = held_parameters(self.model, self.base.index)
        return merge_into(self.parameters, self.plan, self.adapters, held=held, keeping=Keeping(policy=undo))


def prepared(base: Base, acting: Mapping[str, Held], compat: str | None) -> Landing:
    """The merge of these adapters with their weights; nothing is changed.

    Raises:
        UsageError: there are none, one was put on another component than its file names, or weights are by component
            or block under ``compat="peft"``, which puts them into the factors.
        LorahubError: what merging would raise.
    """
    if not acting:
        raise UsageError("no adapter acts, so there is nothing to merge", "choose some: set_adapters([...])")
    if elsewhere := [name for name, one in acting.items() if one.component]:
        raise UsageError(
            f"{', '.join(elsewhere)} was put on another component than its file names",
            "merge it into that model: lorahub.merge(pipe.COMPONENT, {...})",
        )
    plain = {name: one.rule for name, one in acting.items() if isinstance(one.rule, int | float)}
    if len(plain) < len(acting) and compat == "peft":
        raise UsageError(
            'under compat="peft" weights go into the factors, one for each adapter', "give each adapter one number"
        )
    policies = [one.policy for one in acting.values()]
    job = prepare(
        base,
        {name: one.source for name, one in acting.items()},
        weights={name: plain.get(name, 1.0) for name in acting},
        allow={code for policy in policies for code in policy.allow},
        compat=compat,
        hub=policies[0].hub,
    )
    job.refuse()
    numbers = {
        name: dict.fromkeys(targets, 1.0) if name in plain else factors(acting[name].rule, targets, name=name)
        for name, targets in targets_of(job.plan).items()
    }
    model = base.model
    assert model is not None  # pipelines are live
    adapters = job.adapters(load_registry())
    plan, parameters = local_parts(weighted(job.plan, numbers), base.framework.parameters(model, base.index), adapters)
    return Landing(base=base, model=model, plan=plan, parameters=parameters, adapters=adapters)
