"""What README.md and docs/ tell to type is typed: every fenced block of shell or Python carries one of three marks.

quick        runs here, the blocks of a page in order in one folder that already has corpus.jsonl (a chapter's beginning
             and the demo's stories), corpus.zarr = teacher.zarr (MiniLM: alone and both:64, layers 0, 3, 6)
slow         the same with -m slow
needs-data   with -m slow and the real corpora: LibriSpeech/ is there too, a small part of the real one

The blocks of OF_THE_DEMO run in a small copy of the folder that `make demo` leaves.

Whatever the mark, each `stillhouse` line has to parse: commands, options and choices that do not exist fail at once.
`make` is asked with --dry-run, since `make test` would come here again.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import parakeets
import peers
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]
PAGES = [p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))]
SHELLS = {"sh": "bash", "bash": "bash", "zsh": "zsh", "fish": "fish"}
MARKS = ("quick", "slow", "needs-data")
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
# Settings of a run that takes seconds
SMALL = "optim.steps=2 run.log_every=1 run.eval_every=2 model.dim=16 model.layers=1 model.heads=2 model.inner=32"
SMALL_RUN = " ".join(f"--set {s}" for s in [*SMALL.split(), "transfer.views=minilm/*/6", "run.precision=float32"])
# A model and settings that no test can wait for, and what stands in for them
STAND_INS = {
    "../recipes/demo.toml": f"{{root}}/recipes/demo.toml {SMALL_RUN}",
    "sentence-transformers/all-MiniLM-L6-v2": "{minilm}",
    "bert-base-uncased": "{minilm}",
    "recipes/librispeech-100.toml": "{root}/recipes/librispeech-100.toml --set optim.steps=2 --set run.eval_every=2"
    " --set model.dim=32 --set model.layers=1 --set model.inner=64 --set run.checkpoint_every=2",
    "--layers 6,12": "--layers 3,6",
    "nvidia/parakeet-tdt-0.6b-v3": "{parakeet}",
}

# Pages of docs/guide/ whose commands run in the folder of the demo
OF_THE_DEMO = {"training.md", "fine-tuning.md", "models.md", "decoding.md", "score.md", "export.md", "parakeet.md"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    mark: str
    code: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language in SHELLS or self.language in ("python", "console", "pycon")


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        language, _, mark = found[1].strip().partition(" ")
        yield Block(page, text[: found.start()].count("\n") + 1, language, mark, found[2])


ALL = [block for page in PAGES for block in blocks(page)]


def lines(code: str) -> list[str]:
    """Lines of shell, those that end in a backslash joined with the next."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def test_every_block_that_runs_has_a_mark() -> None:
    wrong = [b.where for b in ALL if b.runs and b.mark not in MARKS]
    assert not wrong, f"no mark (```sh quick, ```python slow …): {wrong}"
    assert not [b.where for b in ALL if b.mark and not b.runs]
    assert not [b.where for b in ALL if b.language in ("console", "pycon")], "write ```sh without prompts"


def test_every_stillhouse_line_parses(shell: SimpleNamespace) -> None:
    wrong = []
    for block in ALL:
        if block.language not in SHELLS:
            continue
        for line in lines(block.code):
            for words in shell.pipeline(line):
                words = words[next((i for i, w in enumerate(words) if "=" not in w), 0) :]
                if words[0] == "stillhouse":
                    try:
                        shell.check(words)
                    except click.UsageError as e:
                        wrong.append(f"{block.where}: {e.format_message()}")
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere() -> None:
    wrong = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
            path, _, fragment = target.partition("#")
            if "://" in target:
                continue
            there = page if not path else page.parent / path
            if not there.exists():
                wrong.append(f"{page.name}: {target}")
            elif fragment and there.suffix == ".md":
                text = there.read_text(encoding="utf-8")
                headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                if fragment not in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings]:
                    wrong.append(f"{page.name}: {target}")
    assert not wrong, wrong


def test_the_files_and_names_that_contributing_gives_are_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w/.])((?:data|extract|distill|train|tests|docs)/[\w/.-]*\w)", text))
    assert len(files) > 30 and not [f for f in files if not (ROOT / f).exists()]
    wrong = []
    for names, file in re.findall(r"((?:`\w+`(?:,? and |, | or ))*`\w+`) (?:in|of|to) `([\w/]+\.py)`", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        wrong += [f"{file}: {name}" for name in re.findall(r"\w+", names) if name not in {*defined, "and", "or"}]
    assert not wrong, wrong


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "quick" for b in blocks(p))], ids=lambda p: p.name)
def test_quick(page: Path, type_it: Callable[[Block], None]) -> None:
    for block in blocks(page):
        if block.mark == "quick":
            type_it(block)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.mark == "slow" for b in blocks(p))], ids=lambda p: p.name)
def test_slow(page: Path, type_it: Callable[[Block], None]) -> None:
    for block in blocks(page):
        if block.mark in ("quick", "slow"):
            type_it(block)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.mark == "needs-data" for b in blocks(p))], ids=lambda p: p.name
)
def test_needs_data(page: Path, type_it: Callable[[Block], None], corpora: Path) -> None:
    Path("LibriSpeech").mkdir()
    for split, source in (("train-clean-100", "train-clean-100"), ("dev-clean", "test-other")):
        for speaker in sorted((corpora / "librispeech-subset" / source).iterdir())[:2]:
            to = Path("LibriSpeech", split, speaker.name)
            to.parent.mkdir(exist_ok=True)
            to.symlink_to(speaker)
    for name in ("corpus.jsonl", "corpus.zarr", "teacher.zarr"):
        Path(name).unlink()  # the page makes its own
    for block in blocks(page):
        if block.mark == "needs-data":
            type_it(block)


@pytest.fixture(scope="session")
def demo_folder(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small copy of what `make demo` leaves: the workshop's texts with noise for audio, and a run of two steps."""
    from stillhouse.cli import cli

    folder = tmp_path_factory.mktemp("demo")
    splits = {"84-121123": "test-new", "s1": "dev", "s2": "test-known"}
    entries = [json.loads(line) for line in (workshop / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    random = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for entry in entries:
        session = entry["session"]
        entry |= {"audio": f"audio/{entry['id']}.wav", "split": splits.get(session, "train"), "speaker": session}
        soundfile.write(folder / entry["audio"], random.normal(0, 0.1, 48_000), 16_000)
    hypotheses = [{"id": e["id"], "ref": e["text"], "hyp": e["text"]} for e in entries if e["split"] == "test-new"]
    for name, values in (("corpus.jsonl", entries), ("hyp-test-new.jsonl", hypotheses)):
        (folder / name).write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    (folder / "teacher.zarr").symlink_to(workshop / "corpus.zarr")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            "corpus features corpus.jsonl features.h5 --speeds 0.9,1.0,1.1",
            "corpus tokenizer corpus.jsonl units --kind characters",
            f"train {ROOT}/recipes/demo.toml --out run {SMALL_RUN}",
        ):
            cli(shlex.split(line), standalone_mode=False)
    return folder


@pytest.fixture(scope="session")
def parakeet(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Parakeet over the workshop's texts."""
    lines = (workshop / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return parakeets.save(tmp_path_factory.mktemp("parakeet"), [json.loads(line)["text"] for line in lines])


@pytest.fixture
def type_it(
    workshop: Path,
    minilm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Callable[[Block], None]:
    """Run a block of a page in this test's folder; names that one Python block makes are there in the next."""
    for source in workshop.iterdir():
        (tmp_path / source.name).symlink_to(source)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    for name, module in peers.modules().items():  # toolkits that docs/reference/python.md has classes for
        monkeypatch.setitem(sys.modules, name, module)
    Path("train_manifest.json").write_text('{"id": "84-121123-0000"}\n')
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    names: dict[str, object] = {"__name__": "block"}

    def run(block: Block) -> None:
        code = block.code
        if block.page.name in OF_THE_DEMO and not Path("units").exists():
            for source in request.getfixturevalue("demo_folder").iterdir():
                Path(source.name).unlink(missing_ok=True)
                made_here = source.name == "run" and "--out run" in code
                if not made_here:
                    Path(source.name).symlink_to(source)
        for told, stand_in in STAND_INS.items():
            if told in code:
                places = {"minilm": minilm, "root": ROOT}
                if "{parakeet}" in stand_in:
                    places["parakeet"] = request.getfixturevalue("parakeet")
                code = code.replace(told, stand_in.format(**places))
        if block.language == "python":
            exec(compile("\n" * block.line + code, block.where, "exec"), names)
            return
        program = SHELLS[block.language]
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
        if all(is_plain(line) for line in lines(code)):
            for line in lines(code):
                here(block, shlex.split(line, comments=True))
            return
        code = re.sub(r"^make ", f"make --dry-run -C {shlex.quote(str(ROOT))} ", code, flags=re.MULTILINE)
        options = ["-eo", "pipefail"] if program == "bash" else []
        done = subprocess.run([program, *options, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, f"{block.where}\n{done.stdout}\n{done.stderr}"

    def here(block: Block, words: list[str]) -> None:
        """In this process: the same, less half a second."""
        from stillhouse.cli import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(words[1:])
        assert left.value.code == 0, f"{block.where}: {shlex.join(words)}\n{capsys.readouterr().err}"

    return run


def is_plain(line: str) -> bool:
    """A `stillhouse` command that needs no shell."""
    unquoted = re.sub(r"'[^']*'|\"[^\"$`]*\"|#.*", "", line)
    return line.startswith(("stillhouse ", "#")) and not re.search(r"[|&;<>*?$`~(]", unquoted)
