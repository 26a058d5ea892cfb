"""`stillhouse store` without its import: delete, copy, subset and merge. No command here loads a language model.

Guarantees: every command that deletes has --dry-run. Every command that builds a store leaves its sources unchanged.
Try: `stillhouse store gc STORE --dry-run`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import options as opt
from .store_import import store

if TYPE_CHECKING:
    from ..maintain.combine import Combined
    from ..maintain.exclusive import Removed

IDS_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
dry_run_option = opt.flag("--dry-run", "Only show what would be done.")
utterances_option = click.option("--utterances", type=IDS_FILE, help="A file with an utterance id on each line.")


@store.command("rm", epilog="Example: stillhouse store rm corpus.zarr 'minilm/both:64/*'")
@click.argument("store", type=opt.STORE)
@click.argument("views", nargs=-1)
@utterances_option
@dry_run_option
@opt.flag("--yes", "Do not ask before several views are deleted.")
@opt.outcome_option
def remove(
    store: Path, views: tuple[str, ...], utterances: Path | None, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Delete VIEWS of STORE, or hide utterances. The command asks before it deletes several views.

    The files of the views are deleted. You can no longer read the utterances, but their text stays part of their
    neighbours' context. `stillhouse store gc` frees their disk space.
    """
    from ..maintain.remove import remove_utterances, remove_views
    from ..store.storage import on_disk

    if bool(views) == (utterances is not None):
        raise click.UsageError("name views, or give --utterances FILE")
    if utterances is None:
        if not (dry_run or yes):
            _ask(remove_views(on_disk(store), views, True))
        _print_removed(remove_views(on_disk(store), views, dry_run), as_json)
    else:
        _print_removed(remove_utterances(on_disk(store), read_ids(utterances), dry_run), as_json)


@store.command("gc", epilog="Example: stillhouse store gc corpus.zarr --dry-run")
@click.argument("store", type=opt.STORE)
@dry_run_option
@opt.outcome_option
def collect(store: Path, dry_run: bool, as_json: bool) -> None:
    """Free the disk space of deleted views, hidden utterances and superseded records.

    If readable utterances share a shard with hidden ones, they are copied, byte for byte, before the shard is deleted.
    """
    from ..maintain.gc import collect_garbage
    from ..store.storage import on_disk

    _print_removed(collect_garbage(on_disk(store), dry_run), as_json)


@store.command("subset", epilog="Example: stillhouse store subset corpus.zarr part.zarr --utterances ids.txt")
@click.argument("store", type=opt.STORE)
@click.argument("out", type=opt.STORE)
@utterances_option
@click.option("--split", help="Use the utterances of these splits of --corpus, as in train,dev.")
@click.option("--corpus", type=opt.EXISTING, help="The manifest, for --split.")
@opt.views_option("--views")
@opt.outcome_option
def subset(
    store: Path,
    out: Path,
    utterances: Path | None,
    split: str | None,
    corpus: Path | None,
    views: tuple[str, ...],
    as_json: bool,
) -> None:
    """Copy some utterances of STORE to a new store OUT, with the text that their contexts saw."""
    from ...data.manifest import read_manifest
    from ..maintain.combine import subset as run

    if (utterances is None) == (split is None) or (split is None) != (corpus is None):
        raise click.UsageError("give --utterances FILE, or --split S with --corpus CORPUS")
    if utterances is not None:
        ids = read_ids(utterances)
    else:
        ids = [u.id for u in read_manifest(str(corpus)).select(split).utterances]
    _print_combined(run(store, out, ids, views), as_json)


@store.command("cp", epilog="Example: stillhouse store cp corpus.zarr small.zarr --views 'minilm/*/3,6'")
@click.argument("store", type=opt.STORE)
@click.argument("out", type=opt.STORE)
@opt.views_option("--views")
@opt.outcome_option
def copy(store: Path, out: Path, views: tuple[str, ...], as_json: bool) -> None:
    """Copy views of STORE to a new store OUT, which has no deleted views or hidden utterances.

    STORE and OUT may be folders or s3://BUCKET/PREFIX. So this command copies a store to an object store and back.
    """
    from ..maintain.combine import copy as run

    _print_combined(run(store, out, views), as_json)


@store.command("merge", epilog="Example: stillhouse store merge clean.zarr other.zarr both.zarr")
@click.argument("a", type=opt.STORE)
@click.argument("b", type=opt.STORE)
@click.argument("out", type=opt.STORE)
@opt.views_option("--views")
@opt.outcome_option
def merge(a: Path, b: Path, out: Path, views: tuple[str, ...], as_json: bool) -> None:
    """Copy the utterances of the stores A and B to a new store OUT.

    Both must have been made with the same settings. Utterances that are in both must be equal. Exit code 12: they are
    not.
    """
    from ..maintain.combine import merge as run

    _print_combined(run(a, b, out, views), as_json)


def _ask(planned: Removed) -> None:
    """Ask whether to delete the views, if they are several. Raises UsageError where nobody can answer."""
    from ...data.errors import UsageError

    if len(planned.views) < 2:
        return
    what = f"this deletes {len(planned.views)} views, {planned.bytes / 1e6:,.1f} MB: {', '.join(planned.views)}"
    if not sys.stdin.isatty():
        raise UsageError(what, where=planned.store, remedy="add --yes to delete them, or name fewer views")
    click.confirm(f"{planned.store}: {what}. Continue?", abort=True, err=True)


def read_ids(path: Path) -> list[str]:
    """Read the distinct ids of a file, one on each line. Raises UsageError for a file without any."""
    from ...data.errors import UsageError

    ids = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    ids = list(dict.fromkeys(i for i in ids if i))
    if not ids:
        raise UsageError("this file has no ids", where=path, expected="an utterance id on each line")
    return ids


def _print(outcome: Any, lines: list[str], as_json: bool) -> None:
    click.echo(json.dumps(asdict(outcome), indent=1) if as_json else "\n".join(lines))


def _print_removed(r: Removed, as_json: bool) -> None:
    lines = [f"{r.store}: {'done' if r.done else 'would be done'}"]
    lines += [f"views        {', '.join(r.views)}"] if r.views else []
    lines += [f"utterances   {r.utterances:,}"] if r.utterances else []
    lines += [f"hidden       {r.tokens:,} tokens or frames"] if r.tokens else []
    lines += [f"moved        {r.moved_tokens:,} tokens or frames"] if r.moved_tokens else []
    lines += [f"freed        {r.bytes / 1e6:,.1f} MB in {r.files:,} files and folders"]
    _print(r, lines, as_json)


def _print_combined(c: Combined, as_json: bool) -> None:
    context = f", and the text of {c.context_only:,} more as context" if c.context_only else ""
    head = f"{c.store}: {c.utterances:,} utterances{context}, {c.bytes / 1e6:,.1f} MB"
    _print(c, [head, f"views        {', '.join(c.views)}"], as_json)
