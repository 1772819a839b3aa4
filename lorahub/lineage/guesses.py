"""What is said of a base that nothing records: an architecture or a family, for people, with what shows it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Guess"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What the base may be.

    Attributes:
        label: for people: "SDXL-shaped", "Pony Diffusion (SDXL)".
        architecture: "SDXL", "Flux", ...; "" where only a family is named.
        family: "Pony Diffusion", "Illustrious", ...; only from metadata.
        source: "metadata" or "shapes".
        evidence: which key or module says so.
    """

    label: str
    architecture: str
    family: str = ""
    source: str
    evidence: str

    def document(self) -> dict[str, str]:
        """JSON-ready values."""
        return {
            "label": self.label,
            "architecture": self.architecture,
            "family": self.family,
            "source": self.source,
            "evidence": self.evidence,
        }
