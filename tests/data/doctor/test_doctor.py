"""doctor: libraries that are absent, broken, crash, hang or chatter; the machine; the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.data.doctor import checks
from stillhouse.data.doctor import requirements as needs
from stillhouse.data.doctor.probes import Answer, ask

SETUP = """
[metadata]
name = stillhouse
[options]
install_requires =
    click>=8.1
    h5py>=3.10
    soundfile>=0.12,<0.13
    # a comment
    no-such-thing>=2
    sentencepiece>=0.2
[options.extras_require]
dev =
    pytest>=8
audio =
    soundfile>=0.12
far = also-not-there[all]>=1 ; python_version > "3"
"""


def module(folder: Path, name: str, code: str) -> None:
    path = folder.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code, encoding="utf-8")
    for parent in path.relative_to(folder).parents:
        if str(parent) != ".":
            (folder / parent / "__init__.py").touch()


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few needs, some of whose modules are broken in ways that have been seen."""
    setup = tmp_path / "setup.cfg"
    setup.write_text(SETUP, encoding="utf-8")
    monkeypatch.setattr(needs, "SETUP", setup)
    folder = tmp_path / "modules"
    module(folder, "h5py", "raise OSError('libhdf5.so.310: cannot open shared object file')")
    module(folder, "sentencepiece", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    module(folder, "numba.cuda", "raise ModuleNotFoundError(\"No module named 'cuda.bindings'\")")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path


def test_each_kind_of_trouble_is_named(broken: Path) -> None:
    found = {(c.group, c.name): c for c in checks.examine(broken)}

    def told(group: str, name: str) -> tuple[str, str]:
        return found[group, name].state, found[group, name].what

    assert told("library", "click")[0] == "ok"
    assert told("library", "no-such-thing") == ("broken", "not installed")
    assert found["library", "no-such-thing"].remedy == "pip install 'no-such-thing>=2'"
    state, what = told("library", "h5py")
    assert state == "broken" and "OSError: libhdf5.so.310: cannot open" in what
    state, what = told("library", "sentencepiece")
    assert state == "broken" and "SIGSEGV" in what
    state, what = told("library", "soundfile")
    assert state == "broken" and what.endswith(", >=0.12,<0.13 asked for")
    state, what = told("gpu", "numba on CUDA")
    assert state == "broken" and "cuda.bindings" in what
    assert found["gpu", "numba on CUDA"].remedy == "pip install 'stillhouse[gpu]'"
    assert told("gpu", "numba's simulator")[0] == "low"
    assert told("extra", "audio")[0] == "ok"
    assert told("extra", "far") == ("absent", "without also-not-there")
    assert found["extra", "far"].remedy == "pip install 'stillhouse[far]'"
    assert ("extra", "dev") not in found
    assert told("machine", "file system")[0] == "ok"
    assert sorted(p.name for p in broken.iterdir()) == ["modules", "setup.cfg"]


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import os; os._exit(0)", "ended with exit code 0"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "crashed: SIGABRT"),
        ("while True: pass", "no answer in 0.5 s"),
    ],
)
def test_a_process_that_fails_is_an_answer(program: str, error: str) -> None:
    assert ask(program, 0.5 if "while" in program else 60) == Answer(error=error)


def test_chatter_does_not_hide_the_facts() -> None:
    program = "import sys\nprint('stillhouse')\nsys.stderr.write('warning')\nfacts['a'] = [1]\nprint('{}')"
    assert ask(program) == Answer({"a": [1]})


def gpu(driver: Answer, torch: Answer, numba: Answer) -> dict[str, checks.Check]:
    answers = {" driver": driver, "torch": torch, " numba.cuda": numba, " simulator": Answer()}
    return {c.name: c for c in checks._gpu(answers)}


def test_a_gpu_that_all_see() -> None:
    one = {"there": True, "init": 0, "version": "13.0", "devices": 1}
    torch = Answer({"cuda": True, "devices": ["H100, 80 GiB, compute 9.0"]})
    found = gpu(Answer(one), torch, Answer({"available": True}))
    assert {c.state for c in found.values()} == {"ok"}
    assert found["torch on CUDA"].what == "H100, 80 GiB, compute 9.0"


def test_a_gpu_that_only_the_driver_sees() -> None:
    one = {"there": True, "init": 0, "version": "12.4", "devices": 1}
    found = gpu(Answer(one), Answer({"cuda": False, "built_for": "13.0"}), Answer({"available": False}))
    assert found["torch on CUDA"].state == found["numba on CUDA"].state == "broken"
    assert found["torch on CUDA"].remedy == "install a torch that is built for CUDA 12.4 or older"


def test_a_driver_that_does_not_start() -> None:
    found = gpu(Answer({"there": True, "init": 803, "devices": 0}), Answer(error="gone"), Answer({}))
    assert found["CUDA driver"].state == "broken" and "803" in found["CUDA driver"].what


def test_no_gpu_is_no_fault() -> None:
    found = gpu(Answer({"there": False, "devices": 0}), Answer({"cuda": False}), Answer({"available": False}))
    assert {c.state for c in found.values()} == {"absent", "ok"}


def test_few_open_files_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    program = "import resource; from stillhouse.data.doctor.checks import _open_files as f; h = 4096\n"
    program += "resource.setrlimit(resource.RLIMIT_NOFILE, (256, h)); c = f(); facts['told'] = [c.state, c.remedy]"
    assert ask(program).get("told") == ["low", "ulimit -n 4096"]
    found = {c.name: c for c in checks.machine(tmp_path / "gone" / "deep")}
    assert found["file system"].state == "broken" and "No such file" in found["file system"].what
    assert found["disk"].state in ("ok", "low")


def test_the_needs_are_setup_cfgs(root: Path) -> None:
    found = needs.needs()
    assert needs.Need("torch", ">=2.11,<2.15", None) in found
    assert {"gpu", "demo"} <= {n.extra for n in found}


def test_a_package_without_its_checkout_has_its_own_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(needs, "SETUP", tmp_path / "gone.cfg")
    found = needs.needs()
    assert {"torch", "zarr", "click"} <= {n.name for n in found if n.extra is None}
    assert ("numba-cuda", "gpu") in {(n.name, n.extra) for n in found}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli", "doctor", "--path", str(tmp_path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["schema"] == "stillhouse.doctor/1" and told["ok"] is (done.returncode == 0)
    assert done.returncode == 0, done.stdout
    module(tmp_path, "torchaudio", "raise OSError('undefined symbol: aoti_torch')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "BROKEN  torchaudio" in done.stdout and "aoti_torch" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "/" not in line)


def test_the_page_tells_all_fields(root: Path) -> None:
    text = (root / "docs" / "reference" / "doctor.md").read_text(encoding="utf-8")
    assert all(f"| `{field.name}` |" in text for field in dataclasses.fields(checks.Check))
