"""docs/reference/api.md is written from the docstrings of the public modules; anew: make docs."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
HEAD = """# Python reference

<!-- written by tests/docs/test_api_reference.py from the docstrings; `make docs` writes it anew -->

What other programs may import. Letters of shapes: B batch, T frames, U units, V vocabulary, N tokens, D width. Examples
that run are in [python.md](python.md), [transfer.md](../guide/transfer.md) and [rnnt-loss.md](rnnt-loss.md).
"""
MODULES = {
    "stillhouse.data.manifest": ["Corpus", "Utterance", "read_manifest", "write_manifest"],
    "stillhouse.extract.store": None,  # all that __all__ names
    "stillhouse.extract.store.batches": ["batches"],
    "stillhouse.extract.adapters": None,
    "stillhouse.extract.adapters.dataset": ["States"],
    "stillhouse.extract.adapters.labelled": ["to_xarray"],
    "stillhouse.distill": None,
    "stillhouse.train.rnnt": None,
}


def page() -> str:
    parts = [HEAD]
    for name, chosen in MODULES.items():
        module = importlib.import_module(name)
        parts.append(f"## `{name}`\n\n{(inspect.getdoc(module) or '').splitlines()[0]}\n")
        for thing in chosen or module.__all__:
            parts += entry(getattr(module, thing), thing, "###")
    return "\n".join(parts)


def entry(thing: object, name: str, level: str) -> Iterator[str]:
    yield f"{level} `{name}`\n"
    yield block(f"{name.split('.')[-1]}{signature(thing)}", told(thing))
    if inspect.isclass(thing):
        for member, value in own(thing):
            if isinstance(value, property):
                yield f"#### `{name}.{member}`\n"
                yield block(member, told(value))
            else:
                yield from entry(getattr(thing, member), f"{name}.{member}", "####")


def own(cls: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties with a docstring, a base class's before, in the order of the source."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("stillhouse."):
            continue
        for name, value in vars(base).items():
            called = isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
            if called and not name.startswith("_") and name not in seen and told(getattr(cls, name, None) or value):
                seen.add(name)
                yield name, value


def told(thing: object) -> str:
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    text = inspect.cleandoc(text or "")
    return "" if re.match(r"\w+\(", text) else text  # what dataclass writes itself


def signature(thing: object) -> str:
    try:
        text = str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"<factory>|<function [^>]*>|<[\w.]+ object at [^>]*>|<built-in function empty>", "…", text)
    return text.replace("'", "") if "->" in text or ":" in text else text


def block(head: str, text: str) -> str:
    return "```text\n" + head + ("\n\n" + text if text else "") + "\n```\n"


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "stale: make docs"


def test_everything_public_is_described() -> None:
    undescribed = [
        f"{name}.{thing}"
        for name, chosen in MODULES.items()
        for thing in chosen or importlib.import_module(name).__all__
        if not told(getattr(importlib.import_module(name), thing))
    ]
    assert not undescribed, undescribed


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
