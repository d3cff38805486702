"""What an import found, what its source does not say, and what was left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

LACKS: Final = {
    "weights": "the routing weights",
    "order": "the order of a token's experts",
    "scores": "the router's scores of experts that were not selected",
    "token ids": "which tokens were read",
    "text": "the text",
    "phases": "which tokens are the prompt and which were generated",
    "positions": "single tokens: only counts were recorded",
    "prompts": "which prompt a token belongs to",
}
"""What an imported run may lack, by the word that `runs.manifest` keeps under `lacks`."""


@dataclass
class ImportReport:
    """The validator's report of one import.

    Attributes:
        format: the name of the importer.
        version: the version of the format that was recognized.
        found: facts in the order found, such as tokens, layers, experts.
        lacks: keys of `LACKS`.
        assumed: what was inferred because the source does not say it.
        dropped: what was left out, how many, and why.
    """

    format: str
    version: str = ""
    found: dict[str, Any] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    dropped: list[tuple[str, int, str]] = field(default_factory=list)

    def drop(self, what: str, number: int, why: str) -> None:
        """Note that so many were left out; nothing when there were none."""
        if number:
            self.dropped.append((what, number, why))

    def lines(self) -> Iterator[str]:
        """The report as sentences for people."""
        facts = ", ".join(f"{name} {_shown(value)}" for name, value in self.found.items())
        version = f" ({self.version})" if self.version else ""
        yield f"{self.format}{version}: {facts}"
        for sentence in self.assumed:
            yield f"assumed: {sentence}"
        for what, number, why in self.dropped:
            yield f"left out: {number:,} {what}: {why}"
        for key in self.lacks:
            yield f"not in the source: {LACKS[key]}"

    def to_json(self) -> dict[str, Any]:
        """As kept in `runs.manifest`."""
        return {
            "format": self.format,
            "version": self.version,
            "found": dict(self.found),
            "assumed": list(self.assumed),
            "dropped": [{"what": what, "number": n, "why": why} for what, n, why in self.dropped],
        }


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)
