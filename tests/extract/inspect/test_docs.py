"""docs/reference/inspect.md describes every command, and its schemas are these dataclasses.

Its examples run in tests/docs/test_blocks.py. Write the schemas anew after a field has been added: make docs
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from stillhouse.extract.commands.inspect import inspect as group
from stillhouse.extract.inspect.facts import diff as differing
from stillhouse.extract.inspect.facts import export as exporting
from stillhouse.extract.inspect.facts import store as facts
from stillhouse.extract.inspect.facts import tree as layout
from stillhouse.extract.inspect.facts import utterance as showing
from stillhouse.extract.inspect.numbers import choose_views as choosing
from stillhouse.extract.inspect.numbers import neighbours, similarity, statistics
from stillhouse.extract.store.verify import verify

DOCS = Path(__file__).resolve().parents[3] / "docs" / "reference" / "inspect.md"
BEGIN, END = "<!-- schemas: written by tests/extract/inspect/test_docs.py -->", "<!-- end of schemas -->"
SCHEMAS = {
    "info": [facts.StoreFacts, facts.TeacherFacts],
    "view": [facts.ViewFacts],
    "utterance": [facts.UtteranceFacts],
    "show": [showing.Shown, showing.ShownTeacher, showing.TokenFacts, showing.ContextFacts, showing.ShownView],
    "verify": [facts.Verified, verify.StoreFinding],
    "statistics": [statistics.Statistics, statistics.Dimension],
    "similarity": [similarity.Similarity],
    "neighbours": [neighbours.Neighbours, neighbours.Neighbour],
    "comparison": [neighbours.NeighbourComparison, neighbours.Moved],
    "choice": [choosing.Choice, choosing.Probed, choosing.Suggested],
    "node": [layout.Node],
    "export": [exporting.ExportedStates],
    "diff": [
        differing.StoreDifference,
        differing.SettingDiffers,
        differing.UtterancesDiffer,
        differing.NumbersDiffer,
    ],
}


def schemas() -> str:
    parts = []
    for kind, classes in SCHEMAS.items():
        parts.append(f"### `stillhouse.inspect.{kind}/1`")
        for number, cls in enumerate(classes):
            source, about = inspect.getsource(cls), inspect.getdoc(cls) or ""
            name = "" if number == 0 else f"`{cls.__name__}`: "
            about = "" if about.startswith(f"{cls.__name__}(") else about
            if name or about:
                parts.append(f"{name}{about}".strip().removesuffix(":") if about else f"`{cls.__name__}`:")
            rows = ["| field | type | |", "|---|---|---|"]
            for field in dataclasses.fields(cls):
                comment = re.search(rf"^    {field.name}: [^#\n]*#\s*(.*)$", source, re.MULTILINE)
                kind_of = str(field.type).replace("|", "\\|")
                rows.append(f"| `{field.name}` | {kind_of} | {comment[1] if comment else ''} |")
            parts.append("\n".join(rows))
    return "\n\n".join(parts)


def test_the_schemas_are_the_dataclasses():
    text = DOCS.read_text(encoding="utf-8")
    written = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert written == schemas(), "stale: make docs"


def test_every_command_and_option_is_documented():
    text = DOCS.read_text(encoding="utf-8")
    for name, command in group.commands.items():
        assert f"stillhouse inspect {name} " in text, name
        for option in command.params:
            for flag in (o for o in option.opts if o.startswith("--")):
                assert flag in text, f"{name} {flag}"
        assert command.epilog and command.epilog.startswith("Example: stillhouse inspect "), name


if __name__ == "__main__":
    text = DOCS.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    DOCS.write_text(f"{head}{BEGIN}\n\n{schemas()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")
    sys.stdout.write(f"{DOCS}\n")
