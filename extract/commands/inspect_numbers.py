"""The commands of `inspect` that compute something from states: numbers, neighbours, pictures, the report, `views`.

Invariant: as commands.py beside this one, which puts them into the group. Run: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

from pathlib import Path

import click

from .options import (
    STORE,
    chosen_views,
    complete_utterance,
    complete_view,
    dump,
    json_option,
    print_fact,
    progress,
    sample_options,
    views_option,
    whole_views,
)


@click.command(epilog="Example: stillhouse inspect stats corpus.zarr --view 'minilm/*/*'")
@click.argument("store", type=STORE)
@views_option
@sample_options("20,000")
@click.option("--full", is_flag=True, help="All tokens instead of a sample.")
@json_option
def stats(store: Path, views: tuple[str, ...], tokens: int | None, seed: int, full: bool, as_json: bool) -> None:
    """Norms, dead and outlier dimensions, anisotropy, effective rank of each view."""
    from ..inspect.facts import store as facts
    from ..inspect.numbers import statistics
    from ..inspect.show import numbers as rendering
    from ..store import Store

    opened = Store.open(store)
    chosen = whole_views(opened, chosen_views(opened, views))
    found = statistics.statistics(opened, chosen, tokens, seed, progress(), full=full)
    if as_json:
        entries = [facts.as_json(f, "statistics") for f in found]
        dump({"schema": "stillhouse.inspect.stats/1", "views": entries})
    else:
        click.echo(rendering.statistics(found))


@click.command(epilog="Example: stillhouse inspect similarity corpus.zarr --view '*/alone/*'")
@click.argument("store", type=STORE)
@views_option
@sample_options("2,000")
@json_option
def similarity(store: Path, views: tuple[str, ...], tokens: int | None, seed: int, as_json: bool) -> None:
    """Linear CKA between views: which of them say the same."""
    from ..inspect.numbers.similarity import similarity as compute
    from ..inspect.show import numbers as rendering
    from ..store import Store

    opened = Store.open(store)
    found = compute(opened, whole_views(opened, chosen_views(opened, views)), tokens, seed, progress())
    print_fact(found, "similarity", as_json, rendering.similarity)


@click.command(
    epilog="Example: stillhouse inspect neighbours corpus.zarr 84-121123-0001:staircase --view minilm/both:64/6"
)
@click.argument("store", type=STORE)
@click.argument("word", metavar="UTT:WORD", shell_complete=complete_utterance)
@click.option(
    "--view",
    metavar="VIEW",
    help="One view; or several by a pattern, one after the other. Default: all.",
    shell_complete=complete_view,
)
@click.option("--count", default=10, show_default=True, type=click.IntRange(min=1), help="How many.")
@click.option("--standardise", is_flag=True, help="With the view's norms, so that outlier dimensions do not decide.")
@click.option("--same-utterance", is_flag=True, help="Look in the utterance itself, too.")
@json_option
def neighbours(
    store: Path, word: str, view: str | None, count: int, standardise: bool, same_utterance: bool, as_json: bool
) -> None:
    """The tokens nearest to a word within a view, with their sentences.

    In UTT:WORD, WORD is a word of the utterance UTT as its tokens spell it (bank, or bank#2 for the second), or a
    token's number.
    """
    from ..inspect.facts import store as facts
    from ..inspect.numbers.neighbours import nearest
    from ..inspect.show import numbers as rendering
    from ..store import Store

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
            report=progress(),
        )
        for v in whole_views(opened, chosen_views(opened, (view,) if view else ()))
    ]
    if as_json:
        entries = [facts.as_json(f, "neighbours") for f in found]
        dump({"schema": "stillhouse.inspect.neighbours/1", "views": entries})
    else:
        click.echo("\n\n".join(rendering.neighbours(f) for f in found))


@click.command(
    epilog="Example: stillhouse inspect compare corpus.zarr 84-121123-0001 --views minilm/alone/6,minilm/both:64/6"
)
@click.argument("store", type=STORE)
@click.argument("utterance", shell_complete=complete_utterance)
@click.option(
    "--views",
    metavar="A,B",
    help="View addresses with commas, or a pattern. Default: all.",
    shell_complete=complete_view,
)
@json_option
def compare(store: Path, utterance: str, views: str | None, as_json: bool) -> None:
    """How the tokens of UTTERANCE move from the first view to the others."""
    from ..inspect.facts import store as facts
    from ..inspect.numbers.neighbours import compare as compute
    from ..inspect.show import numbers as rendering
    from ..store import Store

    opened = Store.open(store)
    found = compute(opened, utterance, chosen_views(opened, tuple(split_views(views) if views else ())))
    if as_json:
        entries = [facts.as_json(f, "comparison") for f in found]
        dump({"schema": "stillhouse.inspect.compare/1", "views": entries})
    else:
        click.echo(rendering.compared(found))


def split_views(views: str) -> list[str]:
    """ "a/alone/3,6,b/*/last" as ["a/alone/3,6", "b/*/last"]: a comma before a slash parts addresses."""
    found: list[str] = []
    for word in views.split(","):
        if "/" in word or not found:
            found.append(word)
        else:
            found[-1] += f",{word}"
    return found


@click.command(epilog="Example: stillhouse inspect plot corpus.zarr bank.png --kind word --word bank --view '*/*/6'")
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
    from ..inspect.numbers import statistics
    from ..inspect.numbers import word_map as occurrences
    from ..inspect.numbers.similarity import similarity as compute
    from ..inspect.show import plots
    from ..store import Store

    plots.check_path(out, force)
    if kind == "word" and word is None:
        raise click.UsageError("--kind word needs --word")
    opened = Store.open(store)
    chosen = whole_views(opened, chosen_views(opened, views))
    if kind == "similarity":
        figure = plots.similarity(compute(opened, chosen, seed=seed, report=progress()))
    elif kind == "norms":
        figure = plots.norms(statistics.statistics(opened, chosen, seed=seed, report=progress(), rank=False))
    else:
        figure = plots.word(occurrences.word_map(opened, chosen, str(word), seed=seed))
    plots.save(figure, out)
    click.echo(str(out))


@click.command(epilog="Example: stillhouse inspect report corpus.zarr store.html --word bank --word light")
@click.argument("store", type=STORE)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--word", "words", multiple=True, help="Words to look at, several times. Default: frequent ones.")
@sample_options("2,000")
@click.option("--full", is_flag=True, help="Every view and all tokens instead of samples.")
@click.option("--force", is_flag=True, help="Replace OUT.")
def report(
    store: Path, out: Path, words: tuple[str, ...], tokens: int | None, seed: int, full: bool, force: bool
) -> None:
    """All of it as one HTML page, OUT, that needs nothing else."""
    from ..inspect.show import page
    from ..store import Store

    page.check_path(out, force)
    found = page.collect(Store.open(store), words=words, tokens=tokens, seed=seed, full=full, report=progress())
    page.write(found, out)
    click.echo(str(out))


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
    from ...data.manifest import read_manifest
    from ...data.units import load_units
    from ..inspect.numbers import choose_views as choosing
    from ..inspect.show import numbers as rendering
    from ..inspect.show import plots
    from ..store import Store

    if plot is not None:
        plots.check_path(plot, False)
    opened = Store.open(store)
    texts, symbols = read_manifest(corpus).select(split), load_units(units)
    chosen = whole_views(opened, chosen_views(opened, views))
    found = choosing.choose(opened, chosen, texts, symbols, pick=pick, places=places, seed=seed, report=progress())
    if plot is not None:
        plots.save(plots.similarity(choosing.heat_map(found)), plot)
    print_fact(found, "choice", as_json, rendering.choice)
