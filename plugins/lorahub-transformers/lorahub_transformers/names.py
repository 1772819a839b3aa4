"""Stored names and canonical names: prefixes that come and go, modules that were renamed, tensors nobody reads.

The canonical name of a parameter is the one that a live model with a head uses: ``bert.encoder.layer.0...`` also for a
bare encoder's ``encoder.layer.0...``, and today's name where checkpoints keep an older one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lorahub_transformers.families import Family

__all__ = ["Spelling", "aliases", "checkpoint_name", "is_below", "matches", "spelling_of"]

# Checkpoints of the first releases; transformers itself renames these for every architecture.
_OLD_LEAVES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True, slots=True)
class Spelling:
    """How one checkpoint or model spells its family's names.

    Attributes:
        family: the architecture.
        used: what stands where the family has its prefix; "" in a bare backbone.
        heads: first parts of names that are outside the backbone.
    """

    family: Family
    used: str
    heads: frozenset[str]

    def canonical(self, name: str) -> str:
        """The canonical name of a stored (or live) one."""
        for old, new in _OLD_LEAVES:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if not self._in_backbone(name):
            return _rename(name, self.family.renamed_heads)
        return self.family.prefix + _rename(name.removeprefix(self.used), self.family.renamed)

    def respelled(self, name: str, prefix: str) -> str:
        """A stored name with another prefix before the backbone, and otherwise as it is stored."""
        return prefix + name.removeprefix(self.used) if self._in_backbone(name) else name

    def _in_backbone(self, name: str) -> bool:
        return name.startswith(self.used) if self.used else name.partition(".")[0] not in self.heads


def spelling_of(family: Family, names: Collection[str]) -> Spelling:
    """How these names, all of one checkpoint or model, are spelled."""
    prefixes = [prefix for prefix in (family.prefix, *family.others) if prefix]
    used = next((each for each in prefixes if any(name.startswith(each) for name in names)), "")
    heads = [name for head in family.heads for name in head.parameters] + [old for old, _ in family.renamed_heads]
    return Spelling(family, used, frozenset(name.partition(".")[0] for name in heads if family.prefix))


def checkpoint_name(family: Family, name: str) -> str:
    """What checkpoints call a parameter of this canonical name: the inverse of the family's renamings."""
    if family.prefix and not name.startswith(family.prefix):
        return _rename(name, _inverse(family.renamed_heads))
    return family.prefix + _rename(name.removeprefix(family.prefix), _inverse(family.renamed))


def aliases(family: Family, modules: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """(canonical beginning, other beginning) pairs for all that adapters may call these modules."""
    pairs = [(family.prefix, other) for other in family.others]
    for module in modules:
        old = checkpoint_name(family, module)
        if old != module:
            pairs.append((f"{module}.", f"{old}."))
            if module.startswith(family.prefix):
                pairs += [(f"{module}.", f"{other}{old.removeprefix(family.prefix)}.") for other in family.others]
    return tuple(pairs)


def matches(pattern: str, path: str) -> bool:
    """Whether a path is what a pattern says: equal parts, ``*`` for a number."""
    return _begins(path.split("."), pattern.split("."), whole=True)


def is_below(name: str, parts: Collection[str]) -> bool:
    """Whether a parameter is one of these parts or lies below one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    parts = name.split(".")
    for old, new in pairs:
        before = old.split(".")
        if _begins(parts, before):
            numbers = iter([part for part, each in zip(parts, before, strict=False) if each == "*"])
            after = [next(numbers) if each == "*" else each for each in new.split(".")]
            return ".".join(after + parts[len(before) :])
    return name


def _begins(parts: list[str], pattern: list[str], *, whole: bool = False) -> bool:
    if len(parts) < len(pattern) or (whole and len(parts) != len(pattern)):
        return False
    return all(part.isdigit() if each == "*" else part == each for part, each in zip(parts, pattern, strict=False))


def _inverse(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(new, old) for old, new in pairs]
