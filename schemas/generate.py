"""Write the JSON Schemas of lorahub's documents, from the models that read and write them.

make schemas      write them
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from lorahub.manifest.document import Manifest
from lorahub.manifest.lockfile import Lock
from lorahub.recipe import Recipe
from lorahub.recipe_lock import RecipeLock
from lorahub.records import AdapterRecord
from lorahub.report import CheckReport

FOLDER = Path(__file__).parent

MODELS: dict[str, type[BaseModel]] = {
    "adapter": AdapterRecord,
    "lock": Lock,
    "manifest": Manifest,
    "recipe": Recipe,
    "recipe-lock": RecipeLock,
    "report": CheckReport,
}
"""File name before ``.schema.json`` -> model."""


def schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema of what a model reads; it has no ``$id``, so it means the same wherever it lies."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema(mode="validation")}


def texts() -> dict[str, str]:
    """File name -> text, of every schema."""
    return {
        f"{name}.schema.json": json.dumps(schema(model), indent=2, ensure_ascii=False) + "\n"
        for name, model in MODELS.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"schemas/{name}")
