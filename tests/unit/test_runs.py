"""Keys brought together as columns: the same modules as one key after another gives."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorahub.files.entries import Form
from lorahub.formats.runs import Runs, Splits, Stem, bring_together, runs_of

NAMES = [f"{module}.{suffix}{rest}" for module in "abc" for suffix in "xyz" for rest in ("", ".default")]
names = st.lists(st.sampled_from(NAMES), unique=True)


def split(name: str) -> tuple[Stem, str]:
    """Two names say the same where they differ in their third part alone."""
    module, suffix = name.split(".")[:2]
    return ("part", module), suffix


def one_by_one(keys: list[str]) -> tuple[dict[Stem, dict[str, str]], list[tuple[str, str]]]:
    """Modules, and keys that say what another before them says."""
    modules: dict[Stem, dict[str, str]] = {}
    twice = []
    for key in keys:
        stem, suffix = split(key)
        if (other := modules.setdefault(stem, {}).setdefault(suffix, key)) != key:
            twice.append((key, other))
    return modules, twice


def together(keys: list[str], splits: Splits) -> tuple[Runs, list[tuple[str, str]]]:
    twice: list[tuple[str, str]] = []
    stems, suffixes = splits.of(keys)
    runs = bring_together(keys, stems, suffixes, lambda *both: twice.append(both), clash=splits.clash)
    return runs, twice


@given(st.lists(names, max_size=3))
def test_columns_give_the_modules_that_a_loop_gives(files: list[list[str]]) -> None:
    splits = Splits(split)
    for keys in files:
        runs, twice = together(keys, splits)
        found = {stem: runs.keys_of(at) for at, stem in enumerate(runs.stems)}
        assert (found, twice) == one_by_one(keys)
        assert [*found] == [*one_by_one(keys)[0]]
        assert [list(each) for each in found.values()] == [list(each) for each in one_by_one(keys)[0].values()]
        assert len(runs.bounds) == len(runs.stems) + 1


@given(names)
def test_stems_that_are_equal_and_no_one_object_are_one_module(keys: list[str]) -> None:
    rows = [split(key) for key in keys]
    runs = bring_together(keys, [stem for stem, _ in rows], [suffix for _, suffix in rows], lambda *_: None)
    assert {stem: runs.keys_of(at) for at, stem in enumerate(runs.stems)} == one_by_one(keys)[0]


@given(names, st.lists(st.sampled_from([Form("F16", ()), Form("F32", ())]), min_size=18, max_size=18), st.data())
def test_modules_are_of_one_sort_where_suffixes_forms_and_numbers_agree(
    keys: list[str], forms: list[Form], data: st.DataObject
) -> None:
    runs, _ = together(keys, Splits(split))
    of = dict(zip(keys, forms, strict=False))
    one = {form: {value: float(value) + 0.5 for value in range(2)} for form in set(forms)}
    numbers = {key: one[of[key]][data.draw(st.integers(0, 1))] for key in keys if key.split(".")[1] == "x"}
    told = [
        [(suffix, of[key], numbers.get(key)) for suffix, key in runs.keys_of(at).items()]
        for at in range(len(runs.stems))
    ]
    sorts = runs.sorts(of, numbers)
    assert all((sorts[a] == sorts[b]) == (told[a] == told[b]) for a in range(len(told)) for b in range(len(told)))


def test_modules_that_are_known_stay_in_their_order() -> None:
    modules = {"b": {"x": "b.x"}, "a": {"y": "a.y", "x": "a.x"}}
    runs = runs_of(modules)
    assert {stem: runs.keys_of(at) for at, stem in enumerate(runs.stems)} == {
        ("", name): keys for name, keys in modules.items()
    }
    assert runs_of({}).stems == []
    assert runs_of({}).bounds == [0]
