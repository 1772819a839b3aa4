"""Adapters on a live model while weights for them are tried: attached once, beside those that they are held against.

Built as ``attach`` builds a live model; what stands in for an adapter (random, fresh, at weights that are learned)
goes where its plan says.  Knows no optimiser and no objective.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast, final

from lorahub.attaching import Policy, plan_one
from lorahub.bases.layout import Layout, Target
from lorahub.bases.torch_module import held_parameters
from lorahub.composition.searching.descending import descend
from lorahub.composition.searching.places import narrowed, standing_in, terms_of, weighable, whole
from lorahub.composition.searching.stand_ins import RANK, fresh_like, is_stack, norm_of, random_like, shuffled
from lorahub.composition.searching.trial_log import as_loss
from lorahub.composition.searching.weighed import Granularity, Group, groups_of, on_device, weighed
from lorahub.conversion.weights import BaseWeights
from lorahub.deltas.delta import Delta
from lorahub.engine.folding.bind import Bound
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step, Term
from lorahub.errors import UnsupportedKind, UsageError
from lorahub.fetching import Source
from lorahub.lazy import torch
from lorahub.live.attached import Live, Planned
from lorahub.merging.preparing import named_weights, prepare
from lorahub.opening import open_base
from lorahub.sources import Given

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Dials", "Loss", "Stage"]

Loss = Callable[["nn.Module", int], "torch.Tensor"]
"""(model, step) -> a loss with gradients, of the examples of that step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Deltas:
    """What stands in for an adapter."""

    deltas: Mapping[Target, Delta]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dials:
    """Adapters that are attached at weights which are tensors.

    Attributes:
        names: under which they are attached.
        groups: for each, what shares a weight.
        weights: for each group its weight, a leaf of no axes.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[Group, ...], ...]
    weights: tuple[tuple[torch.Tensor, ...], ...]

    def leaves(self) -> list[torch.Tensor]:
        """All weights."""
        return [weight for each in self.weights for weight in each]

    def put(self, value: float) -> None:
        """Let every weight be ``value``."""
        with torch.no_grad():
            for weight in self.leaves():
                weight.fill_(value)


@final
class Stage:
    """A live model, and adapters for it; as a context manager it takes all of them off at the end.

    Attributes:
        model: what objectives get.
        names: of the adapters, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, Given] | Sequence[Source],
        *,
        seed: int,
        allow: Collection[str] = (),
        compat: str | None = None,
        hub: str | None = None,
    ) -> None:
        """Read, place and judge the adapters; none is attached yet.

        Raises:
            UsageError: no adapter, a weight in a reference, or adapters are attached to the model already.
            LorahubError: what attaching them would raise.
        """
        self.model = model
        inner = getattr(model, "_orig_mod", model)  # what torch.compile returns holds the model itself
        self._base = open_base(inner)
        self._policy, self._seed = Policy(allow=allow, compat=compat, hub=hub), seed
        self._given = _without_weights(adapters)
        self.names = tuple(self._given)
        self._live = Live(
            inner,
            self._base.index,
            self._base.framework,
            plan=lambda _name, planned: cast("Planned", planned),
            judge=self._judge,
            compat=compat,
        )
        try:
            self._planned = {
                name: plan_one(self._base, name, source, self._policy) for name, source in self._given.items()
            }
            held = held_parameters(inner, self._base.index)
            tensors = self._base.framework.parameters(inner, self._base.index)
            self._devices: dict[str, torch.device] = {name: each.device for name, each in tensors.items()}
            self._devices |= {name: each.device for name, each in held.items()}
        except BaseException:
            self._live.detach()
            raise

    def _judge(self, names: Sequence[str]) -> None:
        """Refuse what a merge of several would refuse; of stand-ins there is nothing to say."""
        chosen = {name: self._given[name] for name in names if name in self._given}
        allow, compat, hub = self._policy.allow, self._policy.compat, self._policy.hub
        prepare(self._base, chosen, weights=[1.0] * len(chosen), allow=allow, compat=compat, hub=hub).refuse()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.detach()

    def digests(self, brought: Mapping[str, Planned] | None = None) -> dict[str, str]:
        """For each adapter ``sha256:`` over all that it changes; the stage's own by default."""
        planned = self._planned if brought is None else brought
        return {name: Bound(plan, {name: each}).digest(plan) for name, (plan, each) in planned.items()}

    # ---- attaching

    @contextmanager
    def plain(self, brought: Mapping[str, Planned] | None = None) -> Iterator[tuple[str, ...]]:
        """Attach adapters for a block, the stage's own by default; gives their names here."""
        names: list[str] = []
        try:
            for name, planned in (self._planned if brought is None else brought).items():
                self._live.add(name, planned)
                names.append(name)
            yield tuple(names)
        finally:
            self._live.set_adapters([])
            for name in names:
                with suppress(UsageError):  # a thread that the objective began has it still: it goes with the stage
                    self._live.remove(name)

    @contextmanager
    def dialled(self, granularity: Granularity, brought: Mapping[str, Planned] | None = None) -> Iterator[Dials]:
        """The same, at weights that are tensors, 1/n at first.

        Raises:
            UnsupportedKind: under compat="peft" a weight goes into the factors of a change.
        """
        planned = self._planned if brought is None else brought
        groups, weights = [], []
        attached = {}
        for name, (plan, adapter) in planned.items():
            terms = terms_of(plan)
            if self._policy.compat == "peft":
                _demand_outside(name, (adapter.deltas[target] for target in terms))
            own = groups_of([target for target, found in terms.items() if not whole(found)], granularity)
            leaves = tuple(torch.tensor(1.0 / len(planned), requires_grad=True) for _ in own)
            by_target = {target: leaf for group, leaf in zip(own, leaves, strict=True) for target in group.targets}
            deltas = {target: on_device(adapter.deltas[target], self._device(found)) for target, found in terms.items()}
            deltas |= {target: weighed(deltas[target], leaf) for target, leaf in by_target.items()}
            attached[name] = narrowed(plan, terms), _Deltas(deltas=deltas)
            groups.append(own)
            weights.append(leaves)
        with self.plain(attached) as names:
            yield Dials(names=names, groups=tuple(groups), weights=tuple(weights))

    def choose(self, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
        """Let these act from now on, at weight 1 by default."""
        self._live.set_adapters(names, weights=[1.0] * len(names) if weights is None else weights)

    def given(self, name: str, source: Given) -> dict[str, Planned]:
        """One more adapter, read and placed."""
        (one,) = _without_weights({name: source}).values()
        return {name: plan_one(self._base, name, one, self._policy)}

    # ---- stand-ins

    def random(self, draw: int) -> dict[str, Planned]:
        """For each adapter a random one, whose changes have the shapes, ranks and norms of its own."""
        return {
            f"(random {draw}) {name}": (
                standing_in(plan, weighable(plan)),
                _Deltas(deltas=self._drawn(plan, adapter.deltas, _seed_of(self._seed, draw, name))),
            )
            for name, (plan, adapter) in self._planned.items()
        }

    def _drawn(self, plan: Plan, deltas: Mapping[Target, Delta], seed: int) -> dict[Target, Delta]:
        generator = torch.Generator().manual_seed(seed)
        terms = weighable(plan)
        result: dict[Target, Delta] = {}
        with self._weights(terms) as weights:
            for target in sorted(terms):
                delta, found = deltas[target], terms[target]
                if is_stack(delta):
                    result[target] = shuffled(delta, generator)
                    continue
                shape = weights.shape(target) or delta.shape()
                low = delta.low_rank()
                norm = norm_of(low) if low is not None else _norm(delta, target, weights)
                assert shape is not None  # a change without a base's parameter was refused
                rank = max((term.rank for _, term in found if term.rank), default=None)
                result[target] = random_like(delta, shape, norm, rank=rank, generator=generator)
        return result

    def fresh(self) -> tuple[dict[str, Planned], list[torch.Tensor]]:
        """One adapter at all targets of all, which changes nothing yet, at the largest rank; and its tensors.

        It comes as several, one for the targets that each adapter has and none before it.
        """
        generator = torch.Generator().manual_seed(_seed_of(self._seed, 0, "fresh"))
        every = {name: weighable(plan) for name, (plan, _) in self._planned.items()}
        ranks = [term.rank for terms in every.values() for found in terms.values() for _, term in found if term.rank]
        result: dict[str, Planned] = {}
        seen: set[Target] = set()
        leaves: list[torch.Tensor] = []
        for name, (plan, adapter) in self._planned.items():
            terms = {target: found for target, found in every[name].items() if target not in seen}
            if not terms:
                continue
            seen |= {*terms}
            deltas: dict[Target, Delta] = {}
            with self._weights(terms) as weights:
                for target in sorted(terms):
                    own, found = adapter.deltas[target], terms[target]
                    shape = weights.shape(target) or own.shape()
                    assert shape is not None
                    deltas[target] = fresh_like(
                        shape,
                        rank=max(ranks, default=RANK),
                        generator=generator,
                        device=self._device(found),
                        stack=own if is_stack(own) else None,
                    )
                    leaves += [each for each in deltas[target].tensors().values() if each.requires_grad]
            result[f"(fresh) {name}"] = standing_in(plan, terms), _Deltas(deltas=deltas)
        return result, leaves

    @contextmanager
    def _weights(self, terms: Mapping[Target, Sequence[tuple[Step, Term]]]) -> Iterator[BaseWeights]:
        layouts: dict[Target, Layout] = {}  # as planned, which knows the makers' names too
        for target, found in terms.items():
            layouts[target] = Layout(target=target, pieces=tuple(term.piece for _, term in found))
            for name, piece in found[0][1].siblings.items():
                sibling = replace(target, parameter=name)
                layouts[sibling] = Layout(target=sibling, pieces=(piece,))
        with self._base.tensors() as read:
            yield BaseWeights(self._base.index, layouts, read)

    def _device(self, found: Sequence[tuple[Step, Term]]) -> torch.device:
        return self._devices.get(found[0][0].out, torch.device("cpu"))

    # ---- running

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Let PyTorch's generators begin at the seed for a block, and go on afterwards as if nothing had been drawn."""
        cards = sorted({each.index or 0 for each in self._devices.values() if each.type == "cuda"})
        with torch.random.fork_rng(devices=cards, device_type="cuda"):
            torch.default_generator.manual_seed(self._seed)
            for card in cards:
                torch.cuda.default_generators[card].manual_seed(self._seed)
            yield

    def score(self, objective: Callable[[nn.Module], object]) -> float:
        """What the objective gives for the model as it is chosen; NaN where that is no finite number.

        Raises:
            UsageError: it gives no number.
            BaseException: what it raises.
        """
        with self.seeded():
            return as_loss(objective(self.model))

    def train(
        self,
        leaves: Sequence[torch.Tensor],
        loss: Loss,
        *,
        steps: int,
        lr: float,
        tick: Callable[[], None] = lambda: None,
    ) -> tuple[tuple[float, ...], list[bool]]:
        """See ``descend``: the loss of the model as it is chosen."""
        with self.seeded():
            return descend(leaves, lambda step: loss(self.model, step), steps=steps, lr=lr, tick=tick)


def _without_weights(adapters: Mapping[str, Given] | Sequence[Source]) -> dict[str, Given]:
    """Adapters by name.

    Raises:
        UsageError: there is none, or a reference has a weight.
    """
    given = named_weights(adapters)
    if not given:
        raise UsageError("no adapter was given", "give one or more: {'ink': 'acme/ink@1.2'}")
    for name, (_, weight) in given.items():
        if weight != 1:
            raise UsageError(
                f"the reference of '{name}' has a weight ({weight:g}), and weights are what is looked for",
                f"leave out ':{weight:g}'",
            )
    return {name: source for name, (source, _) in given.items()}


def _norm(delta: Delta, target: Target, weights: BaseWeights) -> float:
    """The Frobenius norm of a change that has no factors, at the base's weight."""
    weight = weights.weight(target)
    siblings = {name: weights.weight(replace(target, parameter=name)) for name in delta.reads}
    assert weight is not None
    with torch.no_grad():
        change = delta.delta(weight, **{name: each for name, each in siblings.items() if each is not None})
    return float(change.norm())


def _demand_outside(name: str, deltas: Iterator[Delta]) -> None:
    for delta in deltas:
        try:
            delta.strengthened(1.0)
        except UnsupportedKind:
            continue
        raise UnsupportedKind(
            f"under compat='peft' the weight of '{name}' goes into factors of its {delta.kind} changes, and what is "
            "learned are weights of whole changes",
            "leave out compat, or pass compat='strict'",
        )


def _seed_of(seed: int, draw: int, name: str) -> int:
    """A seed that depends on these alone."""
    return int.from_bytes(hashlib.sha256(f"{seed} {draw} {name}".encode()).digest()[:7])
