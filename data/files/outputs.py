"""Files and folders that a command may write: none of its inputs, and nothing that another program wrote.

Guarantees: a file is compared with the inputs as the file that it is, over links and other spellings of its path. Two
ids never get one file name, also on file systems that do not tell A from a.
Try: `stillhouse score hyp.jsonl --html hyp.jsonl`.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

from ..errors import UsageError, first_few

PAGE = b'<meta name="generator" content="stillhouse">'  # in the head of every page that Stillhouse writes
LONGEST_NAME = 200  # bytes of UTF-8. File systems take 255, and a suffix follows.
PLAIN = re.compile(r"[^\W_][\w.-]*", re.ASCII)
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # names that Windows keeps for itself


def refuse_input(out: Path, inputs: Iterable[Path | None], *, inside: bool = False) -> None:
    """Raise UsageError if `out` is the same file or folder as one of the inputs, or is `inside` one of them.

    It is also raised if `out` lies in a store, which holds nothing but its own files.
    """
    _refuse_store(out)
    for path in inputs:
        if path is None or not path.exists():
            continue
        same = out.exists() and os.path.samefile(out, path)
        if same or os.path.realpath(out) == os.path.realpath(path):
            what = "this is an input of the command, which would be overwritten"
            raise UsageError(what, where=out, remedy="choose another name")
        if inside and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(path)):
            what = f"this is inside of {path}, which is an input of the command"
            raise UsageError(what, where=out, remedy="choose a place outside of it")


def _refuse_store(out: Path) -> None:
    for folder in Path(os.path.realpath(out)).parents:
        if (folder / "store.json").is_file():
            what = f"this is inside of the store {folder}"
            raise UsageError(what, where=out, remedy="choose a place outside of it")


def check_file(
    out: Path,
    inputs: Iterable[Path | None] = (),
    *,
    own: Callable[[bytes], bool] | None = None,
    force: bool = False,
    remedy: str = "choose another name, or replace it with --force",
) -> None:
    """Raise UsageError if a file may not be written, before any work is done.

    It may be if it is no folder and no input, and if it does not exist, `own` recognises its first 4,096 bytes as an
    earlier output, or `force` is set. `remedy` is what to do about another file.
    """
    refuse_input(out, inputs)
    if out.is_dir():
        raise UsageError("this is a folder", where=out, expected="the name of a file")
    if not out.exists() or force:
        return
    if not out.is_file():
        raise UsageError("this is not a regular file", where=out, expected="the name of a file")
    with out.open("rb") as file:
        head = file.read(4096)
    if head and not (own is not None and own(head)):
        what = "this file exists, and no earlier call of this command wrote it"
        raise UsageError(what, where=out, remedy=remedy)


def is_page(head: bytes) -> bool:
    """Return whether a file begins like a page of Stillhouse."""
    return PAGE in head


def check_folder(out: Path, fits: Callable[[set[str]], bool], what: str) -> None:
    """Raise UsageError unless a folder is absent or empty, or the names of what it holds fit, or if it is in a store.

    `what` names a folder that fits, for the error. Names that begin with a dot do not count.
    """
    _refuse_store(out)
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UsageError("this is not a folder", where=out, expected=f"a new or empty folder, or {what}")
    names = {name for name in os.listdir(out) if not name.startswith(".") and name != "lost+found"}
    if names and not fits(names):
        has = f"the folder is not {what}, and it has {first_few(sorted(names), 3)}"
        raise UsageError(has, where=out, expected=f"a new or empty folder, or {what}", remedy="choose another name")


def file_names(ids: Iterable[str]) -> dict[str, str]:
    """Return a file name, without a suffix, for each id. No two are equal, also if case does not count.

    An id that is a plain name is its own. Any other is its letters with a hash behind them.
    """
    ids = list(dict.fromkeys(ids))
    plain = {id: id for id in ids if PLAIN.fullmatch(id) and len(id) <= LONGEST_NAME and not DEVICES.fullmatch(id)}
    plain = {id: name for id, name in plain.items() if not name.endswith(".")}
    uses = Counter(name.casefold() for name in plain.values())
    names = {id: name for id, name in plain.items() if uses[name.casefold()] == 1}
    taken = set(uses)
    for id in ids:
        size = 6
        while id not in names:
            digest = blake2b(id.encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
            letters = re.sub(r"[^A-Za-z0-9.-]+", "_", unicodedata.normalize("NFKD", id))[:60].strip("_.-")
            name = f"{'id_' if not letters or DEVICES.fullmatch(letters) else ''}{letters}-{digest}"
            size += 1
            if name.casefold() not in taken:
                names[id] = name
                taken.add(name.casefold())
    return {id: names[id] for id in ids}
