"""The tree of commands, and shell lines held against it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from stillhouse.cli import cli
from stillhouse.train.demo.stories import read_stories


def walk(command: click.Command = cli, path: tuple[str, ...] = ("stillhouse",)) -> Iterator[tuple[str, click.Command]]:
    """("stillhouse corpus check", command) of every group and command, in the order of --help."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from walk(inner, (*path, name))


def pipeline(line: str) -> list[list[str]]:
    """The words of each command of a shell line, without redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if set(word) <= set("|&;"):
            commands.append([])
        elif set(word) <= set("<>"):
            skip = True  # the file's name comes next
        elif not skip:
            commands[-1].append(word)
        else:
            skip = False
    return [c for c in commands if c]


def check(words: list[str]) -> None:
    """Errors: click.UsageError unless these words, "stillhouse" first, are a command with its options and arguments."""
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group):
        if not rest or rest[0].startswith("-"):
            break
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            raise click.UsageError(f"no command {rest[0]!r} in {' '.join(words)}")
        command, rest = found, rest[1:]
    context = click.Context(command)
    values, left, _ = command.make_parser(context).parse_args(list(rest))
    if left:
        raise click.UsageError(f"too much: {left} in {' '.join(words)}")
    for param in command.params:
        value = values.get(param.name or "")
        given = value if isinstance(value, (list, tuple)) else [value]
        given = [v for v in given if isinstance(v, str)]
        if param.required and not given:
            raise click.UsageError(f"{param.name} is missing in {' '.join(words)}")
        if not isinstance(param.type, (click.Path, click.File)):
            for v in given:
                param.type(v, param, context)


@pytest.fixture(scope="session")
def shell() -> SimpleNamespace:
    return SimpleNamespace(walk=walk, pipeline=pipeline, check=check)


# An utterance of each, named as LibriSpeech names them
CHAPTER = (
    "SHE HEARD HIM BEFORE SHE SAW HIM",
    "HE CAME UP THE STAIRCASE SLOWLY WITH A LAMP IN ONE HAND",
    "THE NIGHT OUTSIDE WAS QUITE STILL",
    "NO STAIRCASE IN THAT HOUSE WAS EVER SILENT BY NIGHT",
)
STORIES = 4


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """The folder that test_blocks.py describes, its store made by the command itself."""
    folder = tmp_path_factory.mktemp("workshop")
    said = [("84-121123", f"84-121123-{k:04}", text) for k, text in enumerate(CHAPTER)]
    for story in read_stories()[:STORIES]:
        said += [(f"s{story.number}", f"s{story.number}-{k:02}", text) for k, text in enumerate(story.sentences)]
    entries = [json.dumps({"id": i, "text": text, "session": session}) for session, i, text in said]
    (folder / "corpus.jsonl").write_text("\n".join(entries) + "\n", encoding="utf-8")
    request = "--name minilm --layers 0,3,6 --context alone --context both:64 --transform sentence_case"
    paths = [str(folder / "corpus.jsonl"), str(folder / "corpus.zarr")]
    cli(["extract", *paths, "--teacher", str(minilm), *request.split()], standalone_mode=False)
    (folder / "teacher.zarr").symlink_to(folder / "corpus.zarr")
    return folder
