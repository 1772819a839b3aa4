"""What the metadata of a card should say, by the record and the files: tables from our words to the Hub's.

Base, task, licence, tags and results in the form that the Hub's validation takes.  Knows no README: what its author
wrote there is judged in ``reconciling.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorahub.adapter import AdapterHeader
from lorahub.cards.usage import Usage
from lorahub.names import printable
from lorahub.records import AdapterRecord, is_path

__all__ = ["HUB_LICENSES", "MERGED", "ORDER", "hub_license", "is_repo", "slug", "wanted"]

ORDER = (
    "language",
    "license",
    "license_name",
    "license_link",
    "library_name",
    "pipeline_tag",
    "base_model",
    "base_model_relation",
    "new_version",
    "datasets",
    "tags",
    "instance_prompt",
    "model-index",
)
"""The keys that a card writes, in order."""

MERGED = ("datasets", "tags")
"""Lists to which a card adds, and keeps what else is in them."""

_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 open-mdw
    openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib
"""
HUB_LICENSES = frozenset(_LICENSES.split())
"""Identifiers that the Hub takes (huggingface.co/docs/hub/repositories-licenses)."""

_SPDX: Mapping[str, str] = {
    "odbl-1.0": "odbl",
    "odc-by-1.0": "odc-by",
    "pddl-1.0": "pddl",
}
"""SPDX identifiers that the Hub calls otherwise, beyond case and the ends below."""

_ENDS = ("-only", "-or-later")

_REPO = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual", re.ASCII)
_WORD = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*", re.ASCII)

_TAGS: Mapping[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "dora": ("lora", "dora"),
    "pissa": ("lora", "pissa"),
    "expert-lora": ("lora",),
    "merged-lora": ("lora",),
    "qv-lora": ("lora",),
    "conv-view": ("lora",),
    "locon": ("lora", "locon"),
    "dora-locon": ("lora", "dora", "locon"),
    "replace": (),
    "full": (),
}
"""Kind -> the Hub's tags for it, where they are not the kind's own name."""


def is_repo(text: object) -> bool:
    """Whether this may be a repository of the Hub: no path, no address."""
    return isinstance(text, str) and len(text) <= 96 and bool(_REPO.fullmatch(text)) and not is_path(text)


def hub_license(name: str) -> str:
    """The Hub's identifier for a licence, or "" where it has none."""
    lower = name.strip().lower()
    for end in _ENDS:
        lower = lower.removesuffix(end)
    lower = _SPDX.get(lower, lower)
    return lower if lower in HUB_LICENSES else ""


def slug(name: str) -> str:
    """A licence's name as the Hub takes names that it does not know."""
    return re.sub(r"[^a-z0-9.-]+", "-", name.strip().lower()).strip("-")


def wanted(
    header: AdapterHeader, record: AdapterRecord, usage: Usage, *, repo: str, triggers: Sequence[str]
) -> dict[str, Any]:
    """Metadata key -> value, in the order of ``ORDER``; nothing of what is not known."""
    base = record.base.repo_id if record.base else None
    values: dict[str, Any] = {
        "language": [each for each in record.language if _LANGUAGE.fullmatch(each)],
        **_license(header, record),
        "library_name": usage.library,
        "pipeline_tag": record.pipeline_tag if _WORD.fullmatch(record.pipeline_tag) else usage.task,
        "base_model": base,
        "base_model_relation": "adapter" if base else None,
        "datasets": _unique(each.id for each in (record.training.datasets if record.training else ())),
        "tags": _tags(record, usage),
        "instance_prompt": printable(", ".join(triggers)) if triggers and usage.library == "diffusers" else None,
        "model-index": _model_index(record, repo),
    }
    return {key: values[key] for key in ORDER if values.get(key)}


def _unique(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _license(header: AdapterHeader, record: AdapterRecord) -> dict[str, str | None]:
    if not record.license:
        return {}
    known = hub_license(record.license)
    if known and known != "other":
        return {"license": known}
    text = next((name for name in sorted(header.files.others) if name.lower().startswith(("license", "licence"))), "")
    name = slug(record.license)
    return {
        "license": "other",
        "license_name": name if name not in ("", "other") else None,
        "license_link": printable(record.license_link or text) or None,
    }


def _tags(record: AdapterRecord, usage: Usage) -> list[str]:
    tags = [tag for kind in record.kinds for tag in _TAGS.get(kind, (kind,))]
    own = ["transformers"] if usage.library == "peft" and record.base and record.base.library == "transformers" else []
    return _unique([*own, *tags, *map(printable, record.tags), "lorahub"])


def _model_index(record: AdapterRecord, repo: str) -> list[dict[str, Any]]:
    """Results as the Hub's leaderboards read them; one without a dataset has no place there."""
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in record.evals:
        if each.dataset:
            metric = {"type": printable(each.metric), "value": each.value, "name": printable(each.metric)}
            results.setdefault((printable(each.task), printable(each.dataset)), []).append(metric)
    if not results:
        return []
    return [
        {
            "name": repo.rpartition("/")[2] or "adapter",
            "results": [
                {
                    "task": {"type": task},
                    "dataset": {"type": dataset if is_repo(dataset) else _dataset(dataset), "name": dataset},
                    "metrics": metrics,
                }
                for (task, dataset), metrics in results.items()
            ],
        }
    ]


def _dataset(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "dataset"
