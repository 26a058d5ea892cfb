"""The command report. Try: `stillhouse report --help`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ...data.commands.paths import PATH


@click.command()
@click.argument("run", type=PATH)
@click.argument("page", required=False, type=PATH)
@click.option("--examples", type=click.IntRange(min=0), default=24, show_default=True,
              help="Show so many utterances of the last evaluation.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace PAGE, whatever it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON, and write no page.")
def report(run: Path, page: Path | None, examples: int, force: bool, as_json: bool) -> None:
    """Show a run, also while it trains, as one HTML page: PAGE, or RUN/report.html.

    The page shows settings, curves, error rates, times by part, checkpoints and the hypotheses of the last evaluation.
    It needs no other file and no network.

    Example: stillhouse report runs/kathleen
    """
    from dataclasses import asdict

    from ...data.errors import UsageError
    from ...data.files.atomic import write_atomic
    from ...data.files.outputs import check_file, is_page
    from ..report.run import read_run, render

    contents = read_run(run, examples)
    if as_json:
        click.echo(json.dumps(asdict(contents.facts), ensure_ascii=False))
        return
    path = page or run / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise UsageError("the page is an HTML file", where=path, expected="a name that ends in .html")
    check_file(path, own=is_page, force=force)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, render(contents))
    click.echo(path)
