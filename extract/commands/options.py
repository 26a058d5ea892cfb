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
from click.shell_completion import CompletionItem

from ...data.commands import paths

if TYPE_CHECKING:
    from ..store import Store, View

EXISTING, NEW_FILE, PATH, STORE = paths.EXISTING, paths.NEW_FILE, paths.PATH, paths.STORE
F = TypeVar("F", bound=Callable[..., Any])
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
    return [i for i in ([] if store is None else store.utterance_ids) if i.startswith(incomplete)][:100]


def _completing(ctx: click.Context) -> Store | None:
    """The store of an unfinished command line, which click has not bound while an option lacks its value."""
    from ...data.errors import StillhouseError
    from ..store import Store

    path = ctx.params.get("store") or next(iter(ctx.args), None)
    try:
        return None if path is None else Store.open(path)
    except (StillhouseError, OSError):
        return None


def flag(name: str, text: str) -> Callable[[F], F]:
    """An option without a value; `--json` becomes the argument as_json."""
    names = (name, "as_json") if name == "--json" else (name,)
    return click.option(*names, is_flag=True, help=text)


def choice(name: str, values: Sequence[str], text: str) -> Callable[[F], F]:
    """An option with one of some values; the first is the default."""
    return click.option(name, default=values[0], show_default=True, type=click.Choice(values), help=text)


def number(name: str, default: int, text: str, least: int | None = None) -> Callable[[F], F]:
    """An option with a whole number, perhaps of at least `least`."""
    kind = click.INT if least is None else click.IntRange(min=least)
    return click.option(name, default=default, show_default=True, type=kind, help=text)


json_option = flag("--json", "Print the facts as JSON. docs/reference/inspect.md has the schemas.")
outcome_option = flag("--json", "Print the outcome as JSON.")
force_option = flag("--force", "Replace OUT if it exists.")
full_option = flag("--full", "Read all tokens instead of a sample.")
seed_option = number("--seed", 0, "Seed of the sample.")
split_option = click.option("--split", help="Use only these splits of the corpus, as in train,dev.")


class DtypeName(click.ParamType):
    """The name of a stored dtype, of which pq:M are many."""

    name = "dtype"
    listed = ("float16", "bfloat16", "float32", "int8")

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ...data.errors import UsageError
        from ..store.disk.layout import dtype_of

        try:
            return dtype_of(value).logical
        except UsageError as e:
            self.fail(f"{e.what}. Expected {e.expected}", param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(n) for n in (*self.listed, "pq:32") if n.startswith(incomplete)]


dtype_option = click.option(
    "--dtype",
    default="float16",
    show_default=True,
    type=DtypeName(),
    metavar="|".join([*DtypeName.listed, "pq:M"]),
    help="Dtype of the stored states. int8 takes half the space of float16, with an error of 1 % or less. pq:M has M "
    'codes of 8 bits a state, which `distance = "codes"` learns. Its error is large: `inspect info` gives it.',
)
_TRANSFORM = "Text transforms before tokenisation, joined by +, as in sentence_case or lower+no_punct."
transform_option = click.option("--transform", default="none", show_default=True, help=_TRANSFORM)
name_option = click.option("--name", help="Name of the teacher in the store. Default: last part of the model's name.")


def views_option(name: str) -> Callable[[F], F]:
    """The option that chooses views, by patterns."""
    text = "Views as in minilm/alone/6, minilm/*/3,6 or */*/last. You can repeat it. Default: all."
    return click.option(name, "views", multiple=True, metavar="VIEW", shell_complete=complete_view, help=text)


def sample_options(tokens: str) -> Callable[[F], F]:
    """--tokens and --seed of a command that reads a sample. `tokens` is the default, as text."""
    default, text = f"{tokens}, fewer if the views are wide or many", "Number of tokens in the sample of each view."
    option = click.option("--tokens", show_default=default, type=click.IntRange(min=4), help=text)
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


def open_views(
    path: Path, patterns: Sequence[str], planned: bool = False, axis: str | None = None
) -> tuple[Store, list[View]]:
    """Open a store, and choose the views that patterns name, or all views. Raises NoStoreError if there are none.

    With `axis`, "token" or "frame", only views of text teachers or of speech teachers are chosen from all, and others
    that are named are a UsageError. Views without any states are left out unless `planned` is set. A line on stderr
    names views that are not complete.
    """
    from ...data.errors import NoStoreError, UsageError, first_few
    from ..store import Store

    store = Store.open(path)
    among = store.planned_views
    if not planned:
        among = [v for v in among if store.available(v).any()]
        if not among:
            remedy = "stillhouse extract CORPUS STORE …"
            raise NoStoreError("nothing is extracted yet", where=store.address, remedy=remedy)
    chosen = store.resolve(tuple(patterns) or ("*/*/*",), among)
    fitting = [v for v in chosen if axis in (None, store.plan.teachers[v.teacher].axis)]
    if not fitting or (patterns and len(fitting) < len(chosen)):
        other = next(v for v in chosen if v not in fitting)
        kinds = ("a speech teacher", "text teachers") if axis == "token" else ("a text teacher", "speech teachers")
        names = " ".join(name for name, t in store.plan.teachers.items() if t.axis == axis)
        what = f"{other.address} is of {kinds[0]}, and this needs views of {kinds[1]}"
        raise UsageError(what, where=store.address, expected=f"views of {names}" if names else "another store")
    chosen = fitting
    complete = set(store.views)
    partial = [v.address for v in chosen if v not in complete]
    if partial and not planned:
        click.echo(f"these views are not complete yet: {first_few(partial)}", file=sys.stderr)
    return store, chosen


def open_undamaged(path: Path, patterns: Sequence[str], axis: str | None = None) -> tuple[Store, list[View]]:
    """Open a store as `open_views`, without damaged views, which stderr names. Raises StoreError if all are damaged."""
    from ...data.errors import StoreError
    from ..inspect.sample import undamaged

    store, chosen = open_views(path, patterns, axis=axis)
    views, damage = undamaged(store, chosen)
    for text in damage:
        click.echo(f"left out: {text}", file=sys.stderr)
    if not views:
        remedy = "stillhouse inspect verify STORE"
        raise StoreError("all of these views are damaged", where=store.address, remedy=remedy)
    return store, views


def print_fact(
    fact: Any, kind: str, as_json: bool, render: Callable[[Any], str], listed: tuple[str, str] | None = None
) -> None:
    """Print a fact as text or JSON. A list of facts is a JSON object of the schema and with the key of `listed`."""
    from ..inspect.facts.store import as_json as to_json

    if not as_json:
        click.echo(render(fact))
        return
    if listed is None:
        value = to_json(fact, kind)
    else:
        value = {"schema": f"stillhouse.inspect.{listed[0]}/1", listed[1]: [to_json(f, kind) for f in fact]}
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


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
