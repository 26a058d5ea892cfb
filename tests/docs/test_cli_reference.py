"""docs/reference/cli.md is written from the commands; every command and option is described, every example parses.

Write it anew after a command has changed: make docs (python tests/docs/test_cli_reference.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "cli.md"
HEAD = """# The command line

<!-- written by tests/docs/test_cli_reference.py from the commands; `make docs` writes it anew -->

Every command prints its data to standard output and everything else to standard error; `--help` shows what is below.
Exit codes: 0 done, 1 failed or findings, 2 usage, 3 some utterances failed, 10 no store, 11 locked, 12 stale or
incompatible, 130 interrupted. `stillhouse --debug COMMAND` shows the traceback of an error.
"""
EXAMPLE = re.compile(r"Example: (stillhouse\b.*(?:\\\n.*)*)", re.MULTILINE)


def told(command: click.Command) -> str:
    """Help and epilog as they stand in the source, without click's own marks."""
    text = "\n\n".join(filter(None, [command.help, command.epilog]))
    return text.split("\f")[0].replace("\b\n", "")


def paragraphs(text: str) -> tuple[list[str], list[str]]:
    """(paragraphs, examples) of a help text; each example on one line."""
    said, examples = [], []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        flat = " ".join(paragraph.split())
        found = flat.split("Example: ")
        if found[0]:
            said.append(found[0].strip())
        examples += [e.strip() for e in found[1:]]
    return said, examples


def names(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        name = (param.metavar or str(param.name).upper()) + ("…" if param.nargs == -1 else "")
        return f"`{name}`" if param.required else f"`[{name}]`"
    flags = ", ".join(param.opts)
    if param.secondary_opts:
        return f"`{flags}` / `{', '.join(param.secondary_opts)}`"
    value = "" if getattr(param, "is_flag", False) or getattr(param, "count", False) else f" {kind(param)}"
    return f"`{flags}{value}`"


def kind(param: click.Parameter) -> str:
    if param.metavar:
        return param.metavar
    if isinstance(param.type, click.Choice):
        return "|".join(map(str, param.type.choices))
    return {"path": "PATH", "text": "TEXT", "integer": "N", "integer range": "N", "float": "X", "float range": "X"}.get(
        param.type.name, param.type.name.upper()
    )


def about(param: click.Option) -> str:
    parts = [(param.help or "").strip()]
    limits = [
        f"{sign} {value}"
        for sign, value in (("≥", getattr(param.type, "min", None)), ("≤", getattr(param.type, "max", None)))
        if value is not None
    ]
    if limits:
        parts.append(f"{' and '.join(limits)}.")
    if param.required:
        parts.append("Required.")
    if param.show_default and not callable(param.default):
        value = param.default
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        if isinstance(param.show_default, str):
            shown = param.show_default
        parts.append(f"Default: `{shown}`.")
    if param.envvar:
        parts.append(f"Or by `{param.envvar}`.")
    return " ".join(p for p in parts if p).replace("|", "\\|")


def section(path: str, command: click.Command) -> str:
    said, examples = paragraphs(told(command))
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    usage = " ".join([path, *(["[OPTIONS]"] if options else []), *(names(a).strip("`") for a in arguments)])
    level = "##" if path.count(" ") < 2 else "###"
    if isinstance(command, click.Group):
        context = click.Context(command)
        inner = [f"[`{n}`](#{anchor(f'{path} {n}')})" for n in command.list_commands(context)]
        return "\n\n".join([f"{level} {path}", *said, ", ".join(inner)])
    parts = [f"{level} {path}", f"    {usage}", *said]
    if options:
        rows = [f"| {names(o).replace('|', chr(92) + '|')} | {about(o)} |" for o in options]
        parts.append("\n".join(["| option | |", "|---|---|", *rows]))
    parts += [f"    {e}" for e in examples]
    return "\n\n".join(parts)


def anchor(heading: str) -> str:
    return heading.lower().replace(" ", "-")


def page(walk) -> str:
    sections = [section(path, command) for path, command in walk() if path != "stillhouse"]
    return HEAD + "\n" + "\n\n".join(sections) + "\n"


def test_the_page_is_what_the_commands_say(shell: SimpleNamespace) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(shell.walk), "stale: make docs"


def test_every_command_is_described_with_an_example_that_parses(shell: SimpleNamespace) -> None:
    wrong = []
    for path, command in shell.walk():
        said, examples = paragraphs(told(command))
        if not said:
            wrong.append(f"{path}: no help")
        if isinstance(command, click.Group):
            continue
        if not any(e.startswith(f"{path} ") or e == path for e in examples):
            wrong.append(f"{path}: no `Example: {path} …` in its help or epilog")
        for example in examples:
            for words in shell.pipeline(example):
                try:
                    if words[0] == "stillhouse":
                        shell.check(words)
                except click.UsageError as e:
                    wrong.append(f"{path}: its example does not parse: {e.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_every_option_and_argument_is_described(shell: SimpleNamespace) -> None:
    wrong = []
    for path, command in shell.walk():
        text = told(command)
        for param in command.params:
            if isinstance(param, click.Option):
                if not param.help:
                    wrong.append(f"{path} {param.opts[-1]}: no help")
            elif not isinstance(command, click.Group):
                name = (param.metavar or str(param.name)).upper()
                if not obvious(name) and not all(part in text for part in re.findall("[A-Z]+", name)):
                    wrong.append(f"{path} {name}: not in its help")
    assert not wrong, "\n".join(wrong)


def obvious(name: str) -> bool:
    """What docs/glossary.md defines."""
    return name in {"CORPUS", "STORE", "MANIFEST", "FEATURES", "RUN", "UNITS", "UTTERANCE"}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("stillhouse inspect info", "missing"),
        ("stillhouse inspect look s", "no command"),
        ("stillhouse inspect info s --deep", "No such option"),
        ("stillhouse inspect info s t", "too much"),
        ("stillhouse inspect stats s --tokens few", "not a valid"),
    ],
)
def test_a_wrong_example_would_be_seen(shell: SimpleNamespace, line: str, wrong: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        shell.check(line.split())
    assert wrong in caught.value.format_message()


def test_a_pipeline_is_cut(shell: SimpleNamespace) -> None:
    line = "stillhouse decode a b c --split 'x y' > hyp.jsonl | stillhouse score - && make  # or not"
    assert shell.pipeline(line) == [
        ["stillhouse", "decode", "a", "b", "c", "--split", "x y"],
        ["stillhouse", "score", "-"],
        ["make"],
    ]


if __name__ == "__main__":
    from conftest import walk

    PAGE.write_text(page(walk), encoding="utf-8")
    print(PAGE)
