"""The laws every adapter kind keeps, as plain functions for plugin authors.

    from lorahub.testing import check_kind
    def test_my_kind():
        check_kind(MY_KIND)

Each law runs over the kind's ``example`` deltas on linear, convolution and vector shapes in float64, and raises an
``AssertionError`` that says in a sentence what does not hold, for which delta and shape.  A shape that ``example``
refuses with ``BaseMismatch`` is left out; a kind that refuses all of them fails.  References are index loops over
``delta(W)`` as a black box: the laws know no formula, so a kind also needs a test of its own against one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.bases.torch_module import TorchModule
from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.engine.planning.plan import Form, Plan, Step, Term
from lorahub.errors import BaseMismatch, CannotCarry, NotLocal, UnsupportedKind
from lorahub.lazy import torch
from lorahub.live.attached import Live
from lorahub.shapes import Binding, ShapeMisfit, unify

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LAWS",
    "Case",
    "additive_kinds_ignore_the_weight_and_commute",
    "attached_equals_merged",
    "cases",
    "check_kind",
    "declarations_are_what_build_does",
    "fresh_changes_nothing",
    "full_merges_alike",
    "layouts_land_alike",
    "regions_are_local_or_refused",
    "shape_is_kept",
    "spellings_lose_nothing",
    "weights_are_linear",
]

SHAPES: tuple[tuple[int, ...], ...] = ((8, 6), (6, 6), (6, 4, 3), (4, 6, 3, 2), (4, 3, 2, 2, 2), (8,))
"""Linear (one of them square), convolutions in one to three dimensions, a vector."""

RANK = 3
SEEDS = (0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A delta and a weight that it fits.

    Attributes:
        name: for messages: kind, class, shape, seed.
        delta: a random instance.
        other: a second one for the same shape.
        weight: float64, standard normal.
        generator: seeded by the case, for whatever else a law draws.
    """

    name: str
    delta: Delta
    other: Delta
    weight: torch.Tensor
    generator: torch.Generator


def cases(kind: Kind) -> Iterator[Case]:
    """Every delta class of the kind on every shape that it takes.

    Raises:
        AssertionError: a class takes none of the shapes, or makes a change too small for any law to notice.
    """
    for cls in kind.deltas:
        made = 0
        for shape, seed in itertools.product(SHAPES, SEEDS):
            generator = torch.Generator().manual_seed(seed)
            try:
                delta, other = (cls.example(shape, r=RANK, generator=generator) for _ in range(2))
            except BaseMismatch:
                continue
            made += 1
            name = f"{kind.name}: {cls.__name__} on {list(shape)}, seed {seed}"
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            size = float((delta.delta(weight).norm() / weight.norm()).item())
            _hold(size > 1e-2, f"{name}: example changes the weight by {size:.1e} of its norm, too little to test with")
            yield Case(name=name, delta=delta, other=other, weight=weight, generator=generator)
        _hold(made > 0, f"{kind.name}: {cls.__name__}.example refuses every shape the laws know")


def check_kind(kind: Kind) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold."""
    for law in LAWS.values():
        law(kind)


def shape_is_kept(kind: Kind) -> None:
    """Law 1: a change has the weight's shape and dtype, is finite, is new memory, and leaves the weight alone."""
    for case in cases(kind):
        for dtype in (torch.float32, torch.float64):
            weight = case.weight.to(dtype)
            before = weight.clone()
            change = case.delta.delta(weight)
            _hold(change.shape == weight.shape, f"{case.name}: the change has shape {list(change.shape)}")
            _hold(change.dtype == dtype, f"{case.name}: the change of a {dtype} weight is {change.dtype}")
            _hold(bool(change.isfinite().all()), f"{case.name}: the change is not finite")
            _hold(torch.equal(weight, before), f"{case.name}: delta wrote into the weight")
            kept = change.clone()
            change.add_(1)
            _hold(torch.equal(weight, before), f"{case.name}: the change shares memory with the weight")
            _hold(torch.equal(case.delta.delta(weight), kept), f"{case.name}: the change shares memory with the delta")
        shape = case.delta.shape()
        _hold(shape in (None, tuple(case.weight.shape)), f"{case.name}: shape() says {shape}")


def fresh_changes_nothing(kind: Kind) -> None:
    """Law 2: a fresh delta changes nothing, exactly; a class may refuse with ``UnsupportedKind``."""
    for case in cases(kind):
        try:
            fresh = type(case.delta).fresh(tuple(case.weight.shape), r=RANK, generator=case.generator)
        except UnsupportedKind:
            continue
        for dtype in (torch.float32, torch.float64):
            change = fresh.delta(case.weight.to(dtype))
            _hold(not change.any(), f"{case.name}: a fresh delta changes {int(change.count_nonzero())} elements")


def additive_kinds_ignore_the_weight_and_commute(kind: Kind) -> None:
    """Law 3: an additive change is the same on every weight, so order does not matter; any other does look."""
    for case in cases(kind):
        weight, elsewhere = case.weight, torch.randn(case.weight.shape, generator=case.generator, dtype=torch.float64)
        change, moved = case.delta.delta(weight), case.delta.delta(elsewhere)
        if not case.delta.additive:
            _hold(
                not torch.equal(change, moved), f"{case.name}: not declared additive, and does not look at the weight"
            )
            continue
        _hold(torch.equal(change, moved), f"{case.name}: declared additive, and looks at the weight")
        first = weight + change
        both = first + case.other.delta(first)
        second = weight + case.other.delta(weight)
        _close(second + case.delta.delta(second), both, weight, f"{case.name}: two deltas do not commute")


def weights_are_linear(kind: Kind) -> None:
    """Law 4: a delta is a pure function, so ``W + a * d(W) + b * e(W)`` is linear in a and b, in either order."""
    for case in cases(kind):
        weight = case.weight
        one, other = case.delta.delta(weight), case.other.delta(weight)
        again = case.delta.delta(weight)
        _hold(torch.equal(one, again), f"{case.name}: the same weight gave another change the second time")
        for a, b in ((1.0, 0.0), (0.5, 0.0), (0.5, -0.25), (-2.0, 1.0)):
            expected = _loop_sum(weight, ((a, one), (b, other)))
            forward = weight + a * case.delta.delta(weight) + b * case.other.delta(weight)
            backward = weight + b * case.other.delta(weight) + a * case.delta.delta(weight)
            _close(forward, expected, weight, f"{case.name}: weights {a}, {b} are not linear")
            _close(backward, expected, weight, f"{case.name}: weights {a}, {b} depend on the order")


def regions_are_local_or_refused(kind: Kind) -> None:
    """Law 5: ``region(r, c).delta(W[r][:, c])`` is ``delta(W)[r][:, c]``, or the cut is refused with ``NotLocal``."""
    for case in cases(kind):
        weight, change = case.weight, case.delta.delta(case.weight)
        whole = case.delta.region(ALL, ALL).delta(weight)
        _close(whole, change, weight, f"{case.name}: the region that is everything differs from the delta")
        for rows, cols in _cuts(tuple(weight.shape)):
            window = _loop_take(weight, rows, cols)
            try:
                part = case.delta.region(rows, cols)
            except NotLocal:
                continue
            says = f"{case.name}: region({_index(rows)}, {_index(cols)})"
            _close(part.delta(window), _loop_take(change, rows, cols), weight, f"{says} is not that part of the change")
            _hold(part.shape() in (None, tuple(window.shape)), f"{says}.shape() says {part.shape()}")


def full_merges_alike(kind: Kind) -> None:
    """Law 6: ``Full(d.delta(W))`` merges as ``d`` does, and the other views of a delta agree with it.

    ``replacement`` is the merged value, and ``low_rank`` multiplies out to the change.
    """
    for case in cases(kind):
        weight, change = case.weight, case.delta.delta(case.weight)
        full = Full(change.clone()).delta(weight)
        _hold(torch.equal(weight + full, weight + change), f"{case.name}: the full difference merges otherwise")
        if (value := case.delta.replacement()) is not None:
            _close(value.to(weight), weight + change, weight, f"{case.name}: replacement() is not the merged value")
        if (factors := case.delta.low_rank()) is not None:
            rank = factors.down.shape[0]
            multiplied = torch.zeros_like(weight).flatten(1)
            for r in range(rank):
                multiplied += torch.outer(factors.up[:, r].to(weight), factors.down[r].to(weight)) * factors.scale
            _close(multiplied.reshape(change.shape), change, weight, f"{case.name}: low_rank() is not the change")


def layouts_land_alike(kind: Kind) -> None:
    """Two weighted deltas land where a layout says, element by element, and nowhere else.

    Transposed, expert, fused (a band, an interleaving), split by rows and by columns.
    """
    for case in cases(kind):
        terms = ((0.75, case.delta), (-0.5, case.other))
        changes = [(weight, delta.delta(case.weight)) for weight, delta in terms]
        for how, layout, stored in _layouts(case):
            expected = {name: tensor.clone() for name, tensor in stored.items()}
            for piece in layout.pieces:
                _loop_add(piece, expected[piece.parameter], changes)
            _land(layout, stored, terms, tuple(case.weight.shape))
            for name, tensor in stored.items():
                touched = expected[name] != tensor
                _close(
                    tensor, expected[name], case.weight, f"{case.name}: {how}: {name} differs in {int(touched.sum())}"
                )


def declarations_are_what_build_does(kind: Kind) -> None:
    """What ``touches`` says from headers is what ``build`` makes of the tensors, and ``dissolve`` undoes ``build``."""
    dissolved = 0
    for case, parameter, group, tensors in _groups(kind):
        dissolved += 1
        declared = {slot.name: slot for slot in kind.slots}
        stray = [name for name in tensors if not any(slot.covers(name) for slot in kind.slots)]
        _hold(not stray, f"{case.name}: dissolve gives slots that the kind does not declare")
        missing = [name for name, slot in declared.items() if not slot.optional and name not in tensors]
        _hold(not missing, f"{case.name}: dissolve leaves out the required {', '.join(missing)}")
        built = kind.build(group, tensors)
        touches = {touch.parameter: touch for touch in kind.touches(group)}
        _hold(touches.keys() == built.keys(), f"{case.name}: touches {sorted(touches)}, builds {sorted(built)}")
        rebuilt = built[parameter]
        _same(rebuilt, case, "build after dissolve")
        for name, delta in built.items():
            touch = touches[name]
            _hold(touch.additive == delta.additive, f"{case.name}: touch and delta disagree on additive")
            _hold(touch.replaces == (delta.replacement() is not None), f"{case.name}: they disagree on replaces")
            _hold(touch.reads == delta.reads, f"{case.name}: they disagree on reads")
        touch = touches[parameter]
        shape = tuple(case.weight.shape)
        bound: Binding = {}
        for slot in touch.slots:
            bound = unify(kind.slot(slot).dims, group.slots[slot].shape, bound, name=slot)
        unify(touch.dims, shape, bound, name=parameter)
        try:
            unify(touch.dims, tuple(size + 1 for size in shape), bound, name=parameter)
        except ShapeMisfit:
            pass
        else:
            larger = torch.randn([size + 1 for size in shape], generator=case.generator, dtype=torch.float64)
            _hold(
                _takes(rebuilt, larger), f"{case.name}: the declared dims [{touch.dims}] let a weight of any size pass"
            )
        if touch.local:
            try:
                rebuilt.region(slice(1, 3), ALL)
            except NotLocal:
                _hold(False, f"{case.name}: declared local, and refuses a window of rows")
    _hold(dissolved > 0, f"{kind.name}: dissolve recognises no example on a weight or a bias")


def spellings_lose_nothing(kind: Kind) -> None:
    """Every spelling has words for all slots, none for two, and a config from which the same deltas come back."""
    declared = {slot.name: slot for slot in kind.slots}
    for spelling in kind.spellings:
        says = f"{kind.name} in {spelling.format}"
        unknown = [leaf.suffix for leaf in spelling.leaves if leaf.slot not in declared]
        _hold(not unknown, f"{says}: {', '.join(unknown)} spell slots that the kind does not declare")
        spelled = {leaf.slot for leaf in spelling.leaves}
        silent = [name for name, slot in declared.items() if not slot.optional and name not in spelled]
        _hold(not silent, f"{says}: no word for {', '.join(silent)}")
        # a shared slot and one of a module may share a suffix: their keys differ before it
        suffixes = [(leaf.suffix, declared[leaf.slot].shared) for leaf in spelling.leaves]
        twice = {suffix for suffix, shared in suffixes if suffixes.count((suffix, shared)) > 1}
        _hold(not twice, f"{says}: {', '.join(sorted(twice))} spell two slots")
        for name, field in spelling.fields.items():
            meanings = field.inert + field.used + bool(field.refuse)
            _hold(meanings == 1, f"{says}: field {name} is not just one of inert, used and refused")
        for case, parameter, group, tensors in _groups(kind):
            try:
                config = spelling.config({group.module: group})
            except CannotCarry:
                continue
            extra = config.keys() - spelling.fields.keys()
            _hold(not extra, f"{says}: writes the fields {', '.join(sorted(extra))} that it does not declare")
            options = spelling.options(config, group.module, group.slots)
            for name in options.keys() & group.options.keys():
                _hold(options[name] == group.options[name], f"{case.name}: {spelling.format} reads another {name} back")
            read = Group(module=group.module, kind=kind.name, slots=group.slots, options={**group.options, **options})
            _same(kind.build(read, tensors)[parameter], case, f"what {spelling.format} reads back")


def attached_equals_merged(kind: Kind) -> None:
    """Law 9: a module with two deltas attached gives what it gives with both merged, and rows of a batch may differ.

    Linear layers, embeddings and convolutions (one of them in groups, strided and dilated), and biases.
    """
    for case in cases(kind):
        for how, module, name, x in _modules(case):
            says = f"{case.name}: {how}"
            weight = module.get_parameter(name).detach()
            plain = module(x).detach()
            terms = {"one": (0.75, case.delta), "other": (-0.5, case.other)}

            def given(
                value: torch.Tensor, module: nn.Module = module, name: str = name, x: torch.Tensor = x
            ) -> torch.Tensor:
                output: torch.Tensor = torch.func.functional_call(module, {name: value}, x)
                return output.detach()

            merged = weight + sum(strength * delta.delta(weight) for strength, delta in terms.values())
            expected = given(merged)
            by_row = [(row, weight + delta.delta(weight)) for row, delta in ((0, case.other), (2, case.delta))]
            of_row = [(row, alone, given(alone)[row]) for row, alone in by_row]
            _hold(not torch.equal(expected, plain), f"{says}: merging makes no difference, so nothing is tested")
            live = _attach(module, name, {adapter: delta for adapter, (_, delta) in terms.items()})
            try:
                live.set_adapters([*terms], weights=[strength for strength, _ in terms.values()])
                found = module(x).detach()
                _close_outputs(found, expected, (x, weight, merged), f"{says}: attached, it is not what merging gives")
                if name == "weight":
                    live.set_rows(["other", None, "one"])
                    rows = module(x).detach()
                    for row, alone, own in of_row:
                        _close_outputs(rows[row], own, (x, weight, alone), f"{says}: row {row} is not its own")
                    _hold(torch.equal(rows[1], plain[1]), f"{says}: a row without an adapter changes")
            finally:
                live.detach()
            _hold(torch.equal(module(x), plain), f"{says}: detached, the module is not what it was")


LAWS: Mapping[str, Callable[[Kind], None]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            shape_is_kept,
            fresh_changes_nothing,
            additive_kinds_ignore_the_weight_and_commute,
            weights_are_linear,
            regions_are_local_or_refused,
            full_merges_alike,
            layouts_land_alike,
            declarations_are_what_build_does,
            spellings_lose_nothing,
            attached_equals_merged,
        )
    }
)
"""Name -> law; each takes a kind and raises ``AssertionError``."""


def _hold(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _close(found: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, sentence: str) -> None:
    """Equal but for the order of float64 operations.

    An element comes from at most one sum over the weight's elements and a few further operations, none of whose partial
    results is larger than n times the largest value in sight; each rounds by half an eps of that.
    """
    n = weight.numel()
    largest = max(1.0, *(float(tensor.abs().max()) for tensor in (found, expected, weight) if tensor.numel()))
    error = float((found - expected).abs().max()) if found.shape == expected.shape and found.numel() else 0.0
    bound = n * torch.finfo(torch.float64).eps * largest
    _hold(found.shape == expected.shape and error <= bound, f"{sentence} (off by {error:.1e}, allowed {bound:.1e})")


def _close_outputs(found: torch.Tensor, expected: torch.Tensor, used: Sequence[torch.Tensor], sentence: str) -> None:
    """Equal but for the order of float64 operations.

    An output is a sum of at most as many products as the weight has elements, added up over a rank before or after;
    no partial sum is larger than that many products of the largest input and the largest weight, and each rounds by
    half an eps of that.
    """
    x, *weights = used
    n = max(weight.numel() for weight in weights)
    largest = max(1.0, *(float(weight.abs().max()) for weight in weights))
    largest *= 1.0 if not x.is_floating_point() else max(1.0, float(x.abs().max()))
    error = float((found - expected).abs().max())
    bound = n * torch.finfo(torch.float64).eps * largest * n
    _hold(error <= bound, f"{sentence} (off by {error:.1e}, allowed {bound:.1e})")


def _modules(case: Case) -> Iterator[tuple[str, nn.Module, str, torch.Tensor]]:
    """Modules that have the case's weight, in float64: (what it is, module, which parameter, a batch of 3 for it)."""
    sizes, generator = case.weight.shape, case.generator

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def holding(module: nn.Module, name: str) -> nn.Module:
        module = module.double().eval()
        with torch.no_grad():
            module.get_parameter(name).copy_(case.weight)
        return module

    if len(sizes) == 1:
        yield "a bias", holding(torch.nn.Linear(5, sizes[0]), "bias"), "bias", noise(3, 5)
        return
    if len(sizes) == 2:
        yield "a linear layer", holding(torch.nn.Linear(sizes[1], sizes[0]), "weight"), "weight", noise(3, 2, sizes[1])
        ids = torch.randint(sizes[0], (3, 20), generator=generator)
        yield "an embedding", holding(torch.nn.Embedding(*sizes), "weight"), "weight", ids
        return
    out, width, *kernel = sizes
    make = getattr(torch.nn, f"Conv{len(kernel)}d")
    places = [6] * len(kernel)
    yield "a convolution", holding(make(width, out, kernel, padding=1), "weight"), "weight", noise(3, width, *places)
    grouped = make(2 * width, out, kernel, groups=2, stride=2, dilation=2, padding=2, padding_mode="circular")
    yield "a convolution in groups", holding(grouped, "weight"), "weight", noise(3, 2 * width, *places)


def _attach(module: nn.Module, name: str, deltas: Mapping[str, Delta]) -> Live:
    """The deltas attached to one parameter, under their names and inactive."""
    framework = TorchModule()
    index = framework.index_model(module, BaseRef())
    form = Form(tuple(index.parameters[name].shape), index.parameters[name].dtype)
    target = Target("", "", name)

    def plan(adapter: str, delta: Delta) -> Plan:
        term = Term(
            adapter=adapter,
            weight=1.0,
            target=target,
            piece=Piece(parameter=name),
            kind=delta.kind,
            additive=delta.additive,
            replaces=delta.replacement() is not None,
            local=False,
            rank=None,
        )
        step = Step(out=name, source=name, before=form, after=form, terms=(term,), stored_as=name, saved_as=name)
        return Plan(base=BaseRef(), framework=framework.name, steps=(step,), untouched=())

    live = Live(
        module,
        index,
        framework,
        plan=lambda adapter, delta: (plan(adapter, cast("Delta", delta)), _Holder({target: cast("Delta", delta)})),
        judge=lambda _: None,
    )
    for adapter, delta in deltas.items():
        live.add(adapter, delta)
    return live


@dataclass(frozen=True, slots=True)
class _Holder:
    deltas: Mapping[Target, Delta]


def _same(delta: Delta, case: Case, says: str) -> None:
    """Bit-equal tensors, and a bit-equal change."""
    ours, theirs = case.delta.tensors(), delta.tensors()
    _hold(type(delta) is type(case.delta), f"{case.name}: {says} is a {type(delta).__name__}")
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    _hold(equal, f"{case.name}: {says} holds other tensors")
    _hold(
        torch.equal(delta.delta(case.weight), case.delta.delta(case.weight)),
        f"{case.name}: {says} makes another change",
    )


def _takes(delta: Delta, weight: torch.Tensor) -> bool:
    """Whether the delta changes this weight; a spectrum, say, fits every size, and then no pattern can tell."""
    try:
        delta.delta(weight)
    except BaseMismatch:
        return False
    return True


def _groups(kind: Kind) -> Iterator[tuple[Case, str, Group, dict[str, torch.Tensor]]]:
    """Every example that dissolves, with its parameter, as the group a file would hold.

    Kinds differ in what they change: the weight, the bias, or always both alike.
    """
    for case in cases(kind):
        both = [("weight", "bias")] if case.weight.dim() > 1 else []
        for parameters in (("weight",), ("bias",), *both):
            dissolved = kind.dissolve(dict.fromkeys(parameters, case.delta))
            if dissolved is not None:
                tensors, options = dissolved
                yield case, parameters[0], _group(kind, tensors, options), tensors
                break


def _group(kind: Kind, tensors: Mapping[str, torch.Tensor], options: Mapping[str, JSON]) -> Group:
    slots = {
        name: TensorRef(key=f"layers.0.proj.{name}", shape=tuple(tensor.shape), dtype="F32")
        for name, tensor in tensors.items()
    }
    return Group(module="layers.0.proj", kind=kind.name, slots=slots, options=dict(options))


def _cuts(shape: tuple[int, ...]) -> Iterator[tuple[Index, Index]]:
    """Windows, strides, selections and permutations of rows, of columns where there are any, and of both."""
    rows, cols = (list(_indices(size)) for size in (*shape, 1)[:2])
    if len(shape) == 1:
        cols = [ALL]
    yield from itertools.product(rows, cols)


def _indices(size: int) -> Iterator[Index]:
    yield ALL
    yield slice(1, size - 1)
    yield slice(0, size, 2)
    yield (size - 1, 0)
    yield tuple(reversed(range(size)))


def _positions(index: Index, size: int) -> Sequence[int]:
    return range(size)[index] if isinstance(index, slice) else index


def _index(index: Index) -> str:
    return f"{index.start}:{index.stop}:{index.step}" if isinstance(index, slice) else str(list(index))


def _loop_take(tensor: torch.Tensor, rows: Index, cols: Index) -> torch.Tensor:
    """``tensor[rows][:, cols]``, one element at a time."""
    parts = [tensor[row] for row in _positions(rows, tensor.shape[0])]
    if tensor.dim() > 1:
        parts = [torch.stack([part[col] for col in _positions(cols, tensor.shape[1])]) for part in parts]
    return torch.stack(parts)


def _loop_sum(weight: torch.Tensor, terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """``weight + sum of w * change``, one element at a time in Python floats."""
    flat = [
        value + sum(w * change for (w, _), change in zip(terms, changes, strict=True))
        for value, *changes in zip(
            weight.flatten().tolist(), *(term[1].flatten().tolist() for term in terms), strict=True
        )
    ]
    return torch.tensor(flat, dtype=torch.float64).reshape(weight.shape)


def _loop_add(piece: Piece, stored: torch.Tensor, changes: Sequence[tuple[float, torch.Tensor]]) -> None:
    """Add the piece's part of the changes to ``stored``, one row and column at a time, by the words of ``Region``."""
    view = stored if piece.of_parameter.expert is None else stored[piece.of_parameter.expert]
    shape = changes[0][1].shape
    vector = len(shape) == 1
    across = 1 if vector else shape[1]
    sizes = (view.shape[1], view.shape[0]) if piece.of_parameter.transposed else (*view.shape, 1)[:2]
    rows = zip(_positions(piece.of_delta.rows, shape[0]), _positions(piece.of_parameter.rows, sizes[0]), strict=True)
    for source, row in rows:
        here = across if vector else sizes[1]
        cols = zip(_positions(piece.of_delta.cols, across), _positions(piece.of_parameter.cols, here), strict=True)
        for origin, col in cols:
            at: tuple[int, ...] = (row,) if vector else ((col, row) if piece.of_parameter.transposed else (row, col))
            for weight, change in changes:
                view[at] += weight * (change[source] if vector else change[source, origin])


def _land(
    layout: Layout, stored: Mapping[str, torch.Tensor], terms: Sequence[tuple[float, Delta]], shape: tuple[int, ...]
) -> None:
    """Merge through a layout by ``region``, falling back on the whole weight where a delta is not local."""
    whole = torch.empty(shape, dtype=torch.float64)
    for piece in layout.pieces:
        piece.of_delta.put(whole, piece.of_parameter.of(stored[piece.parameter]))
    for piece in layout.pieces:
        window = piece.of_parameter.of(stored[piece.parameter]).clone()
        result = window.clone()
        for weight, delta in terms:
            try:
                change = delta.region(piece.of_delta.rows, piece.of_delta.cols).delta(window)
            except NotLocal:
                change = piece.of_delta.of(delta.delta(whole))
            result += weight * change
        piece.of_parameter.put(stored[piece.parameter], result)


def _layouts(case: Case) -> Iterator[tuple[str, Layout, dict[str, torch.Tensor]]]:
    """Ways to store the case's weight, each with its layout and the tensors that hold it."""
    weight, rest = case.weight, case.weight.shape[1:]
    out = weight.shape[0]
    target = Target("", "layers.0.proj", "weight")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=case.generator, dtype=torch.float64)

    def layout(*pieces: Piece) -> Layout:
        return Layout(target=target, pieces=pieces)

    def fused(rows: Index) -> dict[str, torch.Tensor]:
        tensor = noise(3 * out, *rest)
        for row, value in zip(_positions(rows, 3 * out), weight, strict=True):
            tensor[row] = value
        return {"a": tensor}

    yield "whole", layout(Piece(parameter="a")), {"a": weight.clone()}
    experts = Piece(parameter="a", of_parameter=Region(expert=1))
    yield "expert", layout(experts), {"a": torch.stack([noise(out, *rest), weight, noise(out, *rest)])}
    band: Index = slice(out, 2 * out)
    yield "band", layout(Piece(parameter="a", of_parameter=Region(rows=band))), fused(band)
    woven: Index = tuple((3 * row + 1) % (3 * out) for row in reversed(range(out)))
    yield "interleaved", layout(Piece(parameter="a", of_parameter=Region(rows=woven))), fused(woven)
    half = out // 2
    low, high = slice(0, half), slice(half, out)
    split = (Piece(parameter="a", of_delta=Region(rows=low)), Piece(parameter="b", of_delta=Region(rows=high)))
    yield "split rows", layout(*split), {"a": weight[low].clone(), "b": weight[high].clone()}
    if weight.dim() == 1:
        return
    turned = Piece(parameter="a", of_parameter=Region(transposed=True))
    yield "transposed", layout(turned), {"a": weight.transpose(0, 1).contiguous()}
    both = Piece(parameter="a", of_parameter=Region(expert=2, transposed=True))
    stack = torch.stack([noise(*weight.transpose(0, 1).shape) for _ in range(2)] + [weight.transpose(0, 1)])
    yield "transposed expert", layout(both), {"a": stack}
    middle = weight.shape[1] // 2
    left, right = slice(0, middle), slice(middle, weight.shape[1])
    split = (Piece(parameter="a", of_delta=Region(cols=left)), Piece(parameter="b", of_delta=Region(cols=right)))
    yield "split columns", layout(*split), {"a": weight[:, left].clone(), "b": weight[:, right].clone()}
