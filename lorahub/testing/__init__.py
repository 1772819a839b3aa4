"""The laws that whatever plugins bring keeps, as plain functions for plugin authors.

    from lorahub.testing import check_format, check_kind, check_method
    def test_my_kind():
        check_kind(MY_KIND)
    def test_my_method():
        check_method(MyMethod(density=0.4))
    def test_my_format():
        check_format(MyFormat())

A law of kinds runs over the kind's ``example`` deltas on linear, convolution and vector shapes in float64, and raises
an ``AssertionError`` that says in a sentence what does not hold, for which delta and shape.  A shape that ``example``
refuses with ``BaseMismatch`` is left out; a kind that refuses all of them fails.  References are index loops over
``delta(W)`` as a black box: the laws know no formula, so a kind also needs a test of its own against one.
``check_framework`` and ``check_storage`` are told a model, ``check_format`` may be told files of others, and
``check_runtime`` looks at a table of rules: see the modules of these names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from lorahub.deltas.kind import Kind
from lorahub.testing.attached import attached_equals_merged
from lorahub.testing.cases import Case, cases
from lorahub.testing.changes import (
    additive_kinds_ignore_the_weight_and_commute,
    fresh_changes_nothing,
    full_merges_alike,
    regions_are_local_or_refused,
    shape_is_kept,
    weights_are_linear,
)
from lorahub.testing.declarations import declarations_are_what_build_does, spellings_lose_nothing
from lorahub.testing.formats import FORMAT_LAWS, check_format
from lorahub.testing.frameworks import FRAMEWORK_LAWS, FrameworkCase, check_framework
from lorahub.testing.landing import layouts_land_alike
from lorahub.testing.methods import METHOD_LAWS, check_method
from lorahub.testing.runtimes import RUNTIME_LAWS, check_runtime
from lorahub.testing.specimens import FormatCase
from lorahub.testing.starting import starts_change_nothing_and_train
from lorahub.testing.storages import STORAGE_LAWS, StorageCase, check_storage

__all__ = [
    "FORMAT_LAWS",
    "FRAMEWORK_LAWS",
    "LAWS",
    "METHOD_LAWS",
    "RUNTIME_LAWS",
    "STORAGE_LAWS",
    "Case",
    "FormatCase",
    "FrameworkCase",
    "StorageCase",
    "additive_kinds_ignore_the_weight_and_commute",
    "attached_equals_merged",
    "cases",
    "check_format",
    "check_framework",
    "check_kind",
    "check_method",
    "check_runtime",
    "check_storage",
    "declarations_are_what_build_does",
    "fresh_changes_nothing",
    "full_merges_alike",
    "layouts_land_alike",
    "regions_are_local_or_refused",
    "shape_is_kept",
    "spellings_lose_nothing",
    "starts_change_nothing_and_train",
    "weights_are_linear",
]


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
            starts_change_nothing_and_train,
        )
    }
)
"""Name -> law; each takes a kind and raises ``AssertionError``."""


def check_kind(kind: Kind) -> None:
    """Run every law; raises ``AssertionError`` with the first sentence that does not hold."""
    for law in LAWS.values():
        law(kind)
