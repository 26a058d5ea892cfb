"""Kernels where numba can write neither beside the sources nor under HOME, and folders that others have put there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.train.rnnt import cache

LOSS = """
import torch
from stillhouse.train.rnnt import rnnt_loss
logits = torch.zeros(1, 2, 2, 3, requires_grad=True)
one = torch.ones(1, 1, dtype=torch.int32)
loss = rnnt_loss(logits, one, torch.tensor([2], dtype=torch.int32), torch.tensor([1], dtype=torch.int32))
loss.sum().backward()
print(float(loss.detach().sum()))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An installation and a HOME without any folder to write to: files are where numba would make folders."""
    site = tmp_path / "site" / "stillhouse" / "train"
    source = Path(cache.__file__).parent
    shutil.copytree(source, site / "rnnt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source.parent / "__init__.py", site)
    for folder in [site / "rnnt", *(f for f in (site / "rnnt").iterdir() if f.is_dir())]:
        (folder / "__pycache__").touch()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NUMBA_", "XDG_"))}
    home = str(tmp_path / "home")
    more = {"HOME": home, "XDG_CACHE_HOME": home, "TMPDIR": str(tmp_path / "tmp"), "OMP_NUM_THREADS": "1"}
    return kept | more | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.slow
def test_the_loss_of_two_processes_at_once_without_a_folder_to_write_to(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Two frames, one unit and even odds over three outputs: two paths of three steps each, so log(27 / 2)."""
    for printed in two_at_once(LOSS, environment, tmp_path):
        assert float(printed) == pytest.approx(2.6026897, abs=1e-5)


def test_a_kernel_of_two_processes_at_once_without_a_folder_to_write_to(
    environment: dict[str, str], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    (site / "__pycache__").touch()
    (site / "seven.py").write_text(
        "from stillhouse.train.rnnt.cache import compiled\n@compiled\ndef seven(x):\n    return x + 7\n"
    )
    assert two_at_once("import seven\nprint(seven.seven(1))", environment, tmp_path) == ["8\n", "8\n"]
    hits = "import seven\nseven.seven(1)\nprint(sum(seven.seven.stats.cache_hits.values()))"
    assert two_at_once(hits, environment, tmp_path) == ["1\n", "1\n"]


def two_at_once(program: str, environment: dict[str, str], tmp_path: Path) -> list[str]:
    """Return what two processes print that keep compiled kernels in one private folder."""
    command = [sys.executable, "-c", program]
    started = [
        subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    [folder] = (tmp_path / "tmp").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700 and list(folder.rglob("*.nbi"))
    return printed


def private(monkeypatch: pytest.MonkeyPatch, parent: Path) -> str | None:
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(parent))
    return cache.private_folder.__wrapped__()


def test_folders_that_another_user_may_have_made_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"stillhouse-numba-{os.getuid()}"
    assert private(monkeypatch, tmp_path) == private(monkeypatch, tmp_path) == str(tmp_path / name)
    (tmp_path / name).chmod(0o770)
    assert private(monkeypatch, tmp_path) is None
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").chmod(0o700)
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    assert private(monkeypatch, tmp_path) is None
    (tmp_path / name).unlink()
    tmp_path.chmod(0o777)
    assert private(monkeypatch, tmp_path) is None
    tmp_path.chmod(0o1777)
    assert private(monkeypatch, tmp_path) == str(tmp_path / name)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / f"stillhouse-numba-{os.getuid()}"
    folder.mkdir(0o700)
    os.chown(folder, 65534, 65534)
    assert private(monkeypatch, tmp_path) is None
