"""The house: who may import whom, what ships, and how fast --help is."""

from __future__ import annotations

import ast
import configparser
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from stillhouse.cli import cli

PACKAGES = ("data", "extract", "distill", "train")
# What each room may import of the house; whatever else it imports is a library's.
MAY = {
    "data": {"data"},
    "extract": {"extract", "data"},
    "distill": {"distill", "extract.store", "data"},
    "train": {"train", "distill", "extract.store", "data"},
    "train.rnnt": {"train.rnnt"},
}


def modules(root: Path) -> list[Path]:
    return [p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))]


def imports(path: Path, root: Path) -> set[str]:
    """Dotted names of what a module imports, relative ones resolved below the package stillhouse."""
    here = path.relative_to(root).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            base = f"stillhouse.{base}" if node.level else ""
            name = ".".join(filter(None, [base.rstrip("."), node.module or ""]))
            found |= {f"{name}.{a.name}" for a in node.names} | {name}
    return found


def test_who_may_import_whom(root: Path) -> None:
    wrong = []
    for path in modules(root):
        room = path.relative_to(root).parts[0]
        if path.is_relative_to(root / "train" / "rnnt"):
            room = "train.rnnt"
        for name in imports(path, root):
            inside = name.removeprefix("stillhouse.")
            if name.startswith("stillhouse.") and inside.split(".")[0] in PACKAGES:
                # The name of a room's parent is no import of what else is in it.
                near = (inside == m or inside.startswith(m + ".") or m.startswith(inside + ".") for m in MAY[room])
                if not any(near):
                    wrong.append(f"{path.relative_to(root)} imports {name}")
            top = name.split(".")[0]
            of_the_shell = path.parent.name == "commands"
            if top in {"click", "rich"} and not of_the_shell:
                wrong.append(f"{path.relative_to(root)} imports {top}: only cli.py and commands/ may")
            if top == "transformers" and room not in {"extract"}:
                wrong.append(f"{path.relative_to(root)} imports transformers")
            if top == "pickle" or top == "joblib":
                wrong.append(f"{path.relative_to(root)} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_the_loss_needs_torch_numpy_and_numba_alone(root: Path) -> None:
    allowed = {"torch", "numpy", "numba", "llvmlite", "stillhouse"} | set(sys.stdlib_module_names)
    for path in (root / "train" / "rnnt").rglob("*.py"):
        assert {n.split(".")[0] for n in imports(path, root) if n} <= allowed, path


def test_setup_cfg_lists_every_package(root: Path) -> None:
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg", encoding="utf-8")
    listed = set(config["options"]["packages"].split())
    folders = {
        "stillhouse." + ".".join(p.parent.relative_to(root).parts)
        for package in PACKAGES
        for p in (root / package).rglob("__init__.py")
    }
    assert listed == folders | {"stillhouse"}


def test_only_cli_is_python_at_the_root(root: Path) -> None:
    assert [p.name for p in root.glob("*.py")] == ["cli.py"]  # any other would ship as stillhouse.NAME


def test_the_wheel_holds_every_module_and_nothing_generic(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "build" / "lib", ignore_errors=True)  # setuptools packs what an earlier build left there
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no wheel without the package index: its build backend is installed from there")
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"stillhouse"}
    expected = {f"stillhouse/{p.relative_to(root)}" for p in [*modules(root), root / "cli.py"]}
    assert expected == {n for n in names if n.endswith(".py")}
    assert {"stillhouse/train/demo/stories-train.txt"} <= names
    assert not [n for n in names if n.startswith("stillhouse/tests")]


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every group and command as the words behind `stillhouse`."""
    yield " ".join(path)
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name))


@pytest.mark.parametrize("command", [*commands()])
def test_help_is_fast_and_imports_nothing_heavy(command: str) -> None:
    program = (
        "import sys; from stillhouse.cli import main\n"
        f"try: main({[*command.split(), '--help']!r})\n"
        "except SystemExit as e:\n"
        "    heavy = {'torch', 'zarr', 'h5py', 'numba', 'transformers', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "    sys.exit(f'imports {heavy}' if heavy else e.code)\n"
    )
    # Of CPU: on a quiet machine the same as by the clock, and other tests may run beside this one. The best of three.
    took = []
    while not took or (took[-1] >= 0.3 and len(took) < 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "Usage: stillhouse" in done.stdout
    assert took[-1] < 0.3, took


def test_python_cli_py_works_in_a_checkout(root: Path) -> None:
    done = subprocess.run([sys.executable, "cli.py", "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "Commands:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nonsense"], 2), (["train", "gone.toml"], 2), (["score", "gone.jsonl"], 1), (["--version"], 0)],
)
def test_exit_codes(arguments: list[str], code: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.cli", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert done.stdout == "" and done.stderr.strip()
