"""The layout rules: who may import whom, how large folders and files are, what ships, and how fast --help is.

Guarantees: every rule is counted from the syntax trees of the package, imports inside functions included.
Try: `pytest tests/test_house.py`.
"""

from __future__ import annotations

import ast
import configparser
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click
import pytest

from stillhouse.cli import cli

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "extract", "distill", "train")
# What each part of the package may import of the package; whatever else it imports is a library's.
MAY_IMPORT = {
    "data": {"data"},
    "extract": {"extract", "data"},
    "distill": {"distill", "extract.store", "data"},
    "train": {"train", "distill", "extract.store", "extract.cpu_matmul", "data"},
    "train.rnnt": {"train.rnnt", "extract.cpu_matmul"},  # which imports torch alone
    # `decode` and `align` of new audio run the speech encoder that computed a run's features. Training never does.
    "train.commands": {"train", "distill", "extract.store", "extract.speech", "extract.cpu_matmul", "data"},
}
# Folders and files from the lowest to the highest: a module imports from its own line and from lower ones alone.
LAYERS = {
    "data": [
        "errors",
        "files",
        "text manifest units",
        "audio",
        "features",
        "batches corpus",
        "sources doctor",
        "commands",
    ],
    "extract": ["store cpu_matmul", "adapters teacher", "speech", "pipeline", "maintain", "inspect", "commands"],
    "extract.store": [
        "disk",
        "remote",
        "format",
        "read storage",
        "views display gather reader batches writer",
        "verify",
    ],
    "train": ["config rnnt score", "model", "run decode", "loop export report", "study", "demo", "commands"],
}
MOST_ENTRIES, MOST_LINES, MOST_EQUAL_LINES = 12, 400, 12


def modules() -> dict[str, Path]:
    """{dotted name below stillhouse: file} of every module of the package."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, relative ones resolved below the package stillhouse."""
    here = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["stillhouse", *here[: len(here) - node.level + 1]] if node.level else []
            name = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{name}.{a.name}" for a in node.names} | {name}
    return found


def edges() -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, also inside functions; a name of a package is that module."""
    named = modules()
    graph: dict[str, set[str]] = {}
    for module, path in named.items():
        inside = {name.removeprefix("stillhouse.") for name in imports(path) if name.startswith("stillhouse.")}
        # `from . import x` names the package, too, which holds nothing of its own then
        packages = {n for n in inside if any(m.startswith(f"{n}.") for m in inside & named.keys())}
        graph[module] = (inside & named.keys()) - packages - {module}
    return graph


def test_who_may_import_whom() -> None:
    wrong = []
    for module, path in modules().items():
        part = max((p for p in MAY_IMPORT if f"{module}.".startswith(f"{p}.")), key=len)
        for name in imports(path):
            inside = name.removeprefix("stillhouse.")
            if name.startswith("stillhouse.") and inside.split(".")[0] in PACKAGES:
                # The name of a parent package is no import of what else is in it.
                allowed = [f"{inside}.".startswith(f"{m}.") or m.startswith(f"{inside}.") for m in MAY_IMPORT[part]]
                wrong += [] if any(allowed) else [f"{module} imports {name}"]
            top = name.split(".")[0]
            if top in {"click", "rich"} and path.parent.name != "commands":
                wrong.append(f"{module} imports {top}: only cli.py and folders named commands/ may")
            if top == "transformers" and module.split(".")[0] != "extract":
                wrong.append(f"{module} imports transformers")
            if top in {"pickle", "joblib"}:
                wrong.append(f"{module} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other() -> None:
    try:
        TopologicalSorter(edges()).prepare()
    except CycleError as e:
        pytest.fail(f"an import circle: {' -> '.join(e.args[1])}")


@pytest.mark.parametrize("package", LAYERS)
def test_folders_import_downwards_alone(package: str) -> None:
    level = {name: i for i, line in enumerate(LAYERS[package]) for name in line.split()}
    wrong = []
    for module, imported in edges().items():
        for other in imported:
            if module.startswith(f"{package}.") and other.startswith(f"{package}."):
                a, b = (name.removeprefix(f"{package}.").split(".")[0] for name in (module, other))
                if level[a] < level[b]:
                    wrong.append(f"{module} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_folders_and_files_are_of_a_size_that_one_can_look_through() -> None:
    named = modules()
    folders: dict[Path, int] = Counter()
    for folder in {p.parent for p in named.values()}:
        entries = [p for p in folder.iterdir() if p.name not in ("__init__.py", "__pycache__")]
        folders[folder.relative_to(ROOT)] = len(entries)
    assert not {str(f): n for f, n in folders.items() if n > MOST_ENTRIES}
    lines = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in named.values()}
    assert not {p: n for p, n in lines.items() if n > MOST_LINES}


def test_a_class_name_stands_once() -> None:
    homes = defaultdict(list)
    for module, path in modules().items():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_every_folder_says_what_it_is_for() -> None:
    for path in {p.parent / "__init__.py" for p in modules().values()}:
        said = ast.get_docstring(tree(path)) or ""
        assert said and "TODO" not in said and len(said.splitlines()) <= 8, path


def test_no_lines_stand_twice() -> None:
    """No run of more than MOST_EQUAL_LINES lines of code; blank lines, comments and imports are passed over."""
    seen: dict[tuple[str, ...], tuple[str, int]] = {}
    twice = []
    for module, path in modules().items():
        imported: set[int] = set()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = [
            text.strip()
            for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            if text.strip() and not text.strip().startswith("#") and number not in imported
        ]
        for first in range(len(lines) - MOST_EQUAL_LINES):
            run = tuple(lines[first : first + MOST_EQUAL_LINES + 1])
            other, at = seen.setdefault(run, (module, first))
            if other != module or first - at > MOST_EQUAL_LINES:
                twice.append(f"{module} and {other}: {run[0]!r} …")
    assert not twice, "\n".join(twice)


def test_the_loss_needs_torch_numpy_and_numba_alone(root: Path) -> None:
    allowed = {"torch", "numpy", "numba", "llvmlite", "stillhouse"} | set(sys.stdlib_module_names)
    for path in (ROOT / "train" / "rnnt").rglob("*.py"):
        assert {n.split(".")[0] for n in imports(path) if n} <= allowed, path


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
    expected = {f"stillhouse/{p.relative_to(root)}" for p in [*modules().values(), root / "cli.py"]}
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
