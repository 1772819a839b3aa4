"""The loader: what it takes, what it leaves out and why, and that no plugin breaks another."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lorahub import hookspecs
from lorahub.bases.framework import Framework
from lorahub.composition.method import Method
from lorahub.deltas.kind import Kind
from lorahub.errors import MissingDependency, PluginError, UnsupportedFormat, UnsupportedKind, UsageError
from lorahub.formats.format import Format
from lorahub.hookspecs import hookimpl
from lorahub.plugins import Registry, load_registry, name_clash
from lorahub.registry import SORTS, PluginInfo, Required, unmet
from lorahub.runtimes.runtime import Runtime
from lorahub.storages.storage import Storage


@dataclass
class Point:
    """An entry point of a distribution that need not be installed."""

    name: str
    content: Callable[[], object]
    distribution: str = "acme-plugin"
    version: str = "1.0"

    @property
    def value(self) -> str:
        return f"module_of_{self.name}"

    @property
    def dist(self) -> SimpleNamespace:
        return SimpleNamespace(name=self.distribution, version=self.version)

    def load(self) -> object:
        return self.content()


def plugin(**members: object) -> Callable[[], object]:
    module = ModuleType("a_plugin")
    for name, member in members.items():
        setattr(module, name, member)
    return lambda: module


def framework(name: str, requires: str = "") -> SimpleNamespace:
    members = dict.fromkeys(SORTS["frameworks"].attributes, print)
    return SimpleNamespace(**members | {"name": name, "requires": requires})


def frameworks(*names: str, requires: str = "") -> Callable[[], object]:
    @hookimpl
    def lorahub_frameworks() -> list[Any]:
        return [framework(name, requires) for name in names]

    return plugin(lorahub_frameworks=lorahub_frameworks)


def load(*points: Point, env: dict[str, str] | None = None) -> Registry:
    return load_registry(entry_points=points, env=env or {})  # type: ignore[arg-type]


def states(registry: Registry) -> dict[str, str]:
    return {info.name: info.state for info in registry.plugins}


def never_imported() -> object:
    raise AssertionError("this plugin must not be imported")


def test_a_plugin_adds_to_the_built_ins() -> None:
    registry = load(Point("keras", frameworks("keras", requires="pluggy>=1")))
    (info,) = registry.plugins
    assert "keras" in registry.frameworks
    assert "lora" in registry.kinds
    assert info == PluginInfo(
        name="keras",
        distribution="acme-plugin",
        version="1.0",
        hooks=("lorahub_frameworks",),
        provides=("framework keras",),
        requires=(Required(requirement="pluggy>=1", installed=metadata.version("pluggy"), met=True),),
    )


def test_built_ins_are_found_without_a_list() -> None:
    registry = load()
    assert {"lora", "dora", "ia3"} <= set(registry.kinds)
    assert "peft" in registry.formats
    assert "torch" in registry.frameworks
    assert "vllm" in registry.runtimes
    assert registry.plugins == ()


def test_everything_is_sorted_by_name_whatever_the_order_of_installation() -> None:
    one, two = Point("b", frameworks("zeta")), Point("a", frameworks("alpha"))
    first, second = load(one, two), load(two, one)
    assert list(first.frameworks) == list(second.frameworks) == sorted(first.frameworks)
    assert [info.name for info in first.plugins] == [info.name for info in second.plugins] == ["a", "b"]


def raises(error: BaseException) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


@hookimpl
def lorahub_kinds() -> list[object]:
    return []


def returning(value: object) -> Callable[[], object]:
    @hookimpl
    def lorahub_frameworks() -> object:
        return value

    return plugin(lorahub_frameworks=lorahub_frameworks)


@hookimpl(specname="lorahub_frameworks")
def taking_an_argument(index: object) -> list[object]:
    return []


@hookimpl
def lorahub_sausages() -> list[object]:
    return []


@hookimpl(specname="lorahub_formats")
def crashing() -> list[object]:
    raise ZeroDivisionError("at call time")


BROKEN: dict[str, tuple[Callable[[], object], str]] = {
    "import": (raises(ImportError("no keras here")), "ImportError: no keras here"),
    "exit": (raises(SystemExit(3)), "SystemExit: 3"),
    "argument": (plugin(hook=taking_an_argument), "does not follow lorahub's hooks"),
    "unknown-hook": (plugin(lorahub_sausages=lorahub_sausages), "lorahub_sausages"),
    "no-hook": (plugin(), "module_of_bad implements none of lorahub's hooks"),
    "crash": (plugin(hook=crashing), "ZeroDivisionError: at call time"),
    "no-list": (returning(None), "lorahub_frameworks returned an object of type NoneType, not a list"),
    "wrong-type": (returning(["keras"]), "of type str without name, requires, claims"),
    "bad-name": (returning([framework("Keras!")]), "names are like 'some-name'"),
    "twice": (returning([framework("keras"), framework("keras")]), "two frameworks called 'keras'"),
    "requirement": (returning([framework("keras", "keras over 3")]), "'keras over 3' is no requirement"),
    "strange-hooks": (plugin(lorahub_kinds=lorahub_kinds, LORAHUB_HOOKS="1.0"), "its LORAHUB_HOOKS is '1.0'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_named_and_breaks_no_other(name: str) -> None:
    content, reason = BROKEN[name]
    registry = load(Point("bad", content), Point("good", frameworks("keras2")))
    assert states(registry) == {"bad": "broken", "good": "loaded"}
    assert reason in registry.plugins[0].error
    assert "keras2" in registry.frameworks
    assert "keras" not in registry.frameworks


@pytest.mark.parametrize(("major", "upgrade"), [(2, "lorahub-core"), (0, "acme-plugin")])
def test_another_major_of_the_hooks_is_refused_and_the_older_side_is_to_be_upgraded(major: int, upgrade: str) -> None:
    content = plugin(lorahub_kinds=lorahub_kinds, LORAHUB_HOOKS=(major, 0))
    registry = load(Point("other", content), Point("good", frameworks("keras")))
    assert states(registry) == {"good": "loaded", "other": "refused"}
    info = registry.plugins[1]
    assert info.error == f"it was made for version {major}.0 of lorahub's hooks, and this lorahub has 1.0"
    assert info.remedy == f"pip install --upgrade {upgrade}"


def test_what_to_do_about_a_plugin_that_is_left_out_is_said() -> None:
    registry = load(
        Point("a", frameworks("keras")),
        Point("b", frameworks("keras")),
        Point("bad", raises(ImportError("no keras here"))),
        Point("off", never_imported),
        env={"LORAHUB_DISABLE_PLUGINS": "off"},
    )
    remedies = {info.name: info.remedy for info in registry.plugins}
    assert remedies["bad"] == "pip install --upgrade acme-plugin; or do without it: LORAHUB_DISABLE_PLUGINS=bad"
    assert remedies["a"] == "keep one of them: LORAHUB_DISABLE_PLUGINS=a, or uninstall it"
    assert remedies["off"] == "change or unset that variable"


def test_a_newer_minor_of_the_hooks_is_taken() -> None:
    major, minor = hookspecs.HOOKSPEC_VERSION
    registry = load(Point("new", plugin(lorahub_kinds=lorahub_kinds, LORAHUB_HOOKS=(major, minor + 1))))
    assert states(registry) == {"new": "loaded"}


def test_two_plugins_with_one_framework_name_both_lose() -> None:
    registry = load(
        Point("a", frameworks("keras", "other"), "acme-a"), Point("b", frameworks("keras"), "acme-b", "2.0")
    )
    assert states(registry) == {"a": "conflict", "b": "conflict"}
    assert registry.plugins[0].error == "plugin 'b' (acme-b 2.0) brings a framework called 'keras' too"
    assert "acme-a 1.0" in registry.plugins[1].error
    assert not {"keras", "other"} & set(registry.frameworks)


def test_two_plugins_of_one_name_both_lose() -> None:
    registry = load(Point("keras", frameworks("a"), "acme-a"), Point("keras", frameworks("b"), "acme-b"))
    assert [info.state for info in registry.plugins] == ["conflict", "conflict"]
    assert "plugin 'keras' (acme-b 1.0) has the same name" in registry.plugins[0].error


def test_a_plugin_cannot_take_the_name_of_a_built_in() -> None:
    built_in = load().frameworks["torch"]
    registry = load(Point("mine", frameworks("torch")))
    assert type(registry.frameworks["torch"]) is type(built_in)
    assert states(registry) == {"mine": "conflict"}
    assert "a framework called 'torch', which lorahub brings itself" in registry.plugins[0].error


@pytest.mark.parametrize("names", ["bad", "other, bad", "*", "Acme_Plugin"])
def test_a_disabled_plugin_is_not_imported(names: str) -> None:
    registry = load(Point("bad", never_imported), env={"LORAHUB_DISABLE_PLUGINS": names})
    assert states(registry) == {"bad": "blocked"}
    assert registry.plugins[0].error == "LORAHUB_DISABLE_PLUGINS names it"


def test_only_allowed_plugins_are_imported_where_a_list_is_given() -> None:
    registry = load(
        Point("bad", never_imported), Point("good", frameworks("keras"), "x"), env={"LORAHUB_LOAD_PLUGINS": "good"}
    )
    assert states(registry) == {"bad": "blocked", "good": "loaded"}


def test_the_installed_registry_is_made_once_for_each_setting() -> None:
    assert load_registry(env={}) is load_registry(env={})
    off = load_registry(env={"LORAHUB_DISABLE_PLUGINS": "*"})
    assert off is not load_registry(env={})
    assert {info.state for info in off.plugins} <= {"blocked"}


def test_every_installed_plugin_loads() -> None:
    assert [str(info) for info in load_registry(env={}).plugins if info.state != "loaded"] == []


@pytest.mark.parametrize(
    ("method", "error"),
    [("kind", UnsupportedKind), ("format", UnsupportedFormat), ("framework", PluginError), ("runtime", UsageError)],
)
def test_an_unknown_name_says_what_there_is_and_what_failed_to_load(method: str, error: type[Exception]) -> None:
    registry = load(Point("keras", raises(ImportError("no keras here"))))
    with pytest.raises(error) as unknown:
        getattr(registry, method)("sausage")
    assert f"No {method} is called 'sausage'. There are: " in str(unknown.value)
    assert "Not loaded: plugin 'keras' (acme-plugin 1.0): ImportError: no keras here" in str(unknown.value)


def test_a_mistyped_name_is_corrected() -> None:
    with pytest.raises(UnsupportedKind, match="Did you mean 'lora'"):
        load().kind("lorra")


def test_a_known_name_gives_the_object() -> None:
    registry = load()
    assert registry.kind("lora").name == "lora"
    assert registry.format("peft").name == "peft"
    assert registry.runtime("vllm").name == "vllm"
    assert registry.framework_to_run("torch") is registry.framework("torch")


def test_what_a_framework_requires_is_tested_before_it_runs_and_not_before_it_reads() -> None:
    registry = load(
        Point("old", frameworks("old", requires="pluggy<1")),
        Point("gone", frameworks("gone", requires="no-such-distribution>=3")),
        Point("fine", frameworks("fine", requires="pluggy>=1")),
    )
    pluggy = metadata.version("pluggy")
    assert {info.name: (*map(str, info.requires), info.remedy) for info in registry.plugins} == {
        "fine": (f"pluggy>=1 ({pluggy})", ""),
        "gone": ("no-such-distribution>=3 (not installed)", "pip install 'no-such-distribution>=3'"),
        "old": (f"pluggy<1 ({pluggy} is installed)", "pip install 'pluggy<1'"),
    }
    assert registry.framework("old").name == "old"
    assert registry.framework_to_run("fine").name == "fine"
    with pytest.raises(PluginError, match=r"'old' needs pluggy<1"):
        registry.framework_to_run("old")
    with pytest.raises(MissingDependency, match=r"'gone' needs no-such-distribution>=3 \(not installed\)") as missing:
        registry.framework_to_run("gone")
    assert missing.value.hint == "pip install 'no-such-distribution>=3'"


def test_a_requirement_is_judged_by_installed_metadata() -> None:
    assert unmet(f"pluggy=={metadata.version('pluggy')}") == ""
    with pytest.raises(PluginError, match="no requirement"):
        unmet("pluggy?")


def public_members(protocol: type) -> set[str]:
    return {name for name in vars(protocol) if not name.startswith("_")}


def test_what_is_asked_of_objects_is_what_their_types_declare() -> None:
    assert set(SORTS["formats"].attributes) == public_members(Format)
    assert set(SORTS["frameworks"].attributes) == public_members(Framework)
    assert set(SORTS["kinds"].attributes) == {field.name for field in fields(Kind)}
    assert set(SORTS["runtimes"].attributes) == {field.name for field in fields(Runtime)}
    assert set(SORTS["methods"].attributes) == public_members(Method) | {"name", "title", "source"}
    assert set(SORTS["storages"].attributes) == public_members(Storage)


def test_every_hook_has_its_place_in_the_registry() -> None:
    hooks = {name for name in hookspecs.__all__ if name.startswith("lorahub_")}
    assert {sort.hook for sort in SORTS.values()} == hooks
    assert {field.name for field in fields(Registry)} == {*SORTS, "plugins"}


def test_a_plugin_as_a_document_has_every_field() -> None:
    (info,) = load(Point("keras", frameworks("keras"))).plugins
    assert list(info.document()) == [field.name for field in fields(PluginInfo)]


def test_the_other_distribution_of_the_name_is_found_and_explained() -> None:
    def installed(name: str) -> Any:
        assert name == "lorahub"
        return SimpleNamespace(version="0.0.3")

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    said = name_clash(installed)
    assert said is not None
    assert "'lorahub' 0.0.3" in said
    assert "pip uninstall --yes lorahub lorahub-core" in said
    assert name_clash(missing) is None


def test_loading_everything_imports_neither_torch_nor_a_framework() -> None:
    code = (
        "import sys; from lorahub.plugins import load_registry; registry = load_registry(); "
        "assert registry.kinds and registry.formats; "
        "print([name for name in ('torch', 'transformers', 'peft', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
