"""The `stillhouse corpus import` commands: thin over the readers of this package, one a kind of corpus.

Invariant: everything heavier than click is imported inside a command. Run: `stillhouse corpus import --help`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..sources.common import Imported

EXISTING = click.Path(exists=True, path_type=Path)
PATH = click.Path(path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
COLUMNS = ("id", "text", "audio", "session", "order", "speaker", "split", "start", "duration")


def say(text: str) -> None:
    click.echo(text, err=True)


def root_option(command: Callable) -> Callable:
    return click.option("--root", type=FOLDER, help="Refuse audio that lies outside this folder, links followed.")(
        command
    )


pattern_option = click.option(
    "--session-pattern", metavar="REGEX", help="On the id, with groups `session` and `order`."
)
split_option = click.option("--split", help="Split of utterances that have none of their own.")
audio_root_option = click.option(
    "--audio-root", type=FOLDER, help="Folder of relative audio paths; by default it is looked for."
)
pipes_option = click.option(
    "--allow-pipes", is_flag=True, help="Run the shell commands that stand in the place of audio files."
)


def _finishing(command: Callable) -> Callable:
    """The options that every import has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print what was imported, and the findings, as JSON."),
        click.option("--force", is_flag=True, help="Replace a manifest that is there and differs."),
        root_option,
    ):
        command = option(command)
    return command


@click.group("import")
def import_() -> None:
    """Make corpus.jsonl out of what there is.

    What cannot be imported is left out and named: file, line, utterance, what to do (exit code 3).
    """


def _column_options(command: Callable) -> Callable:
    for name in reversed(COLUMNS):
        command = click.option(f"--{name}-column", metavar="COLUMN", help=f"Column of the {name}: name or number.")(
            command
        )
    return command


def _columns(options: dict[str, Any]) -> dict[str, str]:
    return {name: value for name in COLUMNS if (value := options.pop(f"{name}_column")) is not None}


@import_.command("csv")
@click.argument("table", type=EXISTING)
@click.argument("manifest", type=PATH)
@_column_options
@pattern_option
@click.option("--delimiter", help="By default after the suffix, else the first line.")
@click.option("--header/--no-header", default=None, help="Default: a header, unless columns are given by number.")
@click.option("--quote/--no-quote", default=None, help="Whether double quotes quote; default: not in a TSV.")
@click.option("--audio-root", type=EXISTING, help="Folder of the audio paths; default: the table's.")
@split_option
@_finishing
def import_csv(table: Path, manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """TABLE, a CSV or TSV; other columns than those mapped are kept in `meta`.

    Usual names of columns are found without being told. "A,B" joins two columns by "-".

    Example: stillhouse corpus import csv prompts.csv corpus.jsonl --text-column prompt --audio-root audio
    """
    from ..sources.table import import_table

    columns = _columns(options)
    if options["delimiter"] in ("tab", "\\t"):
        options["delimiter"] = "\t"
    _finish(import_table(table, manifest, columns, **options), manifest, force, as_json)


@import_.command("librispeech")
@click.argument("folder", type=EXISTING)
@click.argument("manifest", type=PATH)
@_finishing
def import_librispeech(folder: Path, manifest: Path, root: Path | None, force: bool, as_json: bool) -> None:
    """FOLDER, a LibriSpeech tree, or any one split, speaker or chapter of it.

    Example: stillhouse corpus import librispeech LibriSpeech corpus.jsonl
    """
    from ..sources.librispeech import import_librispeech as read

    _finish(read(folder, manifest, root=root), manifest, force, as_json)


@import_.command("text")
@click.argument("files", type=EXISTING, nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@click.option("--ids/--no-ids", default=None, help="Lines are UTT<TAB>TEXT; default: if all of them have a tab.")
@pattern_option
@click.option("--split", help="Split of all utterances.")
@click.option("--force", is_flag=True, help="Replace a manifest that is there and differs.")
@click.option("--json", "as_json", is_flag=True, help="Print what was imported, and the findings, as JSON.")
def import_text(files: tuple[Path, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """FILES of text without audio: UTT<TAB>TEXT, or a sentence a line with blank lines between sessions.

    Example: stillhouse corpus import text stories.txt corpus.jsonl
    """
    from ..sources.text import import_text as read

    _finish(read(files, **options), manifest, force, as_json)


@import_.command("kaldi")
@click.argument("sources", metavar="[SPLIT=]FOLDER...", nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@audio_root_option
@pipes_option
@pattern_option
@_finishing
def import_kaldi(sources: tuple[str, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Kaldi data directories: [SPLIT=]FOLDER... with wav.scp and text, or a folder of such folders.

    The split is the folder's name unless another is said. With `segments`, recordings are sessions in the order of
    time. Pipes that only decode one file (flac -c -d, sox, sph2pipe, ffmpeg) are read without a shell; others need
    --allow-pipes.

    Example: stillhouse corpus import kaldi data/train_clean_100 dev=data/dev_clean corpus.jsonl
    """
    from ..sources.common import named_sources
    from ..sources.kaldi import import_kaldi as read

    _finish(read(named_sources(sources), manifest, **options), manifest, force, as_json)


@import_.command("espnet")
@click.argument("sources", metavar="[SPLIT=]FOLDER...", nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@click.option("--text-name", default="text", show_default=True, help="File of the transcripts in each folder.")
@click.option("--pieces", is_flag=True, help="They are tokens: join them, with ▁ and <space> as spaces.")
@audio_root_option
@pipes_option
@pattern_option
@_finishing
def import_espnet(sources: tuple[str, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """ESPnet's dumps: [SPLIT=]FOLDER... like dump/raw/train, laid out as Kaldi's; audio in archives is written out.

    Example: stillhouse corpus import espnet train=dump/raw/train_clean_100 dev=dump/raw/dev corpus.jsonl
    """
    from ..sources.common import named_sources
    from ..sources.kaldi import import_kaldi as read

    _finish(read(named_sources(sources), manifest, **options), manifest, force, as_json)


@import_.command("nemo")
@click.argument("sources", metavar="[SPLIT=]FILE...", nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@click.option("--text-key", default="text", show_default=True, help="Key of the transcript.")
@audio_root_option
@pattern_option
@_finishing
def import_nemo(sources: tuple[str, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """NeMo manifests: [SPLIT=]FILE... of JSON lines with audio_filepath, text, duration and perhaps offset.

    Example: stillhouse corpus import nemo train=train_manifest.json dev=dev_manifest.json corpus.jsonl
    """
    from ..sources.common import named_sources
    from ..sources.nemo import import_nemo as read

    _finish(read(named_sources(sources), manifest, **options), manifest, force, as_json)


@import_.command("lhotse")
@click.argument("sources", metavar="[SPLIT=]FILE...", nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@audio_root_option
@pipes_option
@pattern_option
@_finishing
def import_lhotse(sources: tuple[str, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Lhotse's JSON lines, gzip or not: [SPLIT=]FILE... of cuts, or of recordings and of supervisions.

    Example: stillhouse corpus import lhotse train=cuts_train.jsonl.gz dev=cuts_dev.jsonl.gz corpus.jsonl
    """
    from ..sources.common import named_sources
    from ..sources.lhotse import import_lhotse as read

    _finish(read(named_sources(sources), manifest, **options), manifest, force, as_json)


@import_.command("huggingface")
@click.argument("sources", metavar="[SPLIT=]FOLDER...", nargs=-1, required=True)
@click.argument("manifest", type=PATH)
@_column_options
@pattern_option
@_finishing
def import_huggingface(sources: tuple[str, ...], manifest: Path, force: bool, as_json: bool, **options: Any) -> None:
    """Hugging Face datasets on disk: [SPLIT=]FOLDER... of save_to_disk, or of parquet files.

    Audio that is embedded is written out beside the manifest, byte for byte. Usual names of columns are found without
    being told; other texts and numbers are kept in `meta`. Needs pyarrow: pip install 'stillhouse[huggingface]'.

    Example: stillhouse corpus import huggingface my_dataset corpus.jsonl --text-column sentence
    """
    from ..sources.common import named_sources
    from ..sources.huggingface import import_huggingface as read

    columns = _columns(options)
    _finish(read(named_sources(sources), manifest, columns, **options), manifest, force, as_json)


def _finish(result: Imported, manifest: Path, force: bool, as_json: bool) -> None:
    from ..errors import CorpusError, PartialError, UsageError
    from ..manifest import to_line, write_manifest

    for finding in result.findings[:50]:
        say(str(finding))
    if len(result.findings) > 50:
        say(f"… and {len(result.findings) - 50} more (--json prints all)")
    utterances = result.utterances
    sessions = len({u.session for u in utterances if u.session is not None})
    without = sum(u.session is None for u in utterances)
    if utterances and without == len(utterances):
        result.note("sessions: unknown, so no utterance has context (name them with --session-pattern, if ids tell)")
    elif without:
        result.note(f"sessions: {sessions}; {without} utterances have none")
    for note in result.notes:
        say(note)
    written = bool(utterances)
    if written and manifest.exists() and not force:
        with manifest.open("rb") as file:
            same = all(file.readline() == (to_line(u) + "\n").encode() for u in utterances) and not file.read(1)
        if not same:
            raise UsageError("a manifest that differs is there already", where=manifest, remedy="--force replaces it")
    if written:
        write_manifest(manifest, utterances)
    hours = sum(u.duration_s or 0 for u in utterances) / 3600
    if as_json:
        facts = {
            "manifest": str(manifest) if written else None,
            "utterances": len(utterances),
            "hours": round(hours, 4),
            "sessions": sessions,
            "speakers": len({u.speaker for u in utterances if u.speaker is not None}),
            "splits": sorted({u.split for u in utterances if u.split is not None}),
            "notes": result.notes,
            "findings": [f.facts() for f in result.findings],
        }
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    if not written:
        raise CorpusError("nothing could be imported", where=manifest)
    say(f"{manifest}: {len(utterances)} utterances, {hours:.2f} h")
    if result.findings:
        raise PartialError(f"{len(result.findings)} findings, see above: what they name was left out", where=manifest)
