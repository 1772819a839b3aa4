"""What ``lorahub check`` answers, as a document with a schema: the verdict, its six axes, and the evidence.

Knows nothing of how findings come about; ``checks.py`` judges.  ``schemas/report.schema.json`` is generated from here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema

from lorahub.findings import AXES, Axis, Finding, Verdict, worst

__all__ = ["REPORT_VERSION", "CheckReport", "FindingDocument"]

REPORT_VERSION = "1.0"


def _verdict(value: object) -> Verdict:
    """A verdict, or the one of that name."""
    if isinstance(value, Verdict):
        return value
    found = next((verdict for verdict in Verdict if str(verdict) == value), None)
    if found is None:
        raise ValueError(f"{value!r} is no verdict: {', '.join(map(str, Verdict))}")
    return found


Level = Annotated[
    Verdict,
    PlainValidator(_verdict),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"enum": [str(verdict) for verdict in Verdict], "type": "string"}),
]
"""A verdict by its name."""


class FindingDocument(BaseModel):
    """One observation, as JSON."""

    model_config = ConfigDict(frozen=True, extra="allow")

    code: str = Field(min_length=1, description="Stable; what --allow takes and scripts match on.")
    axis: Axis = Field(description="Which of the six axes it belongs to.")
    level: Level = Field(description="The verdict this finding alone would give.")
    message: str = Field(description="What is so, in one sentence.")
    where: tuple[str, ...] = Field(default=(), description="The keys, targets or files concerned.")
    remedy: str = Field(default="", description="What to do about it, as a command where there is one.")
    allowable: bool = Field(default=False, description="Whether --allow may set it aside.")

    def finding(self) -> Finding:
        """The same, as lorahub uses it."""
        return Finding(
            code=self.code,
            axis=self.axis,
            level=self.level,
            message=self.message,
            where=self.where,
            remedy=self.remedy,
            allowable=self.allowable,
        )


def _finding(value: object) -> Finding:
    return value if isinstance(value, Finding) else FindingDocument.model_validate(value).finding()


class CheckReport(BaseModel):
    """Whether an adapter goes with a base or a runtime, and why."""

    model_config = ConfigDict(frozen=True, extra="allow")

    schema_version: Annotated[str, Field(pattern=r"^1\.(0|[1-9][0-9]{0,5})$")] = Field(
        default=REPORT_VERSION, description="Version of this schema."
    )
    adapter: str = Field(description="The adapter, as it was named.")
    against: str = Field(description="What it was held against: a base, a runtime, or both.")
    verdict: Level = Field(description="The worst over the axes.")
    axes: dict[Axis, Level] = Field(description="The verdict on each axis.")
    allowed: tuple[str, ...] = Field(
        default=(), description="Codes that were allowed, and count as unverified at most."
    )
    findings: tuple[
        Annotated[
            Finding,
            PlainValidator(_finding, json_schema_input_type=FindingDocument),
            PlainSerializer(Finding.document, return_type=dict[str, Any]),
        ],
        ...,
    ] = Field(default=(), description="The evidence.")

    @classmethod
    def of(cls, *, adapter: str, against: str, findings: Collection[Finding], allowed: Collection[str] = ()) -> Self:
        """The report that the findings add up to.

        Args:
            adapter: the adapter, as it was named.
            against: what it was held against.
            findings: everything there is to say.
            allowed: codes given by ``--allow``.
        """
        axes: dict[Axis, Verdict] = {
            axis: worst((finding for finding in findings if finding.axis == axis), allowed=allowed) for axis in AXES
        }
        return cls(
            adapter=adapter,
            against=against,
            verdict=max(axes.values()),
            axes=axes,
            allowed=tuple(sorted(allowed)),
            findings=tuple(findings),
        )

    def document(self) -> dict[str, Any]:
        """The report as JSON-ready values, every field, in declaration order."""
        result: dict[str, Any] = self.model_dump(mode="json")
        return result
