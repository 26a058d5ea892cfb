"""The commands that compute something from states: numbers, neighbours, pictures, the report, and `views`.

Guarantees: damaged views are left out and named. inspect.py puts these commands into the group.
Try: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

import re
from pathlib import Path

import click

from ..inspect.show import numbers as show_numbers
from . import options as opt

KINDS = ("similarity", "norms", "word")
_VIEW = "A view, or a pattern for several. Default: all."
_VIEWS = "Addresses of views joined by commas, or a pattern. Default: all."


@click.command(epilog="Example: stillhouse inspect stats corpus.zarr --view 'minilm/*/*'")
@click.argument("store", type=opt.STORE)
@opt.views_option("--view")
@opt.sample_options("20,000")
@opt.full_option
@opt.json_option
def stats(store: Path, views: tuple[str, ...], tokens: int | None, seed: int, full: bool, as_json: bool) -> None:
    """Show the norms, dead and outlier dimensions, anisotropy and effective rank of each view."""
    from ..inspect.numbers.statistics import statistics

    measured = statistics(*opt.open_undamaged(store, views), tokens, seed, opt.progress(), full=full)
    opt.print_fact(measured, "statistics", as_json, show_numbers.statistics, ("stats", "views"))


@click.command(epilog="Example: stillhouse inspect similarity corpus.zarr --view '*/alone/*'")
@click.argument("store", type=opt.STORE)
@opt.views_option("--view")
@opt.sample_options("2,000")
@opt.json_option
def similarity(store: Path, views: tuple[str, ...], tokens: int | None, seed: int, as_json: bool) -> None:
    """Show which views are redundant, by linear CKA between each two.

    Views of text teachers are compared at tokens, those of speech teachers at times, so name one kind of them.
    """
    from ..inspect.numbers.similarity import similarity as compute

    computed = compute(*opt.open_undamaged(store, views), tokens, seed, opt.progress())
    opt.print_fact(computed, "similarity", as_json, show_numbers.similarity)


@click.command(
    epilog="Example: stillhouse inspect neighbours corpus.zarr 84-121123-0001:staircase --view minilm/both:64/6"
)
@click.argument("store", type=opt.STORE)
@click.argument("place", metavar="UTT:WORD", shell_complete=opt.complete_utterance)
@click.option("--view", metavar="VIEW", help=_VIEW, shell_complete=opt.complete_view)
@opt.number("--count", 10, "Number of tokens to show.", least=1)
@opt.flag("--standardise", "Standardise states first, so that outlier dimensions weigh less.")
@opt.flag("--same-utterance", "Search the utterance itself, too.")
@opt.json_option
def neighbours(
    store: Path, place: str, view: str | None, count: int, standardise: bool, same_utterance: bool, as_json: bool
) -> None:
    """Show the tokens whose states are nearest to those of a word, with their sentences.

    In UTT:WORD, WORD is a word of the utterance UTT as its tokens spell it, or a token's number. Write bank#2 for the
    second "bank". For a speech teacher give a time in seconds, as in UTT@1.25. Then the nearest frame of each other
    utterance is shown.
    """
    from ..inspect.numbers.neighbours import nearest

    utterance, time, word = _place(place)
    opened, views = opt.open_undamaged(store, [view] if view else [], "frame" if time else "token")
    options = {"standardise": standardise, "same_utterance": same_utterance}
    nearby = [nearest(opened, v, utterance, word, count, on_progress=opt.progress(), **options) for v in views]
    render = show_numbers.neighbours
    opt.print_fact(nearby, "neighbours", as_json, lambda n: "\n\n".join(map(render, n)), ("neighbours", "views"))


def _place(place: str) -> tuple[str, bool, str | float]:
    """Split UTT@SECONDS or UTT:WORD into the utterance, whether a time is given, and the time or the word."""
    if found := re.fullmatch(r"(.+)@(\d+(?:\.\d*)?|\.\d+)", place):
        return found[1], True, float(found[2])
    utterance, colon, word = place.rpartition(":")
    if not colon:
        raise click.BadParameter(f"{place!r} is not UTT:WORD, and not UTT@SECONDS", param_hint="UTT:WORD")
    return utterance, False, word


@click.command(
    epilog="Example: stillhouse inspect compare corpus.zarr 84-121123-0001 --views minilm/alone/6,minilm/both:64/6"
)
@click.argument("store", type=opt.STORE)
@click.argument("utterance", shell_complete=opt.complete_utterance)
@click.option("--views", metavar="A,B", help=_VIEWS, shell_complete=opt.complete_view)
@opt.json_option
def compare(store: Path, utterance: str, views: str | None, as_json: bool) -> None:
    """Show how far each token's state in UTTERANCE moves from the first view to the others."""
    from ..inspect.numbers.neighbours import compare as compute

    opened, chosen = opt.open_views(store, split_views(views) if views else ())
    compared = compute(opened, utterance, chosen)
    opt.print_fact(compared, "comparison", as_json, show_numbers.compared, ("compare", "views"))


def split_views(views: str) -> list[str]:
    """Split "a/alone/3,6,b/*/last" into ["a/alone/3,6", "b/*/last"]: only a comma before an address separates."""
    return re.split(",(?=[^,]*/)", views)


@click.command(epilog="Example: stillhouse inspect plot corpus.zarr bank.png --kind word --word bank --view '*/*/6'")
@click.argument("store", type=opt.STORE)
@click.argument("out", type=opt.NEW_FILE)
@opt.choice("--kind", KINDS, "Draw a heat map of CKA, the norms by layer, or all occurrences of a word on a plane.")
@click.option("--word", help="The word of --kind word.")
@opt.views_option("--view")
@opt.seed_option
@opt.force_option
def plot(store: Path, out: Path, kind: str, word: str | None, views: tuple[str, ...], seed: int, force: bool) -> None:
    """Draw a picture of STORE into OUT: .png, .svg or .pdf."""
    from ..inspect.numbers.similarity import similarity as compute
    from ..inspect.numbers.statistics import statistics
    from ..inspect.numbers.word_map import word_map
    from ..inspect.output import check_output
    from ..inspect.show import plots

    check_output(out, plots.SUFFIXES, force, [store])
    if kind == "word" and word is None:
        raise click.UsageError("--kind word needs --word")
    opened, chosen = opt.open_undamaged(store, views, "token" if kind == "word" else None)
    if kind == "similarity":
        figure = plots.similarity(compute(opened, chosen, seed=seed, on_progress=opt.progress()))
    elif kind == "norms":
        figure = plots.norms(statistics(opened, chosen, seed=seed, on_progress=opt.progress(), rank=False))
    else:
        figure = plots.word(word_map(opened, chosen, str(word), seed=seed))
    plots.save(figure, out)
    click.echo(str(out))


@click.command(epilog="Example: stillhouse inspect report corpus.zarr store.html --word bank --word light")
@click.argument("store", type=opt.STORE)
@click.argument("out", type=opt.NEW_FILE)
@click.option("--word", "words", multiple=True, help="A word to look at. You can repeat it. Default: frequent words.")
@opt.sample_options("2,000")
@opt.flag("--full", "Read every view and all tokens instead of samples.")
@opt.force_option
def report(
    store: Path, out: Path, words: tuple[str, ...], tokens: int | None, seed: int, full: bool, force: bool
) -> None:
    """Write the facts and numbers of STORE as one HTML page, OUT, that loads nothing else."""
    from ..inspect.output import check_output
    from ..inspect.show import page
    from ..store import Store

    check_output(out, (".html",), force, [store])
    opened = Store.open(store)
    collected = page.collect(opened, words=words, tokens=tokens, seed=seed, full=full, on_progress=opt.progress())
    page.write(collected, out)
    click.echo(str(out))


@click.command("views", epilog="Example: stillhouse views corpus.zarr --corpus corpus.jsonl --units units")
@click.argument("store", type=opt.STORE)
@click.option("--corpus", required=True, type=opt.PATH, help="The manifest, for its transcripts.")
@click.option("--units", required=True, type=opt.PATH, help="The folder of ASR units.")
@opt.split_option
@opt.views_option("--view")
@opt.number("--pick", 3, "Number of views to suggest.", least=1)
@opt.number("--places", 6_000, "Number of units in the sample.", least=50)
@opt.number("--seed", 0, "Seed of the sample and of the folds.")
@click.option("--plot", type=opt.NEW_FILE, help="Draw the probes of all views into this file: .png, .svg or .pdf.")
@opt.json_option
def choose_views(
    store: Path,
    corpus: Path,
    units: Path,
    split: str | None,
    views: tuple[str, ...],
    plot: Path | None,
    as_json: bool,
    **sample: int,
) -> None:
    """Help to choose views of STORE: how well each predicts the ASR units, and which are redundant.

    A ridge probe predicts the unit at a place and the next unit from each view. It is cross-validated over sessions and
    compared with the teacher's input embeddings and with chance. The command also shows linear CKA between views and a
    suggested set, with the rule behind it.
    """
    from ...data.manifest import read_manifest
    from ...data.units import load_units
    from ..inspect.numbers.choose_views import choose
    from ..inspect.output import check_output
    from ..inspect.show import plots

    if plot is not None:
        check_output(plot, plots.SUFFIXES, False, [store, corpus, units])
    opened, chosen = opt.open_undamaged(store, views, "token")
    texts, symbols = read_manifest(corpus).select(split), load_units(units)
    choice = choose(opened, chosen, texts, symbols, **sample, on_progress=opt.progress())
    if plot is not None:
        plots.save(plots.probes(choice), plot)
    opt.print_fact(choice, "choice", as_json, show_numbers.choice)
