"""The metadata of a card: valid for the Hub, the author's values kept as written, nothing private left in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cards.making import BASE, PEFT, RECORD, Made, peft_tensors, write
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from lorahub.cards import make_card
from lorahub.cards.front import edited, read_front, split
from lorahub.cards.yaml_text import entry
from lorahub.errors import RecordError
from lorahub.findings import Verdict
from lorahub.records import AdapterRecord


def metadata(text: str) -> dict[str, Any]:
    """What the Hub's own client reads."""
    return ModelCard(text).data.to_dict()


def codes(card: Any) -> list[str]:
    return [finding.code for finding in card.findings]


def readme(front: str, body: str = "\n# Mine\n") -> str:
    return f"---\n{front}---\n{body}"


def test_a_new_card_says_base_relation_library_task_licence_and_tags(made: Made) -> None:
    assert metadata(made().text) == {
        "license": "apache-2.0",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "tags": ["transformers", "lora", "lorahub"],
    }


def test_a_base_that_is_on_no_hub_is_not_named(made: Made) -> None:
    found = metadata(made(base={"weights_digest": BASE["weights_digest"]}).text)
    assert "base_model" not in found
    assert "base_model_relation" not in found


def test_evaluations_with_a_dataset_are_a_model_index_that_the_client_reads(made: Made) -> None:
    evals = [
        {"task": "text-generation", "dataset": "acme/tales", "metric": "bleu", "value": 31.5, "delta_vs_base": 2.5},
        {"task": "text-generation", "dataset": "acme/tales", "metric": "rouge", "value": 0.25},
        {"task": "text-generation", "dataset": "Our own set, v2", "metric": "bleu", "value": 12},
        {"task": "text-generation", "metric": "perplexity", "value": 3.5},
    ]
    results = ModelCard(made(evals=evals).text).data.eval_results
    assert results is not None
    assert [(each.dataset_type, each.dataset_name, each.metric_type, each.metric_value) for each in results] == [
        ("acme/tales", "acme/tales", "bleu", 31.5),
        ("acme/tales", "acme/tales", "rouge", 0.25),
        ("Our-own-set-v2", "Our own set, v2", "bleu", 12),
    ]


@pytest.mark.parametrize(
    ("license_", "found"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("llama3.1", {"license": "llama3.1"}),
        ("Acme Research Licence 2", {"license": "other", "license_name": "acme-research-licence-2"}),
        ("other", {"license": "other", "license_link": "https://acme.example/licence"}),
    ],
)
def test_a_licence_is_spelled_as_the_hub_takes_it(made: Made, license_: str, found: dict[str, str]) -> None:
    link = "https://acme.example/licence" if license_ == "other" else ""
    said = metadata(made(license=license_, license_link=link).text)
    assert {key: said[key] for key in said if key.startswith("license")} == found


def test_values_comments_order_and_style_of_the_author_stay_as_written(made: Made) -> None:
    front = (
        "# about me\ntags: [story, 'fan fiction']  # mine\nthumbnail: \"a.png\"\n\n# the law\n"
        "license: apache-2.0 # ok\n"
        "pipeline_tag:   text-generation\nextra:\n    deep:\n    - 1.50\n    - 0x10\n"
    )
    text = made(readme(front)).text
    assert text.startswith(
        "---\n"
        + front.replace("'fan fiction']", "'fan fiction', transformers, lora, lorahub]")
        + "library_name: peft\n"
    )
    assert metadata(text)["tags"] == ["story", "fan fiction", "transformers", "lora", "lorahub"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_stay_what_they_are(made: Made, newline: str) -> None:
    text = made(readme("license: mit\ntags:\n- a\n").replace("\n", newline), license="mit").text
    assert text.count("\n") == text.count(newline)
    assert metadata(text)["tags"] == ["a", "transformers", "lora", "lorahub"]


@pytest.mark.parametrize(
    "path", ["/home/me/models/llama", "./out", "../base", "C:\\models\\llama", "model\\Qwen2-0.5B", "a/b/c"]
)
def test_a_local_base_becomes_the_one_that_was_recorded_and_is_told(made: Made, path: str) -> None:
    front = f"library_name: peft\nbase_model: '{path}'\ntags:\n- 'base_model:adapter:{path}'\n- lora\n"
    card = made(readme(front, f"\nTuned from [{path}](https://huggingface.co/{path}).\n"))
    found = metadata(card.text)
    assert found["base_model"] == "acme/base"
    assert found["tags"] == ["base_model:adapter:acme/base", "lora", "transformers", "lorahub"]
    assert codes(card) == ["card-base-replaced", "card-path-in-text"]
    assert card.findings[1].where == ("line 9",)
    assert f"Tuned from [{path}]" in card.text  # the author's text is theirs


def test_a_local_base_is_taken_out_where_the_record_names_none(made: Made) -> None:
    card = made(readme("base_model: /mnt/llama\nlicense: apache-2.0\n"), base=None)
    assert "base_model" not in metadata(card.text)
    assert codes(card) == ["card-base-replaced"]


def test_another_base_than_the_records_stays_and_is_told(made: Made) -> None:
    card = made(readme("base_model:\n- unsloth/base-bnb-4bit\n"))
    assert metadata(card.text)["base_model"] == ["unsloth/base-bnb-4bit"]
    assert codes(card) == ["card-base-differs"]


def test_another_licence_than_the_records_is_for_the_publisher_to_refuse(made: Made) -> None:
    card = made(readme("license: mit\n"))
    assert [(each.code, each.level) for each in card.findings] == [("card-license-differs", Verdict.DEGRADED)]
    assert metadata(card.text)["license"] == "mit"
    assert made(readme("license: Apache 2.0\n")).findings == ()


@pytest.mark.parametrize(
    ("written", "license_", "differs"),
    [
        ("new-licence-9", "new-licence-9", False),  # one that the Hub learnt since
        ("llama3", "other", False),
        ("other", "Acme Licence", False),
        ("mit", "Acme Licence", True),
        ("new-licence-9", "mit", True),
    ],
)
def test_licences_without_a_name_on_the_hub_are_compared_by_their_own(
    made: Made, written: str, license_: str, differs: bool
) -> None:
    card = made(readme(f"license: {written}\n"), license=license_)
    assert codes(card) == ["card-license-differs"] * differs
    found = metadata(card.text)
    assert found["license"] == written
    assert found.get("license_name") == ("acme-licence" if written == "other" else None)


def test_the_relation_is_said_beside_a_base_that_the_author_named(made: Made) -> None:
    found = metadata(made(readme("base_model: acme/base\nlicense: apache-2.0\n")).text)
    assert (found["base_model"], found["base_model_relation"]) == ("acme/base", "adapter")


def test_datasets_on_one_machine_are_removed_and_told(made: Made) -> None:
    card = made(
        readme("datasets:\n- acme/a\n- /var/data/images\n"), training={"datasets": [{"id": "acme/a"}, {"id": "acme/b"}]}
    )
    assert metadata(card.text)["datasets"] == ["acme/a", "acme/b"]
    assert codes(card) == ["card-dataset-removed"]


def test_a_successor_that_the_author_named_stays(made: Made) -> None:
    assert metadata(made(readme("new_version: acme/ink2\n")).text)["new_version"] == "acme/ink2"


def test_what_an_earlier_card_wrote_follows_the_record_and_the_authors_values_do_not(made: Made) -> None:
    first = made(readme("pipeline_tag: summarization\n"), kinds=["dora"]).text
    second = made(first, license="mit", kinds=["lora"], language=["en"])
    found = metadata(second.text)
    assert (found["license"], found["pipeline_tag"], found["language"]) == ("mit", "summarization", ["en"])
    assert found["tags"] == ["transformers", "lora", "lorahub"]
    assert "language" not in metadata(made(second.text, license="mit").text)


def test_a_value_that_the_author_changed_since_is_the_authors(made: Made) -> None:
    changed = made().text.replace("base_model: acme/base", "base_model: acme/other")
    card = made(changed)
    assert metadata(card.text)["base_model"] == "acme/other"
    assert codes(card) == ["card-base-differs"]


@pytest.mark.parametrize(
    ("front", "line", "words"),
    [
        ("license: [\n", 2, "not YAML"),
        ("a: 1\nlicense: mit\nlicense: gpl\n", 4, "appears twice"),
        ("a: &x [1]\nb: *x\n", 2, "anchors and aliases"),
        ("- a\n- b\n", 2, "no mapping"),
        ("a: 1\n b: 2\n", 3, "not YAML"),
        ("1: 2\n", 2, "no text"),
        (f"a: {'[' * 40}\n", 2, "nested deeper"),
    ],
)
def test_metadata_that_cannot_be_read_are_refused_with_their_line(
    made: Made, front: str, line: int, words: str
) -> None:
    with pytest.raises(RecordError, match=words) as caught:
        made(readme(front))
    assert f"line {line}" in caught.value.message
    assert caught.value.hint


def test_metadata_that_nothing_closes_are_refused(made: Made) -> None:
    with pytest.raises(RecordError, match="line 1: this opens metadata"):
        made("---\nlicense: mit\n\n# Mine\n")


def test_metadata_in_braces_are_refused_and_never_rewritten(made: Made) -> None:
    with pytest.raises(RecordError, match="in braces"):
        made(readme("{license: apache-2.0}\n"))


def test_metadata_laid_out_so_that_no_line_can_be_added_are_refused(made: Made) -> None:
    with pytest.raises(RecordError, match="laid out so that single values cannot be changed"):
        made(readme("? license\n: apache-2.0\n"))


def test_metadata_over_the_limit_are_refused(made: Made) -> None:
    with pytest.raises(RecordError, match="more than the"):
        made(readme(f"a: {'x' * (300 << 10)}\n"))


def test_values_that_stand_for_exponentially_much_are_refused_before_they_are_built(made: Made) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + at)}: &{chr(98 + at)} [{', '.join(['*' + chr(97 + at)] * 9)}]\n" for at in range(20)
    )
    with pytest.raises(RecordError, match="line 2"):
        made(readme(bomb))


def test_empty_metadata_are_filled(made: Made) -> None:
    for text in ("---\n---\n# Mine\n", "---\n\n---\n# Mine\n", "---\n# nothing yet\n---\n# Mine\n"):
        card = made(text)
        assert metadata(card.text)["license"] == "apache-2.0"
        assert "# Mine\n" in card.text


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT
_VALUE = st.recursive(
    _SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3), max_leaves=6
)


@given(st.dictionaries(_TEXT.filter(lambda key: len(key) > 0), _VALUE, max_size=4))
def test_what_is_written_reads_back_as_it_was(values: dict[str, Any]) -> None:
    front = "\n".join(entry(key, value) for key, value in values.items())
    document = split(f"---\n{front}\n---\n")
    assert repr(read_front(document)) == repr(values)


_PLAIN = st.dictionaries(
    st.sampled_from("abcdef"), st.text("xyz: #'\"[-", max_size=8) | st.lists(st.text("xyz: #'", max_size=5), max_size=3)
)


@given(_PLAIN, _PLAIN)
def test_a_change_of_some_values_leaves_the_lines_of_the_others(old: dict[str, Any], new: dict[str, Any]) -> None:
    front = "\n".join(f"{entry(key, value)}\n# after {key}" for key, value in old.items())
    document = split(f"---\n{front}\n---\nbody")
    kept = {key: value for key, value in old.items() if new.get(key, value) == value}
    values = {key: new.get(key, value) for key, value in old.items()} | new
    text = edited(document, read_front(document), values)
    assert read_front(document.changed(front=text, body="")) == values
    for key, value in kept.items():
        assert entry(key, value) in text
    for key in old:
        assert f"# after {key}" in text


def test_the_folder_that_a_trainer_took_for_the_base_gives_way_to_the_recorded_name(tmp_path: Path) -> None:
    config = PEFT | {"base_model_name_or_path": "base"}
    ink = write(tmp_path / "ink", "adapter_model.safetensors", peft_tensors(), adapter_config=config)
    readme = "---\nbase_model: base\ntags:\n- base_model:adapter:base\n- lora\n---\n\n# Ink\n"
    card = make_card(readme, ink, AdapterRecord.from_json(RECORD), repo="acme/ink")
    data = ModelCard(card.text).data
    assert data.base_model == "acme/base"
    assert data.tags[:2] == ["base_model:adapter:acme/base", "lora"]
    assert [each.code for each in card.findings] == ["card-base-replaced"]
    again = make_card(card.text, ink, AdapterRecord.from_json(RECORD), repo="acme/ink")
    assert (again.text, again.findings) == (card.text, ())
