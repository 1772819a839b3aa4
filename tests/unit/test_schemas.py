"""The published schemas are the models', and both judge the examples alike."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest

from lorahub.errors import RecordError
from lorahub.findings import Finding, Verdict
from lorahub.records import AdapterRecord
from lorahub.report import CheckReport

SCHEMAS = Path(__file__).parents[2] / "schemas"
VALID = sorted((SCHEMAS / "examples" / "valid").glob("*.json"))
INVALID = sorted((SCHEMAS / "examples" / "invalid").glob("*.json"))


def published(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def key_path(error: jsonschema.ValidationError) -> str:
    parts = list(error.absolute_path)
    if error.validator == "required":
        parts.append(next(name for name in error.validator_value if name not in error.instance))
    if error.validator == "additionalProperties":
        known = error.schema["patternProperties"]
        parts.append(next(name for name in error.instance if not any(_matches(name, pattern) for pattern in known)))
    text = "".join(f".{part}" if isinstance(part, str) and part.isidentifier() else f"[{part!r}]" for part in parts)
    return text.removeprefix(".")


def _matches(name: str, pattern: str) -> bool:
    return jsonschema.Draft202012Validator({"pattern": pattern}).is_valid(name)


def deepest(errors: list[jsonschema.ValidationError]) -> set[str]:
    """Where the errors are, looking into the alternatives of optional fields."""
    found = set()
    for error in errors:
        inner = [each for each in error.context or [] if each.validator != "type" or each.instance is None]
        found |= deepest(inner) if inner else {key_path(error)}
    return found


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_schemas", SCHEMAS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_published_schemas_are_the_generated_ones(generator: ModuleType) -> None:
    texts = generator.texts()
    assert {path.name for path in SCHEMAS.glob("*.schema.json")} == set(texts)
    for name, text in texts.items():
        assert (SCHEMAS / name).read_text(encoding="utf-8") == text, "run: make schemas"


def test_every_field_is_described(generator: ModuleType) -> None:
    for model in generator.MODELS.values():
        schema = generator.schema(model)
        tables = [schema, *(each for each in schema["$defs"].values() if "properties" in each)]
        bare = [
            f"{table['title']}.{name}"
            for table in tables
            for name, field in table["properties"].items()
            if not field.get("description")
        ]
        assert bare == []


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_a_valid_example_is_valid_for_schema_and_model(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    assert list(published("adapter").iter_errors(document)) == []
    assert AdapterRecord.from_json(text).document() == document
    assert document["extra"]["why"]


@pytest.mark.parametrize("path", INVALID, ids=lambda path: path.stem)
def test_an_invalid_example_fails_both_at_its_key_path(path: Path) -> None:
    example: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    assert example["why"]
    assert deepest(list(published("adapter").iter_errors(example["record"]))) == {example["where"]}
    with pytest.raises(RecordError) as refused:
        AdapterRecord.from_json(example["record"])
    assert f"{example['where']}: " in refused.value.message


def test_there_are_examples_of_both_sorts() -> None:
    assert len(VALID) >= 5
    assert len(INVALID) >= 15


def test_a_check_report_follows_its_schema() -> None:
    finding = Finding(
        code="base-weights-differ", axis="base", level=Verdict.DEGRADED, message="other weights", allowable=True
    )
    document = CheckReport.of(adapter="acme/ink", against="acme/base", findings=[finding]).document()
    assert list(published("report").iter_errors(document)) == []
    assert document["verdict"] == "degraded"


@pytest.mark.parametrize("change", [{"verdict": "fine"}, {"axes": {"taste": "exact"}}, {"findings": [{"code": "x"}]}])
def test_a_report_that_is_none_fails_schema_and_model(change: dict[str, Any]) -> None:
    document = CheckReport.of(adapter="acme/ink", against="acme/base", findings=[]).document() | change
    assert list(published("report").iter_errors(document)) != []
    with pytest.raises(ValueError, match=next(iter(change))):
        CheckReport.model_validate_json(json.dumps(document))
