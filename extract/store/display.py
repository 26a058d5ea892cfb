"""How a store and a batch look where Python shows them: a few lines of text, or a table in a notebook.

Guarantees: showing never fails and reads no states. What a damaged store does not give is left out. This module takes
whatever it is given and imports none of the classes that it shows, because they import it.
Try: `pytest tests/extract/inspect/test_notebook.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ...data.errors import StillhouseError

MOST = 20  # rows of a table


def store_text(store: Any) -> str:
    """Return a store as a line, and a line for each teacher."""
    head, rows = _store(store)
    lines = [f"<Store {head}>"]
    for teacher, width, tokens, contexts, layers, dtype in rows:
        lines.append(f"  {teacher}: {width} wide, {tokens}, {dtype}; {contexts}; layers {layers}")
    return "\n".join(lines)


def store_html(store: Any) -> str:
    """Return a store as a table of its teachers."""
    head, rows = _store(store)
    return _html(f"Store {head}", ("teacher", "width", "states", "contexts", "layers", "dtype"), rows)


def gathered_text(batch: Any) -> str:
    """Return a batch as a line, and a line for each view."""
    head, rows = _gathered(batch)
    return "\n".join([f"<Gathered {head}>", *(f"  {view}: {shape} {dtype}" for view, shape, dtype in rows)])


def gathered_html(batch: Any) -> str:
    """Return a batch as a table of its views."""
    head, rows = _gathered(batch)
    return _html(f"Gathered {head}", ("view", "shape", "dtype"), rows)


def _store(store: Any) -> tuple[str, list[tuple[str, ...]]]:
    utterances = _or(lambda: f"{len(store.index):,} utterances", "utterances unknown")
    planned = store.planned_views
    complete = _or(lambda: len(store.views), None)
    if complete is None:
        state = f"{len(planned)} views, damaged"
    elif complete == len(planned):
        state = f"{complete} views, complete"
    else:
        state = f"{complete} of {len(planned)} views complete"
    rows: list[tuple[str, ...]] = []
    for name, settings in store.plan.teachers.items():
        tokens = _or(lambda name=name: f"{store.teacher(name).tokens:,}", "?")  # type: ignore[misc]
        tokens += f" {settings.axis}s"
        layers = ", ".join(map(str, sorted(settings.layers)))
        rows.append((name, str(settings.width), tokens, ", ".join(settings.contexts), layers, settings.dtype))
    return f"{store.address!r}: {utterances}, {state}", rows


def _gathered(batch: Any) -> tuple[str, list[tuple[str, ...]]]:
    sizes = [len(length) for length in batch.lengths.values()]
    head = f"{sizes[0] if sizes else 0} utterances"
    for teacher, length in batch.lengths.items():
        head += f", {int(length.sum()):,} {'tokens' if teacher in batch.token_id else 'frames'} of {teacher}"
    rows: list[tuple[str, ...]] = [
        (v.address, f"[{', '.join(map(str, x.shape))}]", str(x.dtype)) for v, x in batch.states.items()
    ]
    return head, rows


def _or(value: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return value()
    except (StillhouseError, OSError, ValueError, LookupError):
        return otherwise


def _html(head: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that inherits the page's colours, so that it can be read on light and dark."""
    cell = "padding:2px 12px 2px 0;text-align:left;border:0;background:none;color:inherit"
    top = "".join(f'<th style="{cell}">{escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{cell}">{escape(str(c))}</td>' for c in row) + "</tr>" for row in rows[:MOST]
    )
    more = f"<div>and {len(rows) - MOST} more</div>" if len(rows) > MOST else ""
    table = f'<table style="border-collapse:collapse"><tr>{top}</tr>{body}</table>'
    return f'<div style="overflow-x:auto"><div><b>{escape(head)}</b></div>{table}{more}</div>'
