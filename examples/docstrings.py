"""Two text classification tasks made from the docstrings of Python's own standard library: real text, no download.

``topics``: which part of the library does this docstring come from?  ``parts``: does it describe a class, a function
or a method?  Both tasks have the same texts and the same split.  The library's files are parsed, never imported.
Knows nothing of models, adapters or lorahub.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TOPICS", "Docstring", "Task", "collect", "parts", "topics"]

TOPICS = {
    "asyncio": ("asyncio",),
    "processes": ("multiprocessing",),
    "threads": ("threading", "concurrent", "queue", "sched"),
    "web": ("http", "urllib"),
    "sockets": ("socket", "socketserver", "selectors", "ssl"),
}
"""Topic -> packages and modules: five that speak of similar things, so that the task is not won by single words."""

FEWEST, MOST = 4, 24
"""Shortest text that is kept, and where longer ones are cut, in words."""


@dataclass(frozen=True, slots=True)
class Docstring:
    """The first paragraph of one docstring, with the topic it belongs to and what it describes."""

    text: str
    topic: str
    part: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Texts and class numbers, split into a training and a test set that share no text."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]

    @property
    def majority(self) -> float:
        """Accuracy on the test set of always naming the most frequent class."""
        answers = [answer for _, answer in self.test]
        return max(answers.count(label) for label in range(len(self.labels))) / len(answers)


def collect() -> list[Docstring]:
    """Every distinct docstring of the topics' files, in the order of topics, files and lines."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}
    for topic, modules in TOPICS.items():
        for module in modules:
            for path in sorted((library / module).rglob("*.py")) or [library / f"{module}.py"]:
                for doc in _of_file(path, topic):
                    found.setdefault(doc.text, doc)
    return list(found.values())


def topics(docs: list[Docstring]) -> Task:
    """Five classes: the topic a docstring belongs to."""
    return _task("topics", tuple(TOPICS), docs, lambda doc: doc.topic)


def parts(docs: list[Docstring]) -> Task:
    """Three classes: what a docstring describes."""
    return _task("parts", ("class", "function", "method"), docs, lambda doc: doc.part)


def _of_file(path: Path, topic: str) -> Iterator[Docstring]:
    def visit(node: ast.AST, inside_class: bool) -> Iterator[Docstring]:
        for child in ast.iter_child_nodes(node):
            is_class = isinstance(child, ast.ClassDef)
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(child) or "").split("\n\n")[0].split()
                if len(words) >= FEWEST:
                    part = "class" if is_class else "method" if inside_class else "function"
                    yield Docstring(" ".join(words[:MOST]), topic, part)
            yield from visit(child, is_class)

    yield from visit(ast.parse(path.read_bytes()), False)


def _task(name: str, labels: tuple[str, ...], docs: list[Docstring], label: Callable[[Docstring], str]) -> Task:
    """A quarter of the texts is for testing, chosen by a hash of the text: the same on every machine."""
    sides: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for doc in docs:
        is_test = hashlib.sha256(doc.text.encode()).digest()[0] < 64
        sides[is_test].append((doc.text, labels.index(label(doc))))
    return Task(name=name, labels=labels, train=tuple(sides[0]), test=tuple(sides[1]))
