"""The page of the errors of a set of hypotheses.

Guarantees: the page is written completely or not at all, and text of a transcript is shown as text.
Try: `stillhouse score HYP --html errors.html`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic
from ..score.alignment import AlignedUtterance
from ..score.groups import Group
from ..score.significance import SystemComparison
from ..score.wer import Score
from .html import page


def write_page(
    path: Path,
    name: str,
    score: Score,
    frequent: dict[str, list[tuple[str, int]]],
    utterances: Sequence[AlignedUtterance],
    groups: Sequence[Group] = (),
    by: str | None = None,
    against: tuple[str, SystemComparison] | None = None,
) -> None:
    """Write the page of the hypotheses called `name`.

    `frequent` comes from `frequent_errors`, `utterances` from `worst_utterances`. `by` says what the groups are, such
    as "speaker". `against` is the name of other hypotheses and the comparison with them. Raises CorpusError if the
    page cannot be written.
    """
    values = {"score": score, "frequent": frequent, "utterances": utterances, "groups": groups, "by": by}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page("score.html.j2", f"Errors of {name}", **values, against=against))
    except OSError as e:
        raise CorpusError(f"the page cannot be written: {e.strerror}", where=path) from e
