"""The errors of a set of hypotheses as one HTML page that needs nothing else.

Invariant: whatever stands in a transcript is shown as text. Exercised by `stillhouse score HYP --html errors.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic
from ..score.groups import Aligned, Group
from ..score.significance import SystemComparison
from ..score.wer import Score
from .html import page


def write_page(
    path: Path,
    title: str,
    score: Score,
    frequent: dict[str, list[tuple[str, int]]],
    utterances: Sequence[Aligned],
    groups: Sequence[Group] = (),
    by: str | None = None,
    against: tuple[str, SystemComparison] | None = None,
) -> None:
    """Write the page whole or not at all."""
    text = page(
        "score.html.j2",
        title=title,
        score=score,
        frequent=frequent,
        utterances=utterances,
        groups=groups,
        by=by,
        against=against,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as e:
        raise CorpusError(f"cannot write: {e.strerror}", where=path) from e
