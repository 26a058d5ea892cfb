"""docs/reference/teachers.md says which architectures give exact states, and each row is measured anew.

Guarantees: a model that is called exact gave, in mixed batches, the states that transformers gives each text alone.
Try: `python tests/extract/teacher/test_architectures.py [KIND …]`, which writes the page, or only these rows, anew.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[2] / "lib"
if __name__ == "__main__":
    sys.path.insert(0, str(LIBRARY))

from architectures import Row, measure, measure_all, text_kinds  # noqa: E402

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "teachers.md"
HEAD = """# Architectures

<!-- the tables are written by tests/extract/teacher/test_architectures.py -->

This page says which language models of transformers {version} work as teachers, by architecture. Speech encoders are on
[another page](../guide/front-end.md#which-encoders). Each row was measured with a tiny
random model. Its texts went through Stillhouse in batches of mixed lengths, and through plain transformers one at a
time. *Exact* means that every state of every layer was equal up to rounding.

Before the first state of a store is written, `extract` makes the same comparison with your model and your corpus. It
compares the shortest and the longest windows, and parts that are longer than the windows and blocks of the model.
Then it chooses the largest batches that are exact:

- *Padded*: texts of different lengths share a batch. This is the fastest way.
- *Equal lengths*: only texts of equal length share a batch, because the model treats padding as text.
- *One at a time*: other texts of a batch change the states.
- *New modules*: the model changes itself when it runs. Each batch starts with new modules that share the loaded
  weights.

If no way is exact, `extract` refuses the model and says what differs. The choice is stored in the plan, so every
worker and every resumed run follow it. `extract --dry-run` prints it as `passes`.

The column `+block` says whether the contexts `past:N+block` are exact. The mask of blocks is combined with the
windows of each layer. A causal decoder does not need it. For a refused encoder use `past:N`.
"""
QUICK = [
    *("bert", "mobilebert", "convbert", "fnet", "yoso", "reformer", "modernbert", "big_bird", "nystromformer"),
    *("t5", "fsmt", "gpt2", "llama", "xlnet", "gemma3_text"),
]
_SHORT = [
    ("batches with padding", "padded"),
    ("batches of texts of equal length", "equal lengths"),
    ("one text at a time", "one at a time"),
]


def cells(row: Row) -> str:
    """A row as a line of the page's tables."""
    alone = row.alone
    if alone.startswith("exact"):
        alone = next(short for words, short in _SHORT if words in row.alone)
        alone += ", new modules" if "new modules" in row.alone else ""
    # Numbers of a message depend on the machine's last bits, and names of shapes on the model's sizes.
    return f"| {row.kind} | {row.direction or '–'} | {alone} | {re.sub(r':.*', '', row.block) or '–'} |"


def page(rows: list[Row]) -> str:
    from transformers import __version__

    exact = [r for r in rows if r.alone.startswith("exact")]
    refused = [r for r in rows if r.alone.startswith("refused")]
    rest = [r.kind for r in rows if r not in exact and r not in refused]
    table = ["| architecture | kind | batches | `+block` |", "|---|---|---|---|", *map(cells, exact)]
    parts = [HEAD.format(version=__version__), f"## Exact: {len(exact)}\n\n" + "\n".join(table) + "\n"]
    lines = [f"| {r.kind} | {said(r)} |" for r in refused]
    parts.append(f"## Refused: {len(refused)}\n\n| architecture | why |\n|---|---|\n" + "\n".join(lines) + "\n")
    parts.append(
        f"## Not measured: {len(rest)}\n\nThe test builds no tiny model of these, for example because they need images "
        f"or sound. `extract` compares them as any other: {', '.join(rest)}.\n"
    )
    return "\n".join(parts)


def said(row: Row) -> str:
    """Why an architecture is refused, without what differs from machine to machine."""
    return re.sub(r", by up to.*|: [A-Z]\w+Error: .*", "", row.alone.removeprefix("refused: ")).replace("|", "\\|")


def lines_of_page() -> list[str]:
    return PAGE.read_text(encoding="utf-8").splitlines()


def check(row: Row) -> None:
    line = f"| {row.kind} | {said(row)} |" if row.alone.startswith("refused") else cells(row)
    if row.alone.startswith("not"):
        assert re.search(rf"[ ,]{re.escape(row.kind)}[,.]", lines_of_page()[-1])
    else:
        assert line in lines_of_page(), line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", QUICK)
def test_an_architecture_is_as_the_page_says(kind: str) -> None:
    check(measure(kind))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_as_the_page_says() -> None:
    rows = list(measure_all(text_kinds()))
    assert page(rows).splitlines() == lines_of_page(), "stale: python tests/extract/teacher/test_architectures.py"


if __name__ == "__main__":
    measured = []
    for row in measure_all(sys.argv[1:] or text_kinds()):
        print(cells(row) if row.alone.startswith("exact") else f"| {row.kind} | {row.alone} |", flush=True)
        measured.append(row)
    if not sys.argv[1:]:
        PAGE.write_text(page(measured), encoding="utf-8")
