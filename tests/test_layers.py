"""The shape of the house: what may import what.  Reads the source; imports nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lorahub"

FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "codes",
        "errors",
        "findings",
        "front_matter",
        "hookspecs",
        "lazy",
        "names",
        "plugins",
        "registry",
        "shapes",
        "strict_json",
        "strict_toml",
        "strict_yaml",
        "weights",
    ),
    (
        "bases",
        "deltas",
        "files",
        "pictures",
        "recipe",
        "recipe_fields",
        "recipe_lock",
        "record_fields",
        "records",
        "report",
        "storages",
    ),
    ("formats", "hub", "runtimes"),
    ("adapter", "combination", "saving"),
    ("composition", "conversion", "engine", "live"),
    (
        "cards",
        "checks",
        "distant_bases",
        "inspection",
        "lineage",
        "listing",
        "pinned",
        "recall",
        "recording",
        "remote",
        "testing",
        "weighing",
    ),
    (
        "__init__",
        "__main__",
        "attaching",
        "carding",
        "cli",
        "comparing",
        "composing",
        "converting",
        "creating",
        "dequantising",
        "deriving",
        "descent",
        "fetching",
        "manifest",
        "merging",
        "opening",
        "patching",
        "publishing",
        "searching",
        "sources",
        "tagging",
        "training",
    ),
)
"""Rooms by floor, ground floor first: a room imports from its own floor and from those below."""

TYPES_ONLY = {
    "hookspecs": "the doors name what passes through them; at run time they hold nothing",
    "registry": "the same: a value that carries what upper floors define",
}
"""Modules whose imports under TYPE_CHECKING may point up."""

LOCAL = {
    ("__main__", "cli.main"): "an interruption while it is loaded is to be caught",
    ("hub", "hub.huggingface"): "huggingface_hub is slow to import, and a folder hub needs none of it",
    ("hub", "hub.folder"): "as above: only the hub that is asked for",
    ("opening", "hub.huggingface"): "a base on disk needs no client",
}
"""(module, what a function of it imports) -> why not at the top."""

FRAMEWORKS = {"transformers", "peft", "timm", "diffusers"}
NOT_FOR_THE_HUB = {
    "adapter",
    "bases",
    "composition",
    "conversion",
    "deltas",
    "engine",
    "formats",
    "lazy",
    "runtimes",
    "shapes",
}


@dataclass(frozen=True)
class Import:
    importer: str  # dotted, without "lorahub."
    target: str  # the same for our own modules, with "lorahub." gone; else the foreign name
    own: bool
    line: int
    local: bool
    types: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = modules()


def room(module: str) -> str:
    return module.partition(".")[0]


def floor(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room(module) in rooms)


def imports_of(module: str, tree: ast.Module) -> Iterator[Import]:
    def walk(node: ast.AST, *, local: bool, types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: relative import"
                assert child.module is not None
                names = [
                    full
                    if (full := f"{child.module}.{alias.name}").removeprefix("lorahub.") in MODULES
                    else child.module
                    for alias in child.names
                ]
            for name in dict.fromkeys(names):
                own = name == "lorahub" or name.startswith("lorahub.")
                target = (name.removeprefix("lorahub").removeprefix(".") or "__init__") if own else name
                yield Import(module, target, own, child.lineno, local, types)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = (
                isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"
            )
            yield from walk(child, local=local or inside, types=types or guarded)

    return walk(tree, local=False, types=False)


IMPORTS = [found for name, tree in MODULES.items() for found in imports_of(name, tree)]
OWN = [found for found in IMPORTS if found.own]


def test_every_module_has_a_floor() -> None:
    rooms = [name for rooms in FLOORS for name in rooms]
    assert len(rooms) == len(set(rooms))
    assert {room(module) for module in MODULES} <= set(rooms)


def test_the_walk_sees_imports_of_every_sort() -> None:
    tree = ast.parse(
        "import a.b\nfrom lorahub.errors import X\nfrom lorahub import names\n"
        "if TYPE_CHECKING:\n    import c\ndef f():\n    import d\n"
    )
    found = [(each.target, each.own, each.local, each.types) for each in imports_of("x", tree)]
    assert found == [
        ("a.b", False, False, False),
        ("errors", True, False, False),
        ("names", True, False, False),
        ("c", False, False, True),
        ("d", False, True, False),
    ]


def test_imports_go_down_only() -> None:
    upwards = [
        str(found)
        for found in OWN
        if floor(found.target) > floor(found.importer) and not (found.types and found.importer in TYPES_ONLY)
    ]
    assert upwards == []


def test_nothing_imports_the_public_face_from_below() -> None:
    assert [str(found) for found in OWN if found.target == "__init__" and floor(found.importer) < floor("cli")] == []


def test_there_are_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in OWN:
        if not found.types and not found.local and found.target != found.importer:
            graph[found.importer].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_hub_tower_knows_no_adapters() -> None:
    assert [
        str(found) for found in OWN if room(found.importer) == "hub" and room(found.target) in NOT_FOR_THE_HUB
    ] == []


def test_the_core_imports_no_framework() -> None:
    assert [str(found) for found in IMPORTS if found.target.split(".")[0] in FRAMEWORKS] == []


def test_torch_comes_lazily() -> None:
    eager = [
        str(found)
        for found in IMPORTS
        if found.target.split(".")[0] == "torch"
        and not found.types
        and room(found.importer) not in {"cli", "fetching", "merging", "opening", "publishing", "sources"}
    ]
    assert eager == []


def test_deltas_open_no_file() -> None:
    opening = {"files", "os", "io", "pathlib", "hub", "formats"}
    assert [str(found) for found in IMPORTS if room(found.importer) == "deltas" and room(found.target) in opening] == []


def test_imports_inside_functions_have_a_reason() -> None:
    inside = {
        (found.importer, found.target)
        for found in OWN
        if found.local and not found.types and room(found.importer) not in {"cli", "__init__"}
    }
    assert inside - set(LOCAL) == set()


def test_no_exception_to_the_rules_is_left_over() -> None:
    pairs = {(found.importer, found.target) for found in OWN if found.local}
    assert [pair for pair in LOCAL if pair not in pairs] == []
    upwards = {found.importer for found in OWN if found.types and floor(found.target) > floor(found.importer)}
    assert set(TYPES_ONLY) - upwards == set()


def test_nothing_below_the_command_line_prints() -> None:
    prints = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        if room(module) != "cli"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr in {"stdout", "stderr"} and _is_sys(node.value))
    ]
    assert prints == []


def _is_sys(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "sys"
