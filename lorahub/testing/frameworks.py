"""The laws every framework keeps, for models of its own: files and models tell the same, and so does every layout.

    from lorahub.testing import FrameworkCase, check_framework
    def test_my_framework(tmp_path):
        model = build()
        model.save(tmp_path)
        check_framework(MyFramework(), FrameworkCase(folder=tmp_path, model=model, run=lambda model: model(example)))

``run`` calls the model in any way that uses its weights; what modules compute there is held against what ``site`` says.
Compares structures exactly, and outputs up to the order of the operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorahub.bases.framework import BaseFiles, Edits, Framework
from lorahub.bases.index import BaseIndex, BaseRef, natural
from lorahub.bases.layout import Layout, Target
from lorahub.bases.open import survey_base
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.testing.judging import hold

if TYPE_CHECKING:
    from torch import nn

__all__ = ["FRAMEWORK_LAWS", "FrameworkCase", "check_framework"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkCase:
    """A model of a framework's own, and the folder it was saved to.

    Attributes:
        folder: as the framework saves models.
        model: the live model, with the very weights of the folder, in evaluation mode.
        run: calls the model.
        inside: targets that are no parameters of the model but lie in some: queries in a fused projection.
        presets: names that ``targets`` takes for it.
        opens: ``open_base`` can open the folder.
    """

    folder: Path
    model: nn.Module
    run: Callable[[Any], object]
    inside: tuple[Target, ...] = ()
    presets: tuple[str, ...] = ("all-linear",)
    opens: bool = True
    files: BaseFiles = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", survey_base(self.folder))


def claims_are_made(framework: Framework, case: FrameworkCase) -> None:
    """The folder and the model are claimed more surely than by names and shapes, and a bare module is not."""
    says = type(case.model).__name__
    for what, claim in (("its folder", framework.claims(case.files)), ("it", framework.claims_model(case.model))):
        hold(claim is not None and 0.01 < claim.score <= 1, f"{says}: {framework.name} does not claim {what}")
    bare = framework.claims_model(torch.nn.Linear(2, 2))
    hold(bare is None or bare.score <= 0.01, f"{framework.name} claims a bare module")
    empty = replace(case.files, configs={})
    unsure = framework.claims(empty)
    hold(unsure is None or unsure.score <= 0.01, f"{framework.name} claims a folder without a configuration")


def files_and_model_tell_the_same(framework: Framework, case: FrameworkCase) -> None:
    """Law 11: names, shapes, dtypes, roles and ties are the same from headers and from a model; order is natural."""
    files, live = framework.index(BaseRef(), case.files), framework.index_model(case.model, BaseRef())
    says = type(case.model).__name__
    names = sorted(files.parameters.keys() ^ live.parameters.keys())
    hold(not names, f"{says}: only the files, or only the model, have {', '.join(names[:3])}")
    for name, info in files.parameters.items():
        other = replace(live.parameters[name], stored_as=info.stored_as)
        hold(info == other, f"{says}: {name} is {info} in files and {other} in the model")
    hold(files.tied == live.tied, f"{says}: tied are {files.tied} in files and {live.tied} in the model")
    hold(list(files.order) == sorted(files.order, key=natural), f"{says}: names are not in natural order")
    hold(files.structure == live.structure, f"{says}: the digests of the structure differ")
    hold(files.declared and live.declared, f"{says}: what modules are is not declared")


def parameters_have_the_shapes_of_the_index(framework: Framework, case: FrameworkCase) -> None:
    """Every name of the index, tied ones too, is a live tensor of its shape."""
    index = framework.index_model(case.model, BaseRef())
    tensors = framework.parameters(case.model, index)
    for name, info in index.parameters.items():
        for each in (name, *index.tied_with(name)):
            hold(each in tensors, f"{each} is in the index and no live tensor")
            shape = tuple(tensors[each].shape)
            hold(bool(info.storage) or shape == info.shape, f"{each} is {info.shape} in the index and {shape} live")


def layouts_cover_their_targets(framework: Framework, case: FrameworkCase) -> None:
    """Every parameter is a target and lands in itself; pieces cover a change exactly once; what is absent has none."""
    files, live = framework.index(BaseRef(), case.files), framework.index_model(case.model, BaseRef())
    whole = [_target(name) for name in files.parameters]
    found = framework.layouts(files, [*whole, *case.inside])
    hold(found == framework.layouts(live, [*whole, *case.inside]), "files and model have other layouts")
    for target in (*whole, *case.inside):
        hold(target in found, f"{target.name} has no layout")
        _covered(found[target], files)
    absent = Target("", "no.such.module", "weight")
    hold(not framework.layouts(files, [absent]), "a target that is not there has a layout")


def presets_name_targets_in_order(framework: Framework, case: FrameworkCase) -> None:
    """What a preset names lands in the base, each once, in natural order; files and model agree; others are refused."""
    files, live = framework.index(BaseRef(), case.files), framework.index_model(case.model, BaseRef())
    for preset in case.presets:
        targets = framework.targets(files, preset)
        hold(bool(targets), f"'{preset}' names nothing")
        hold(targets == framework.targets(live, preset), f"'{preset}' is another thing for the model")
        hold(len(set(targets)) == len(targets), f"'{preset}' names a target twice")
        hold(targets == sorted(targets, key=lambda each: natural(each.name)), f"'{preset}' is not in natural order")
        hold(framework.layouts(files, targets).keys() == set(targets), f"'{preset}' names what does not land")
    try:
        framework.targets(files, "no such preset")
    except UsageError:
        pass
    else:
        hold(False, "a preset that does not exist is taken")


def sites_say_what_modules_compute(framework: Framework, case: FrameworkCase) -> None:
    """A called module with a site gives what the site's operation gives with its weight, and its bias."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    handles = []
    sites = {}
    for path, module in case.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.nn.Parameter):
            sites[path] = framework.site(case.model, f"{path}.weight" if path else "weight")
        if sites.get(path) is not None:
            handles.append(module.register_forward_hook(partial(_keep, seen, path)))
    try:
        with torch.no_grad():
            case.run(case.model)
    finally:
        for handle in handles:
            handle.remove()
    hold(bool(seen), "no module with a site was called")
    for path, (x, y) in seen.items():
        site, module = sites[path], case.model.get_submodule(path)
        assert site is not None
        weight = module.get_parameter("weight").detach()
        logical = weight.transpose(0, 1) if site.transposed else weight
        bias = getattr(module, "bias", None)
        with torch.no_grad():
            expected = site.call(x, logical)
            if isinstance(bias, torch.Tensor):
                expected = expected + replace(site, op="bias").call(x, bias)
        error = float((y - expected).abs().max())
        bound = logical[0].numel() * torch.finfo(y.dtype).eps * max(1.0, float(expected.abs().max()))
        hold(error <= bound, f"{path} does not compute what its site says (off by {error:.1e}, allowed {bound:.1e})")


def nothing_created_is_nothing_edited(framework: Framework, case: FrameworkCase) -> None:
    """Without new parameters nothing changes elsewhere, and what goes along are files that lie there."""
    index = framework.index(BaseRef(), case.files)
    edits = framework.edits(index, {}, {})
    hold(edits is None or edits == Edits(), "an edit is made for nothing")
    there = {*case.files.configs, *case.files.others}
    along = framework.companions(case.files)
    hold(set(along) <= there, "files go along that are not there")
    hold(list(along) == sorted(along), "the files that go along are not sorted")


def folders_open_as_what_they_were(framework: Framework, case: FrameworkCase) -> None:
    """``open_base`` gives the class and the very weights that were saved."""
    if not case.opens:
        return
    opened = framework.open_base(case.folder)
    hold(type(opened) is type(case.model), f"a {type(case.model).__name__} opens as a {type(opened).__name__}")
    before = framework.parameters(case.model, framework.index_model(case.model, BaseRef()))
    after = framework.parameters(opened, framework.index_model(opened, BaseRef()))
    hold(before.keys() == after.keys(), "the opened model has other parameters")
    other = [name for name in before if not torch.equal(before[name], after[name])]
    hold(not other, f"opened, {', '.join(other[:3])} have other values")


FRAMEWORK_LAWS: Mapping[str, Callable[[Framework, FrameworkCase], None]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            claims_are_made,
            files_and_model_tell_the_same,
            parameters_have_the_shapes_of_the_index,
            layouts_cover_their_targets,
            presets_name_targets_in_order,
            sites_say_what_modules_compute,
            nothing_created_is_nothing_edited,
            folders_open_as_what_they_were,
        )
    }
)
"""Name -> law; each takes a framework and a case and raises ``AssertionError``."""


def check_framework(framework: Framework, case: FrameworkCase) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold."""
    for law in FRAMEWORK_LAWS.values():
        law(framework, case)


def _keep(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], path: str, _module: Any, args: Any, out: Any) -> None:
    seen.setdefault(path, (args[0].clone(), out.clone()))  # what follows may write into them


def _target(name: str) -> Target:
    module, _, parameter = name.rpartition(".")
    return Target("", module, parameter)


def _covered(layout: Layout, index: BaseIndex) -> None:
    """Whether the pieces lie in parameters that are there, and together cover rows of the change exactly once."""
    rows: list[int] = []
    for piece in layout.pieces:
        says = f"{layout.target.name} lands in {piece.parameter}"
        hold(piece.parameter in index.parameters, f"{says}, which is not there")
        shape = piece.of_parameter.shape(index.parameters[piece.parameter].shape)
        if piece.of_delta.expert is not None:
            return
        chosen = piece.of_delta.rows
        size = shape[0] if shape else 1
        taken = [*range(size)] if piece.of_delta.whole else _positions(chosen)
        hold(len(taken) == size, f"{says}: {len(taken)} rows of the change go into {size}")
        rows += taken
    hold(sorted(rows) == [*range(len(rows))], f"{layout.target.name}: its pieces do not cover it exactly once")


def _positions(index: slice | tuple[int, ...]) -> list[int]:
    return [*range(index.start or 0, index.stop, index.step or 1)] if isinstance(index, slice) else [*index]
