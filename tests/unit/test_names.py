"""References, selectors, globs, file names and near misses: what people type, and what is refused."""

from __future__ import annotations

import math
import os
import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from lorahub.errors import InvalidRef, UnsafePath
from lorahub.names import Ref, Selector, check_path, did_you_mean, matches, path_problem, printable

# ------------------------------------------------------------------------------------------------ round trips

_repos = st.from_regex(
    r"[A-Za-z0-9_]{1,8}(?:[.-][a-z0-9]{1,4})?/[A-Za-z0-9_]{1,8}(?:[.-][a-z0-9]{1,4})?", fullmatch=True
)
_selectors = st.one_of(
    st.sampled_from(["1", "1.2", "1.2.3", "v1", "2.0rc1", "~=1.2", ">=1,<2", "!=1.3", "main", "dev-2", "refs/pr/12"]),
    st.sampled_from(["refs/heads/feature/x", "refs/tags/v1.0", "feature/new%things", "0" * 40, "Ünïcode"]),
)
_parts = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=6).filter(
    lambda s: not path_problem(s)
)
_subpaths = st.lists(_parts, max_size=3).map("/".join)
_weights = st.none() | st.floats(allow_nan=False, allow_infinity=False)
_names = st.none() | st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,9}", fullmatch=True)
_paths = st.builds(
    str.__add__,
    st.sampled_from(["./", "../", "/", "~/", "~ann/", "C:\\", "C:/"]),
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Cf", "Zl", "Zp"]), max_size=12),
).map(lambda path: path + "x" if path.endswith("/") else path)


@given(name=_names, repo=_repos, selector=st.none() | _selectors, subpath=_subpaths, weight=_weights)
def test_a_hub_reference_parses_back_from_its_own_text(name, repo, selector, subpath, weight):
    assume(not repo.lower().startswith(("con/", "prn/", "aux/", "nul/", "api/", "docs/")))
    assume(not path_problem(repo) and not repo.endswith(".git"))
    assume(":" not in subpath)
    ref = Ref(name=name, repo=repo, selector=selector, subpath=subpath, weight=weight)
    assert Ref.parse(str(ref)) == ref


@given(name=_names, path=_paths, weight=_weights)
@example(name=None, path="./a:0.5", weight=None)
@example(name="x", path="./a:1:2", weight=-0.0)
@example(name=None, path="C:\\x", weight=1e-300)
def test_a_local_reference_parses_back_from_its_own_text(name, path, weight):
    ref = Ref(name=name, path=path, weight=weight)
    assert Ref.parse(str(ref)) == ref


@given(st.text(max_size=60))
@example("https://[/a/b")
@example("a/b@" + "1" * 300)
@example("~=a")
def test_any_text_is_a_reference_or_refused_with_a_caret(text):
    try:
        ref = Ref.parse(text)
    except InvalidRef as raised:
        error = raised
    else:
        assert Ref.parse(str(ref)) == ref
        return
    assert error.hint
    assert error.message.endswith("^")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", str(error))


# ------------------------------------------------------------------------------------------------ the grammar

REFS = {
    "acme/ink": Ref(repo="acme/ink"),
    "acme/ink@1.2": Ref(repo="acme/ink", selector="1.2"),
    "ink=acme/ink@~=1.2/sub/x.safetensors:-0.8": Ref(
        name="ink", repo="acme/ink", selector="~=1.2", subpath="sub/x.safetensors", weight=-0.8
    ),
    "acme/ink@>=1, <2:1e-1": Ref(repo="acme/ink", selector=">=1, <2", weight=0.1),
    "acme/ink@refs/pr/3/sub": Ref(repo="acme/ink", selector="refs/pr/3", subpath="sub"),
    "acme/ink@feature%2Fx/sub": Ref(repo="acme/ink", selector="feature/x", subpath="sub"),
    "acme/ink/": Ref(repo="acme/ink"),
    "./mix": Ref(path="./mix"),
    "./mix/:.5": Ref(path="./mix", weight=0.5),
    "../a@b:2": Ref(path="../a@b", weight=2.0),
    "/": Ref(path="/"),
    "..": Ref(path=".."),
    "~/mix:+1": Ref(path="~/mix", weight=1.0),
    "C:\\x": Ref(path="C:\\x"),
    "C:\\x:0.5": Ref(path="C:\\x", weight=0.5),
    "d:/1": Ref(path="d:/1"),
    "a=C:/x:-1": Ref(name="a", path="C:/x", weight=-1.0),
    "./a:0.5/": Ref(path="./a:0.5"),
    "https://huggingface.co/acme/ink": Ref(repo="acme/ink"),
    "https://huggingface.co/acme/ink/tree/main": Ref(repo="acme/ink", selector="main"),
    "https://huggingface.co/acme/ink/tree/v1.2/sub/": Ref(repo="acme/ink", selector="v1.2", subpath="sub"),
    "https://huggingface.co/acme/ink/tree/refs%2Fpr%2F1/s": Ref(repo="acme/ink", selector="refs/pr/1", subpath="s"),
    "https://huggingface.co/acme/ink/blob/refs/pr/1/a%20b.safetensors?x=1#L1": Ref(
        repo="acme/ink", selector="refs/pr/1", subpath="a b.safetensors"
    ),
    "ink=https://hf.co/acme/ink/resolve/main/x.safetensors:0.5": Ref(
        name="ink", repo="acme/ink", selector="main", subpath="x.safetensors", weight=0.5
    ),
    "huggingface.co/acme/ink": Ref(repo="acme/ink"),
    "hf://acme/ink@1.2/sub": Ref(repo="acme/ink", selector="1.2", subpath="sub"),
    "hf://models/acme/ink": Ref(repo="acme/ink"),
}


@pytest.mark.parametrize("text", REFS)
def test_the_grammar_reads(text):
    assert Ref.parse(text) == REFS[text]


REFUSED = {
    "": "namespace/name",
    "acme": "namespace/name",
    "acme/ink:heavy": "weight",
    "acme/ink:nan": "'nan' is no weight",
    "acme/ink:1e999": "finite",
    "acme/ink@": "after '@'",
    "acme/ink@=>1": "range",
    "acme/ink@===1": "range",
    "acme/ink@a b": "cannot name",
    "acme/ink@a..b": "cannot name",
    "acme/ink/../../etc": "climbs out",
    "acme/ink//x": "absolute",
    "acme/ink/x//y": "empty component",
    "acme/ink/a\\b": "holds one of",
    "acme/ink/C:x": "weight",
    "acme/in..k": "repository",
    "acme/-ink": "repository",
    "con/ink": "Windows",
    "1x=acme/ink": "repository",
    "a\x1b]0;owned\x07/b": "control",
    "acme/ink\u202e": "invisible",
    "acme/" + "x" * 97: "96",
    "C:1": "namespace/name",
    "datasets/acme/ink": "datasets",
    "https://huggingface.co/datasets/acme/ink": "datasets",
    "https://huggingface.co/acme": "no repository",
    "https://huggingface.co/acme/ink/discussions/3": "neither a folder nor a file",
    "https://example.org/acme/ink": "huggingface.co",
    "https://huggingface.co.example.org/acme/ink": "huggingface.co",
    "https://huggingface.co:8443/acme/ink": "huggingface.co",
    "hf://datasets/acme/ink": "datasets",
}


@pytest.mark.parametrize("text", REFUSED)
def test_the_grammar_refuses_and_says_why(text):
    with pytest.raises(InvalidRef, match=re.escape(REFUSED[text])):
        Ref.parse(text)


def test_an_over_long_reference_is_refused_without_being_shown():
    with pytest.raises(InvalidRef) as caught:
        Ref.parse("x" * 5000)
    assert len(str(caught.value)) < 300


def test_the_caret_stands_below_the_fault():
    with pytest.raises(InvalidRef) as caught:
        Ref.parse("acme/ink@1.2:heavy")
    _, text, caret = caught.value.message.splitlines()
    assert text[caret.index("^") :] == ":heavy"


def test_a_refused_name_that_lies_here_is_offered_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix").mkdir()
    with pytest.raises(InvalidRef) as caught:
        Ref.parse("mix")
    assert "./mix" in caught.value.hint


def test_a_hub_name_stays_one_even_where_a_folder_of_that_name_lies_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "ink").mkdir(parents=True)
    assert Ref.parse("acme/ink").repo == "acme/ink"


def test_a_repository_without_namespace_needs_to_be_asked_for():
    assert Ref.parse("gpt2@main", bare=True) == Ref(repo="gpt2", selector="main")
    assert Ref.parse("org/gpt2/sub", bare=True) == Ref(repo="org/gpt2", subpath="sub")
    with pytest.raises(InvalidRef):
        Ref.parse("gpt2")


def test_credentials_in_a_pasted_address_are_refused_and_not_repeated():
    with pytest.raises(InvalidRef) as caught:
        Ref.parse("https://user:hf_abcdefghijklmnop@huggingface.co/acme/ink")
    assert "hf_abc" not in str(caught.value)
    assert "user:" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"repo": "a/b", "path": "./x"},
        {"repo": "a/b", "subpath": "../x"},
        {"repo": "a/b", "weight": math.nan},
        {"repo": "a/b", "name": "a b"},
        {"repo": "a/b/c"},
        {"repo": "../b"},
        {"path": "mix"},
        {"path": "./a\nb"},
    ],
)
def test_a_reference_cannot_be_built_wrong(fields):
    with pytest.raises(InvalidRef):
        Ref(**fields)


def test_a_local_path_expands_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert Ref.parse("~/mix").local == tmp_path / "mix"
    assert Ref.parse("acme/ink").local is None


# -------------------------------------------------------------------------------------------------- selectors

KINDS = {
    "a" * 40: "commit",
    "A" * 40: "commit",
    "a" * 39: "name",
    "refs/pr/7": "ref",
    "refs/heads/a/b": "ref",
    "refs/tags/v1": "ref",
    "~=1.2": "range",
    ">=1,<2": "range",
    "==1.*": "range",
    "1": "series",
    "v1.2": "series",
    "1234567": "series",
    "1.2.3": "version",
    "v1.2.3": "version",
    "2.0rc1": "version",
    "main": "name",
    "v1-final": "name",
}


@pytest.mark.parametrize("text", KINDS)
def test_a_selector_knows_its_kind_from_its_text(text):
    assert Selector.parse(text).kind == KINDS[text]


@pytest.mark.parametrize(
    "text", ["", " ", "-x", "x/", "x.lock", "a~b", "a:b", "a\\b", "a//b", "~=x", "=1", "===1", "x" * 256]
)
def test_no_selector_is_made_of_what_can_be_no_ref(text):
    with pytest.raises(InvalidRef):
        Selector.parse(text)


# ------------------------------------------------------------------------------------------------------ globs


@given(pattern=st.text("ab.*", max_size=8), name=st.text("ab.", max_size=10))
@example(pattern="a*a", name="a")
@example(pattern="*", name="")
@example(pattern="a**b", name="ab")
def test_a_glob_matches_as_fnmatch_does(pattern, name):
    assert matches(pattern, name) == fnmatchcase(name, pattern)


@given(name=st.text("ab.[]?", max_size=10))
def test_every_character_but_the_star_stands_for_itself(name):
    assert matches(name, name)
    assert matches("[ab]", name) == (name == "[ab]")


def test_a_glob_made_to_blow_up_does_not():
    assert not matches("*a" * 2000, "a" * 1999 + "b")
    assert matches("*a" * 2000, "a" * 2000)


# ------------------------------------------------------------------------------------------------- file names

HOSTILE = {
    "": "empty",
    "/etc/passwd": "absolute",
    "../x": "climbs",
    "a/../../x": "climbs",
    "./x": "climbs",
    "a//b": "empty",
    "a/": "empty",
    "a\\..\\b": "holds one of",
    "C:x": "holds one of",
    "a:stream": "holds one of",
    "what?": "holds one of",
    "a\0b": "control",
    "a\x1b[31m": "control",
    "a\u202egpj.exe": "control",
    "\ud800": "control",
    "x.": "ends in",
    "x /y": "ends in",
    "nul": "Windows",
    "a/COM1.txt": "Windows",
    "e\u0301": "normal form",
    "x" * 256: "255 bytes",
    "é" * 128: "255 bytes",
    "/".join("abcdefghi"): "deep",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_name_is_refused_and_the_rule_named(name):
    with pytest.raises(UnsafePath, match=HOSTILE[name]):
        check_path(name)


@pytest.mark.parametrize(
    "name", ["a", "adapter_model.safetensors", "a/b/c", ".hidden", "é.txt", "a b", "console", "x" * 255]
)
def test_an_ordinary_file_name_passes(name):
    assert check_path(name) == name


@given(st.text(max_size=20))
def test_what_passes_stays_within_its_folder(name):
    assume(not path_problem(name))
    assert os.path.normpath(os.path.join("/place/folder", name)).startswith("/place/folder/")  # noqa: PTH118
    assert name.encode()


# ------------------------------------------------------------------------------------------------------ words


def test_a_near_word_is_offered_and_a_far_one_is_not():
    assert did_you_mean("adaptr", ["adapter", "base"]) == " Did you mean 'adapter'?"
    assert did_you_mean("zzz", ["adapter", "base"]) == ""


@given(st.text())
@example("\x1b]0;x\x07\u202e\u2066\u200b\ud800\x85\u2028")
def test_printable_text_holds_nothing_that_steers_a_terminal(text):
    shown = printable(text)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff]", shown)
    shown.encode()  # lone surrogates would raise


def test_printable_text_masks_tokens():
    token = "hf_" + "a1B2" * 9
    shown = printable(f"Bearer {token} and {token} at https://me:{token}@host/x, Bearer other")
    assert token not in shown
    assert "other" not in shown
    assert "me:" not in shown
