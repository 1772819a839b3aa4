"""The laws every storage keeps: what it reads is what runs, it rounds once, and undoing gives every bit.

    from lorahub.testing import StorageCase, check_storage
    def test_my_storage():
        check_storage(MyStorage(), StorageCase(build=quantised_model, run=lambda model: model(example)))

``build`` makes the same small quantised model each time.  Compares numbers exactly, save for what modules compute,
where ``noise`` says how far their own arithmetic may lie from float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement

from lorahub.errors import LorahubError
from lorahub.files.dtypes import from_torch
from lorahub.files.header import TensorInfo
from lorahub.lazy import torch
from lorahub.storages.storage import Held, Storage, own_tensors
from lorahub.storages.stored import Settings
from lorahub.testing.judging import hold

if TYPE_CHECKING:
    from torch import nn

__all__ = ["STORAGE_LAWS", "StorageCase", "check_storage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageCase:
    """A model of a storage's own, and the files that its library saves.

    Attributes:
        build: gives the model, quantised and in evaluation mode, with the same weights each time.
        run: calls it and gives its output.
        noise: how far the library's own arithmetic may be from float32, as a part of the output: sums in 16 bits,
            inputs that are quantised too.
        settings: the ``quantization_config`` of a checkpoint of this storage; empty: it reads no files.
        tensors: what that checkpoint holds; of ``build``'s weights, under the names that they have in the model.
    """

    build: Callable[[], nn.Module]
    run: Callable[[Any], torch.Tensor]
    noise: float = 0.02
    settings: Settings = field(default_factory=lambda: MappingProxyType({}))
    tensors: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))


def modules_are_recognised(storage: Storage, case: StorageCase) -> None:
    """Its own modules are recognised by their classes, with the tensors they consist of; others are left alone."""
    try:
        Requirement(storage.library)
    except InvalidRequirement as error:
        raise AssertionError(f"{storage.name}: its library, {storage.library!r}, is no requirement") from error
    for other in (torch.nn.Linear(4, 3), torch.nn.Embedding(4, 3), torch.nn.LayerNorm(3), torch.nn.ReLU()):
        hold(not storage.holds(other), f"{storage.name}: it claims a plain {type(other).__name__}")
    model = case.build()
    for name, module, held in _held(storage, model):
        says = f"{storage.name}: {name}"
        hold(held.module is module, f"{says}: it is held by another module than the one that was asked")
        stray = set(held.hidden) - own_tensors(module)
        hold(not stray, f"{says}: {', '.join(sorted(stray))} are hidden, and its module does not have them")
        hold(held.bits > 0, f"{says}: a code of {held.bits} bits")
        hold(held.scales in ("kept", "fresh"), f"{says}: its scales are {held.scales!r}, neither kept nor fresh")
        again = storage.holds(module)[name.rpartition(".")[2]]
        hold(again.identity == held.identity, f"{says}: asked twice, it is another weight")
        hold(again.storage == held.storage != "", f"{says}: it does not say what it is stored as")


def reading_changes_nothing(storage: Storage, case: StorageCase) -> None:
    """What is read is float32 of the logical shape, the same each time, and stays when its copy is written to."""
    model, untouched = case.build(), case.build()
    for name, _, held in _readable(storage, model):
        says = f"{storage.name}: {name}"
        coded = held.read()
        values = coded.values()
        hold(values.dtype == torch.float32, f"{says}: its values are {values.dtype}, and float32 is asked for")
        hold(tuple(values.shape) == held.shape, f"{says}: values of {list(values.shape)} for {list(held.shape)}")
        hold(bool(values.isfinite().all()), f"{says}: its values are not finite")
        hold(coded.nbytes < values.nbytes, f"{says}: {coded.nbytes} bytes are no fewer than those of plain numbers")
        kept = values.clone()
        values.zero_()
        hold(torch.equal(held.read().values(), kept), f"{says}: writing to what was read changes the model")
        hold(torch.equal(coded.values(), kept), f"{says}: writing to what was read changes what it was read from")
    hold(torch.equal(_run(case, model), _run(case, untouched)), f"{storage.name}: reading changes what the model does")


def what_is_read_is_what_runs(storage: Storage, case: StorageCase) -> None:
    """A linear module gives what the values that were read give, but for the arithmetic of its library."""
    model = case.build()
    values = {name: held.read().values() for name, _, held in _readable(storage, model)}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    linear = {
        name: module
        for name, module, held in _readable(storage, model)
        if held.op == "linear" or (not held.op and isinstance(module, torch.nn.Linear))
    }
    handles = [module.register_forward_hook(partial(_keep, seen, name)) for name, module in linear.items()]
    _run(case, model)
    for handle in handles:
        handle.remove()
    hold(bool(seen) or not linear, f"{storage.name}: the case runs no module that holds a weight")
    for name, (x, y) in seen.items():
        bias = linear[name].bias
        expected = x.float() @ values[name].T
        if isinstance(bias, torch.Tensor):
            expected = expected + bias.detach().float()
        error = float((y.float() - expected).norm() / expected.norm())
        hold(
            error <= case.noise,
            f"{storage.name}: {name} does not compute with what is read (off by {error:.1e}, allowed {case.noise:.1e})",
        )


def own_values_are_kept(storage: Storage, case: StorageCase) -> None:
    """The values that were read, stored again, are those values: a weight that nobody changes loses nothing."""
    for name, _, held in _writable(storage, case.build()):
        coded = held.read()
        values = coded.values()
        again = coded.requantised(values.clone()).values()
        lost = int((again != values).sum())
        hold(not lost, f"{storage.name}: {name}: stored again unchanged, {lost} of {values.numel()} elements change")


def other_values_are_rounded_once(storage: Storage, case: StorageCase) -> None:
    """Other values go to the nearest that can be stored: never farther than the old ones, or zero, where those can be.

    Elements between zero and their old values need no larger scale, so where scales are kept both are on the grid.
    """
    for name, _, held in _writable(storage, case.build()):
        says = f"{storage.name}: {name}"
        coded = held.read()
        values = coded.values()
        generator = torch.Generator().manual_seed(0)
        wanted = values * torch.rand(values.shape, generator=generator).to(values.device)
        given = wanted.clone()
        stored = coded.requantised(given).values()
        hold(
            torch.equal(coded.values(), values),
            f"{says}: storing other values changes what was read before, which undoing needs",
        )
        lost = float((stored - wanted).norm() / wanted.norm())
        most = 2.0 ** -(held.bits // 2)  # of a float with an exponent, half its bits
        hold(lost <= most, f"{says}: {lost:.1%} of the values are lost, and {held.bits} bits lose {most:.1%} at most")
        if held.scales == "kept":  # fresh ones are another grid
            slack = torch.finfo(torch.float32).eps * values.abs().max()
            nearest = torch.minimum((values - wanted).abs(), wanted.abs())
            worse = int(((stored - wanted).abs() > nearest + slack).sum())
            hold(not worse, f"{says}: {worse} of {values.numel()} elements are not rounded to the nearest")
            twice = coded.requantised(stored.clone()).values()
            hold(torch.equal(twice, stored), f"{says}: what was rounded is rounded again when it is stored again")


def writing_is_what_was_rounded(storage: Storage, case: StorageCase) -> None:
    """What is written is what is read then, the model computes with it, and its mark is another."""
    model, untouched = case.build(), case.build()
    written = 0
    for name, _, held in _writable(storage, model):
        says = f"{storage.name}: {name}"
        before = held.read()
        new = before.requantised(_moved(before.values()))
        held.write(new)
        written += 1
        hold(torch.equal(held.read().values(), new.values()), f"{says}: read back, it is not what was written")
        hold(held.read().mark() == new.mark(), f"{says}: the mark of what was written is another when it is read back")
        hold(new.mark() != before.mark(), f"{says}: other codes, and the same mark")
    if written:
        same = torch.equal(_run(case, model), _run(case, untouched))
        hold(not same, f"{storage.name}: the model computes with what was there before it was written to")


def undoing_gives_every_bit(storage: Storage, case: StorageCase) -> None:
    """What was read, written back after others, gives the model as it was, also when the model ran in between."""
    model, untouched = case.build(), case.build()
    saved = {name: (held, held.read()) for name, _, held in _writable(storage, model)}
    for runs in (False, True):
        marks = {name: coded.mark() for name, (_, coded) in saved.items()}
        values = {name: coded.values() for name, (_, coded) in saved.items()}
        for name, (held, coded) in saved.items():
            held.write(coded.requantised(_moved(values[name])))
        if runs:
            _run(case, model)
        for held, coded in saved.values():
            held.write(coded)
        for name, (held, _) in saved.items():
            says = f"{storage.name}: {name}: undone{', after the model ran,' if runs else ''} it has other"
            hold(torch.equal(held.read().values(), values[name]), f"{says} values")
            hold(held.read().mark() == marks[name], f"{says} codes")
    hold(
        torch.equal(_run(case, model), _run(case, untouched)), f"{storage.name}: undone, the model does something else"
    )


def what_cannot_be_written_says_so(storage: Storage, case: StorageCase) -> None:
    """A weight with a refusal takes no other numbers: it raises a typed error, and nothing changes."""
    for name, _, held in _held(storage, case.build()):
        if not held.refusal:
            continue
        says = f"{storage.name}: {name}"
        try:
            coded = held.read()
        except LorahubError:
            continue
        values = coded.values()
        try:
            coded.requantised(_moved(values))
        except LorahubError:
            hold(torch.equal(held.read().values(), values), f"{says}: refused, and changed all the same")
        else:
            hold(False, f"{says}: it says that nothing can be put there, and takes other numbers")


def files_tell_the_same(storage: Storage, case: StorageCase) -> None:
    """A checkpoint's weights are those of the model; one of another library's is left alone."""
    tensors, read = _headers(case.tensors), case.tensors.__getitem__
    hold(not storage.stored({}, {}, read), f"{storage.name}: it claims a checkpoint that is not quantised")
    other = storage.stored({"quant_method": "a method of nobody"}, tensors, read)
    hold(other is None, f"{storage.name}: it claims a checkpoint of another method")
    if not case.settings:
        return
    found = storage.stored(case.settings, tensors, read)
    if found is None:
        raise AssertionError(f"{storage.name}: it does not know the settings of its own checkpoint")
    live = {name: held for name, _, held in _readable(storage, case.build())}
    hold({each.name for each in found} == live.keys(), f"{storage.name}: files and model hold other weights")
    for each in found:
        says = f"{storage.name}: {each.name}"
        stray = [part for part in each.parts if part not in tensors]
        hold(not stray, f"{says}: made of {', '.join(stray)}, which is not in the checkpoint")
        values = each.values(read)
        hold(values.dtype == torch.float32, f"{says}: the files' values are {values.dtype}")
        hold(tuple(values.shape) == each.shape == live[each.name].shape, f"{says}: the shapes differ")
        hold(torch.equal(values, live[each.name].read().values()), f"{says}: files and model have other values")


STORAGE_LAWS: Mapping[str, Callable[[Storage, StorageCase], None]] = MappingProxyType(
    {
        law.__name__: law
        for law in (
            modules_are_recognised,
            reading_changes_nothing,
            what_is_read_is_what_runs,
            own_values_are_kept,
            other_values_are_rounded_once,
            writing_is_what_was_rounded,
            undoing_gives_every_bit,
            what_cannot_be_written_says_so,
            files_tell_the_same,
        )
    }
)
"""Name -> law; each takes a storage and a case and raises ``AssertionError``."""


def check_storage(storage: Storage, case: StorageCase) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold."""
    for law in STORAGE_LAWS.values():
        law(storage, case)


def _held(storage: Storage, model: nn.Module) -> Iterator[tuple[str, nn.Module, Held]]:
    """Every weight that the storage holds: (its name, its module, what it is).

    Raises:
        AssertionError: there is none.
    """
    found = 0
    for path, module in model.named_modules():
        for name, held in storage.holds(module).items():
            found += 1
            yield f"{path}.{name}" if path else name, module, held
    hold(found > 0, f"{storage.name}: it recognises no module of the case's model")


def _readable(storage: Storage, model: nn.Module) -> Iterator[tuple[str, nn.Module, Held]]:
    for name, module, held in _held(storage, model):
        try:
            held.read()
        except LorahubError as error:
            hold(bool(held.refusal), f"{storage.name}: {name} cannot be read and says no reason: {error}")
            continue
        yield name, module, held


def _writable(storage: Storage, model: nn.Module) -> Iterator[tuple[str, nn.Module, Held]]:
    return (each for each in _held(storage, model) if not each[2].refusal)


def _moved(values: torch.Tensor) -> torch.Tensor:
    """Other values: a third of the neighbouring row's added."""
    return values + 0.3 * values.roll(1, 0)


def _run(case: StorageCase, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return case.run(model).detach().clone()


def _keep(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str, _module: Any, args: Any, out: Any) -> None:
    seen.setdefault(name, (args[0].detach().clone(), out.detach().clone()))


def _headers(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """The tensors as a header tells them."""
    found: dict[str, TensorInfo] = {}
    at = 0
    for name, tensor in tensors.items():
        found[name] = TensorInfo(
            dtype=from_torch(tensor.dtype), shape=tuple(tensor.shape), start=at, stop=at + tensor.nbytes
        )
        at += tensor.nbytes
    return found
