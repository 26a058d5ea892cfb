"""What the commands of this folder share: options, completion by the shell, and printing.

Guarantees: data goes to stdout and everything else to stderr. Completion offers nothing if no store opens.
Try: `stillhouse inspect ls STORE --json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..store import Store, View

F = TypeVar("F", bound=Callable[..., Any])
STORE = click.Path(path_type=Path)
NEW_FILE = click.Path(path_type=Path, dir_okay=False)
PROGRESS_EVERY_S = 5.0


def complete_view(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the address of a view of the store on the command line. After a comma, complete the next address."""
    store = _completing(ctx)
    before, comma, last = incomplete.rpartition(",")
    addresses = [] if store is None else [v.address for v in store.planned_views]
    return [before + comma + a for a in addresses if a.startswith(last)]


def complete_utterance(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete the id of an utterance. At most a hundred ids are offered."""
    store = _completing(ctx)
    ids = [] if store is None else store.utterance_ids
    return [i for i in ids if i.startswith(incomplete)][:100]


def _completing(ctx: click.Context) -> Store | None:
    """The store of an unfinished command line, which click has not bound while an option lacks its value."""
    from ...data.errors import StillhouseError
    from ..store import Store

    path = ctx.params.get("store") or next(iter(ctx.args), None)
    try:
        return None if path is None else Store.open(path)
    except (StillhouseError, OSError):
        return None


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the facts as JSON. docs/reference/inspect.md has the schemas."
)
outcome_option = click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
force_option = click.option("--force", is_flag=True, help="Replace OUT if it exists.")
full_option = click.option("--full", is_flag=True, help="Read all tokens instead of a sample.")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of the sample.")
split_option = click.option("--split", help="Use only these splits of the corpus, as in train,dev.")
transform_option = click.option(
    "--transform",
    default="none",
    show_default=True,
    help="Text transforms before tokenisation, joined by +, as in sentence_case or lower+no_punct.",
)
dtype_option = click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=click.Choice(["float16", "bfloat16", "float32", "int8"]),
    help="Dtype of the stored states. int8 takes half the space of float16, with an error of 1 % or less.",
)
name_option = click.option("--name", help="Name of the teacher in the store. Default: last part of the model's name.")


def views_option(flag: str) -> Callable[[F], F]:
    """The option that chooses views, by patterns."""
    help_text = "Views as in minilm/alone/6, minilm/*/3,6 or */*/last. You can repeat it. Default: all."
    return click.option(flag, "views", multiple=True, metavar="VIEW", shell_complete=complete_view, help=help_text)


def sample_options(tokens: str) -> Callable[[F], F]:
    """--tokens and --seed of a command that reads a sample. `tokens` is the default, as text."""
    option = click.option(
        "--tokens",
        show_default=f"{tokens}, fewer if the views are wide or many",
        type=click.IntRange(min=4),
        help="Number of tokens in the sample of each view.",
    )
    return lambda command: option(seed_option(command))


class Share(click.ParamType):
    """ "5%" or "0.05" as 0.05."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            number = float(value.rstrip("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            number = -1.0
        if not 0 < number <= 1:
            self.fail(f"{value!r} is not a share; give 5% or 0.05", param, ctx)
        return number


def chosen_views(store: Store, patterns: Sequence[str], planned: bool = False) -> list[View]:
    """Return the views that patterns name, or all views.

    Views without any states are left out unless `planned` is set. A line on stderr names views that are not complete.

    Raises:
        NoStoreError: no view matches, or nothing is extracted yet.
    """
    from ...data.errors import NoStoreError, first_few

    among = store.planned_views
    if not planned:
        among = [v for v in among if store.available(v).any()]
        if not among:
            raise NoStoreError(
                "nothing is extracted yet", where=store.address, remedy="stillhouse extract CORPUS STORE …"
            )
    chosen = store.resolve(tuple(patterns) or ("*/*/*",), among)
    complete = set(store.views)
    partial = [v.address for v in chosen if v not in complete]
    if partial and not planned:
        click.echo(f"these views are not complete yet: {first_few(partial)}", file=sys.stderr)
    return chosen


def open_undamaged(path: Path, patterns: Sequence[str]) -> tuple[Store, list[View]]:
    """Open a store; return it with the chosen views that are not damaged. Lines on stderr name the damaged ones.

    Raises:
        StoreError: all of the views are damaged.
    """
    from ...data.errors import StoreError
    from ..inspect.sample import undamaged
    from ..store import Store

    store = Store.open(path)
    views, damage = undamaged(store, chosen_views(store, patterns))
    for text in damage:
        click.echo(f"left out: {text}", file=sys.stderr)
    if not views:
        remedy = "stillhouse inspect verify STORE"
        raise StoreError("all of these views are damaged", where=store.address, remedy=remedy)
    return store, views


def print_fact(fact: Any, kind: str, as_json: bool, render: Callable[[Any], str]) -> None:
    """Print one fact as JSON or as text."""
    from ..inspect.facts.store import as_json as to_json

    click.echo(_dumps(to_json(fact, kind)) if as_json else render(fact))


def print_facts(
    facts: Sequence[Any], schema: str, key: str, kind: str, as_json: bool, render: Callable[[Any], str]
) -> None:
    """Print several facts as one JSON object, with the facts under `key`, or as text."""
    from ..inspect.facts.store import as_json as to_json

    if as_json:
        entries = [to_json(f, kind) for f in facts]
        click.echo(_dumps({"schema": f"stillhouse.inspect.{schema}/1", key: entries}))
    else:
        click.echo(render(facts))


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False)


def progress(line: Callable[[Any], str] = "looking at {}".format) -> Callable[[Any], None]:
    """Return a callback that prints `line` of its argument to stderr, at most every five seconds."""
    last = time.perf_counter()

    def on_progress(what: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            click.echo(line(what), file=sys.stderr)

    return on_progress
