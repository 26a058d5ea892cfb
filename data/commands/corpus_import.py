"""`stillhouse corpus import`: one command for each kind of corpus.

Guarantees: a command imports everything heavier than click inside its function.
Try: `stillhouse corpus import --help`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .paths import EXISTING, PATH, AnyPath

if TYPE_CHECKING:
    from ..manifest import Utterance
    from ..sources.common import Imported

FOLDER = AnyPath(exists=True, file_okay=False)
COLUMNS = ("id", "text", "audio", "session", "order", "speaker", "split", "start", "end", "duration", "channel")


def say(text: str) -> None:
    """Print a line to standard error."""
    click.echo(text, err=True)


root_option = click.option("--root", type=FOLDER, help="Refuse audio files outside this folder. Links are followed.")
_folders = click.argument("sources", metavar="[SPLIT=]FOLDER...", nargs=-1, required=True)
_files = click.argument("sources", metavar="[SPLIT=]FILE...", nargs=-1, required=True)
_pattern = click.option(
    "--session-pattern",
    metavar="REGEX",
    help="Regular expression for the whole id, with a group `session` and perhaps a group `order`.",
)
_audio_root = click.option(
    "--audio-root", type=FOLDER, help="Folder where relative audio paths start. By default the import looks for it."
)
_pipes = click.option(
    "--allow-pipes", is_flag=True, help="Run the shell commands that stand in the place of audio files."
)


def _columns(command: Callable) -> Callable:
    for name in reversed(COLUMNS):
        help = f"Name or number of the column of the {name}, or - for none."
        option = click.option(f"--{name}-column", metavar="COLUMN", help=help)
        command = option(command)
    return command


@click.group("import")
def import_() -> None:
    """Make corpus.jsonl from a corpus of another form, or add to it with --add.

    Each line that cannot be imported is left out and shown: file, line, utterance, what to do. The exit code is then 3.
    """


def _importer(
    name: str, help: str, parameters: tuple[Callable, ...], *, module: str | None = None, audio: bool = True
) -> None:
    """Add the command of `sources.MODULE.import_MODULE`: its parameters, MANIFEST, and the options of all."""
    module = module or name

    def command(sources: Any, manifest: Path, force: bool, add: bool, as_json: bool, **options: Any) -> None:
        from ..errors import UsageError
        from ..files.outputs import check_file
        from ..sources.common import named_sources

        read = getattr(importlib.import_module(f"..sources.{module}", __package__), f"import_{module}")
        if _folders in parameters or _files in parameters:
            sources = named_sources(sources)
        if _columns in parameters:
            options["columns"] = {c: v for c in COLUMNS if (v := options.pop(f"{c}_column")) is not None}
        inputs = sources if isinstance(sources, (list, tuple)) else [sources]
        inputs = [source[1] if isinstance(source, tuple) else source for source in inputs]
        check_file(manifest, inputs, force=True)
        if add and force:
            raise UsageError("--add keeps what is there, and --force replaces it", expected="one of them")
        if add and not manifest.exists():
            raise UsageError("there is no manifest to add to", where=manifest, remedy="leave out --add to make one")
        _finish(read(sources, *([manifest] if audio else []), **options), manifest, force, add, as_json)

    shared = (
        *((root_option,) if audio else ()),
        click.option("--force", is_flag=True, help="Replace a manifest that is different."),
        click.option("--add", is_flag=True, help="Add to the manifest that is there what it lacks."),
        click.option("--json", "as_json", is_flag=True, help="Print facts and findings as JSON."),
    )
    for parameter in reversed((parameters[0], click.argument("manifest", type=PATH), *parameters[1:], *shared)):
        command = parameter(command)
    import_.command(name, help=help)(command)


_importer(
    "csv",
    """Import TABLE, a CSV or TSV file.

    Columns are found by their usual names, or by the options. "A,B" joins two columns by "-". Columns that no option
    names are kept in `meta`.

    Example: stillhouse corpus import csv prompts.csv corpus.jsonl --text-column prompt --audio-root audio
    """,
    (
        click.argument("sources", metavar="TABLE", type=EXISTING),
        _columns,
        _pattern,
        click.option(
            "--delimiter",
            callback=lambda _, option, value: "\t" if value in ("tab", "\\t") else value,
            help="Delimiter. By default it follows from the suffix or the first line.",
        ),
        click.option(
            "--header/--no-header",
            default=None,
            help="Whether the first row names the columns. By default yes, unless columns are given by number.",
        ),
        click.option(
            "--quote/--no-quote",
            default=None,
            help="Whether double quotes quote. By default yes, but in a TSV only if it doubles quotes inside of cells.",
        ),
        click.option(
            "--audio-root", type=EXISTING, help="Folder where audio paths start. By default the folder of the table."
        ),
        click.option("--split", help="Split of utterances that have none of their own."),
    ),
    module="table",
)
_importer(
    "librispeech",
    """Import FOLDER, a LibriSpeech tree or one split, speaker or chapter of it.

    Example: stillhouse corpus import librispeech LibriSpeech corpus.jsonl

    Example: stillhouse corpus import librispeech LibriSpeech corpus.jsonl --text-only --add --split text
    """,
    (
        click.argument("sources", metavar="FOLDER", type=EXISTING),
        click.option("--text-only", is_flag=True, help="Import the transcripts without their audio."),
        click.option("--split", help="Split of all utterances. [default: the name of the folder of the speaker]"),
    ),
)
_importer(
    "text",
    """Import FILES of text without audio.

    Lines are UTT<TAB>TEXT, with --ids also UTT TEXT, or one sentence a line with blank lines between sessions. Files
    may be gzip.

    Example: stillhouse corpus import text stories.txt corpus.jsonl

    Example: stillhouse corpus import text novels.txt.gz corpus.jsonl --add --split text
    """,
    (
        click.argument("sources", metavar="FILES", type=EXISTING, nargs=-1, required=True),
        click.option(
            "--ids/--no-ids", default=None, help="Whether lines start with ids. By default yes, if all have a tab."
        ),
        _pattern,
        click.option("--split", help="Split of all utterances."),
    ),
    audio=False,
)
_importer(
    "kaldi",
    """Import each FOLDER, a Kaldi data directory with wav.scp and text, or a folder of such directories.

    The split is SPLIT, or else the folder's name. With `segments`, recordings are sessions in the order of time. A pipe
    that only decodes one file (flac -c -d, sox, sph2pipe, ffmpeg, cat) is read without a shell. Others need
    --allow-pipes.

    Example: stillhouse corpus import kaldi data/train_clean_100 dev=data/dev_clean corpus.jsonl
    """,
    (_folders, _audio_root, _pipes, _pattern),
)
_importer(
    "espnet",
    """Import each FOLDER, a dump of ESPnet such as dump/raw/train, with the split SPLIT.

    Dumps have the layout of Kaldi data directories. Audio in archives is written to files beside the manifest.

    Example: stillhouse corpus import espnet train=dump/raw/train_clean_100 dev=dump/raw/dev corpus.jsonl
    """,
    (
        _folders,
        click.option("--text-name", default="text", show_default=True, help="File of the transcripts in each folder."),
        click.option("--pieces", is_flag=True, help="Join transcripts that are tokens. ▁ and <space> become spaces."),
        _audio_root,
        _pipes,
        _pattern,
    ),
    module="kaldi",
)
_importer(
    "nemo",
    """Import each FILE, a NeMo manifest, with the split SPLIT.

    A manifest has JSON lines with audio_filepath, text, duration and perhaps offset.

    Example: stillhouse corpus import nemo train=train_manifest.json dev=dev_manifest.json corpus.jsonl
    """,
    (
        _files,
        click.option("--text-key", default="text", show_default=True, help="Key of the transcript."),
        _audio_root,
        _pattern,
    ),
)
_importer(
    "lhotse",
    """Import each FILE of Lhotse's JSON lines, with the split SPLIT.

    Files hold cuts, or recordings and supervisions. They may be gzip.

    Example: stillhouse corpus import lhotse train=cuts_train.jsonl.gz dev=cuts_dev.jsonl.gz corpus.jsonl
    """,
    (_files, _audio_root, _pipes, _pattern),
)
_importer(
    "huggingface",
    """Import each FOLDER, a Hugging Face dataset on disk, with the split SPLIT.

    A folder is one of save_to_disk, of parquet files, or of audio files with metadata.jsonl or metadata.csv. Embedded
    audio is written to files beside the manifest, byte for byte. Columns are found by their usual names, and other
    texts and numbers are kept in `meta`. The first two need pyarrow: pip install 'stillhouse[huggingface]'.

    Example: stillhouse corpus import huggingface my_dataset corpus.jsonl --text-column sentence
    """,
    (_folders, _columns, _audio_root, _pattern),
)


def _finish(result: Imported, manifest: Path, force: bool, add: bool, as_json: bool) -> None:
    """Print findings and notes, write the manifest, and print facts."""
    from ..errors import CorpusError, PartialError
    from ..files.lock import FileLock

    for finding in result.findings[:50]:
        say(str(finding))
    if len(result.findings) > 50:
        say(f"… and {len(result.findings) - 50} more (--json prints all)")
    utterances = result.utterances
    sessions = len({u.session for u in utterances if u.session is not None})
    without = sum(u.session is None for u in utterances)
    if utterances and without == len(utterances):
        result.note("sessions are unknown, so no utterance has context. --session-pattern can read them from ids")
    elif without:
        result.note(f"{sessions} sessions, and {without} utterances without one")
    more: dict[str, int] = {}
    if utterances and add:
        with FileLock(manifest, "manifest"):
            more = _add(result, manifest)
    elif utterances:
        _write(utterances, manifest, force)
    for note in result.notes:
        say(note)
    hours = sum(u.duration_s or 0 for u in utterances) / 3600
    if as_json:
        facts = {
            "manifest": str(manifest) if utterances else None,
            "utterances": len(utterances),
            "hours": round(hours, 4),
            "sessions": sessions,
            "speakers": len({u.speaker for u in utterances if u.speaker is not None}),
            "splits": sorted({u.split for u in utterances if u.split is not None}),
            "notes": result.notes,
            "findings": [f.facts() for f in result.findings],
            **more,
        }
        click.echo(json.dumps(facts, ensure_ascii=False, indent=1))
    if not utterances:
        raise CorpusError("nothing could be imported", where=manifest)
    if add:
        known = f", {more['known']} were there already" if more["known"] else ""
        say(f"{manifest}: {more['added']} utterances added{known}, {more['total']} in all")
    else:
        say(f"{manifest}: {len(utterances)} utterances, {hours:.2f} h")
    if result.findings:
        raise PartialError(f"{len(result.findings)} findings are left out, see above", where=manifest)


def _write(utterances: list[Utterance], manifest: Path, force: bool) -> None:
    """Write a new manifest. A different one is replaced by `force` alone."""
    from ..errors import UsageError
    from ..files.outputs import check_file
    from ..manifest import is_manifest, to_line, write_manifest

    if manifest.exists() and not force:
        with manifest.open("rb") as file:
            same = all(file.readline() == (to_line(u) + "\n").encode() for u in utterances) and not file.read(1)
        if not same:
            remedy = "--force replaces it, and --add adds to it"
            raise UsageError("there is a different manifest", where=manifest, remedy=remedy)
    check_file(manifest, own=is_manifest, remedy="choose another name, or remove it")
    write_manifest(manifest, utterances)


def _add(result: Imported, manifest: Path) -> dict[str, int]:
    """Add what is new to a manifest, whose lock the caller holds. Return the counts."""
    from ..corpus.add import add_utterances
    from ..manifest import read_manifest, write_manifest

    added = add_utterances(read_manifest(manifest), result.utterances)
    if added.sessions:
        result.note(
            f"new utterances stand behind those of {added.sessions} sessions that the corpus has. They are context of "
            "each other in the order of the file, so extract a store again with --refresh"
        )
    if added.new:
        write_manifest(manifest, added.utterances)
    return {"added": added.new, "known": added.known, "total": len(added.utterances)}
