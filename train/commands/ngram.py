"""`stillhouse corpus ngram`: count the n-grams of transcripts and write a language model for `decode --lm`.

Guarantees: a command imports everything heavier than click inside its function.
Try: `stillhouse corpus ngram corpus.jsonl words.arpa --order 3`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.commands.paths import EXISTING, NEW_FILE
from .live import say

if TYPE_CHECKING:
    from ...data.manifest import Corpus

TRANSFORM = "lower+no_punct+squeeze"


def parse_prune(ctx: click.Context, param: click.Parameter, value: str | None) -> list[int]:
    """Parse "0,0,1" into numbers."""
    numbers = value.replace(" ", "").split(",") if value is not None else []
    if not all(n.isdecimal() for n in numbers):
        raise click.BadParameter(f"{value!r}; give a number for each order, as in 0,0,1", ctx, param)
    return [int(n) for n in numbers]


@click.command()
@click.argument("corpus", type=EXISTING)
@click.argument("arpa", type=NEW_FILE)
@click.option("--order", type=click.IntRange(1, 9), default=3, show_default=True, help="Most words of an n-gram.")
@click.option("--split", help="Count these splits, with commas between. [default: all but those named test, dev, …]")
@click.option("--unit", type=click.Choice(["word", "unit"]), default="word", show_default=True,
              help="The n-grams are of words, or of ASR units (for decode --lm-unit unit).")  # fmt: skip
@click.option("--units", type=EXISTING, metavar="UNITS", help="Spell the words as these units do, or count them.")
@click.option("--transform", help=f"Text transforms without --units, + between. [default: {TRANSFORM}]")
@click.option("--prune", callback=parse_prune, metavar="N,N,…",
              help="For each order: drop n-grams that occur so often or less, as in 0,0,1.")  # fmt: skip
@click.option("--held-out", metavar="SPLITS", help="Also compute the perplexity of these splits.")
@click.option("--force", is_flag=True, help="Replace a file that this command did not write.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def ngram(
    corpus: Path,
    arpa: Path,
    order: int,
    split: str | None,
    unit: str,
    units: Path | None,
    transform: str | None,
    prune: list[int],
    held_out: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Count the n-grams of CORPUS, also of its text without audio, and write the language model ARPA.

    The model has interpolated Kneser-Ney smoothing with three discounts an order. The file is gzipped if its name ends
    with .gz. `stillhouse decode --lm` reads it.

    Example: stillhouse corpus ngram corpus.jsonl words.arpa.gz --order 3 --split train,text --held-out dev
    """
    from ...data.corpus.split import is_held_out
    from ...data.errors import CorpusError, UsageError
    from ...data.files.outputs import check_file
    from ...data.manifest import Corpus, read_manifest
    from ..decode.lm.arpa import is_arpa, write_arpa
    from ..decode.lm.kneser_ney import count_ngrams, kneser_ney, perplexity

    if unit == "unit" and units is None:
        raise UsageError("--unit unit needs the units", expected="--units UNITS with it")
    if units is not None and transform is not None:
        raise UsageError("the units of --units have their own transform", expected="no --transform")
    check_file(arpa, [corpus], own=is_arpa, force=force)
    spell = _speller(unit, units, transform or TRANSFORM)
    whole = read_manifest(corpus)
    chosen = whole.select(split)
    if split is None and (left := sorted({u.split for u in whole.utterances if u.split and is_held_out(u.split)})):
        chosen = Corpus(whole.path, [u for u in whole.utterances if u.split not in left], whole.root)
        say(f"The splits {', '.join(left)} are not counted, because their names say that they are held out (--split).")
    elif held := sorted(name for name in chosen.splits() if name and is_held_out(name)):
        say(f"{', '.join(held)} is counted, whose name says that it is held out. Do not decode it with this model.")
    counted = count_ngrams(_sentences(chosen, spell), order, corpus)
    model = kneser_ney(counted, prune)
    for n in model.usual:
        say(f"There are too few {n}-grams to estimate their discounts, so that they are 0.5, 1 and 1.5.")
    facts: dict[str, Any] = {
        "path": str(arpa),
        "order": order,
        "unit": unit,
        "sentences": counted.sentences,
        "words": counted.tokens,
        "ngrams": [len(table[0]) for table in model.lm.tables],
        "discounts": [[round(d, 6) for d in three] for three in model.discounts],
        "held_out": {},
    }
    for name in held_out.replace(" ", "").split(",") if held_out is not None else []:
        found, words, unknown = perplexity(model.lm, _sentences(whole.select(name), spell))
        if not words:
            raise CorpusError(f"split {name} has no word", where=corpus, expected="a split with transcripts")
        facts["held_out"][name] = {"perplexity": found, "words": words, "unknown": unknown}
    write_arpa(arpa, model.lm)
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    things = f"{unit}s"
    for name, own in facts["held_out"].items():
        share = own["unknown"] / max(1, own["words"])
        say(f"{name}: perplexity {own['perplexity']:.2f} of {own['words']} {things}; {share:.2%} of them are unknown")
    grams = ", ".join(f"{count} {n}-grams" for n, count in enumerate(facts["ngrams"], start=1))
    say(f"{arpa}: {grams} of {counted.tokens} {things} in {counted.sentences} sentences")


def _speller(unit: str, units: Path | None, transform: str) -> Callable[[str], Sequence[str]]:
    """Return what makes the words, or the units, of a transcript."""
    from ...data.text import transformed
    from ...data.units import BLANK, UNKNOWN, load_units
    from ..decode.lm.kneser_ney import UNKNOWN as UNKNOWN_WORD

    if units is None:
        return lambda text: transformed(text, transform).split()
    own = load_units(units)
    if unit == "word":
        return lambda text: own.normalise(text).text.split()
    names = [UNKNOWN_WORD if k in (BLANK, UNKNOWN) else piece for k, piece in enumerate(own.pieces)]
    return lambda text: [names[k] for k in own.ids(text).tolist()]


def _sentences(corpus: Corpus, spell: Callable[[str], Sequence[str]]) -> Iterator[Sequence[str]]:
    return (spell(u.text) for u in corpus.utterances)
