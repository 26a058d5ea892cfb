"""The folder of an export is there whole or not at all, killed or not, and replaces only another export."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.data.errors import UsageError
from stillhouse.train.export.folder import new_folder
from stillhouse.train.run.load import EXPORT_HEAD

WRITER = """
import os, signal, sys
from pathlib import Path
from stillhouse.train.export.folder import new_folder

kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
rename, moment, count = Path.rename, sys.argv[2], [0]

def renamed(path, target):
    count[0] += 1
    if moment == f"before rename {count[0]}":
        kill()
    return rename(path, target)

Path.rename = renamed
with new_folder(Path(sys.argv[1]), True) as draft:
    (draft / "model.json").write_text("new")
    if moment == "writing":
        kill()
"""


def write(out: Path, text: str, force: bool = False) -> None:
    with new_folder(out, force) as draft:
        (draft / EXPORT_HEAD).write_text(text)


@pytest.mark.parametrize("moment", ["writing", "before rename 1", "before rename 2"])
def test_a_kill_leaves_the_old_folder_and_the_next_one_sweeps(tmp_path: Path, moment: str) -> None:
    out = tmp_path / "an [odd] name"
    write(out, "old")
    done = subprocess.run([sys.executable, "-c", WRITER, str(out), moment], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(UsageError, match=r"already exists.*--force"):
        write(out, "newer")
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    assert (out / EXPORT_HEAD).read_text() == "old"
    write(out, "newer", force=True)
    assert (out / EXPORT_HEAD).read_text() == "newer" and len(list(tmp_path.iterdir())) == 1


def test_what_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out, "old")
    with pytest.raises(ZeroDivisionError), new_folder(out, True) as draft:
        (draft / EXPORT_HEAD).write_text("half")
        raise ZeroDivisionError
    assert (out / EXPORT_HEAD).read_text() == "old" and [p.name for p in out.parent.iterdir()] == ["out"]


def test_only_an_export_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "new", force=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    (tmp_path / "file").write_text("text")
    for name in ("thesis", "file"):
        with pytest.raises(UsageError, match="no export wrote it"):
            write(tmp_path / name, "new", force=True)
    assert (tmp_path / "thesis" / "chapter").read_text() == "one" and (tmp_path / "file").read_text() == "text"


def test_a_draft_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    draft = tmp_path / f".out.{os.getppid()}.new"
    draft.mkdir()
    write(tmp_path / "out", "new")
    assert draft.exists()
