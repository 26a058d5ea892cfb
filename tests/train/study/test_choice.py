"""Settings that a study chooses on held-out speech, and errors by class of words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from studies import pretend, write

from stillhouse.data.errors import ConfigError, StaleError, UsageError
from stillhouse.data.manifest import read_manifest
from stillhouse.data.units import load_units
from stillhouse.train.config import load_config
from stillhouse.train.study.definition import Study, StudyRun, load_study
from stillhouse.train.study.report import markdown
from stillhouse.train.study.table import tabulate

STUDY = """
base = "run.toml"
seeds = [1]
test = ["test"]
[settings]
optim.steps = 6
[arms.none]
[arms.slow]
optim.lr = 1e-5
[choice]
seeds = [11, 12]
split = "dev"
metric = "{metric}"
[choice.arms.slow.dry]
model.dropout = 0.0
[choice.arms.slow.wet]
model.dropout = 0.9
"""


def decoded_to(path: Path, out: Path, hypotheses: dict[str, list[str]], references: list[str], choosing: bool) -> Study:
    """A study whose runs were decoded to the hypotheses of their arm, the same for each seed."""

    def metrics(run: StudyRun) -> list[dict]:
        loss = {"slow.dry": 2.0, "slow.wet": 1.0}.get(run.arm, 3.0)
        return [{"kind": "train", "step": 6, "seconds": 1.0}, {"kind": "dev", "step": 6, "rnnt": loss}]

    return pretend(load_study(path, out, choosing=choosing), lambda run: hypotheses[run.arm], references, metrics)


def choose(path: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "stillhouse.cli", "study", str(path), "--choose", "--table", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("metric", "best", "dropout"), [("wer", "dry", 0.0), ("cer", "wet", 0.9), ("loss", "wet", 0.9)]
)
def test_the_best_alternative_of_an_arm_is_what_the_study_runs(
    tones: Path, tmp_path: Path, metric: str, best: str, dropout: float
) -> None:
    """dry: 1 of 2 words and 4 of 9 characters are wrong. wet: 2 of 2 words and 2 of 9 characters."""
    path = write(tones, "choice", STUDY.replace("{metric}", metric))
    with pytest.raises(UsageError, match=r"nothing has been chosen yet for slow.*--choose"):
        load_study(path, tmp_path)
    said = {"slow.dry": ["abcd "], "slow.wet": ["abcz wxyy"]}
    decoded_to(path, tmp_path, said, ["abcd wxyz"], choosing=True)
    done = choose(path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"slow: {best}, " in done.stderr and f"study {path} --choose --only slow.dry --out {tmp_path}" in done.stdout
    study = load_study(path, tmp_path)
    assert [(str(run), run.config.model.dropout) for run in study.runs][1] == ("slow/1", dropout)
    assert study.of("none")[0].config.model.dropout not in (0.0, 0.9) and study.of("slow")[0].config.optim.lr == 1e-5
    assert all(tmp_path / "choice" not in run.folder.parents for run in study.runs)


def test_a_choice_counts_for_its_alternatives_alone_and_is_made_when_all_are_done(tones: Path, tmp_path: Path) -> None:
    text = STUDY.replace("{metric}", "wer")
    path = write(tones, "choice-other", text)
    study = decoded_to(path, tmp_path, {"slow.dry": ["a"], "slow.wet": ["b"]}, ["a"], choosing=True)
    kept = study.runs[0].folder / "result.json"
    result = kept.read_text()
    kept.unlink()
    assert choose(path, tmp_path).returncode == 0 and not (tmp_path / "choice.json").exists()
    kept.write_text(result)
    assert choose(path, tmp_path).returncode == 0
    load_study(path, tmp_path)
    for changed in (text.replace("0.9", "0.8"), text.replace("[11, 12]", "[11, 13]")):
        with pytest.raises(StaleError, match="among other alternatives"):
            load_study(write(tones, "choice-other", changed), tmp_path)
    (tmp_path / "choice.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable choice"):
        load_study(write(tones, "choice-other", text), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY.replace("[11, 12]", "[1, 12]"), "has the study's seeds 1"),
        (STUDY.replace('split = "dev"', 'split = "test"'), "chooses on test, which is a test of the study"),
        (STUDY.replace("choice.arms.slow", "choice.arms.slower"), "names slower"),
        (STUDY.replace("[arms.none]", "[arms.choice]"), "cannot be named choice"),
        (STUDY.replace("model.dropout = 0.9", "model.drop = 0.9"), r"arm slow\.wet: model\.drop"),
        (STUDY.replace("model.dropout = 0.9", "model.dim = 64"), "model.dim is 48 and 64"),
        (STUDY.replace("slow.wet]", 'slow."a/b"]'), "a/b"),
    ],
)
def test_a_choice_that_cannot_be_meant(tones: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tones, "choice-wrong", text.replace("{metric}", "wer")), tmp_path, choosing=True)


def test_there_may_be_nothing_to_choose(tones: Path, tmp_path: Path) -> None:
    path = write(tones, "choice-none", STUDY.partition("[choice]")[0])
    with pytest.raises(UsageError, match="nothing to choose"):
        load_study(path, tmp_path, choosing=True)


@pytest.mark.slow
def test_alternatives_are_trained_and_the_choice_is_trained_from_other_seeds(tones: Path, tmp_path: Path) -> None:
    text = STUDY.replace("{metric}", "loss").replace('["test"]', '["train"]')
    path, out = write(tones, "choice-run", text), tmp_path / "out"
    command = [sys.executable, "-m", "stillhouse.cli", "study", str(path), "--out", str(out)]
    for more in (["--choose"], []):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    record = json.loads((out / "choice.json").read_text())
    assert sorted(p.name for p in (out / "choice").iterdir() if p.is_dir()) == ["slow.dry", "slow.wet"]
    config = load_config(out / "slow" / "seed-1" / "config.toml", saved=True)
    assert config.model.dropout == {"dry": 0.0, "wet": 0.9}[record["best"]["slow"]]


def test_errors_by_class_of_words_worked_by_hand(tones: Path, tmp_path: Path) -> None:
    known = read_manifest(tones / "corpus.jsonl").select("train").utterances[0].text.split()[0]
    (tones / "classes.txt").write_text(f"{known}\n\n{known}")
    text = 'unseen = true\nwords = { known = "classes.txt" }\n' + STUDY.partition("[choice]")[0]
    path = write(tones, "classes", text)
    spelt = load_units(tones / "units").normalise(known).text
    refs = [f"{spelt} qq {spelt}", f"{spelt} qq"]
    said = {"none": [f"{spelt} qq", f"{spelt} x qq x"], "slow": [spelt, "qq"]}
    table = tabulate(decoded_to(path, tmp_path, said, refs, choosing=False))
    found = {(row.arm, row.name): (row.words, row.wrong.value) for row in table.classes}
    # Of three known words, none deletes one, and slow two. Of two others, slow deletes one. Insertions are in no class.
    assert found == {
        ("none", "known"): (3, pytest.approx(1 / 3)),
        ("none", "unseen"): (2, 0),
        ("slow", "known"): (3, pytest.approx(2 / 3)),
        ("slow", "unseen"): (2, 0.5),
    }
    (difference,) = table.classes[3].differences
    assert difference.to == "none" and difference.estimate.value == pytest.approx(0.5)
    shown = markdown(table)
    assert "Words of the class “unseen”: 2. Share" in shown and "| slow | 50.0 (0.0 to 100.0) | +50.0" in shown
    (tones / "classes.txt").write_text("  ")
    with pytest.raises(ConfigError, match="no words of the class known"):
        tabulate(load_study(path, tmp_path))
    for name in ("wer", "cer", "unseen"):
        path = write(tones, "classes", text.replace("{ known", f"{{ {name}"))
        with pytest.raises(ConfigError, match=f"cannot be named {name}"):
            tabulate(load_study(path, tmp_path))
