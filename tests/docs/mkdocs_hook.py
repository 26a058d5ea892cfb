"""Show code blocks of the pages on the site: Markdown knows a language behind the fence, but not the mark of a test."""

from __future__ import annotations

import re
from typing import Any

MARK = re.compile(r"^```(\w+) (?:quick|slow|needs-data) *$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page without the marks that test_blocks.py reads; mkdocs calls this for each page."""
    return MARK.sub(r"```\1", markdown)
