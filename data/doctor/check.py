"""One line of `stillhouse doctor`, and its JSON.

Invariant: the schema `stillhouse.doctor/1` only grows. Exercised by: `stillhouse doctor --json`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "low", "absent", "broken"]


@dataclass(frozen=True)
class Check:
    """`state`: "ok"; "low" works, but not well; "absent" is not needed by everyone; "broken" has to be mended."""

    group: str  # "python", "library", "gpu", "extra" or "machine"
    name: str
    state: State
    what: str
    remedy: str | None = None


def as_json(checks: list[Check]) -> dict[str, Any]:
    """The schema is in docs/reference/doctor.md and only grows."""
    ok = not any(c.state == "broken" for c in checks)
    return {"schema": "stillhouse.doctor/1", "ok": ok, "checks": [asdict(c) for c in checks]}
