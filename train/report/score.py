"""The page of the errors of a set of hypotheses.

Guarantees: the page is written completely or not at all, and text of a transcript is shown as text.
Try: `stillhouse score HYP --html errors.html`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.errors import CorpusError
from ...data.files.atomic import write_atomic
from ...data.files.trouble import not_written
from .html import page


def write_page(path: Path, name: str, **values: Any) -> None:
    """Write the page of the hypotheses called `name`.

    values: `score`, `frequent` (from `frequent_errors`), `utterances` (from `worst_utterances`), `groups` (from
    `score_groups`), `by` (what the groups are), and `against` (the name of other hypotheses and the comparison with
    them, or None). Raises CorpusError if the page cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page("score.html.j2", f"Errors of {name}", **values))
    except OSError as e:
        raise not_written(CorpusError, e, path, "the page cannot be written") from e
