"""Write what the pages show of the code: tables of what is supported, settings of kinds, files of the examples.

python docs/generate.py

A page says ``<!-- NAME -->`` where it begins and ``<!-- /NAME -->`` where it ends; the rest is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from lorahub.deltas.kind import JSON
from lorahub.plugins import load_registry

FOLDER = Path(__file__).parent
PLUGINS = ("diffusers", "timm", "transformers")

_MADE = re.compile(r"(<!-- (?P<what>[a-z]+)(?: (?P<about>\S+))? -->\n).*?(<!-- /(?P=what) -->)", re.DOTALL)


def kinds() -> str:
    """Every kind that can be trained, and what it can be told."""
    rows = ["| kind | settings, and what they are where nobody says | choices |", "|---|---|---|"]
    for kind in load_registry().kinds.values():
        if kind.starting is None:
            continue
        settings = kind.starting.settings
        told = ", ".join(f"`{name}` {_shown(each.default)}" for name, each in settings.items())
        chosen = "; ".join(
            f"`{name}`: {', '.join(map(str, each.choices))}" for name, each in settings.items() if each.choices
        )
        rows.append(f"| [`{kind.name}`]({kind.source}) | {told or 'none'} | {chosen or '-'} |")
    return "\n".join(rows) + "\n"


def _shown(value: JSON) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}"
    return str(value) if value else "none"


def table(framework: str) -> str:
    """What a framework's plugin supports."""
    made = import_module(f"lorahub_{framework}.table").table()
    assert isinstance(made, str)
    return made


def file(path: str) -> str:
    """A file of the repository, as a block of code."""
    language = {".py": "python", ".toml": "toml"}[Path(path).suffix]
    return f"```{language}\n{(FOLDER.parent / path).read_text()}```\n"


def generated(page: Path) -> str:
    """The page with everything in it that is made of the code."""
    makers: dict[str, Callable[[str], str]] = {
        "kinds": lambda _: kinds(),
        "table": lambda _: table(page.stem),
        "file": file,
    }

    def made(found: re.Match[str]) -> str:
        return f"{found[1]}{makers[found['what']](found['about'] or '')}{found[4]}"

    return _MADE.sub(made, page.read_text())


def pages() -> Iterator[Path]:
    """The pages, in order."""
    return iter(sorted(FOLDER.glob("*.md")))


if __name__ == "__main__":
    for each in pages():
        each.write_text(generated(each))
