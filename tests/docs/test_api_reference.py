"""docs/reference/api.md is written from the signatures and docstrings of the public modules.

Guarantees: the page shows every public name with a plain signature; a docstring's `Arguments:`, `Returns:` and
`Raises:` become lists. Try: `make docs`, which writes the page.
"""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "api.md"
HEAD = """# Python reference

<!-- written by tests/docs/test_api_reference.py from the docstrings; `make docs` writes it anew -->

You can import everything on this page from your own program.

```python quick
from stillhouse.extract.store import Store

store = Store.open("teacher.zarr")
batch = store.gather(["84-121123-0001", "84-121123-0000"], store.resolve("minilm/*/6"))
print(batch)
```

```
<Gathered 2 utterances, 19 tokens of minilm>
  minilm/alone/6: [19, 384] float16
  minilm/both:64/6: [19, 384] float16
```

More examples are in [python.md](python.md), [transfer.md](../guide/transfer.md) and [rnnt-loss.md](rnnt-loss.md).
Letters of shapes: B batch, T frames, U units, V vocabulary, N tokens, D width.
"""
MODULES = {
    "stillhouse.data.manifest": ["Corpus", "Utterance", "read_manifest", "write_manifest"],
    "stillhouse.extract.store": None,  # all that __all__ names
    "stillhouse.extract.store.batches": ["batches"],
    "stillhouse.extract.adapters": None,
    "stillhouse.extract.adapters.dataset": ["States"],
    "stillhouse.extract.adapters.labelled": ["to_xarray"],
    "stillhouse.distill": None,
    "stillhouse.train": None,
    "stillhouse.train.rnnt": None,
}
WIDTH = 100  # characters of a signature on one line
SECTION = r"(?:Arguments|Attributes|Fields|Returns|Yields|Raises|Source):[ ]*\n(?= )"
ITEMS = {"Arguments", "Attributes", "Fields", "Raises"}  # sections whose entries have names
BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}  # of annotated_types


def page() -> str:
    parts = [HEAD]
    for name, public in MODULES.items():
        module = importlib.import_module(name)
        parts.append(f"## `{name}`\n\n{(inspect.getdoc(module) or '').splitlines()[0]}\n")
        for thing in public or module.__all__:
            parts += entry(getattr(module, thing), thing, "###")
    return "\n".join(parts)


def entry(thing: object, name: str, level: str) -> Iterator[str]:
    """The heading, signature and docstring of a function or class, and those of the class's methods."""
    yield f"{level} `{name}`\n"
    yield fence(signature(thing, name.split(".")[-1]))
    if text := rendered(docstring(thing)):
        yield text
    if inspect.isclass(thing):
        if bounds := list(field_bounds(thing)):
            yield "\n".join(bounds) + "\n"
        for member, value in members(thing):
            if isinstance(value, property):
                yield f"#### `{name}.{member}`\n"
                kind = inspect.signature(value.fget).return_annotation  # type: ignore[arg-type]
                yield fence(f"{member}: {plain(kind)}")
                yield rendered(docstring(value))
            else:
                yield from entry(getattr(thing, member), f"{name}.{member}", "####")


def members(cls: type) -> Iterator[tuple[str, object]]:
    """Public methods and properties with a docstring, those of a base class first, in the order of the source."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("stillhouse."):
            continue
        for name, value in vars(base).items():
            shown = isinstance(value, property | classmethod | staticmethod) or inspect.isfunction(value)
            if shown and not name.startswith("_") and name not in seen and docstring(getattr(cls, name, None) or value):
                seen.add(name)
                yield name, value


def docstring(thing: object) -> str:
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else getattr(thing, "__doc__", None)
    text = inspect.cleandoc(text or "")
    return "" if re.match(r"\w+\(", text) else text  # dataclasses write their signature there


# --- signatures ---------------------------------------------------------------------------------------------------


def signature(thing: object, name: str) -> str:
    """The call as one would write it, an argument on each line if it is long."""
    try:
        whole = inspect.signature(thing)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return name
    parameters = [p for p in whole.parameters.values() if p.name not in ("self", "cls")]
    shown: list[str] = []
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not any(s.startswith("*") for s in shown):
            shown.append("*")
        shown.append(parameter(p))
    returns = "" if whole.return_annotation in (whole.empty, None, "None") else f" -> {plain(whole.return_annotation)}"
    line = f"{name}({', '.join(shown)}){returns}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {s},\n" for s in shown) + f"){returns}"


def parameter(p: inspect.Parameter) -> str:
    stars = "*" * (1 * (p.kind is p.VAR_POSITIONAL) + 2 * (p.kind is p.VAR_KEYWORD))
    text = f"{stars}{p.name}" + ("" if p.annotation is p.empty else f": {plain(p.annotation)}")
    if p.default is p.empty:
        return text
    default = repr(p.default)
    return f"{text} = {'…' if default.startswith('<') else default}"


def plain(annotation: Any) -> str:
    """A type as the source writes it: without modules of classes, and without the conditions of `Annotated`."""
    if isinstance(annotation, str):
        return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Z])", "", annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return plain(arguments[0])
    if origin in (Union, types.UnionType):
        return " | ".join(map(plain, arguments))
    if annotation is None or annotation is type(None):
        return "None"
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(plain, arguments))}]" if arguments else name


def field_bounds(cls: type) -> Iterator[str]:
    """A line for each field of a pydantic model whose value has bounds."""
    for name, field in getattr(cls, "model_fields", {}).items():
        conditions = [*field.metadata, *(m for a in get_args(field.annotation) for m in getattr(a, "__metadata__", ()))]
        conditions += [m for c in conditions for m in getattr(c, "metadata", ())]
        limits = [(word, getattr(c, key)) for key, word in BOUNDS.items() for c in conditions if hasattr(c, key)]
        words = [word.format(f"{limit:,.0f}" if limit == int(limit) else limit) for word, limit in limits]
        if words:
            yield f"- `{name}` is {' and '.join(words)}."


# --- docstrings ---------------------------------------------------------------------------------------------------


def rendered(text: str) -> str:
    """A docstring as Markdown: sections as lists, aligned text as it stands, the rest as paragraphs."""
    parts: list[str] = []
    for block in re.split(rf"\n\s*\n|\n(?={SECTION})", text):
        heading = re.match(SECTION, block)
        if heading:
            parts.append(section(block.split(":")[0], textwrap.dedent(block[heading.end() :])))
        elif block.startswith(" ") or re.search(r"^\S.*\S {2,}\S", block, re.MULTILINE):
            parts.append(fence(block).strip())
        elif block:
            parts.append(escaped(block))
    return "\n\n".join(parts) + "\n" if parts else ""


def section(name: str, body: str) -> str:
    """`Arguments:` with an entry on each unindented line becomes a list; `Returns:` stays a paragraph."""
    entries: list[str] = []
    for line in body.splitlines():
        new = not line.startswith(" ") and (not entries or name not in ITEMS or re.match(r"[\w*, ]+:", line))
        if new and (name in ITEMS or not entries):
            entries.append(line)
        else:
            entries[-1] += f" {line.strip()}"
    if name not in ITEMS:
        return f"**{name}:** {escaped(entries[0])}"
    named = [
        re.sub(r"^([\w*, ]+?):", lambda m: ", ".join(f"`{n}`" for n in m[1].split(", ")) + ":", e) for e in entries
    ]
    return f"**{name}:**\n\n" + "\n".join(f"- {escaped(e)}" for e in named)


def escaped(text: str) -> str:
    """The same without what Markdown would take for its own, outside of code spans."""
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"[<*]|\](?=\()", r"\\\g<0>", p) for p in pieces)


def fence(text: str) -> str:
    return f"```text\n{text}\n```\n"


# --- tests --------------------------------------------------------------------------------------------------------


def test_the_reference_is_what_the_code_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "stale: make docs"


def test_everything_public_is_described() -> None:
    undescribed = [
        f"{name}.{public}"
        for name, chosen in MODULES.items()
        for public in chosen or importlib.import_module(name).__all__
        if not docstring(getattr(importlib.import_module(name), public))
    ]
    assert not undescribed, undescribed


def test_signatures_are_plain() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.findall(r"Annotated|FieldInfo|typing\.|Optional\[|ForwardRef", text)
    assert "start_s: float = 0.0" in text and "- `start_s` is at least 0 and at most 1,000,000,000." in text
    assert "on_missing: str = 'error'" in text


def test_docstrings_become_lists() -> None:
    text = (
        "Return a.\n\nArguments:\n    a: *one*,\n        or two.\n    b, c: `x*y`.\nReturns:\n    [N, D],\n    packed."
    )
    lists = "**Arguments:**\n\n- `a`: \\*one\\*, or two.\n- `b`, `c`: `x*y`.\n\n**Returns:** [N, D], packed.\n"
    assert rendered(text) == f"Return a.\n\n{lists}"
    assert rendered("Raises:\n    StoreError: damaged.") == "**Raises:**\n\n- `StoreError`: damaged.\n"
    assert rendered("a     one\nbcd   two") == "```text\na     one\nbcd   two\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
