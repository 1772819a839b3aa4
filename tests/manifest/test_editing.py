"""A person's manifest keeps every comment and line; one line comes, goes or changes."""

from __future__ import annotations

import difflib

import pytest

from lorahub.errors import ManifestError
from lorahub.manifest.editing import with_adapter, with_base, with_verdict, without_adapter

TEXT = """\
# our adapters
base = "acme/base@main"   # pinned on purpose

[adapters]
# drawing
ink = "acme/ink@~=1.2"  # stays at 1
"sql" = { ref = "acme/sql@1.0", weight = 0.5 }

# what we accept
[policy]
verdict = "unverified"

[adapters.own]
ref = "./own"
"""


def changed(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(keepends=True), after.splitlines(keepends=True))
    return [line.rstrip("\n") for line in lines if line[0] in "+-"]


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (lambda: with_adapter(TEXT, "new", "acme/new@1", None), ['+ new = "acme/new@1"']),
        (lambda: with_adapter(TEXT, "new", "./n", 0.5), ['+ new = { ref = "./n", weight = 0.5 }']),
        (
            lambda: with_adapter(TEXT, "ink", "acme/ink@~=2.0", None),
            ['- ink = "acme/ink@~=1.2"  # stays at 1', '+ ink = "acme/ink@~=2.0"  # stays at 1'],
        ),
        (lambda: without_adapter(TEXT, "ink"), ['- ink = "acme/ink@~=1.2"  # stays at 1']),
        (lambda: without_adapter(TEXT, "sql"), ['- "sql" = { ref = "acme/sql@1.0", weight = 0.5 }']),
        (lambda: without_adapter(TEXT, "own"), ["- [adapters.own]", '- ref = "./own"']),
        (lambda: with_verdict(TEXT, "exact"), ['- verdict = "unverified"', '+ verdict = "exact"']),
        (
            lambda: with_verdict(TEXT.replace('verdict = "unverified"\n', "").replace("[policy]\n", ""), "exact"),
            ["- [policy]", '- verdict = "unverified"', "+ [policy]", '+ verdict = "exact"'],
        ),
        (
            lambda: with_base(TEXT, "./base"),
            ['- base = "acme/base@main"   # pinned on purpose', '+ base = "./base"   # pinned on purpose'],
        ),
    ],
)
def test_an_edit_changes_its_line_and_no_other(edit, lines) -> None:
    assert [line for line in changed(TEXT, edit()) if line.strip("+- ")] == lines


def test_a_new_line_goes_behind_the_last_one_of_its_table() -> None:
    lines = with_adapter(TEXT, "new", "acme/new", None).splitlines()
    assert lines[lines.index('new = "acme/new"') - 1].startswith('"sql"')


def test_windows_line_ends_and_a_byte_order_mark_stay() -> None:
    text = '\ufeff# ours\r\n[adapters]\r\nink = "acme/ink"\r\n'
    assert with_adapter(text, "sql", "acme/sql", None) == text + 'sql = "acme/sql"\r\n'
    assert with_base(text, "./b").startswith('\ufeff# ours\r\nbase = "./b"\r\n[adapters]')


def test_an_empty_manifest_gets_its_table() -> None:
    assert with_adapter("", "ink", "acme/ink", None) == '[adapters]\nink = "acme/ink"\n'
    assert with_base("", "./base") == 'base = "./base"\n'


@pytest.mark.parametrize("text", ['adapters = { ink = "acme/ink" }\n', 'adapters.ink = "acme/ink"\n'])
def test_a_layout_that_cannot_be_edited_safely_is_left_alone_with_the_line_to_write(text: str) -> None:
    with pytest.raises(ManifestError, match="laid out so that") as refused:
        with_adapter(text, "sql", "acme/sql", None)
    assert refused.value.hint == 'write it by hand: [adapters] of lorahub.toml: sql = "acme/sql"'
    with pytest.raises(ManifestError, match="laid out so that"):
        without_adapter(text, "ink")


def test_a_value_over_several_lines_is_not_torn() -> None:
    text = '["adapters"]\nink = """\nacme/ink"""\n'
    with pytest.raises(ManifestError, match="laid out so that"):
        without_adapter(text, "ink")
    assert with_adapter(text, "sql", "acme/sql", None) == f'{text}sql = "acme/sql"\n'


def test_what_looks_like_a_table_inside_a_string_is_none() -> None:
    text = 'base = """\n[adapters]\n"""\n'
    assert with_adapter(text, "ink", "acme/ink", None) == f'{text}\n[adapters]\nink = "acme/ink"\n'


def test_an_edit_of_what_is_no_toml_says_so() -> None:
    with pytest.raises(ManifestError, match="not TOML"):
        with_adapter("[adapters", "ink", "acme/ink", None)
