"""Hints after a command failed: arguments in another order than the command takes them.

Guarantees: nothing is read but names and the first bytes of what the arguments name, and only after a failure.
Try: `stillhouse decode corpus.jsonl runs/kathleen features.h5`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

# What an argument takes, by its name in the commands.
EXPECTED = {
    "run": "a run",
    "corpus": "a corpus",
    "manifest": "a corpus",
    "features": "a feature file",
    "features_file": "a feature file",
    "store": "a store",
    "config": "a TOML file",
    "study": "a TOML file",
    "hypotheses": "a corpus",  # both are JSON lines
}
AUDIO = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aiff", ".sph"}


def kind_of(path: Path) -> str | None:
    """Return what lies at a path, in the words of EXPECTED, or "audio". None if it is something else or not there."""
    if path.is_dir():
        files = (("config.toml", "a run"), ("model.json", "a run"), ("store.json", "a store"))
        return next((kind for name, kind in (*files, ("corpus.jsonl", "a corpus")) if (path / name).exists()), None)
    if not path.is_file():
        return None
    by_name = {".jsonl": "a corpus", ".toml": "a TOML file", ".h5": "a feature file", ".hdf5": "a feature file"}
    return "audio" if path.suffix.lower() in AUDIO else by_name.get(path.suffix)


def hint(cli: click.Command, args: Sequence[str]) -> str | None:
    """Return a sentence on two arguments of a command line that seem swapped, or None."""
    try:
        given = list(_given(cli, args))
    except (click.ClickException, click.exceptions.Exit, OSError, ValueError):
        return None
    found = [(name, EXPECTED.get(name), kind_of(Path(value)), value) for name, value in given]
    for at, (a, a_takes, a_is, a_value) in enumerate(found):
        for b, b_takes, b_is, b_value in found[at + 1 :]:
            crossed = a_is is not None and a_is == b_takes != a_takes and b_is in (a_takes, None)
            crossed |= b_is is not None and b_is == a_takes != b_takes and a_is in (b_takes, None)
            if crossed:
                what = f"{a_value} is {a_is}" if a_is is not None else f"{b_value} is {b_is}"
                return f"{a.upper()} and {b.upper()} seem swapped: {what}"
    audio = [value for _, _, kind, value in found if kind == "audio"]
    return f"{audio[1]} is a second audio file, and the command takes one" if len(audio) > 1 else None


def _given(cli: click.Command, args: Sequence[str]) -> list[tuple[str, str]]:
    """Return (name, value) of the arguments that are paths, in order."""
    context = cli.make_context("stillhouse", list(args), resilient_parsing=True)
    while isinstance(context.command, click.Group):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not rest:
            return []
        name, command, rest = context.command.resolve_command(context, rest)
        if command is None:
            return []
        context = command.make_context(name, rest, parent=context, resilient_parsing=True)
    paths: list[tuple[str, Any]] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if isinstance(parameter, click.Argument) and isinstance(value, (str, os.PathLike)):
            paths.append((parameter.name or "", os.fspath(value)))
    return [*paths, *(("", word) for word in context.args)]  # What is left over are arguments that it does not take.
