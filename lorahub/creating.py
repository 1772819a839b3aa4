"""Making an adapter and training it, for scripts: on any model, in any loop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorahub.bases.layout import Target
from lorahub.bases.open import as_module
from lorahub.deltas.kind import JSON
from lorahub.errors import InvalidRef, UsageError
from lorahub.lazy import torch
from lorahub.names import COMMIT, Ref, did_you_mean
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.sources import Given
from lorahub.training.asked import asked, demand_seed, task_of, trainable_kind
from lorahub.training.configs import arguments
from lorahub.training.going_on import saying
from lorahub.training.grounds import Terrain, begin, roles_of, whole_seats
from lorahub.training.made import Made, described, planned
from lorahub.training.peft_targets import completed
from lorahub.training.resuming import taken_up
from lorahub.training.rooted import demand_free
from lorahub.training.seats import Seat, Seats
from lorahub.training.seen import seen
from lorahub.training.targets import Patterns, Resolver
from lorahub.training.targets import named as named_by
from lorahub.training.trainee import Trainee

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Trainee", "create"]

_BIASES = ("none", "all", "lora_only")


def create(
    model: nn.Module,
    kind: str | None = None,
    *,
    r: int | None = None,
    alpha: float | None = None,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    target_parameters: Patterns | None = None,
    modules_to_save: Patterns | None = None,
    layers: int | Collection[int] | None = None,
    dropout: float | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    bias: str | None = None,
    init: str | None = None,
    batches: Iterable[Any] | None = None,
    seed: int = 0,
    name: str = "default",
    dtype: torch.dtype | None = None,
    config: object = None,
    resume: Given | None = None,
    base: str | Ref | None = None,
    task_type: str | None = None,
    allow: Collection[str] = (),
    **settings: JSON,
) -> Trainee:
    """Freeze a model, and put an adapter into it that changes nothing yet and can be trained by any loop.

        trainee = lorahub.create(model, "lora", r=16, target_modules="all-linear")
        optimizer = torch.optim.AdamW(trainee.parameters(), lr=1e-4)

    Create first; wrap, shard, prepare or compile the model then.  A model on the meta device takes no memory: its
    trainee counts parameters.

    Args:
        model: any ``nn.Module``; of a pipeline, the one of its models that is to be trained.
        kind: "lora", "dora", "loha", "lokr", "ia3", "vera", "oft", or any other registered kind that can be trained;
            None: the config's, else "lora".
        r: the rank; None: the kind's own choice.
        alpha: the change is multiplied by alpha / r; None: ``r``, so that it is not scaled.
        target_modules: what to train: a preset ("attention", "all-linear", "all-conv", "all-embedding"), ends of
            modules' paths ("q_proj"), globs ("layers.*.mlp.*"), compiled regular expressions for whole paths, or a list
            of these.  A part of a fused projection ("q" beside "qkv") can be named where its layout is declared.  None:
            the config's, with PEFT's own choice for such a model where that names none; without a config "attention"
            where the model has it, else "all-linear".
        exclude_modules: what to leave out of that, by ends of paths, globs or regular expressions.
        target_parameters: parameters that are no weight of a layer, such as stacks of experts, by the ends of their
            names.
        modules_to_save: modules that are trained in full and saved with the adapter, such as a new head.
        layers: numbers of the layers to train.
        dropout: the chance of an input of the adapter's own path to be dropped while it trains.
        rank_pattern: other ranks for single modules: regular expression for a path or its end -> r.
        alpha_pattern: the same for alpha.
        bias: "none", "all" of the base's, or "lora_only": those of modules that take the adapter; None: the
            config's, else "none".
        init: how it begins ("default", "gaussian", "pissa", "olora", "eva"); see the kind.
        batches: what to run the model on before, for kinds and inits that look at inputs ("eva").
        seed: of what is drawn at random; nothing is drawn from PyTorch's own generators.
        name: of the adapter.
        dtype: of what is trained; float32 by default, whatever the base's.
        config: a ``peft.LoraConfig`` or another config of PEFT, its dictionary, or its JSON file.  What is given beside
            it counts first.
        resume: an adapter to go on from, as a folder or ``ns/name@1.2``: one that was saved here or by PEFT.  Then only
            ``dropout``, ``name``, ``dtype``, ``base`` and ``allow`` can be given beside it.
        base: what the model is, as ``ns/name@COMMIT``, to be recorded; None: what the model itself says.
        task_type: PEFT's word for what it is for, as "CAUSAL_LM", to be written into its config.
        allow: finding codes to accept; see ``lorahub.check``.
        settings: further settings of the kind (``use_rslora=True``).

    Returns:
        ``Trainee``: parameters, counts, ``save``, ``merge`` and ``detach``.

    Raises:
        UsageError: no such kind, setting or module, the kind cannot stand on a module, or an adapter is trained on the
            model already.  Nothing was changed then, nor by any other error.
        BaseMismatch, Degraded, Incompatible: it does not fit the base; see ``lorahub.check``.
    """
    inner = _module_of(model)
    demand_free(inner)
    opened = open_base(inner)
    registry = load_registry()
    named = _base_name(base, opened)
    if not name or "." in name:
        raise UsageError(f"an adapter cannot be called {name!r}", "use letters and digits")
    demand_seed(seed)
    if resume is not None:
        given = {
            "kind": kind, "r": r, "alpha": alpha, "target_modules": target_modules,
            "exclude_modules": exclude_modules, "target_parameters": target_parameters,
            "modules_to_save": modules_to_save, "layers": layers, "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern, "bias": bias, "init": init, "config": config, "batches": batches,
            "seed": seed or None, "task_type": task_type, **settings,
        }  # fmt: skip
        if more := [key for key, value in given.items() if value is not None]:
            raise UsageError(
                f"{', '.join(more)} cannot be chosen for an adapter that is there already", "leave it out beside resume"
            )
        made = taken_up(
            opened, resume, registry, name=name, dtype=dtype or torch.float32, dropout=dropout, named=named, allow=allow
        )
        return Trainee(made, registry)
    said: dict[str, Any] = {"kind": "lora", "bias": "none"}
    said |= arguments(config, registry.kinds) if config is not None else {}
    own: dict[str, Any] = {
        "kind": kind, "bias": bias, "r": r, "alpha": alpha,
        "target_modules": target_modules, "exclude_modules": exclude_modules,
        "target_parameters": target_parameters, "modules_to_save": modules_to_save, "layers": layers,
        "dropout": dropout, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "init": init,
        "task_type": task_type, **settings,
    }  # fmt: skip
    said |= {key: value for key, value in own.items() if value is not None}
    if config is not None:
        layers_there = roles_of(opened)
        model_type = getattr(getattr(inner, "config", None), "model_type", None)
        said = completed(said, model_type, lambda end: any(named_by(end, each) for each in layers_there))
    return Trainee(
        _made(opened, registry, said, batches=batches, seed=seed, name=name, dtype=dtype, named=named, allow=allow),
        registry,
    )


_NO_SETTINGS = frozenset(
    {
        *("kind", "target_modules", "exclude_modules", "target_parameters", "modules_to_save", "layers"),
        *("rank_pattern", "alpha_pattern", "bias", "task_type"),
    }
)


def _made(
    base: Base,
    registry: Registry,
    said: Mapping[str, Any],
    *,
    batches: Iterable[Any] | None,
    seed: int,
    name: str,
    dtype: torch.dtype | None,
    named: Mapping[str, str],
    allow: Collection[str],
) -> Made:
    chosen = asked(
        trainable_kind(said["kind"], registry),
        {key: value for key, value in said.items() if key not in _NO_SETTINGS},
        rank_pattern=said.get("rank_pattern"),
        alpha_pattern=said.get("alpha_pattern"),
    )
    task = task_of(said["task_type"]) if said.get("task_type") else ""
    roles = roles_of(base)
    resolver = Resolver(base.index, base.framework, roles)
    kept = resolver.modules(said["modules_to_save"], "modules_to_save") if said.get("modules_to_save") else []
    inside = {module for module in base.index.modules() if any(f"{module}.".startswith(f"{each}.") for each in kept)}
    layers = said.get("layers")
    targets = resolver.targets(
        said.get("target_modules")
        if said.get("target_modules") is not None or not said.get("target_parameters")
        else (),
        exclude=said.get("exclude_modules") or (),
        kept=inside,
        layers=(layers,) if isinstance(layers, int) else layers,
        parameters=said.get("target_parameters") or (),
    )
    whole = _whole_targets(base, inside)
    biases = _biases(base, said["bias"], {target.module for target in targets}, inside)
    wide = dtype or torch.float32
    if not wide.is_floating_point:
        raise UsageError(f"nothing can be trained in {wide}", "leave dtype out, or give torch.float32")
    with base.tensors() as read:
        terrain = Terrain(base, [*targets, *whole, *biases], read)
        inputs = seen(base, terrain, targets, batches)
        seats = begin(terrain, targets, chosen, roles=roles, registry=registry, seed=seed, dtype=wide, inputs=inputs)
        more = whole_seats(terrain, [target for target in (*whole, *biases) if terrain.is_number(target)], wide)
    whole_of = Seats(seats=(*seats.seats, *more), shared=seats.shared)
    if not any(tensor.numel() for seat in whole_of.seats for tensor in seat.trained.values()):
        raise UsageError("nothing would be trained: all of it is fixed", "choose another kind, or other modules")
    hints: dict[str, JSON] = {
        "roles": {seat.target.name: seat.role for seat in whole_of.seats if seat.role},
        "modules_to_save": [*kept],
        "transposed": [seat.target.name for seat in more if seat.turned],
        "training": saying(whole_of, chosen.dropout),
    }
    first = base.index.parameters.get(base.index.stored(targets[0].name))
    if first is not None and first.transposed:
        hints["fan_in_fan_out"] = True
    if task:
        hints["task_type"] = task
    if named.get("repo"):
        hints |= {"base_repo": named["repo"], "base_revision": named.get("revision") or None}
    kinds = {seat.kind.name for seat in whole_of.seats}
    if any(_disputed(seat, terrain) for seat in seats.seats):
        hints["compat"] = "peft"
    made = Made(
        base=base,
        seats=whole_of,
        name=name,
        dropout=chosen.dropout,
        hints=hints,
        record=described(base, kinds, (), **named),
        allow=allow,
    )
    # where it lands says what it touches: a part of a fused weight touches that, and a gain on outputs the bias as well
    steps = planned(made, registry).steps
    if twice := [step.out for step in steps if len({term.replaces for term in step.terms}) > 1]:
        raise UsageError(
            f"{chosen.kind.title} changes {twice[0]} itself, and bias={said['bias']!r} trains it in full",
            "leave bias out, or choose another kind",
        )
    touched = {step.source for step in steps if step.source}
    return replace(made, record=described(base, kinds, touched, **named))


def _disputed(seat: Seat, terrain: Terrain) -> bool:
    """Whether PEFT's merge of what is trained is not what PEFT computes before it merges."""
    shape = terrain.shape(seat.target)
    on = (spelling.disputed_on for spelling in seat.kind.spellings if spelling.format == "peft")
    return any(each is not None and each(shape, seat.options) is not None for each in on)


def _module_of(model: nn.Module) -> nn.Module:
    """The module itself, of one that is compiled."""
    inner: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inner, torch.nn.Module):
        view = as_module(inner, load_registry().frameworks)
        parts = ", ".join(part for part, _ in view.named_children())
        raise UsageError(
            f"a {type(inner).__name__} is several models", f"give the one that is to be trained: one of {parts}"
        )
    return inner


def _base_name(base: str | Ref | None, opened: Base) -> dict[str, str]:
    """(repo, revision) of the base, as somebody says it or as the model does."""
    if base is not None:
        ref = base if isinstance(base, Ref) else Ref.parse(base, bare=True)
        if not ref.repo:
            raise UsageError(f"base={str(base)!r} is no name", "give NS/NAME or NS/NAME@COMMIT")
        revision = ref.selector if ref.selector is not None and COMMIT.fullmatch(ref.selector) else ""
        if ref.selector is not None and not revision:
            raise UsageError(
                f"base={str(base)!r} names {ref.selector}, which may move", "give the commit, 40 hex digits"
            )
        return {"repo": ref.repo, **({"revision": revision} if revision else {})}
    if opened.index.ref.repo:
        commit = opened.index.ref.commit
        return {"repo": opened.index.ref.repo, **({"revision": commit} if commit else {})}
    said = str(getattr(opened.model, "name_or_path", "") or "")
    try:
        known = Ref.parse(said, bare=True) if said and not Path(said).exists() else None
    except InvalidRef:
        return {}
    return {"repo": said} if known is not None and known.repo == said else {}


def _whole_targets(base: Base, inside: Collection[str]) -> list[Target]:
    """Every parameter of modules that are trained in full, no buffers."""
    assert base.model is not None
    names = {name for name, _ in base.model.named_parameters(remove_duplicate=False)}
    return [
        Target("", module, parameter)
        for module, own in base.index.modules().items()
        if module in inside
        for parameter in own
        if base.index.parameters[base.index.stored(f"{module}.{parameter}")].stored_as in names
    ]


def _biases(base: Base, which: str, adapted: Collection[str], inside: Collection[str]) -> list[Target]:
    if which not in _BIASES:
        if which.endswith("_only"):
            which = "lora_only"
        else:
            raise UsageError(
                f"there is no bias={which!r}.{did_you_mean(which, _BIASES)}", f"choose one of: {', '.join(_BIASES)}"
            )
    if which == "none":
        return []
    found = [
        Target("", module, "bias")
        for module, own in base.index.modules().items()
        if "bias" in own and module not in inside and (which == "all" or module in adapted)
    ]
    if not found:
        raise UsageError(f"bias={which!r}: there are no biases to train", 'leave it out, or bias="none"')
    return found
