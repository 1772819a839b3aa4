"""What a selector comes to among a repository's tags and branches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from lorahub.errors import InvalidRef, NotFound
from lorahub.hub.versions import Picked, pick, version_tags
from lorahub.names import Selector


def commit(number: int) -> str:
    return f"{number:040x}"


TAGS = {
    "v1.0.0": commit(100),
    "v1.2.0": commit(120),
    "1.2.3": commit(123),
    "v1.10.0": commit(110),
    "v2.0.0": commit(200),
    "v3.0.0rc1": commit(300),
    "v1-final": commit(7),
    "nightly": commit(8),
}
BRANCHES = {"main": commit(1), "dev": commit(2), "refs/pr/4": commit(4)}


def picked(text: str | None) -> Picked:
    return pick(None if text is None else Selector.parse(text), TAGS, BRANCHES)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        (None, "v2.0.0"),
        ("1", "v1.10.0"),
        ("v1", "v1.10.0"),
        ("1.2", "1.2.3"),
        ("1.2.0", "v1.2.0"),
        ("v1.2.3", "1.2.3"),
        ("~=1.2.0", "1.2.3"),
        ("~=1.2", "v1.10.0"),
        (">=1,<1.5", "1.2.3"),
        (">=1", "v2.0.0"),
        (">=3.0rc1", "v3.0.0rc1"),
        ("3.0.0rc1", "v3.0.0rc1"),
        ("v1-final", "v1-final"),
        ("nightly", "nightly"),
        ("refs/tags/nightly", "nightly"),
    ],
)
def test_a_selector_picks_its_tag_and_says_why(text, tag):
    found = picked(text)
    assert (found.tag, found.commit) == (tag, TAGS[tag])
    assert found.why


def test_a_branch_and_a_pull_request_and_a_commit_are_found():
    assert picked("dev").branch == "dev"
    assert picked("refs/heads/main").commit == commit(1)
    assert picked("refs/pr/4").commit == commit(4)
    assert picked("F" * 40).commit == "f" * 40


def test_without_version_tags_the_default_branch_is_taken_and_the_reason_said():
    found = pick(None, {"nightly": commit(8)}, BRANCHES)
    assert (found.branch, found.commit) == ("main", commit(1))
    assert "no version" in found.why


def test_only_pre_releases_leave_the_default_branch():
    found = pick(None, {"v1.0rc1": commit(9)}, BRANCHES)
    assert found.branch == "main"
    assert "v1.0rc1" in found.why


@pytest.mark.parametrize("text", ["3", "~=3.0", ">=2.1", "4.0.0", "refs/pr/5", "refs/tags/main", "nightyl"])
def test_what_is_not_there_is_not_found_and_the_versions_are_listed(text):
    with pytest.raises(NotFound, match=r"v2\.0\.0, v1\.10\.0"):
        picked(text)


def test_a_typo_is_answered_with_the_nearest_name():
    with pytest.raises(NotFound) as caught:
        picked("nightyl")
    assert "'nightly'" in caught.value.hint


def test_a_short_commit_is_told_to_be_longer():
    with pytest.raises(NotFound) as caught:
        picked("deadbeef")
    assert "40" in caught.value.hint


def test_an_empty_repository_is_not_found():
    with pytest.raises(NotFound, match="empty"):
        pick(None, {}, {})


def test_two_spellings_of_one_version_on_different_commits_are_an_error():
    tags = {"v1.2.0": commit(1), "1.2.0": commit(2)}
    for text in (None, "1", "1.2.0", "~=1.2", ">=1"):
        with pytest.raises(InvalidRef, match="ambiguous"):
            pick(Selector.parse(text) if text else None, tags, {})
    assert pick(Selector.parse("refs/tags/1.2.0"), tags, {}).commit == commit(2)


def test_two_spellings_of_one_version_on_one_commit_are_no_trouble():
    assert pick(None, {"v1.2.0": commit(1), "1.2.0": commit(1)}, {}).tag == "v1.2.0"


def test_a_moving_major_tag_is_not_mistaken_for_its_first_release():
    tags = {"v1": commit(9), "v1.0.0": commit(1), "v1.1.0": commit(9)}
    assert pick(Selector.parse("v1"), tags, {}).tag == "v1"
    assert pick(Selector.parse("1"), tags, {}).tag == "v1.1.0"
    assert pick(Selector.parse("1.0.0"), tags, {}).tag == "v1.0.0"


def test_a_tag_and_a_branch_of_one_name_on_different_commits_are_an_error():
    with pytest.raises(InvalidRef, match="both a tag and a branch"):
        pick(Selector.parse("dev"), {"dev": commit(3)}, BRANCHES)
    assert pick(Selector.parse("dev"), {"dev": commit(2)}, BRANCHES).tag == "dev"


def test_a_branch_that_looks_like_a_version_is_taken_where_no_version_fits():
    assert pick(Selector.parse("4.1"), {}, {"4.1": commit(5)}).branch == "4.1"


@given(st.lists(st.from_regex(r"v?[0-9]{1,2}(\.[0-9]{1,2}){0,2}(rc1|\.post1|\.dev2)?", fullmatch=True), unique=True))
def test_versions_are_listed_newest_first(names):
    found = version_tags({name: commit(at) for at, name in enumerate(names)})
    assert [each.version for each in found] == sorted(map(Version, names), reverse=True)
