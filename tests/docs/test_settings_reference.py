"""docs/reference/settings.md is written from train/config/sections.py; every section and setting is described.

Write it anew after a setting has changed: make docs (python tests/docs/test_settings_reference.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stillhouse.train.config import Config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "settings.md"
HEAD = """# Settings of a recipe

<!-- written by tests/docs/test_settings_reference.py from train/config/sections.py; `make docs` writes it anew -->

A recipe is a TOML file with the settings of a training run. `--set` changes one of them. A setting that does not exist
is an error, which names the nearest ones:

```sh quick
stillhouse train recipes/kathleen.toml --set optim.stepz=100 || true
```

    error: --set optim.stepz=100: optim.stepz: no such setting; did you mean optim.steps?

The tables below hold every section of a recipe. Only `corpus`, `features` and `units` of `[data]` have no default.
Values of `--set` are TOML, and a word needs no quotes: `--set model.predictor=lstm --set data.speeds=[0.9,1.0,1.1]`.
A run writes all of its settings to `RUN/config.toml`. [Models](../guide/models.md), [training](../guide/training.md)
and [transfer](../guide/transfer.md) explain what the settings do. [Sizing](../guide/sizing.md) helps to choose them.
"""
TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SCHEMA = Config.model_json_schema()


def section(name: str) -> dict[str, Any]:
    """The JSON schema of a section."""
    return SCHEMA["$defs"][SCHEMA["properties"][name]["$ref"].rpartition("/")[2]]


def values(schema: dict[str, Any]) -> str:
    """What a setting may be, in words."""
    if "anyOf" in schema:
        (schema,) = (option for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if schema["type"] == "array":
        items = schema.get("prefixItems", [schema.get("items", {})])
        return f"list of {len(items)}: {values(items[0])}" if len(items) > 1 else f"list: {values(items[0])}"
    kind = "path" if schema.get("format") == "path" else TYPES[schema["type"]]
    bounds = [f"{sign} {schema[key]:,}".replace(",", " ") for key, sign in BOUNDS.items() if key in schema]
    return " ".join([kind, " and ".join(bounds)]).strip()


def default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "required"
    return "none" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"


def page() -> str:
    parts = [HEAD]
    for name in SCHEMA["properties"]:
        rows = [
            f"| `{setting}` | {values(schema)} | {default(schema)} | {schema['description']} |"
            for setting, schema in section(name)["properties"].items()
        ]
        table = ["| setting | values | default | |", "|---|---|---|---|", *rows]
        parts.append(f"## {name}\n\n{section(name)['description']}\n\n" + "\n".join(table) + "\n")
    return "\n".join(parts)


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "stale: make docs"


def test_every_section_and_setting_is_described_in_whole_sentences() -> None:
    texts = {name: section(name).get("description", "") for name in SCHEMA["properties"]}
    for name in [*texts]:
        settings = section(name)["properties"].items()
        texts |= {f"{name}.{setting}": schema.get("description", "") for setting, schema in settings}
    wrong = [name for name, text in texts.items() if not (text[:1].isupper() or text[:1].islower()) or text[-1] != "."]
    assert not wrong, wrong


def test_ranges_and_choices_are_named() -> None:
    model = section("model")["properties"]
    assert values(model["dim"]) == "whole number ≥ 8 and ≤ 65 536" and default(model["dim"]) == "`176`"
    assert values(model["subsampling"]) == "`1`, `2`, `3`, `4`, `6`, `8`"
    assert values(section("optim")["properties"]["betas"]) == "list of 2: number ≥ 0 and < 1"
    assert values(section("transfer")["properties"]["decay"]) == "`linear`, `cosine`"
    assert default(section("data")["properties"]["corpus"]) == "required"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
