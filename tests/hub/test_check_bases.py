"""Bases on a hub, held against adapters: the verdict on each case, and which base and commit it is.

Hugging Face is the double, asked through the real client.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub.bases import WIDTH, base, codes, headers_of, split, tensors, weights, whole_less
from hub.double import Double
from hub.double.cards import card

from lorahub import publishing
from lorahub.bases.open import survey_base
from lorahub.errors import BaseMismatch, Degraded, UnsupportedFormat, UsageError
from lorahub.findings import Verdict
from lorahub.merging.checking import check
from lorahub.merging.preparing import prepare
from lorahub.opening import open_base
from lorahub.records import AdapterRecord


def test_the_recorded_commit_is_exact(double: Double, recorded: Path, at: Any) -> None:
    report = at(recorded, "acme/base")
    assert codes(report) == {"base-weights-equal"}
    assert (report.axes["base"], report.axes["placement"]) == (Verdict.EXACT, Verdict.EXACT)


def test_a_commit_that_changes_the_card_alone_is_exact_and_says_that_it_is_another(
    double: Double, recorded: Path, at: Any
) -> None:
    double.repo("acme/base").edit({"README.md": b"# Better words\n"})
    report = at(recorded, "acme/base")
    assert codes(report) == {"base-commit-differs-weights-equal"}
    assert report.axes["base"] is Verdict.EXACT


def test_a_repository_that_was_renamed_is_exact_under_both_names_and_says_so(
    double: Double, recorded: Path, at: Any
) -> None:
    double.repo("acme/base").rename("acme/bert")
    report = at(recorded, "acme/bert")
    assert codes(report) == {"base-repo-differs-weights-equal"}
    old = at(recorded, "acme/base")
    assert old.axes["base"] is Verdict.EXACT
    assert codes(old, "policy") == {"repo-renamed"}


def test_the_same_skeleton_with_other_weights_is_degraded_and_can_be_allowed(
    double: Double, recorded: Path, at: Any
) -> None:
    double.repo("acme/other").commit(base(seed=7))
    report = at(recorded, "acme/other")
    assert codes(report) == {"base-weights-differ"}
    assert report.verdict is Verdict.DEGRADED
    (found,) = (each for each in report.findings if each.code == "base-weights-differ")
    assert "acme/base@" in found.message
    assert "acme/other@" in found.message
    assert at(recorded, "acme/other", allow=["base-weights-differ"]).axes["base"] is Verdict.UNVERIFIED
    job = prepare("acme/other", {"ink": recorded}, hub=double.endpoint)
    with pytest.raises(Degraded, match="refused"):
        job.refuse()


@pytest.mark.parametrize("relation", ["finetune", "quantized", "merge", None])
def test_other_weights_of_a_base_whose_card_names_the_recorded_one_are_unverified(
    double: Double, recorded: Path, at: Any, relation: str | None
) -> None:
    said = {"base_model_relation": relation} if relation else {}
    double.repo("acme/chat").commit(base(seed=7) | {"README.md": card(base_model=["acme/base"], **said)})
    report = at(recorded, "acme/chat")
    assert codes(report) == {"base-declared-relative"}
    assert report.axes["base"] is Verdict.UNVERIFIED
    assert len(double.seen("README.md", where="hub")) == 1
    (found,) = (each for each in report.findings if each.code == "base-declared-relative")
    assert relation or "finetune" in found.message


@pytest.mark.parametrize(
    "readme",
    [
        card(base_model="acme/else"),
        card(base_model="acme/base", base_model_relation="adapter"),
        card(base_model={"acme/base": 1}),
        card(base_model="acme/base", base_model_relation=["finetune"]),
        b"---\nbase_model: &a [acme/base]\nmore: [*a, *a]\n---\n",
        b"---\nbase_model: acme/base\n",
        b"\xff\xfe\x00",
        b"",
    ],
    ids=["another", "adapter", "mapping", "list", "aliases", "unclosed", "binary", "empty"],
)
def test_a_card_that_does_not_plainly_name_the_recorded_base_declares_nothing(
    double: Double, recorded: Path, at: Any, readme: bytes
) -> None:
    double.repo("acme/chat").commit(base(seed=7) | {"README.md": readme})
    assert codes(at(recorded, "acme/chat")) == {"base-weights-differ"}


def test_a_local_copy_declares_its_relatives_too(double: Double, recorded: Path, at: Any, tmp_path: Path) -> None:
    copy = tmp_path / "chat"
    copy.mkdir()
    for name, data in (base(seed=7) | {"README.md": card(base_model="acme/base")}).items():
        (copy / name).write_bytes(data)
    assert codes(at(recorded, copy)) == {"base-declared-relative"}


def test_a_base_that_the_adapter_declares_is_compatible(double: Double, recorded: Path, at: Any) -> None:
    commit = double.repo("acme/other").commit(base(seed=7))
    record = AdapterRecord.load(recorded / "lorahub.json")
    (recorded / "lorahub.json").write_text(record.changed(compat={"bases": [f"acme/other@{commit}"]}).to_json())
    report = at(recorded, "acme/other")
    assert codes(report) == {"base-declared-compatible"}
    assert report.axes["base"] is Verdict.COMPATIBLE


def test_other_weights_in_files_that_the_adapter_does_not_touch_are_compatible(
    double: Double, adapter: Path, at: Any
) -> None:
    first = double.repo("acme/base").commit(whole_less(split()))
    publishing.record(adapter, "acme/base", hub=double.endpoint)
    double.repo("acme/pooled").commit(whole_less(split(rest=5)))
    report = at(adapter, "acme/pooled")
    assert codes(report) == {"base-untouched-weights-differ"}
    assert report.axes["base"] is Verdict.COMPATIBLE
    double.repo("acme/tuned").commit(whole_less(split(encoder=5)))
    assert codes(at(adapter, "acme/tuned")) == {"base-weights-differ"}
    double.repo("acme/base").forget(first)
    assert codes(at(adapter, "acme/pooled")) == {"base-untouched-weights-differ"}  # its listing is remembered


def test_where_the_recorded_base_cannot_be_listed_other_weights_are_other_weights(
    double: Double, adapter: Path, at: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = double.repo("acme/base").commit(whole_less(split()))
    publishing.record(adapter, "acme/base", hub=double.endpoint)
    double.repo("acme/pooled").commit(whole_less(split(rest=5)))
    double.repo("acme/base").forget(first)
    monkeypatch.setenv("LORAHUB_CACHE", str(tmp_path / "another machine"))
    assert codes(at(adapter, "acme/pooled")) == {"base-weights-differ"}


def test_a_wider_base_is_incompatible(double: Double, recorded: Path, at: Any) -> None:
    double.repo("acme/wide").commit(base(tensors(width=2 * WIDTH), hidden_size=2 * WIDTH))
    report = at(recorded, "acme/wide")
    assert report.axes["placement"] is Verdict.INCOMPATIBLE
    assert report.verdict is Verdict.INCOMPATIBLE
    with pytest.raises(BaseMismatch):
        prepare("acme/wide", {"ink": recorded}, hub=double.endpoint).refuse()


def test_a_base_that_lacks_layers_loses_part_of_the_adapter(double: Double, recorded: Path, at: Any) -> None:
    double.repo("acme/short").commit(base(tensors(layers=1), num_hidden_layers=1))
    report = at(recorded, "acme/short")
    assert report.axes["placement"] >= Verdict.DEGRADED
    assert report.verdict >= Verdict.DEGRADED


def test_layers_besides_those_that_it_touches_are_only_other_weights(double: Double, recorded: Path, at: Any) -> None:
    double.repo("acme/deep").commit(base(tensors(layers=3), num_hidden_layers=3))
    report = at(recorded, "acme/deep")
    assert report.axes["placement"] is Verdict.EXACT
    assert codes(report) == {"base-weights-differ", "structure-differs"}


@pytest.mark.plugin("transformers")
def test_an_unrecorded_base_that_fits_is_unverified_and_says_so_in_one_finding(
    double: Double, adapter: Path, at: Any
) -> None:
    double.repo("acme/base").commit(base())
    report = at(adapter, "acme/base")
    assert report.verdict is Verdict.UNVERIFIED
    assert [each.code for each in report.findings if each.level is Verdict.UNVERIFIED] == ["base-unrecorded"]
    prepare("acme/base", {"ink": adapter}, hub=double.endpoint).refuse()  # goes on


# ------------------------------------------------------------------------------------------------ which base it is


def test_without_a_base_the_recorded_commit_is_taken_whatever_the_branch_says(
    double: Double, recorded: Path, at: Any
) -> None:
    first = double.repo("acme/base").find("main")
    assert first is not None
    double.repo("acme/base").commit(base(seed=8))
    double.log.clear()
    report = at(recorded)
    assert codes(report) == {"base-weights-equal"}
    assert first[:12] in report.against
    assert double.log == []  # that commit was looked at when it was recorded


def test_where_no_commit_is_recorded_it_is_said_which_was_taken(
    double: Double, adapter: Path, at: Any, tmp_path: Path
) -> None:
    files = base()
    here = tmp_path / "here"
    here.mkdir()
    for name, data in files.items():
        (here / name).write_bytes(data)
    publishing.record(adapter, here, base_repo="acme/base")
    commit = double.repo("acme/base").commit(files)
    report = at(adapter)
    assert codes(report) == {"base-weights-equal", "base-commit-chosen"}
    assert report.axes["base"] is Verdict.EXACT
    assert commit[:12] in report.against
    (found,) = (each for each in report.findings if each.code == "base-commit-chosen")
    assert commit[:12] in found.message


def test_an_adapter_without_a_record_says_how_to_name_the_base_its_files_claim(adapter: Path) -> None:
    with pytest.raises(UsageError) as caught:
        check(adapter)
    assert "--base acme/base" in caught.value.hint


def test_a_claimed_base_that_is_a_path_is_never_offered(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../../secret"}))
    with pytest.raises(UsageError) as caught:
        check(adapter)
    assert "secret" not in caught.value.hint


def test_one_weights_file_of_a_repository_can_be_the_base(double: Double, adapter: Path, at: Any) -> None:
    files = base()
    data = files.pop("model.safetensors")
    double.repo("acme/many").commit(files | {"one.safetensors": data, "two.safetensors": weights(tensors(), 3)})
    with pytest.raises(UnsupportedFormat, match="2 safetensors files"):
        at(adapter, "acme/many")
    assert codes(at(adapter, "acme/many@main/one.safetensors")) == {"base-unrecorded"}
    one, two = (open_base(f"acme/many@main/{name}.safetensors", hub=double.endpoint) for name in ("one", "two"))
    assert one.index.weights != two.index.weights
    assert one.pulled().files == survey_base(one.pulled().files.folder / "one.safetensors")  # type: ignore[union-attr]


def test_an_adapter_on_the_hub_is_held_against_a_base_there_without_a_byte_of_either_s_weights(
    double: Double, recorded: Path, at: Any
) -> None:
    files = {path.name: path.read_bytes() for path in recorded.iterdir()}
    double.repo("acme/ink").commit(files, "v1.0.0")
    report = at("acme/ink@1.0.0")
    assert report.axes["base"] is Verdict.EXACT
    assert double.bytes_of("adapter_model.safetensors", where="cdn") == headers_of(files)["adapter_model.safetensors"]
    assert double.bytes_of("/model.safetensors") == 0
    assert len(double.log) <= 8


def test_what_resolving_notices_is_in_the_report(double: Double, recorded: Path, at: Any) -> None:
    files = {path.name: path.read_bytes() for path in recorded.iterdir()}
    repo = double.repo("acme/ink")
    repo.commit(files, "v1.0.0")
    at("acme/ink@1.0.0")
    repo.tags["v1.0.0"] = repo.edit({"README.md": b"other words\n"})
    report = at("acme/ink@1.0.0")
    assert "tag-moved" in codes(report, "integrity")
    assert report.verdict is Verdict.DEGRADED
    repo.rename("acme/sumi")
    assert "repo-renamed" in codes(at("acme/ink"), "policy")
