"""Read settings from TOML files and from `--set`, check them, and write them.

Guarantees: the message of each error names the file or the option that a wrong setting comes from.
Try: `stillhouse train CONFIG --set optim.lr=1e-3`.
"""

from __future__ import annotations

import json
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ...data.errors import ConfigError
from ...data.files.atomic import read_plain
from .sections import Config, TransferSettings

Kind = TypeVar("Kind", bound=BaseModel)
Layer = tuple[object, Mapping[str, Any]]  # where settings come from (a path or an option), and the settings


def load_config(
    path: Path, changes: Sequence[str] = (), options: Sequence[Layer] = (), *, saved: bool = False
) -> Config:
    """Read a TOML file and apply changes of the form `section.name=value`.

    Arguments:
        path: the TOML file.
        changes: as of `--set`. Values are TOML, and a bare word is a string.
        options: the settings of other options, each with the name of its option. They replace those of `changes`.
        saved: a run wrote the file, perhaps with an earlier version. See `without_removed`.

    Raises:
        ConfigError: names the setting, the file or the change that it comes from, and what is expected.
    """
    settings = without_removed(read_toml(path)) if saved else read_toml(path)
    return validated(Config, [(path, settings), *map(_change, changes), *options])


def without_removed(saved: Any) -> Any:
    """Return the settings that a run saved, without data.workers and data.worker_start.

    These settings were removed. They never changed a result, so a run that has them can be resumed and decoded.
    """
    data = saved.get("data") if isinstance(saved, Mapping) else None
    if not isinstance(data, Mapping):
        return saved
    return {**saved, "data": {k: v for k, v in data.items() if k not in ("workers", "worker_start")}}


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError, which names the file."""
    try:
        return tomllib.loads(read_plain(path).decode())
    except FileNotFoundError:
        raise ConfigError("no such file", where=path) from None
    except (OSError, ValueError, RecursionError) as e:  # ValueError: no UTF-8, no TOML, or a number without end
        raise ConfigError(f"not a readable TOML file: {e}", where=path) from None


def validated(kind: type[Kind], layers: Sequence[Layer]) -> Kind:
    """Lay settings over each other, section by section, and check them.

    Arguments:
        kind: the model of all settings.
        layers: pairs of a source and its settings. Later settings replace earlier ones.

    Raises:
        ConfigError: names each setting that is unknown or wrong, and the layer that it comes from.
    """
    tree: Mapping[str, Any] = {}
    for _, settings in layers:
        tree = merged(tree, settings)
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        problems: dict[str, list[str]] = {}
        for error in e.errors():
            sources = [source for source, settings in layers if _touches(settings, error)]
            problems.setdefault(str([layers[0][0], *sources][-1]), []).append(_problem(kind, error))
        raise ConfigError("; ".join(f"{source}: {'; '.join(texts)}" for source, texts in problems.items())) from None


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, section by section, with `changes` in the place of what they replace."""
    both = dict(tree)
    for key, value in changes.items():
        below = both.get(key)
        both[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return both


def _change(text: str) -> Layer:
    """One `--set`, as a layer of settings."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}", expected="section.name=value")
    settings: Any
    try:
        settings = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        settings = value
    for key in reversed(keys):
        settings = {key: settings}
    return f"--set {text}", settings


def _touches(settings: Any, error: ErrorDetails) -> bool:
    """Whether a layer has the setting of an error, or one of the settings that contradict each other."""
    if error["type"] == "value_error":
        sections = {name: values for name, values in settings.items() if isinstance(values, Mapping)}
        return any(f"{section}.{name}" in error["msg"] for section, values in sections.items() for name in values)
    for key in error["loc"]:
        if not isinstance(settings, Mapping):
            break  # the error is about an item of this setting's value
        if key not in settings:
            return False
        settings = settings[key]
    return True


def _problem(kind: type[BaseModel], error: ErrorDetails) -> str:
    name, value = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "value_error":  # one of the validators above, whose message names the settings
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "extra_forbidden":
        what = "section" if isinstance(value, Mapping) else "setting"
        return f"{name}: no such {what}{_hint(kind, *map(str, error['loc']))}"
    text = reprlib.repr(value)  # bounded in depth
    return f"{name}: {error['msg']} (got {text if len(text) <= 60 else text[:57] + '...'})"


def _hint(kind: Any, *path: str) -> str:
    """The end of an error message: the settings of this section, or else of others, that are spelt like `path`."""
    *above, key = path
    section = kind
    for name in above:
        section = section.model_fields[name].annotation if name in section.model_fields else TransferSettings
    near = [".".join([*above, name]) for name in get_close_matches(key, section.model_fields)]
    if not near:
        sections = {name: getattr(field.annotation, "model_fields", {}) for name, field in kind.model_fields.items()}
        near = [f"{s}.{n}" for s, names in sections.items() for n in get_close_matches(key, names, cutoff=0.8)]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    return f" (expected one of {', '.join(section.model_fields)})"


def dump_config(config: Config) -> str:
    """Return the settings as TOML, which load_config reads back to an equal Config."""
    return "\n".join(line for name, values in config.model_dump(mode="json").items() for line in _section(name, values))


def _section(name: str, values: Mapping[str, Any]) -> list[str]:
    """The lines of a section, then those of the sections below it."""
    below = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    # A JSON scalar or list of scalars is TOML as it stands. TOML has no null, and an absent setting means None.
    own = {key: value for key, value in values.items() if value is not None and key not in below}
    lines = [f"[{name}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in own.items()), ""]
    return lines + [line for key, value in below.items() for line in _section(f"{name}.{key}", value)]
