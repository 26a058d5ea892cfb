"""What the commands of `inspect` share: options, completion, and how facts are printed.

Invariant: data goes to stdout, everything else to stderr; completion says nothing where no store opens.
Exercised by: `stillhouse inspect ls STORE --json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..store import View

F = TypeVar("F", bound=Callable[..., Any])
STORE = click.Path(path_type=Path)
REPORT_EVERY_S = 5.0


def complete_view(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """View addresses of the store on the command line; after a comma, of the next one. Nothing where none opens."""
    store = _completing(ctx)
    before, comma, last = incomplete.rpartition(",")
    addresses = [] if store is None else [v.address for v in store.planned_views]
    return [before + comma + a for a in addresses if a.startswith(last)]


def complete_utterance(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Ids of the store that begin so, at most a hundred."""
    store = _completing(ctx)
    ids = [] if store is None else store.utterance_ids
    return [i for i in ids if i.startswith(incomplete)][:100]


def _completing(ctx: click.Context) -> Any:
    """The store of a half-written command line, or None. click has not bound it while an option lacks its value."""
    from ...data.errors import StillhouseError
    from ..store import Store

    path = ctx.params.get("store") or next(iter(ctx.args), None)
    try:
        return None if path is None else Store.open(path)
    except (StillhouseError, OSError):
        return None


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Facts as JSON (docs/reference/inspect.md).")(command)


def views_option(command: F) -> F:
    return click.option(
        "--view",
        "views",
        multiple=True,
        metavar="VIEW",
        shell_complete=complete_view,
        help="As in minilm/alone/6, minilm/*/3,6 or */*/last. May be given several times. Default: all.",
    )(command)


def sample_options(tokens: str) -> Callable[[F], F]:
    """--tokens and --seed of what is computed from a sample, of so many by default."""

    def both(command: F) -> F:
        command = click.option("--seed", default=0, show_default=True, help="Of the sample.")(command)
        least = click.IntRange(min=4)
        shown = f"{tokens}, fewer of wide or many views"
        return click.option("--tokens", show_default=shown, type=least, help="In the sample of each view.")(command)

    return both


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
            self.fail(f"{value!r} is no share; give 5% or 0.05", param, ctx)
        return number


def chosen_views(store: Any, patterns: tuple[str, ...], planned: bool = False) -> list[View]:
    """The views that patterns name; all where there are none. Of those that the store has states of, complete or not,
    which is told on stderr; with `planned`, also of those that it has none of yet.
    """
    from ...data.errors import NoStoreError, first_few

    among = store.planned_views
    if not planned:
        among = [v for v in among if store.available(v).any()]
        if not among:
            raise NoStoreError(
                "nothing is extracted yet", where=store.address, remedy="stillhouse extract CORPUS STORE …"
            )
    chosen = store.resolve(patterns or ("*/*/*",), among)
    if not planned:
        complete = set(store.views)
        begun = [v.address for v in chosen if v not in complete]
        if begun:
            click.echo(f"not complete, taken as far as they go: {first_few(begun)}", file=sys.stderr)
    return chosen


def whole_views(store: Any, views: list[View]) -> list[View]:
    """Those that are not damaged; the others are told on stderr, and are an error if there are no more."""
    from ...data.errors import StoreError
    from ..inspect.sample import whole

    good, damage = whole(store, views)
    for text in damage:
        click.echo(f"left out: {text}", file=sys.stderr)
    if not good:
        raise StoreError(
            "all of these views are damaged", where=store.address, remedy="stillhouse inspect verify STORE"
        )
    return good


def print_fact(fact: Any, kind: str, as_json: bool, render: Callable[[Any], str]) -> None:
    from ..inspect.facts.store import as_json as to_json

    if as_json:
        dump(to_json(fact, kind))
    else:
        click.echo(render(fact))


def dump(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def progress() -> Callable[[Any], None]:
    """A line on stderr every few seconds."""
    last = time.perf_counter()

    def report(what: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= REPORT_EVERY_S:
            last = now
            click.echo(f"looking at {what}", file=sys.stderr)

    return report
