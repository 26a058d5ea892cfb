"""`stillhouse doctor`: libraries that are absent, broken, crash, hang or print, the machine, and the command."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from stillhouse.data.doctor import checks, probes
from stillhouse.data.doctor.probes import TRIES, Answer, ask
from stillhouse.data.doctor.requirements import needs

REQUIRES = [
    "click>=8.1",
    "h5py>=3.10",
    "soundfile<0.13,>=0.12",
    "no-such-thing>=2",
    "sentencepiece>=0.2",
    'pytest>=8; extra == "dev"',
    'soundfile>=0.12; extra == "audio"',
    'also-not-there[all]>=1; python_version > "3" and extra == "far"',
]


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
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    folder = tmp_path / "modules"
    module(folder, "h5py", "raise OSError('libhdf5.so.310: cannot open shared object file')")
    module(folder, "sentencepiece", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    module(folder, "numba.cuda", "raise ModuleNotFoundError(\"No module named 'cuda.bindings'\")")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return tmp_path


def test_each_kind_of_trouble_is_named(broken: Path) -> None:
    found = {(c.group, c.name): c for c in checks.examine(broken)}

    def state_of(group: str, name: str) -> tuple[str, str]:
        return found[group, name].state, found[group, name].what

    assert state_of("library", "click")[0] == "ok"
    assert state_of("library", "no-such-thing") == ("broken", "not installed")
    assert found["library", "no-such-thing"].remedy == "pip install 'no-such-thing>=2'"
    state, what = state_of("library", "h5py")
    assert state == "broken" and "OSError: libhdf5.so.310: cannot open" in what
    state, what = state_of("library", "sentencepiece")
    assert state == "broken" and "SIGSEGV" in what
    state, what = state_of("library", "soundfile")
    assert state == "broken" and what.endswith(", expected <0.13,>=0.12")
    state, what = state_of("gpu", "numba on CUDA")
    assert state == "broken" and "cuda.bindings" in what
    assert found["gpu", "numba on CUDA"].remedy == "pip install 'stillhouse[gpu]'"
    assert state_of("extra", "audio")[0] == "ok"
    assert state_of("extra", "far") == ("absent", "without also-not-there")
    assert found["extra", "far"].remedy == "pip install 'stillhouse[far]'"
    assert ("extra", "dev") not in found
    assert state_of("machine", "file system")[0] == "ok"
    assert sorted(p.name for p in broken.iterdir()) == ["modules"]


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


@pytest.mark.parametrize("works", [True, False])
def test_where_numba_cannot_write_its_cache_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, works: bool
) -> None:
    (tmp_path / "file").touch()
    for name in ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "file"))
    program = "import numba\n" + TRIES["numba"].replace(probes.__file__, "/proc/version")
    folder = tmp_path / f"stillhouse-numba-{os.getuid()}"
    if not works:
        folder.touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    answer = ask(program)
    assert "NUMBA_CACHE_DIR" in str(answer.get("what" if works else "low")) and answer.error is None
    assert (str(folder) in str(answer.get("what"))) == works


def gpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch, devices: int, torch: Answer, numba: Answer
) -> dict[str, checks.Check]:
    monkeypatch.setattr(checks, "DRIVER", folder)
    for k in range(devices):
        (folder / f"0000:{k}").mkdir()
    return {c.name: c for c in checks._gpu(torch, numba)}


def test_a_gpu_that_all_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(tmp_path, monkeypatch, 1, Answer({"devices": ["NVIDIA H100"]}), Answer({"available": True}))
    assert {c.state for c in found.values()} == {"ok"}
    assert found["CUDA driver"].what == "1 devices" and found["torch on CUDA"].what == "NVIDIA H100"


def test_a_gpu_that_only_the_driver_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = Answer({"devices": [], "what": "built for the CPU"})
    found = gpu(tmp_path, monkeypatch, 2, torch, Answer({"available": False}))
    assert found["torch on CUDA"].state == found["numba on CUDA"].state == "broken"
    assert "built for the CPU" in found["torch on CUDA"].what and "nvidia-smi" in str(found["torch on CUDA"].remedy)


def test_no_gpu_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu(tmp_path / "none", monkeypatch, 0, Answer({"devices": []}), Answer({"available": False}))
    assert {c.state for c in found.values()} == {"absent"}


def test_few_open_files_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    program = "import resource; from stillhouse.data.doctor.checks import _open_files as f; h = 4096\n"
    program += "resource.setrlimit(resource.RLIMIT_NOFILE, (256, h)); c = f(); facts['limits'] = [c.state, c.remedy]"
    assert ask(program).get("limits") == ["low", "ulimit -n 4096"]
    found = {c.name: c for c in checks.machine(tmp_path / "gone" / "deep")}
    assert found["file system"].state == "broken" and "No such file" in found["file system"].what
    assert found["disk"].state in ("ok", "low")


def test_the_needs_are_those_of_the_installation() -> None:
    found = needs()
    assert "torch" in {n.name for n in found if n.extra is None}
    assert ("numba-cuda", "gpu") in {(n.name, n.extra) for n in found}


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stillhouse.cli", "doctor", "--path", str(tmp_path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer["schema"] == "stillhouse.doctor/1" and answer["ok"] is (done.returncode == 0)
    assert done.returncode == 0, done.stdout
    module(tmp_path, "torchaudio", "raise OSError('undefined symbol: aoti_torch')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "80"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "BROKEN  torchaudio" in done.stdout and "aoti_torch" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if "/" not in line)


def test_the_page_tells_all_fields(root: Path) -> None:
    text = (root / "docs" / "reference" / "doctor.md").read_text(encoding="utf-8")
    assert all(f"| `{field.name}` |" in text for field in dataclasses.fields(checks.Check))
