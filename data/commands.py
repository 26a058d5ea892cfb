"""The `stillhouse corpus` commands: thin over the functions of this package.

Invariant: everything heavier than click is imported inside a command. Run: `stillhouse corpus --help`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .importing import Imported

EXISTING = click.Path(exists=True, path_type=Path)
PATH = click.Path(path_type=Path)
COLUMNS = ("id", "text", "audio", "session", "order", "speaker", "split", "start", "duration")


@click.group()
def corpus() -> None:
    """Import, check and split a corpus; features; ASR units."""


@corpus.group("import")
def import_() -> None:
    """Make corpus.jsonl out of what there is."""


def say(text: str) -> None:
    click.echo(text, err=True)


def force_option(command: Callable) -> Callable:
    return click.option("--force", is_flag=True, help="Replace a manifest that is there and differs.")(
        command
    )


def _column_options(command: Callable) -> Callable:
    for name in reversed(COLUMNS):
        command = click.option(
            f"--{name}-column", metavar="COLUMN", help=f"Column of the {name}: name or number."
        )(command)
    return command


@import_.command("csv")
@click.argument("table", type=EXISTING)
@click.argument("manifest", type=PATH)
@_column_options
@click.option("--session-pattern", metavar="REGEX", help="On the id, with groups `session` and `order`.")
@click.option("--delimiter", help="By default after the suffix, else the first line.")
@click.option(
    "--header/--no-header", default=None, help="Default: a header, unless columns are given by number."
)
@click.option("--quote/--no-quote", default=None, help="Whether double quotes quote; default: not in a TSV.")
@click.option("--audio-root", type=EXISTING, help="Folder of the audio paths; default: the table's.")
@click.option("--split", help="Split of rows that have none of their own.")
@force_option
def import_csv(table: Path, manifest: Path, force: bool, **options: Any) -> None:
    """A CSV or TSV table; other columns than those mapped are kept in `meta`.

    Usual names of columns are found without being told. "A,B" joins two columns by "-".
    """
    from .import_table import import_table

    columns = {name: value for name in COLUMNS if (value := options.pop(f"{name}_column")) is not None}
    if options["delimiter"] in ("tab", "\\t"):
        options["delimiter"] = "\t"
    _finish(import_table(table, manifest, columns, **options), manifest, force)


def _finish(result: Imported, manifest: Path, force: bool) -> None:
    from .errors import CorpusError, PartialError, UsageError
    from .manifest import to_line, write_manifest

    for problem in result.problems[:50]:
        say(str(problem))
    if len(result.problems) > 50:
        say(f"… and {len(result.problems) - 50} more")
    if not result.utterances:
        raise CorpusError("nothing could be imported", where=manifest)
    if manifest.exists() and not force:
        new = "".join(to_line(u) + "\n" for u in result.utterances).encode()
        if manifest.read_bytes() != new:
            raise UsageError(
                "a manifest that differs is there already", where=manifest, remedy="--force replaces it"
            )
    write_manifest(manifest, result.utterances)
    hours = sum(u.duration_s or 0 for u in result.utterances) / 3600
    say(f"{manifest}: {len(result.utterances)} utterances, {hours:.2f} h")
    if result.problems:
        raise PartialError(f"{len(result.problems)} utterances were left out, see above", where=manifest)


@corpus.command()
@click.argument("manifest", type=EXISTING)
@click.argument("features_file", metavar="FEATURES", type=PATH)
@click.option("--speeds", default="1.0", show_default=True, help="Factors, joined by commas: 0.9,1.0,1.1.")
@click.option("--split", help="Only these splits, joined by commas.")
@click.option(
    "--rate", "rate_hz", default=16000, show_default=True, help="Rate in Hz that audio is resampled to."
)
@click.option("--bins", default=80, show_default=True, help="Mel bins.")
@click.option(
    "--workers", type=int, help="Processes; 0: none but this one. Default: the cores, if it is worth it."
)
@click.option("--redo-changed", is_flag=True, help="Compute anew what has another audio than it had.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
def features(
    manifest: Path,
    features_file: Path,
    speeds: str,
    split: str | None,
    rate_hz: int,
    bins: int,
    workers: int | None,
    redo_changed: bool,
    as_json: bool,
) -> None:
    """Compute Kaldi fbank features into an HDF5 file; goes on where it stopped, adds what is new."""
    from .errors import UsageError
    from .features import FeatureSettings, compute_features
    from .manifest import read_manifest

    try:
        factors = tuple(float(s) for s in speeds.split(","))
    except ValueError as e:
        raise UsageError(f"speeds {speeds!r}", expected="numbers joined by commas") from e
    chosen = read_manifest(manifest).select(split)
    started, state = time.monotonic(), {"rows": 0, "to_do": 0, "audio_s": 0.0, "said": 0.0}

    def on_start(there: int, to_do: int) -> None:
        state["to_do"] = to_do
        say(f"{features_file}: {there} rows there, {to_do} to do")

    def on_part(ids: list[str], audio_s: float) -> None:
        state["rows"] += len(ids) * len(factors)
        state["audio_s"] += audio_s
        now = time.monotonic()
        if now - state["said"] > (0.5 if sys.stderr.isatty() else 5):
            state["said"] = now
            speed = state["audio_s"] / (now - started)
            say(
                f"{state['rows']}/{state['to_do']} rows, {state['audio_s'] / 3600:.2f} h, {speed:.0f}× real time"
            )

    report = compute_features(
        chosen,
        features_file,
        factors,
        settings=FeatureSettings(rate_hz=rate_hz, bins=bins),
        workers=workers,
        redo_changed=redo_changed,
        on_start=on_start,
        on_part=on_part,
    )
    took = time.monotonic() - started
    if as_json:
        facts = {k: v for k, v in vars(report).items() if k != "failures"}
        click.echo(json.dumps({**facts, "seconds": round(took, 3)}))
    else:
        say(
            f"{features_file}: {report.rows_computed} rows of {report.audio_s / 3600:.2f} h in {took:.1f} s "
            f"({report.audio_s / took:.0f}× real time), {report.frames} frames in all"
        )


@corpus.command()
@click.argument("manifest", type=EXISTING)
@click.argument("folder", metavar="UNITS", type=PATH)
@click.option(
    "--kind", type=click.Choice(["characters", "sentencepiece"]), default="sentencepiece", show_default=True
)
@click.option("--size", default=500, show_default=True, help="Most units, blank and unknown included.")
@click.option(
    "--transform", default="lower+no_punct+squeeze", show_default=True, help="Of the text, joined by +."
)
@click.option("--coverage", default=1.0, show_default=True, help="Share of the characters that get units.")
@click.option("--split", help="Learn from these splits only, joined by commas.")
@click.option("--json", "as_json", is_flag=True)
def tokenizer(
    manifest: Path,
    folder: Path,
    kind: str,
    size: int,
    transform: str,
    coverage: float,
    split: str | None,
    as_json: bool,
) -> None:
    """Learn the recogniser's units from the transcripts into a folder."""
    from .manifest import read_manifest
    from .units import train_units

    texts = [u.text for u in read_manifest(manifest).select(split).utterances]
    units = train_units(texts, kind, size=size, transform=transform, coverage=coverage)
    units.save(folder)
    facts = {"kind": kind, "size": units.size, "transform": transform, "fingerprint": units.fingerprint}
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        few = (
            f" ({size} asked for; the corpus has no more)"
            if units.size < size and kind == "sentencepiece"
            else ""
        )
        say(f"{folder}: {units.size} units{few}, fingerprint {units.fingerprint}")
