"""`stillhouse inspect`: look into a store. Facts come from the modules beside this one; here they are printed.

Invariant: data goes to stdout, everything else to stderr; `--json` prints what docs/inspect.md describes; what can be
told without reading states is told without reading them. Run: `stillhouse inspect info STORE`.
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


@click.group(epilog="STORE is the folder that stillhouse extract wrote. Exit codes: 1 findings, 10 no store.")
def inspect() -> None:
    """Look into a store, without a language model and without reading more than is shown."""


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
    from stillhouse.data.errors import StillhouseError

    from ..store import Store

    path = ctx.params.get("store") or next(iter(ctx.args), None)
    try:
        return None if path is None else Store.open(path)
    except (StillhouseError, OSError):
        return None


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Facts as JSON (docs/inspect.md).")(command)


def views_option(command: F) -> F:
    return click.option(
        "--view",
        "views",
        multiple=True,
        metavar="VIEW",
        shell_complete=complete_view,
        help="As in minilm/alone/6, minilm/*/3,6 or */*/last. May be given several times. Default: all.",
    )(command)


@inspect.command(epilog="Example: stillhouse inspect info corpus.zarr")
@click.argument("store", type=STORE)
@json_option
def info(store: Path, as_json: bool) -> None:
    """What STORE holds: teachers, contexts, layers, sizes, and whether it is complete."""
    from ..store import Store
    from . import facts, rendering

    found = facts.store_facts(Store.open(store))
    _print(found, "info", as_json, rendering.store)


@inspect.command(epilog="Example: stillhouse inspect ls corpus.zarr --utterances '84-*'")
@click.argument("store", type=STORE)
@click.argument("patterns", nargs=-1)
@click.option("--utterances", is_flag=True, help="List utterances; PATTERNS are globs on their ids.")
@json_option
@click.option("--jsonl", is_flag=True, help="One JSON object a line.")
def ls(store: Path, patterns: tuple[str, ...], utterances: bool, as_json: bool, jsonl: bool) -> None:
    """The views of STORE, those that match PATTERNS; or its utterances."""
    from ..store import Store
    from . import facts, rendering

    opened = Store.open(store)
    if utterances:
        listed: list[Any] = list(facts.utterance_facts(opened, patterns))
        kind, text = "utterance", rendering.utterances(listed)
    else:
        planned = opened.planned_views
        views = opened.resolve(patterns, planned) if patterns else planned
        listed = facts.view_facts(opened, views)
        kind, text = "view", rendering.views(listed)
    if jsonl:
        for fact in listed:
            click.echo(json.dumps(facts.as_json(fact, kind), ensure_ascii=False))
    elif as_json:
        entries = [facts.as_json(fact, kind) for fact in listed]
        name = "utterances" if utterances else "views"
        _dump({"schema": "stillhouse.inspect.ls/1", name: entries})
    else:
        click.echo(text)


@inspect.command(epilog="Example: stillhouse inspect show corpus.zarr 84-121123-0001 --view 'minilm/*/6'")
@click.argument("store", type=STORE)
@click.argument("utterance", shell_complete=complete_utterance)
@views_option
@click.option("--values", is_flag=True, help="The states themselves, too.")
@click.option("--corpus", type=click.Path(path_type=Path), help="The manifest, to show the transcript as it is there.")
@json_option
def show(store: Path, utterance: str, views: tuple[str, ...], values: bool, corpus: Path | None, as_json: bool) -> None:
    """Tokens of UTTERANCE in its transcript, the context that was seen, and how long the states are."""
    from ..store import Store
    from . import rendering, showing

    opened = Store.open(store)
    chosen = _views(opened, views, planned=True)
    found = showing.show(opened, utterance, chosen, values=values, corpus=corpus)
    _print(found, "show", as_json, rendering.shown)


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


@inspect.command(epilog="Example: stillhouse inspect verify corpus.zarr --sample 5%")
@click.argument("store", type=STORE)
@click.option("--data", is_flag=True, help="Read all states and compare checksums.")
@click.option("--sample", type=Share(), help="Read this share of the utterances, as in 5%.")
@click.option("--repair", is_flag=True, help="Extract what is damaged again, with the teachers that STORE names.")
@click.option(
    "--model", "models", multiple=True, metavar="TEACHER=FOLDER", help="For --repair: where a teacher's model lies now."
)
@click.option("--device", default="auto", show_default=True, help="For --repair: cpu, cuda, cuda:1 or auto.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    store: Path,
    data: bool,
    sample: float | None,
    repair: bool,
    models: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Check that STORE is whole: its structure, and with --data or --sample its bytes. Exit code 1: findings.

    With --repair, units of work with something wrong are extracted again, and nothing else; then it is checked anew.
    """
    from dataclasses import replace

    from ..store import Store
    from . import facts, rendering

    share = 1.0 if data else sample or 0.0
    found = facts.verified(Store.open(store), share, _progress())
    if repair and found.findings:
        from ..repair import repair_all

        named = dict(m.split("=", 1) for m in models if "=" in m)
        if len(named) < len(models):
            raise click.BadParameter("give TEACHER=FOLDER", param_hint="--model")
        mended = repair_all(store, named, device, data=share)
        found = replace(facts.verified(Store.open(store), share, _progress()), mended=mended)
    _print(found, "verify", as_json, rendering.verified)
    if found.findings:
        ctx.exit(1)


def sample_options(tokens: int) -> Callable[[F], F]:
    """--tokens and --seed of what is computed from a sample."""

    def both(command: F) -> F:
        command = click.option("--seed", default=0, show_default=True, help="Of the sample.")(command)
        least = click.IntRange(min=4)
        return click.option("--tokens", default=tokens, show_default=True, type=least, help="In the sample.")(command)

    return both


@inspect.command(epilog="Example: stillhouse inspect stats corpus.zarr --view 'minilm/*/*'")
@click.argument("store", type=STORE)
@views_option
@sample_options(20_000)
@click.option("--full", is_flag=True, help="All tokens instead of a sample.")
@json_option
def stats(store: Path, views: tuple[str, ...], tokens: int, seed: int, full: bool, as_json: bool) -> None:
    """Norms, dead and outlier dimensions, anisotropy, effective rank of each view."""
    from ..store import Store
    from . import facts, rendering, statistics

    opened = Store.open(store)
    chosen = _whole(opened, _views(opened, views))
    found = statistics.statistics(opened, chosen, None if full else tokens, seed, _progress())
    if as_json:
        entries = [facts.as_json(f, "statistics") for f in found]
        _dump({"schema": "stillhouse.inspect.stats/1", "views": entries})
    else:
        click.echo(rendering.statistics(found))


@inspect.command(epilog="Example: stillhouse inspect similarity corpus.zarr --view '*/alone/*'")
@click.argument("store", type=STORE)
@views_option
@sample_options(2_000)
@json_option
def similarity(store: Path, views: tuple[str, ...], tokens: int, seed: int, as_json: bool) -> None:
    """Linear CKA between views: which of them say the same."""
    from ..store import Store
    from . import rendering
    from .similarity import similarity as compute

    opened = Store.open(store)
    found = compute(opened, _whole(opened, _views(opened, views)), tokens, seed, _progress())
    _print(found, "similarity", as_json, rendering.similarity)


@inspect.command(
    epilog="Example: stillhouse inspect neighbours corpus.zarr 84-121123-0001:staircase --view minilm/both:64/6"
)
@click.argument("store", type=STORE)
@click.argument("word", metavar="UTT:WORD", shell_complete=complete_utterance)
@click.option(
    "--view",
    required=True,
    metavar="VIEW",
    help="One view; or several by a pattern, one after the other.",
    shell_complete=complete_view,
)
@click.option("--count", default=10, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--standardise", is_flag=True, help="With the view's norms, so that outlier dimensions do not decide.")
@click.option("--same-utterance", is_flag=True, help="Look in the utterance itself, too.")
@json_option
def neighbours(
    store: Path, word: str, view: str, count: int, standardise: bool, same_utterance: bool, as_json: bool
) -> None:
    """The tokens nearest to a word within a view, with their sentences.

    In UTT:WORD, WORD is a word of the utterance UTT as its tokens spell it (bank, or bank#2 for the second), or a
    token's number.
    """
    import shutil

    from ..store import Store
    from . import facts, rendering
    from .neighbours import nearest

    utterance, colon, name = word.rpartition(":")
    if not colon:
        raise click.BadParameter(f"{word!r} is not UTT:WORD", param_hint="UTT:WORD")
    opened = Store.open(store)
    found = [
        nearest(
            opened,
            v,
            utterance,
            name,
            count,
            standardise=standardise,
            same_utterance=same_utterance,
            report=_progress(),
        )
        for v in _whole(opened, opened.resolve(view))
    ]
    if as_json:
        entries = [facts.as_json(f, "neighbours") for f in found]
        _dump({"schema": "stillhouse.inspect.neighbours/1", "views": entries})
    else:
        columns = shutil.get_terminal_size((100, 24)).columns
        click.echo("\n\n".join(rendering.neighbours(f, columns) for f in found))


@inspect.command(
    epilog="Example: stillhouse inspect compare corpus.zarr 84-121123-0001 --views minilm/alone/6,minilm/both:64/6"
)
@click.argument("store", type=STORE)
@click.argument("utterance", shell_complete=complete_utterance)
@click.option(
    "--views",
    required=True,
    metavar="A,B",
    help="View addresses with commas, or a pattern.",
    shell_complete=complete_view,
)
@json_option
def compare(store: Path, utterance: str, views: str, as_json: bool) -> None:
    """How the tokens of UTTERANCE move from the first view to the others."""
    from ..store import Store
    from . import facts, rendering
    from .neighbours import compare as compute

    opened = Store.open(store)
    found = compute(opened, utterance, opened.resolve(split_views(views)))
    if as_json:
        entries = [facts.as_json(f, "comparison") for f in found]
        _dump({"schema": "stillhouse.inspect.compare/1", "views": entries})
    else:
        click.echo(rendering.compared(found))


@click.command("views", epilog="Example: stillhouse views corpus.zarr --corpus corpus.jsonl --units units")
@click.argument("store", type=STORE)
@click.option("--corpus", required=True, type=click.Path(path_type=Path), help="The manifest: its transcripts.")
@click.option("--units", required=True, type=click.Path(path_type=Path), help="The folder of ASR units.")
@click.option("--split", help="Only these splits of the corpus, as in train,dev.")
@views_option
@click.option("--pick", default=3, show_default=True, type=click.IntRange(min=1), help="How many views to suggest.")
@click.option("--places", default=6_000, show_default=True, type=click.IntRange(min=50), help="Units in the sample.")
@click.option("--seed", default=0, show_default=True, help="Of the sample and of the folds.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="A heat map of CKA: .png, .svg or .pdf.")
@json_option
def choose_views(
    store: Path,
    corpus: Path,
    units: Path,
    split: str | None,
    views: tuple[str, ...],
    pick: int,
    places: int,
    seed: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Help to choose views of STORE before training: what each tells about the ASR units, and which say the same.

    A ridge probe from each view to the unit at a place and to the next one, cross-validated over sessions, beside the
    teacher's input embeddings and chance; linear CKA between views; and a suggested set, with the rule that made it.
    """
    from stillhouse.data.manifest import read_manifest
    from stillhouse.data.units import load_units

    from ..store import Store
    from . import choosing, plots, rendering

    if plot is not None:
        plots.check_path(plot, False)
    opened = Store.open(store)
    texts, symbols = read_manifest(corpus).select(split), load_units(units)
    chosen = _whole(opened, _views(opened, views))
    found = choosing.choose(opened, chosen, texts, symbols, pick=pick, places=places, seed=seed, report=_progress())
    if plot is not None:
        plots.save(plots.similarity(choosing.heat_map(found)), plot)
    _print(found, "choice", as_json, rendering.choice)


def split_views(views: str) -> list[str]:
    """ "a/alone/3,6,b/*/last" as ["a/alone/3,6", "b/*/last"]: a comma before a slash parts addresses."""
    found: list[str] = []
    for word in views.split(","):
        if "/" in word or not found:
            found.append(word)
        else:
            found[-1] += f",{word}"
    return found


@inspect.command(epilog="Example: stillhouse inspect tree corpus.zarr")
@click.argument("store", type=STORE)
@json_option
def tree(store: Path, as_json: bool) -> None:
    """What lies where in STORE's folder."""
    from ..store import Store
    from . import facts, layout, rendering

    opened = Store.open(store)
    found = layout.tree(opened)
    if as_json:
        entries = [facts.as_json(f, "node") for f in found]
        _dump({"schema": "stillhouse.inspect.tree/1", "nodes": entries})
    else:
        click.echo(rendering.tree(str(store), found))


@inspect.command(epilog="Example: stillhouse inspect export corpus.zarr states.npz --view minilm/alone/6 '84-*'")
@click.argument("store", type=STORE)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("patterns", nargs=-1)
@views_option
@click.option("--float32", is_flag=True, help="As float32 whatever is stored.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
def export(
    store: Path, out: Path, patterns: tuple[str, ...], views: tuple[str, ...], float32: bool, force: bool, as_json: bool
) -> None:
    """States, token ids and spans into OUT: .h5, .npz, .safetensors or .csv. PATTERNS are globs on utterance ids."""
    import numpy as np

    from ..store import Store
    from . import exporting, facts, rendering

    opened = Store.open(store)
    rows = np.array([u.row for u in facts.utterance_facts(opened, patterns)]) if patterns else None
    chosen = _views(opened, views, planned=True)
    found = exporting.export(opened, chosen, out, rows=rows, float32=float32, force=force)
    _print(found, "export", as_json, rendering.exported)


@inspect.command(epilog="Example: stillhouse inspect plot corpus.zarr bank.png --kind word --word bank --view '*/*/6'")
@click.argument("store", type=STORE)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--kind",
    type=click.Choice(["similarity", "norms", "word"]),
    default="similarity",
    show_default=True,
    help="A heat map of CKA; norms by layer; a word's occurrences on a plane.",
)
@click.option("--word", help="For --kind word.")
@views_option
@click.option("--seed", default=0, show_default=True, help="Of the sample.")
@click.option("--force", is_flag=True, help="Replace OUT.")
def plot(store: Path, out: Path, kind: str, word: str | None, views: tuple[str, ...], seed: int, force: bool) -> None:
    """Draw a picture of STORE into OUT: .png, .svg or .pdf."""
    from ..store import Store
    from . import occurrences, plots, statistics
    from .similarity import similarity as compute

    plots.check_path(out, force)
    if kind == "word" and word is None:
        raise click.UsageError("--kind word needs --word")
    opened = Store.open(store)
    chosen = _whole(opened, _views(opened, views))
    if kind == "similarity":
        figure = plots.similarity(compute(opened, chosen, seed=seed, report=_progress()))
    elif kind == "norms":
        figure = plots.norms(statistics.statistics(opened, chosen, seed=seed, report=_progress()))
    else:
        figure = plots.word(occurrences.word_map(opened, chosen, str(word), seed=seed))
    plots.save(figure, out)
    click.echo(str(out))


@inspect.command(epilog="Example: stillhouse inspect report corpus.zarr store.html --word bank --word light")
@click.argument("store", type=STORE)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--word", "words", multiple=True, help="Words to look at, several times. Default: frequent ones.")
@sample_options(2_000)
@click.option("--force", is_flag=True, help="Replace OUT.")
def report(store: Path, out: Path, words: tuple[str, ...], tokens: int, seed: int, force: bool) -> None:
    """All of it as one HTML page, OUT, that needs nothing else."""
    from ..store import Store
    from . import report as page

    page.check_path(out, force)
    found = page.collect(Store.open(store), words=words, tokens=tokens, seed=seed, report=_progress())
    page.write(found, out)
    click.echo(str(out))


@inspect.command(epilog="Example: stillhouse inspect diff old.zarr new.zarr")
@click.argument("a", type=STORE)
@click.argument("b", type=STORE)
@sample_options(20_000)
@click.option("--full", is_flag=True, help="All tokens instead of a sample.")
@json_option
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, tokens: int, seed: int, full: bool, as_json: bool) -> None:
    """In what the stores A and B differ: settings, utterances, numbers. Exit code 1: they do."""
    from ..store import Store
    from . import differing, rendering

    found = differing.diff(Store.open(a), Store.open(b), None if full else tokens, seed, _progress())
    _print(found, "diff", as_json, rendering.difference)
    if not found.same:
        ctx.exit(1)


def _views(store: Any, patterns: tuple[str, ...], planned: bool = False) -> list[View]:
    """The views that patterns name; all, complete or (`planned`) not, where there are none."""
    among = store.planned_views if planned else store.views
    return store.resolve(patterns, among) if patterns else store.resolve("*/*/*", among)


def _whole(store: Any, views: list[View]) -> list[View]:
    """Those that are not damaged; the others are told on stderr, and are an error if there are no more."""
    from stillhouse.data.errors import StoreError

    from .reading import whole

    good, damage = whole(store, views)
    for text in damage:
        click.echo(f"left out: {text}", file=sys.stderr)
    if not good:
        raise StoreError("all of these views are damaged", where=store.path, remedy="stillhouse inspect verify STORE")
    return good


def _print(fact: Any, kind: str, as_json: bool, render: Callable[[Any], str]) -> None:
    from .facts import as_json as to_json

    if as_json:
        _dump(to_json(fact, kind))
    else:
        click.echo(render(fact))


def _dump(value: Any) -> None:
    click.echo(json.dumps(value, indent=1, ensure_ascii=False))


def _progress() -> Callable[[Any], None]:
    """A line on stderr every few seconds."""
    last = time.perf_counter()

    def report(what: Any) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= REPORT_EVERY_S:
            last = now
            click.echo(f"looking at {what}", file=sys.stderr)

    return report
