"""Every way back from a merge, and from one merge to the next: exact bits, all of them or none."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.ia3 import Gain
from lorahub.deltas.loha import LOHA, LoHa
from lorahub.deltas.replace import Replace
from lorahub.engine.changing.merge import Arranged, Merged, Prepared, merge_into
from lorahub.engine.changing.undo import Keeping
from lorahub.engine.folding.bind import Bound
from lorahub.engine.folding.fold import Fold
from lorahub.engine.folding.planes import Noted
from lorahub.engine.kernels import merge_torch
from lorahub.engine.kernels.choice import native
from lorahub.engine.planning.plan import plan
from lorahub.engine.undoing import noted as noted_module
from lorahub.engine.undoing.keeper import Keeper
from lorahub.engine.undoing.reload import BaseRows
from lorahub.errors import BaseMismatch, IntegrityError, NotFinite, UsageError
from lorahub.files.tensors import open_weights
from lorahub.files.writer import save_file

PLAYED = {"launched": "copy", "noted": "journal"}
"""What a device's kernel does in passing -> the policy that this is."""
POLICIES = ["copy", "journal", "host", "reload", *PLAYED]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def device(request, as_device):
    """Plays a device where the policy wants one."""
    given = getattr(request.node, "callspec", None)
    if given is not None and given.params.get("policy") in PLAYED:
        as_device(merge_torch.merge_patches)


@pytest.fixture
def world(tools):
    """Parameters of three dtypes; one stored transposed, one a stack of experts, one tied, one of four axes."""
    return tools.World(
        {
            "embed.weight": tools.weights(50, 16, seed=1),
            "a.weight": tools.weights(24, 16, seed=2),
            "b.weight": tools.weights(24, 16, seed=3, dtype=torch.float16),
            "c.weight": tools.weights(24, 16, seed=4, dtype=torch.float32),
            "c.bias": tools.weights(24, seed=5, dtype=torch.float32),
            "turned.weight": tools.weights(16, 24, seed=6),
            "conv.weight": tools.weights(8, 4, 3, 3, seed=7),
            "norm.weight": tools.weights(16, seed=8),
        },
        transposed=frozenset({"turned.weight"}),
        tied=(("embed.weight", "head.weight"),),
    )


def thin(tools, out, inp, *k, seed=0):
    """A LoRA whose factors take much less than its weight."""
    return tools.lora(out, inp, *k, r=1, seed=seed, dtype=torch.bfloat16)


@pytest.fixture
def first(tools):
    """Changes of every sort: additive, in windows or whole; looking at the weight; new values."""
    lora = tools.lora(24, 16, seed=11)
    return {
        "a.weight": thin(tools, 24, 16, seed=12),
        "b.weight": thin(tools, 24, 16, seed=13),
        "c.weight": DoRA(lora.up, lora.down, 1.0, torch.linspace(0.1, 0.3, 24), 0),
        "c.bias": Full(torch.linspace(-0.1, 0.1, 24)),
        "turned.weight": thin(tools, 24, 16, seed=14),
        "norm.weight": Replace(tools.weights(16, seed=15)),
    }


@pytest.fixture
def second(tools):
    """Touches some of the same parameters, in other ways, and others."""
    dora = tools.lora(24, 16, seed=21)
    return {
        "embed.weight": thin(tools, 50, 16, seed=22),
        "a.weight": DoRA(dora.up, dora.down, 1.0, torch.linspace(0.1, 0.3, 24), 0),
        "b.weight": thin(tools, 24, 16, seed=23),
        "c.weight": thin(tools, 24, 16, seed=24),
        "conv.weight": thin(tools, 8, 4, 3, 3, seed=25),
        "turned.weight": Gain(torch.linspace(0.5, 1.5, 16).reshape(1, 16), 1),
        "norm.weight": Full(torch.linspace(-0.1, 0.1, 16)),
    }


class Go:
    """Merges into the live tensors of a world, its files at hand."""

    def __init__(self, tools, world, folder):
        self.tools, self.world, self.live = tools, world, world.live()
        self.files = world.save(folder / "base", shards=2)

    def plan(self, adapter, weight=1.0):
        kinds = self.tools.kinds | {"loha": LOHA}
        header = self.tools.header(adapter)
        return plan(self.world.index(), self.world, {"a": (header, weight)}, kinds, allow=["tied-parameter"])

    def arranged(self, adapter, weight=1.0):
        return Arranged(parameters=self.live, plan=self.plan(adapter, weight), adapters=self.tools.bring(adapter))

    def keeping(self, policy):
        return Keeping(policy=PLAYED.get(policy, policy), base=BaseRows(self.files, self.world.index()))

    def merge(self, adapter, policy="copy", weight=1.0, live=None, **options):
        return merge_into(
            self.live if live is None else live,
            self.plan(adapter, weight),
            self.tools.bring(adapter),
            keeping=self.keeping(policy),
            **options,
        )

    def fresh(self, adapter, weight=1.0):
        """What merging into the untouched base gives."""
        live = self.world.live()
        self.merge(adapter, weight=weight, live=live)
        return live

    def holds(self, expected):
        return all(
            torch.equal(self.live[name].reshape(-1).view(torch.uint8), expected[name].reshape(-1).view(torch.uint8))
            for name in expected
        )


@pytest.fixture
def go(tools, world, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "lorahub.engine.folding.sums.UNIT", 8 * 16 * 2
    )  # eight rows, so that every parameter has several units
    monkeypatch.setattr("lorahub.engine.folding.sums.WINDOW", 8 * 16 * 4)
    return Go(tools, world, tmp_path)


class Stop(BaseException):
    """Nothing that anyone expects."""


# --------------------------------------------------------------------------------------------------- undo


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_back_the_exact_bits(go, world, first, policy, threads):
    merged = go.merge(first, policy, threads=threads)
    assert not go.holds(world.tensors)
    assert go.holds(go.fresh(first))
    merged.undo()
    assert go.holds(world.tensors)
    assert merged.undone


def test_a_journal_serves_what_does_not_look_at_the_weight_and_the_rest_is_copied(go, tools):
    journal = go.merge({"a.weight": thin(tools, 24, 16), "b.weight": thin(tools, 24, 16)}, "journal").report.undo
    assert set(journal) == {"journal"}
    go.live = go.world.live()
    dora = tools.lora(24, 16)
    mixed = {"a.weight": thin(tools, 24, 16), "c.weight": DoRA(dora.up, dora.down, 1.0, torch.ones(24), 0)}
    report = go.merge(mixed, "journal").report
    assert report.undo["copy"] == 24 * 16 * 4
    assert report.document()["undo"] == dict(report.undo)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("relative", "most"), [(1e-3, 0.01), (1e-2, 0.03), (1e-1, 0.10)])
def test_a_journal_takes_a_tenth_of_the_weights_or_less(tools, dtype, relative, most):
    world = tools.World({"w.weight": tools.weights(1024, 512, dtype=dtype)})
    lora = tools.lora(1024, 512)
    size = (lora.up @ lora.down).norm() * lora.scale
    lora = dataclasses.replace(
        lora, scale=float(lora.scale * relative * world.tensors["w.weight"].float().norm() / size)
    )
    live = world.live()
    merged = merge_into(
        live,
        world.plan({"w.weight": lora}, allow=["delta-lost"]),
        tools.bring({"w.weight": lora}),
        keeping=Keeping(policy="journal"),
    )
    assert merged.report.changes["w.weight"] == pytest.approx(relative, rel=0.2)
    assert 0 < merged.report.undo["journal"] <= most * 1024 * 512 * dtype.itemsize
    merged.undo()
    assert torch.equal(live["w.weight"], world.tensors["w.weight"])


def test_where_a_change_is_large_the_journal_says_copy(tools):
    world = tools.World({"w.weight": tools.weights(64, 512)})
    lora = dataclasses.replace(tools.lora(64, 512), scale=5.0)
    live = world.live()
    merged = merge_into(
        live,
        world.plan({"w.weight": lora}, allow=["delta-lost"]),
        tools.bring({"w.weight": lora}),
        keeping=Keeping(policy="journal"),
    )
    assert merged.report.changes["w.weight"] > 0.3
    assert merged.report.undo == {"copy": 64 * 512 * 2}


ALTERATIONS = {
    "all of a factor": lambda lora: lora.up.mul_(2),
    "one number of the last row": lambda lora: lora.up[-1, 0].add_(0.5),
    "one number that all rows read": lambda lora: lora.down[0, 0].add_(0.5),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
@pytest.mark.parametrize("policy", ["journal", "noted"])
def test_a_journal_whose_change_was_altered_is_refused_and_nothing_is_written(go, tools, world, alter, policy):
    adapter = {"a.weight": thin(tools, 24, 16), "b.weight": thin(tools, 24, 16, seed=2)}
    given = {
        name: dataclasses.replace(lora, up=lora.up.clone(), down=lora.down.clone()) for name, lora in adapter.items()
    }
    merged = go.merge(given, policy)
    held = {name: tensor.clone() for name, tensor in go.live.items()}
    alter(given["b.weight"])
    with pytest.raises(IntegrityError, match=r"b\.weight cannot be restored"):
        merged.undo()
    assert go.holds(held)
    with pytest.raises(IntegrityError, match=r"b\.weight cannot be restored"):
        merged.swap_to(go.arranged({"a.weight": tools.lora(24, 16, seed=3)}))
    assert go.holds(held)
    for slot, tensor in given["b.weight"].tensors().items():
        tensor.copy_(adapter["b.weight"].tensors()[slot])
    merged.undo()
    assert go.holds(world.tensors)


def compiled():
    if native().kernel is None:
        pytest.skip("no kernel is compiled here")


def test_a_journal_that_was_altered_is_refused_and_nothing_is_written(go, tools, world):
    compiled()
    merged = go.merge({"a.weight": thin(tools, 24, 16)}, "journal")
    held = {name: tensor.clone() for name, tensor in go.live.items()}
    (*_, (noted, _)) = merged._now.keepers["a.weight"].entries.values()
    assert len(noted.by.codes)
    with torch.inference_mode():
        noted.by.codes[-1] ^= 1
    with pytest.raises(IntegrityError, match=r"a\.weight cannot be restored"):
        merged.undo()
    assert go.holds(held)
    with torch.inference_mode():
        noted.by.codes[-1] ^= 1
    merged.undo()
    assert go.holds(world.tensors)


def test_what_a_kernel_noted_is_taken_off_once_and_not_tried_before(go, tools, world, monkeypatch):
    compiled()
    merged = go.merge({"a.weight": thin(tools, 24, 16)}, "journal")
    units, put, calls = merged._now.keepers["a.weight"].units, Fold.put, []
    monkeypatch.setattr(Fold, "put", lambda *given, **options: (calls.append(given), put(*given, **options)))
    merged.undo()
    assert len(calls) == len(units) == 3
    assert go.holds(world.tensors)


@pytest.mark.parametrize("policy", ["copy", "journal", "reload"])
def test_an_undo_that_failed_in_the_middle_goes_on(go, first, world, policy, monkeypatch):
    merged = go.merge(first, policy, threads=1)
    forget, count = Keeper.forget, []

    def failing(self, rows):
        forget(self, rows)
        count.append(rows)
        if len(count) == 3:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(Keeper, "forget", failing)
        with pytest.raises(Stop):
            merged.undo()
    assert not merged.undone
    with pytest.raises(UsageError, match="half undone"):
        merged.swap_to(go.arranged(first))
    merged.undo()
    assert go.holds(world.tensors)


def test_reading_again_refuses_files_that_hold_something_else(go, first, world):
    go.live["a.weight"][20, 3] += 1
    changed = {name: tensor.clone() for name, tensor in go.live.items()}
    with pytest.raises(UsageError, match=r"a\.weight is not what its files hold"):
        go.merge(first, "reload")
    assert go.holds(changed)


def test_reading_again_refuses_files_that_changed_since(go, first, world):
    merged = go.merge(first, "reload")
    held = {name: tensor.clone() for name, tensor in go.live.items()}
    for path in go.files.folder.glob("*.safetensors"):
        with open_weights(path) as source:
            tensors = {name: source.read(name) for name in source.names()}
        original = {name: tensor.clone() for name, tensor in tensors.items()}
        if "b.weight" in tensors:
            tensors["b.weight"][0, 0] += 1
            changed = path, original
            path.write_bytes(_as_file(path, tensors))
    with pytest.raises(IntegrityError, match=r"b\.weight is not what it was in the files"):
        merged.undo()
    assert go.holds(held)
    changed[0].write_bytes(_as_file(*changed))
    merged.undo()
    assert go.holds(world.tensors)


def _as_file(path, tensors):
    beside = path.with_suffix(".new")
    save_file(beside, tensors, {"format": "pt"})
    data = beside.read_bytes()
    beside.unlink()
    return data


def test_reading_again_rounds_as_loading_did(tools, tmp_path):
    stored = tools.World({"w.weight": tools.weights(24, 16, dtype=torch.float32)})
    loaded = tools.World({"w.weight": stored.tensors["w.weight"].bfloat16()})
    keeping = Keeping(policy="reload", base=BaseRows(stored.save(tmp_path / "base"), stored.index()))
    adapter, live = {"w.weight": tools.lora(24, 16)}, loaded.live()
    merged = merge_into(live, loaded.plan(adapter), tools.bring(adapter), keeping=keeping)
    assert merged.report.undo == {"reload": 0}
    merged.undo()
    assert torch.equal(live["w.weight"], loaded.tensors["w.weight"])


def test_reading_again_needs_the_parameters_as_they_are(tools, tmp_path):
    stored = tools.World({"w.weight": tools.weights(24, 8)})
    loaded = tools.World({"w.weight": tools.weights(24, 16)})
    keeping = Keeping(policy="reload", base=BaseRows(stored.save(tmp_path / "base"), stored.index()))
    adapter, live = {"w.weight": tools.lora(24, 16)}, loaded.live()
    with pytest.raises(BaseMismatch, match=r"have it as \[24, 8\] BF16"):
        merge_into(live, loaded.plan(adapter), tools.bring(adapter), keeping=keeping)
    with pytest.raises(UsageError, match="nobody said where"):
        Keeping(policy="reload")
    with pytest.raises(UsageError, match="no way back"):
        Keeping(policy="subtract")


def test_none_keeps_nothing_and_still_merges_all_or_nothing(go, first, tools, world):
    with pytest.raises(NotFinite):
        go.merge(first | {"norm.weight": Replace(torch.full((16,), float("nan")))}, "none")
    assert go.holds(world.tensors)
    merged = go.merge(first, "none")
    assert go.holds(go.fresh(first))
    assert merged.report.undo == {}
    for refused in (merged.undo, merged.__enter__, lambda: merged.swap_to(go.arranged(first))):
        with pytest.raises(UsageError, match="kept nothing"):
            refused()
    assert go.holds(go.fresh(first))


# --------------------------------------------------------------------------------------------------- swap


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_swap_gives_the_bits_of_a_fresh_merge_and_undo_the_base(go, first, second, world, policy, threads):
    merged = go.merge(first, policy, threads=threads)
    report = merged.swap_to(go.arranged(second))
    assert go.holds(go.fresh(second))
    assert list(report.changes) == [step.out for step in go.plan(second).steps]
    assert merged.report is report
    merged.swap_to(go.arranged(first))
    assert go.holds(go.fresh(first))
    merged.undo()
    assert go.holds(world.tensors)


@pytest.mark.parametrize("policy", POLICIES)
def test_other_weights_are_a_swap_to_the_same_adapter(go, first, second, world, policy):
    merged = go.merge(first, policy, again=lambda adapters, weights, allow: go.arranged(adapters or first, weights))
    merged.set_weights(-0.5)
    assert go.holds(go.fresh(first, -0.5))
    merged.swap(second, weights=0.3)
    assert go.holds(go.fresh(second, 0.3))
    merged.undo()
    assert go.holds(world.tensors)
    with pytest.raises(UsageError, match="undone already"):
        merged.set_weights(1.0)


def test_a_merge_from_a_plan_swaps_to_a_plan(go, first):
    for act in (Merged.swap, Merged.prepare):
        go.live = go.world.live()
        with pytest.raises(UsageError, match="made from a plan"):
            act(go.merge(first), first)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_prepared_is_swapped_to_as_often_as_one_likes(go, first, second, world, policy, monkeypatch):
    merged = go.merge(
        first, policy, again=lambda adapters, weights, allow: go.arranged(adapters or first, weights or 1)
    )
    one, other = merged.prepare(None), merged.prepare(second, weights=0.3)
    assert go.holds(go.fresh(first))  # preparing writes nothing
    wanted = {id(one): go.fresh(first), id(other): go.fresh(second, 0.3)}
    for ready in (other, one, other):
        assert merged.swap(ready) is merged.report
        assert go.holds(wanted[id(ready)])
    bound, made = Bound.ingredients, []
    with monkeypatch.context() as patched:
        patched.setattr(Bound, "ingredients", lambda *given: made.append(given[0]) or bound(*given))
        merged.swap(one)
        assert one.folds().bound not in made or PLAYED.get(policy, policy) == "journal"  # which asks how large it is
        merged.swap(second, weights=0.3)
    assert go.holds(wanted[id(other)])
    assert len(made) >= len(one.plan.steps)
    merged.swap(one)
    assert go.holds(wanted[id(one)])
    merged.set_weights(0.5)  # of the adapters that were prepared
    assert go.holds(go.fresh(first, 0.5))
    merged.undo()
    assert go.holds(world.tensors)
    with pytest.raises(UsageError, match="undone already"):
        merged.swap(one)


def test_what_was_prepared_has_its_weights(go, first, second):
    merged = go.merge(first, again=lambda adapters, weights, allow: go.arranged(adapters or first, weights or 1))
    ready = merged.prepare(second)
    for more in ({"weights": 0.3}, {"allow": ["delta-lost"]}):
        with pytest.raises(UsageError, match="has its weights"):
            merged.swap(ready, **more)
    assert go.holds(go.fresh(first))


def test_what_was_prepared_is_refused_where_the_model_was_moved_since(go, first, second):
    merged = go.merge(first, again=lambda adapters, weights, allow: go.arranged(adapters or first, weights or 1))
    ready = merged.prepare(second)
    held = go.live["a.weight"]
    go.live["a.weight"] = held.clone()
    with pytest.raises(UsageError, match=r"a\.weight was moved, converted or replaced"):
        merged.swap(ready)
    go.live["a.weight"] = held
    merged.swap(ready)
    assert go.holds(go.fresh(second))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_swap_refuses_to_lose_what_someone_else_wrote(go, first, second, policy):
    merged = go.merge(first, policy)
    go.live["b.weight"][3, 3] += 1
    held = {name: tensor.clone() for name, tensor in go.live.items()}
    with pytest.raises(UsageError, match=r"b\.weight changed since"):
        merged.swap_to(go.arranged(second))
    assert go.holds(held)


def test_a_swap_shares_the_copies(go, first, second):
    merged = go.merge(first, "copy")
    before = merged._now.keepers["b.weight"].copy.data_ptr()
    merged.swap_to(go.arranged(second))
    assert merged._now.keepers["b.weight"].copy.data_ptr() == before
    assert merged.report.undo == {"copy": sum(step.before.nbytes for step in go.plan(second).steps)}


# --------------------------------------------------------------------------------------------------- failures


class Broken:
    """A fold that fails once, at its call number ``at``, after it wrote something."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at = 0, at
        run, put, change, checksums = Fold.run, Fold.put, Noted.change, noted_module.checksums

        def broken(original):
            def fold(fold, unit, before, out, space, **more):
                self.calls += 1
                result = original(fold, unit, before, out, space, **more)
                if self.calls == self.at:
                    out.fill_(7)
                    raise Stop
                return result

            return fold

        def stopping(original):
            def act(given):
                self.calls += 1
                if self.calls == self.at:
                    raise Stop
                return original(given)

            return act

        monkeypatch.setattr(Fold, "run", broken(run))
        monkeypatch.setattr(Fold, "put", broken(put))
        monkeypatch.setattr(Noted, "change", stopping(change))
        monkeypatch.setattr(noted_module, "checksums", stopping(checksums))  # before what a device notes, and after


def _fails_everywhere(go, monkeypatch, prepare, act, check):
    """Let ``act`` fail at each of its folds in turn."""
    for at in range(1, 200):
        subject = prepare()
        with monkeypatch.context() as patched:
            broken = Broken(patched, at)
            try:
                act(subject)
            except Stop:
                failed = True
            else:
                failed = False
        if not failed:
            assert broken.calls < at
            return at - 1
        check(subject)
    raise AssertionError("it never succeeded")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_merge_that_fails_at_any_unit_leaves_the_base(go, first, world, monkeypatch, policy):
    def check(_):
        assert go.holds(world.tensors)

    def act(_):
        go.merge(first, policy, threads=1).undo()

    assert _fails_everywhere(go, monkeypatch, lambda: None, lambda _: go.merge(first, policy, threads=1), check) > 8


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_swap_that_fails_at_any_unit_leaves_the_first_merge(go, first, second, world, monkeypatch, policy, prepared):
    expected = go.fresh(first)
    ready = Prepared.of(go.arranged(second), None)

    def prepare():
        for name, tensor in world.tensors.items():
            go.live[name].copy_(tensor)
        return go.merge(first, policy, threads=1)

    def check(merged):
        assert go.holds(expected)
        merged.undo()
        assert go.holds(world.tensors)

    def act(merged):
        merged.swap_to(ready if prepared else go.arranged(second))

    assert _fails_everywhere(go, monkeypatch, prepare, act, check) > 8
    merged = prepare()
    merged.swap_to(ready)
    assert go.holds(go.fresh(second))
    merged.undo()


def test_an_undo_that_fails_at_any_unit_can_be_done_again(go, first, world, monkeypatch):
    expected = go.fresh(first)
    first_half = []

    def prepare():
        for name, tensor in world.tensors.items():
            go.live[name].copy_(tensor)
        return go.merge(first, "journal", threads=1)

    def check(merged):
        first_half.append(go.holds(expected))  # until everything was found to be restorable
        merged.undo()
        assert go.holds(world.tensors)

    assert _fails_everywhere(go, monkeypatch, prepare, lambda merged: merged.undo(), check) > 8
    assert first_half == sorted(first_half, reverse=True)
    assert True in first_half


@pytest.mark.parametrize("policy", POLICIES)
def test_an_interrupted_swap_leaves_the_first_merge(go, first, second, world, policy):
    merged = go.merge(first, policy)
    expected = go.fresh(first)

    def progress(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged.swap_to(go.arranged(second), progress=progress)
    assert go.holds(expected)
    merged.undo()
    assert go.holds(world.tensors)


def test_a_swap_that_cannot_go_back_gives_the_base_and_says_so(go, first, second, world):
    merged = go.merge(first, "copy", threads=1)
    first["a.weight"].up.mul_(3)  # what is merged can no longer be made
    broken = second | {"norm.weight": Replace(torch.full((16,), float("inf")))}
    with pytest.raises(IntegrityError, match=r"a\.weight could not be put back"):
        merged.swap_to(go.arranged(broken))
    assert go.holds(world.tensors)
    assert merged.undone


@dataclasses.dataclass(frozen=True, eq=False)
class Gated(DoRA):
    """A change that looks at a sibling: itself times what the gate is before anything is merged."""

    def delta(self, weight, **siblings):
        return super().delta(weight) * siblings["gate"].reshape(-1, 1)


@pytest.mark.parametrize("policy", ["copy", "host"])
def test_siblings_are_read_as_they_were_before_anything_was_merged(tools, monkeypatch, policy):
    world = tools.World({"m.weight": tools.weights(24, 16), "m.gate": tools.weights(24, seed=1)})
    kind = tools.kinds["dora"]

    def touches(group):
        return (dataclasses.replace(kind.touches(group)[0], reads=("gate",)),)

    kinds = tools.kinds | {"dora": dataclasses.replace(kind, touches=touches)}
    live, before = world.live(), {name: tensor.double() for name, tensor in world.tensors.items()}

    def arranged(seed, gate):
        lora = tools.lora(24, 16, seed=seed)
        values = lora.up, lora.down, 1.0, torch.linspace(0.1, 0.3, 24), 0
        adapter = {"m.gate": gate, "m.weight": DoRA(*values)}
        planned = plan(world.index(), world, {"a": (tools.header(adapter), 1.0)}, kinds)
        brought = tools.bring(adapter | {"m.weight": Gated(*values)})
        expected = before["m.weight"] + Gated(*values).delta(before["m.weight"], gate=before["m.gate"])
        return Arranged(parameters=live, plan=planned, adapters=brought), expected.bfloat16()

    (one, first), (two, second) = (
        arranged(seed, gate) for seed, gate in ((1, Replace(torch.ones(24))), (2, Full(torch.ones(24))))
    )
    broken, _ = arranged(3, Replace(torch.full((24,), float("nan"))))
    merged = merge_into(live, one.plan, one.adapters, keeping=Keeping(policy=policy), threads=1)
    held = {name: tensor.clone() for name, tensor in live.items()}
    assert (live["m.weight"] == first).double().mean() > 0.99
    for _ in range(2):
        with pytest.raises(NotFinite):
            merged.swap_to(broken)
        assert all(torch.equal(live[name], held[name]) for name in held)
        merged.swap_to(two)
        assert (live["m.weight"] == second).double().mean() > 0.99
        assert torch.equal(live["m.gate"], (before["m.gate"] + 1).bfloat16())
        merged.swap_to(one)
        assert all(torch.equal(live[name], held[name]) for name in held)
    merged.undo()
    assert all(torch.equal(live[name], world.tensors[name]) for name in live)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["copy", "journal", "host"])
def test_every_policy_gives_back_the_exact_bits_on_a_gpu(go, world, first, second, policy):
    go.live = {name: tensor.cuda() for name, tensor in world.tensors.items()}
    merged = go.merge(first, policy)
    held = {name: tensor.clone() for name, tensor in go.live.items()}
    merged.swap_to(go.arranged(second))
    merged.swap_to(go.arranged(first))
    assert all(torch.equal(go.live[name], held[name]) for name in held)
    merged.undo()
    assert all(torch.equal(go.live[name].cpu(), tensor) for name, tensor in world.tensors.items())


# --------------------------------------------------------------------------------------------------- what lasts


@pytest.mark.parametrize("cycles", [108, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_cycles_change_no_bit(tools, tmp_path, cycles):
    """A hundred and eight hold every policy with every pair of adapters, three times."""
    world = tools.World(
        {
            "a.weight": tools.weights(12, 8, seed=1),
            "b.weight": tools.weights(12, 8, seed=2, dtype=torch.float16),
            "c.weight": tools.weights(8, 12, seed=3, dtype=torch.float32),
            "norm.weight": tools.weights(8, seed=4),
        },
        transposed=frozenset({"c.weight"}),
    )
    go = Go(tools, world, tmp_path)
    dora = tools.lora(12, 8, seed=6)
    adapters = [
        {name: thin(tools, 12, 8, seed=seed) for seed, name in enumerate(("a.weight", "b.weight", "c.weight"))},
        {
            "a.weight": DoRA(dora.up, dora.down, 1.0, torch.ones(12), 0),
            "b.weight": Gain(torch.linspace(0.5, 1.5, 8).reshape(1, 8), 1),
            "norm.weight": Replace(torch.ones(8)),
        },
        {"b.weight": Full(torch.linspace(-1, 1, 96).reshape(12, 8)), "c.weight": thin(tools, 12, 8, seed=10)},
    ]
    arranged = [[go.arranged(adapter, weight) for weight in (1.0, -0.7)] for adapter in adapters]
    for cycle in range(cycles):
        policy = POLICIES[cycle % 4]  # all but the last
        start, other = arranged[cycle % 3], arranged[(cycle // 3) % 3]
        merged = merge_into(go.live, start[0].plan, start[0].adapters, keeping=go.keeping(policy), threads=1)
        merged.swap_to(other[cycle % 2])
        merged.undo()
        if cycle % 37 == 0:
            assert go.holds(world.tensors)
    assert go.holds(world.tensors)


def test_loha_and_stacked_experts_are_journalled(tools, tmp_path):
    from lorahub.bases.layout import Layout, Piece, Region

    generator = torch.Generator().manual_seed(7)
    world = tools.World({"w.weight": tools.weights(240, 160), "experts": tools.weights(3, 24, 16, seed=2)})
    targets = [tools.target(f"e.{number}.weight") for number in range(3)]
    world.layout = {
        each: Layout(target=each, pieces=(Piece(parameter="experts", of_parameter=Region(expert=number)),))
        for number, each in enumerate(targets)
    }
    live, index = world.live(), world.index()
    adapter = {each.name: thin(tools, 24, 16, seed=number) for number, each in enumerate(targets)}
    planned = world.plan(adapter)
    merged = merge_into(live, planned, tools.bring(adapter), keeping=Keeping(policy="journal"))
    assert set(merged.report.undo) == {"journal"}
    assert not torch.equal(live["experts"], world.tensors["experts"])
    merged.undo()
    assert torch.equal(live["experts"], world.tensors["experts"])

    loha = LoHa.example((240, 160), r=2, generator=generator)
    dissolved = LOHA.dissolve({"weight": loha})
    assert dissolved is not None
    header = _header_of(dissolved, "w", "loha")
    planned = plan(index, world, {"a": (header, 0.01)}, tools.kinds | {"loha": LOHA})
    merged = merge_into(live, planned, tools.bring({"w.weight": loha}), keeping=Keeping(policy="journal"))
    assert set(merged.report.undo) == {"journal"}
    merged.undo()
    assert torch.equal(live["w.weight"], world.tensors["w.weight"])


def _header_of(dissolved, module, kind):
    from lorahub.deltas.kind import Group, TensorRef
    from lorahub.files.dtypes import from_torch
    from lorahub.formats.format import Reading

    tensors, options = dissolved
    slots = {
        slot: TensorRef(key=f"{module}.{slot}", shape=tuple(tensor.shape), dtype=from_torch(tensor.dtype))
        for slot, tensor in tensors.items()
    }
    group = Group(module=module, parameter="weight", kind=kind, slots=slots, options=options)
    return SimpleNamespace(
        reading=Reading(format="test", file="adapter.safetensors", groups=(group,), hints={}), findings=()
    )
