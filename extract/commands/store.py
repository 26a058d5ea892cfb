"""`stillhouse store` but for its import: take out, clear, cut, copy and merge; no language model is loaded.

Invariant: what deletes has --dry-run; what builds leaves its sources alone. Facts come from life.py and rebuild.py.
Run: `stillhouse store gc STORE --dry-run`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .store_import import store

STORE = click.Path(path_type=Path)
_JSON = click.option("--json", "as_json", is_flag=True, help="The outcome as JSON.")
_DRY = click.option("--dry-run", is_flag=True, help="Only tell what would be done.")
_VIEWS = click.option(
    "--views", multiple=True, metavar="VIEW", help="As in minilm/*/3,6. May be given several times. Default: all."
)


@store.command("rm", epilog="Example: stillhouse store rm corpus.zarr 'minilm/both:64/*'")
@click.argument("store", type=STORE)
@click.argument("views", nargs=-1)
@click.option(
    "--utterances", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with an id on each line."
)
@_DRY
@_JSON
def remove(store: Path, views: tuple[str, ...], utterances: Path | None, dry_run: bool, as_json: bool) -> None:
    """Take VIEWS, or utterances, out of STORE.

    Views go with their files. Utterances are not served any more; their text stays what their neighbours saw, and
    `stillhouse store gc` gives their room back.
    """
    from ..maintain.remove import remove_utterances, remove_views

    if bool(views) == (utterances is not None):
        raise click.UsageError("name views, or give --utterances FILE")
    if utterances is None:
        found = remove_views(_local(store), views, dry_run)
    else:
        found = remove_utterances(_local(store), read_ids(utterances), dry_run)
    _cleared(found, as_json)


@store.command("gc", epilog="Example: stillhouse store gc corpus.zarr --dry-run")
@click.argument("store", type=STORE)
@_DRY
@_JSON
def clear(store: Path, dry_run: bool, as_json: bool) -> None:
    """Give back the room of what STORE serves no more: dead rows, dropped views, superseded records.

    What lives in a shard with dead rows is moved, byte for byte, before the shard goes.
    """
    from ..maintain.gc import collect_garbage as run

    _cleared(run(_local(store), dry_run), as_json)


@store.command("subset", epilog="Example: stillhouse store subset corpus.zarr part.zarr --utterances ids.txt")
@click.argument("store", type=STORE)
@click.argument("out", type=STORE)
@click.option(
    "--utterances", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="A file with an id on each line."
)
@click.option("--split", help="The utterances of these splits of --corpus, as in train,dev.")
@click.option("--corpus", type=click.Path(exists=True, path_type=Path), help="The manifest, for --split.")
@_VIEWS
@_JSON
def subset(
    store: Path,
    out: Path,
    utterances: Path | None,
    split: str | None,
    corpus: Path | None,
    views: tuple[str, ...],
    as_json: bool,
) -> None:
    """Some utterances of STORE as a new store OUT, with the text that their contexts saw."""
    from ..maintain.combine import subset as run

    if (utterances is None) == (split is None) or (split is None) != (corpus is None):
        raise click.UsageError("give --utterances FILE, or --split S with --corpus CORPUS")
    if utterances is not None:
        ids = read_ids(utterances)
    else:
        from ...data.manifest import read_manifest

        ids = [u.id for u in read_manifest(str(corpus)).select(split).utterances]
    _built(run(_place(store), _place(out), ids, views), as_json)


@store.command("cp", epilog="Example: stillhouse store cp corpus.zarr small.zarr --views 'minilm/*/3,6'")
@click.argument("store", type=STORE)
@click.argument("out", type=STORE)
@_VIEWS
@_JSON
def copy(store: Path, out: Path, views: tuple[str, ...], as_json: bool) -> None:
    """Views of STORE as a new store OUT, compact whatever STORE has been through.

    Each may be a folder or s3://BUCKET/PREFIX, so this also brings a store to an object store and back.
    """
    from ..maintain.combine import copy as run

    _built(run(_place(store), _place(out), views), as_json)


@store.command("merge", epilog="Example: stillhouse store merge clean.zarr other.zarr both.zarr")
@click.argument("a", type=STORE)
@click.argument("b", type=STORE)
@click.argument("out", type=STORE)
@_VIEWS
@_JSON
def merge(a: Path, b: Path, out: Path, views: tuple[str, ...], as_json: bool) -> None:
    """The utterances of the stores A and B as a new store OUT.

    Both must have been made with the same settings; what is in both must be the same. Exit code 12: it is not.
    """
    from ..maintain.combine import merge as run

    _built(run(_place(a), _place(b), _place(out), views), as_json)


def read_ids(path: Path) -> list[str]:
    """Ids, one on each line. Errors: UsageError for a file without any."""
    from ...data.errors import UsageError

    ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    ids = list(dict.fromkeys(i for i in ids if i))
    if not ids:
        raise UsageError("no id is in this file", where=path, expected="an utterance id on each line")
    return ids


def _local(path: Path) -> Path:
    """Errors: UsageError for a store that is not on a disk."""
    from ...data.errors import UsageError
    from ..store.remote.client import is_url

    if is_url(path):
        raise UsageError(
            "what is in an object store is neither moved nor deleted",
            where=_place(path),
            expected="a store on a disk",
            remedy="put what is to stay under another name (stillhouse store cp, subset or merge read and write URLs)",
        )
    return path


def _place(path: Path) -> Path | str:
    """A folder; or a URL, of whose slashes a Path has left one."""
    from ..store.remote.client import is_url, split_url

    return "s3://{}/{}".format(*split_url(path)) if is_url(path) else path


def _cleared(found: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    lines = [f"views        {', '.join(found.views)}"] if found.views else []
    lines += [f"utterances   {found.utterances:,}"] if found.utterances else []
    lines += [f"dead         {found.tokens:,} tokens"] if found.tokens else []
    lines += [f"moved        {found.moved_tokens:,} tokens"] if found.moved_tokens else []
    lines.append(f"room         {found.bytes / 1e6:,.1f} MB in {found.files:,} files and folders")
    click.echo("\n".join([f"{found.store}: {'done' if found.done else 'would be done'}", *lines]))


def _built(found: Any, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
        return
    alone = f", and the text of {found.context_only:,} more as context" if found.context_only else ""
    click.echo(
        f"{found.store}: {found.utterances:,} utterances{alone}, {found.bytes / 1e6:,.1f} MB\n"
        f"views        {', '.join(found.views)}"
    )
