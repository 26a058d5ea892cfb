"""`stillhouse doctor`: print the checks.

Guarantees: the exit code is 1 if a check is broken, else 0.
Try: `stillhouse doctor`.
"""

from __future__ import annotations

from pathlib import Path

import click

from .paths import PATH

SHOWN = {"ok": ("ok", "green"), "low": ("low", "yellow"), "absent": ("-", "blue"), "broken": ("BROKEN", "red")}
GROUPS = {"python": "", "library": "libraries", "gpu": "GPU", "extra": "extras", "machine": "machine"}


@click.command()
@click.option(
    "--path",
    type=PATH,
    default=Path("."),
    show_default="the current folder",
    help="Folder for stores. Its file system and free space are checked.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON (see docs/reference/doctor.md).")
@click.pass_context
def doctor(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Check your libraries, GPU, audio formats and disk, and show what to install.

    The exit code is 1 if anything is broken. Each library is imported in its own process, which takes some seconds.

    Example: stillhouse doctor
    """
    import json

    from ..doctor.checks import as_json as to_json
    from ..doctor.checks import examine

    checks = examine(path)
    if as_json:
        click.echo(json.dumps(to_json(checks), indent=1, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(checks)))
    if any(c.state == "broken" for c in checks):
        ctx.exit(1)


def _lines(checks: list) -> list[str]:
    import shutil
    import textwrap

    columns = max(60, min(140, shutil.get_terminal_size((100, 24)).columns))
    names = max(len(c.name) for c in checks)
    lines: list[str] = []
    group = ""
    for check in checks:
        if GROUPS[check.group] != group:
            group = GROUPS[check.group]
            lines += ["", click.style(group, bold=True)]
        mark, colour = SHOWN[check.state]
        head = f"{click.style(f'{mark:6}', fg=colour, bold=check.state == 'broken')}  {check.name:{names}}  "
        text = check.what if check.remedy is None else f"{check.what} → {check.remedy}"
        rest = " " * (names + 10)
        wrapped = textwrap.wrap(text, columns - len(rest), break_long_words=False, break_on_hyphens=False) or [""]
        lines += [head + wrapped[0], *(rest + line for line in wrapped[1:])]
    broken = sum(c.state == "broken" for c in checks)
    word = "is" if broken == 1 else "are"
    lines += ["", f"{broken} {word} broken: follow the → above" if broken else "Everything that is needed works."]
    return lines
