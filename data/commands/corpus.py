"""`stillhouse corpus`: import, check, split and describe a corpus, learn ASR units.

`cli.py` adds `corpus features`, which may need a speech encoder, from extract/commands/features.py, and `corpus ngram`
from train/commands/ngram.py, beside the search that reads n-gram models.

Guarantees: a command imports everything heavier than click inside its function.
Try: `stillhouse corpus --help`.
"""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .corpus_import import import_, root_option, say
from .paths import EXISTING, PATH

FEATURE_SUFFIXES = (".h5", ".hdf5")

if TYPE_CHECKING:
    from ..corpus.info import CorpusFacts


@click.group()
def corpus() -> None:
    """Import, check and split a corpus, compute features, and learn ASR units."""


corpus.add_command(import_)


@corpus.command()
@click.argument("manifest", type=EXISTING)
@click.argument("folder", metavar="UNITS", type=PATH)
@click.option(
    "--kind",
    type=click.Choice(["characters", "sentencepiece"]),
    default="sentencepiece",
    show_default=True,
    help="Each unit is one character, or a piece that occurs often.",
)
@click.option("--size", default=500, show_default=True, help="Most units, with blank and unknown.")
@click.option("--transform", default="lower+no_punct+squeeze", show_default=True, help="Text transforms, + between.")
@click.option("--coverage", default=1.0, show_default=True, help="Share of the text whose characters get units.")
@click.option(
    "--marks",
    type=click.Choice(["spell", "drop", "keep"]),
    default="spell",
    show_default=True,
    help="Marks like <unk>, [noise] and (laughter): spell them like words, drop them, or make each a unit.",
)
@click.option("--split", help="Learn from these splits only, with commas between.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")  # fmt: skip
def tokenizer(
    manifest: Path, folder: Path, split: str | None, as_json: bool, size: int, marks: str, **options: Any
) -> None:
    """Learn the ASR units of the transcripts, and write them to the folder UNITS.

    Example: stillhouse corpus tokenizer corpus.jsonl units --size 500 --split train
    """
    from ..errors import first_few
    from ..files.outputs import check_folder
    from ..manifest import read_manifest
    from ..text import MARK
    from ..units import is_units, train_units

    check_folder(folder, lambda names: is_units(folder), "a folder of units")
    texts = [u.text for u in read_manifest(manifest).select(split).utterances]
    found = sorted({match[0] for text in texts for match in MARK.finditer(text)})
    whole = [mark for mark in found if " " not in mark]
    spelled = [mark for mark in found if marks == "spell" or mark not in whole]
    if marks == "drop":
        options["transform"] = f"drop_marks+{options['transform']}"
    elif spelled and "drop_marks" not in options["transform"]:
        remedy = "--marks drop leaves them out" + (", --marks keep makes each a unit" if marks == "spell" else "")
        say(f"the transcripts hold {len(spelled)} marks that become words or symbols: {first_few(spelled)}. {remedy}")
    units = train_units(texts, size=size, marks=whole if marks == "keep" else (), **options)
    units.save(folder)
    facts: dict[str, Any] = {"marks": sorted(units.marks)} if units.marks else {}
    facts |= {"kind": units.kind, "size": units.size, "transform": units.transform, "fingerprint": units.fingerprint}
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        few = units.size < size and units.kind == "sentencepiece"
        count = f"{units.size} units" + (f" of {size}, because the corpus has no more" if few else "")
        say(f"{folder}: {count}, fingerprint {units.fingerprint}")


@corpus.command()
@click.argument("manifest", type=EXISTING)
@click.argument("out", type=PATH, required=False)
@click.option(
    "--by", default="speaker", show_default=True, help="Group: speaker, session, id, text or a column of meta."
)
@click.option("--dev", default="5%", show_default=True, help="Share of the groups in dev.")
@click.option("--test", default="10%", show_default=True, help="Share of the groups in test.")
@click.option("--seed", default=0, show_default=True, help="Random seed. Each seed gives another split.")
@click.option("--only", help="Change only utterances of these splits, with commas between.")
@click.option("--text", metavar="SPLIT", help="Split of all utterances without audio. They need no group.")
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def split(
    manifest: Path,
    out: Path | None,
    by: str,
    dev: str,
    test: str,
    seed: int,
    only: str | None,
    text: str | None,
    as_json: bool,
) -> None:
    """Set the split of every utterance, in place or into OUT. No group is in two splits.

    The split of a group stays the same when the corpus grows.

    Example: stillhouse corpus split corpus.jsonl --by speaker --dev 5% --test 10%
    """
    from ..corpus.info import describe
    from ..corpus.split import parse_share, split_corpus
    from ..errors import UsageError
    from ..files.outputs import check_file
    from ..files.paths import relative_audio
    from ..manifest import Corpus, is_manifest, read_manifest, write_manifest

    source = read_manifest(manifest)
    target = out or source.path
    if target.exists() and not os.path.samefile(target, source.path):
        check_file(target, own=is_manifest, remedy="choose another name, or remove it")
        if not set(read_manifest(target).by_id) <= set(source.by_id):
            what = "this is the manifest of another corpus"
            raise UsageError(what, where=target, remedy="choose another name, or remove it")
    names = only.split(",") if only else None
    utterances = split_corpus(source, by, parse_share(dev), parse_share(test), seed, names, text=text)
    if target.absolute().parent != source.path.absolute().parent:
        moved = {u.id: relative_audio(source.audio_path(u), target) for u in utterances if u.audio is not None}
        utterances = [u.model_copy(update={"audio": moved.get(u.id)}) for u in utterances]
    write_manifest(target, utterances)
    _show(describe(Corpus(target, utterances)), as_json)


@corpus.command()
@click.argument("manifest", type=EXISTING)
@click.option("--rate", "rate_hz", type=int, help="Expected rate in Hz. By default the rate of most files.")
@click.option("--full", is_flag=True, help="Decode all audio, not only headers and the ends of segments.")
@click.option("--features", type=EXISTING, metavar="FEATURES",
              help="Compare the rows of this feature file with the audio and times of the corpus.")  # fmt: skip
@click.option("--audio/--no-audio", default=True, help="Whether to read audio files at all.")
@click.option("--ignore", metavar="KINDS", help="Accept findings of these kinds, with commas between: mark,rate.")
@root_option
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
@click.pass_context
def check(ctx: click.Context, manifest: Path, ignore: str | None, as_json: bool, **options: Any) -> None:
    """Check a corpus, or a feature file (.h5). The exit code is 1 if there are findings.

    Findings of kinds that --ignore names are only counted.

    Example: stillhouse corpus check corpus.jsonl --full
    """
    from collections import Counter

    from ..corpus.check import KINDS, check_corpus, check_features
    from ..errors import UsageError

    accepted = set(ignore.replace(" ", "").split(",")) if ignore is not None else set()
    if unknown := accepted - set(KINDS):
        raise UsageError(f"--ignore {min(unknown)}: no finding is of this kind", expected=", ".join(KINDS))
    done = check_features(manifest) if manifest.suffix in FEATURE_SUFFIXES else check_corpus(manifest, **options)
    ignored = Counter(f.kind for f in done.findings if f.kind in accepted)
    findings = [f for f in done.findings if f.kind not in accepted]
    if as_json:
        facts = {
            "utterances": done.utterances,
            "files": done.files,
            "rates": done.rates,
            "notes": done.notes,
            "findings": [f.facts() for f in findings],
            "ignored": ignored,
        }
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    else:
        for finding in findings:
            click.echo(str(finding))
        for note in done.notes:
            say(note)
        more = f", and {ignored.total()} that are ignored ({', '.join(sorted(ignored))})" if ignored else ""
        say(f"{done.utterances} utterances, {done.files} audio files: {len(findings) or 'no'} findings{more}")
    if findings:
        ctx.exit(1)


@corpus.command()
@click.argument("path", metavar="CORPUS|FEATURES", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def info(path: Path, as_json: bool) -> None:
    """Show what a manifest (CORPUS) or a feature file (FEATURES) holds.

    Example: stillhouse corpus info corpus.jsonl
    """
    if path.suffix in FEATURE_SUFFIXES:
        _show_features(path, as_json)
        return
    from ..corpus.info import describe
    from ..manifest import read_manifest

    _show(describe(read_manifest(path)), as_json)


def _show(facts: CorpusFacts, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(facts), ensure_ascii=False, indent=1))
        return
    click.echo(facts.path)
    parts = [(name or "(none)", part) for name, part in [*facts.splits.items(), ("all", facts.total)]]
    click.echo(f"{'split':16} {'utterances':>10} {'sessions':>8} {'speakers':>8} {'hours':>8} {'words':>9}")
    for name, part in parts:
        numbers = f"{part.utterances:10} {part.sessions:8} {part.speakers:8} {part.hours:8.2f} {part.words:9}"
        click.echo(f"{name:16} {numbers}")
    if facts.total.with_audio:
        click.echo(f"\n{'seconds':16} {'min':>10} {'10%':>8} {'50%':>8} {'90%':>8} {'max':>9}")
    for name, part in parts:
        if part.seconds_quantiles:
            numbers = " ".join(f"{q:{width}g}" for q, width in zip(part.seconds_quantiles, (10, 8, 8, 8, 9)))
            click.echo(f"{name:16} {numbers}")
    if facts.total.with_audio < facts.total.utterances:
        click.echo(f"{facts.total.utterances - facts.total.with_audio} utterances have no audio")
    if facts.meta:
        click.echo("meta: " + ", ".join(f"{name} ({n} values)" for name, n in facts.meta.items()))
    more = f" and {len(facts.alphabet) - 80} more" if len(facts.alphabet) > 80 else ""
    letters = " ".join(facts.alphabet[:80]).replace("\n", "\\n") + more
    click.echo(textwrap.fill(f"{len(facts.alphabet)} characters: {letters}", 80, subsequent_indent="  "))


def _show_features(path: Path, as_json: bool) -> None:
    from ..features.file import FeatureFile

    file = FeatureFile(path).open()
    facts = {
        "path": str(path),
        "utterances": len(file.ids),
        "speeds": file.speeds,
        "copies": file.copies,
        **({} if file.noise is None else {"noise": file.noise}),
        "rows": len(file.row_ids),
        "frames": int(file.offsets[-1]),
        "frame_hz": file.frame_times.hz,
        "hours": int(file.offsets[-1]) / file.frame_times.hz / 3600,
        "width": file.width,
        "bytes": path.stat().st_size,
        "settings": file.settings,
        "fingerprint": file.fingerprint,
    }
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        click.echo(f"{name:12} {', '.join(f'{v:g}' for v in value) if isinstance(value, list) else value}")
