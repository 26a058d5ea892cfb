"""A study on the tones: resumed after a kill, runs that cannot be compared refused, figures worked by hand."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from studies import pretend, write

from stillhouse.data.errors import ConfigError, CorpusError, StaleError, UsageError
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.build import build_model
from stillhouse.train.run import identity
from stillhouse.train.run.load import load_run
from stillhouse.train.study.definition import Study, choose_runs, load_study
from stillhouse.train.study.report import markdown
from stillhouse.train.study.runs import check_identities, done, run_study
from stillhouse.train.study.table import FOUND, ArmErrors, detectable, detectable_differences, tabulate

STUDY = """
base = "run.toml"
seeds = [1, 2]
test = ["dev"]
[settings]
optim.steps = 12
[arms.none]
[arms.slow]
optim.lr = 1e-5
"""


@pytest.fixture(scope="module")
def finished(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A study that was killed in its first run and gone on with, two runs at a time: (STUDY, OUT, what it said)."""
    path, out = write(tones, "study", STUDY), tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "stillhouse.cli", "study", str(path), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("[none/1] step 6/"):
                os.kill(process.pid, signal.SIGKILL)
                break
        else:
            pytest.fail(f"it ended before step 6 of its first run: {seen}")
        process.stderr.read()  # until the run's own process is gone too
    again = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    return path, out, [again.stdout, *again.stderr.splitlines()]


def test_killed_it_goes_on_and_the_runs_are_what_they_would_have_been(
    finished: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    path, out, said = finished
    assert any("4 runs, 0 of them done; 2 at a time" in line for line in said)
    assert any(line.startswith("[none/1] resuming") for line in said)
    first = load_study(path, out).of("none")[0]
    Trainer(first.config, tmp_path / "alone").run()
    ours, theirs = (load_run(folder, "last")[0].state_dict() for folder in (first.folder, tmp_path / "alone"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert identity.read(first.folder) == identity.read(tmp_path / "alone")


def test_a_done_study_runs_nothing_and_its_reports_agree(finished: tuple[Path, Path, list[str]]) -> None:
    path, out, said = finished
    study, again = load_study(path, out), []
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*/**/*")}
    assert run_study(study, study.runs, jobs=2, on_progress=again.append, limits=list) == []
    assert again == ["4 runs, 4 of them done; 2 at a time"]
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*/**/*")}
    table = tabulate(study)
    assert markdown(table) == said[0] == (out / "study.md").read_text()
    assert json.dumps(asdict(table)) == json.dumps(json.loads((out / "study.json").read_text()))
    assert [(row.arm, row.seeds, row.steps) for row in table.rows] == [("none", (1, 2), 12), ("slow", (1, 2), 12)]
    for row in table.rows:
        logs = [(out / row.arm / f"seed-{seed}" / "metrics.jsonl").read_text().splitlines() for seed in row.seeds]
        ends = [[m["rnnt"] for m in map(json.loads, lines) if m["kind"] == "dev"][-1] for lines in logs]
        assert row.dev_loss == pytest.approx(sum(ends) / 2) and f"| {row.dev_loss:.3f} |" in said[0]
    page = (out / "study.html").read_text()
    assert "<svg" in page and "optim.lr = 1e-05" in page
    assert not re.findall(r"""(?:src|href)="(?!#)""", page)  # nothing from elsewhere


def test_the_limit_is_said_as_soon_as_the_reference_is_done(finished: tuple[Path, Path, list[str]]) -> None:
    _, _, said = finished
    (limit,) = [n for n, line in enumerate(said) if line.startswith("dev, 12 utterances")]
    last = max(n for n, line in enumerate(said) if line.startswith("[none/"))
    assert last < limit


def test_arms_share_first_weights_order_and_budget(finished: tuple[Path, Path, list[str]]) -> None:
    path, out, _ = finished
    study = load_study(path, out)
    found = {(run.arm, run.seed): json.loads((run.folder / "identity.json").read_text()) for run in study.runs}
    for seed in (1, 2):
        assert found["none", seed] == found["slow", seed]
    assert found["none", 1]["initialisation"] != found["none", 2]["initialisation"]
    assert found["none", 1]["data"]["order"] != found["none", 2]["data"]["order"]
    assert found["none", 1]["budget"] == {"steps": 12, "batch_frames": 1200, "precision": "float32"}


def test_runs_that_differ_in_data_budget_or_weights_are_refused(
    finished: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    path, out, _ = finished
    study = load_study(path, out)
    check_identities(study.runs)
    mine = study.of("slow")[1].folder / "identity.json"
    kept = mine.read_text()
    try:
        for part, key in (("data", "order"), ("budget", "steps"), ("data", "transcripts")):
            other = json.loads(kept)
            other[part][key] = "another"
            mine.write_text(json.dumps(other))
            with pytest.raises(StaleError, match=rf"none/2 and slow/2 cannot be compared: {part}\.{key}: .* another"):
                check_identities(study.runs)
        mine.write_text(json.dumps(json.loads(kept) | {"initialisation": "f00"}))
        with pytest.raises(StaleError, match=r"initialisation: .* and f00"):
            run_study(study, study.runs, jobs=1, on_progress=lambda _: None, limits=list)
        with pytest.raises(StaleError, match=r"initialisation: .* and f00"):
            tabulate(study)
        mine.unlink()
        with pytest.raises(StaleError, match=r"has no identity\.json with its data"):
            check_identities(study.runs)
    finally:
        mine.write_text(kept)


def test_other_settings_than_the_runs_have_are_refused(finished: tuple[Path, Path, list[str]], tones: Path) -> None:
    _, out, _ = finished
    study = load_study(write(tones, "other", STUDY.replace("1e-5", "1e-4")), out)
    with pytest.raises(StaleError, match=r"slow/seed-1/config\.toml: .* optim\.lr: 1e-05 in the run, 0\.0001 in"):
        run_study(study, study.runs, jobs=1, on_progress=lambda _: None, limits=list)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (STUDY.replace("optim.lr = 1e-5", "optim.steps = 24"), "none and slow cannot be compared: optim.steps is 12"),
        (STUDY.replace("optim.lr = 1e-5", "model.dim = 64"), "model.dim is 48 and 64"),
        (STUDY.replace("optim.lr = 1e-5", "loss.ctc_weight = 0"), "ctc_weight above 0 is True and False"),
        (STUDY.replace("optim.lr = 1e-5", "data.batch_frames = 900"), "data.batch_frames is 1200 and 900"),
        (STUDY.replace("optim.lr", "optim.rate"), "arm slow: optim.rate"),
        (STUDY + "\n[arms.Slow]\noptim.lr = 1e-6\n", "arms slow, Slow differ in case alone"),
        (STUDY.replace("[arms.slow]", '[arms."a/b"]'), "'a/b' cannot be the name of an arm"),
        (STUDY.replace("[1, 2]", "[1, 1]"), "a seed is named twice"),
        (STUDY.replace("seeds", 'against = ["single"]\nseeds'), "against names single"),
        (STUDY.replace("test =", "tests ="), "tests: no such setting; did you mean test"),
    ],
)
def test_a_study_that_cannot_be_meant(tones: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_study(write(tones, "wrong", text), tones / "out")


def test_dropout_is_an_arm_of_its_own_right_and_arms_are_chosen_by_name(tones: Path) -> None:
    study = load_study(write(tones, "dropout", STUDY.replace("optim.lr = 1e-5", "model.dropout = 0.4")), tones / "out")
    weights = [build_model(run.config, 9).state_dict() for run in (study.of("none")[0], study.of("slow")[0])]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert [str(run) for run in study.runs] == ["none/1", "none/2", "slow/1", "slow/2"]
    assert [str(run) for run in choose_runs(study, "slow", "2")] == ["slow/2"]
    with pytest.raises(UsageError, match="no fast, seed 3"):
        choose_runs(study, "fast,slow", "3")


def decoded_to(tones: Path, out: Path, hypotheses: dict[tuple[str, int], list[str]], references: list[str]) -> Study:
    """A study whose runs were decoded to these hypotheses."""
    arms = dict.fromkeys(arm for arm, _ in hypotheses)
    seeds = sorted({seed for _, seed in hypotheses})
    text = f'base = "run.toml"\nseeds = {seeds}\ntest = ["dev"]\n' + "".join(f"[arms.{arm}]\n" for arm in arms)
    study = load_study(write(tones, "pretend", text), out)
    metrics = [{"kind": "train", "step": n, "seconds": 30.0, "transfer": 1 / n} for n in range(1, 21)]
    return pretend(study, lambda run: hypotheses[run.arm, run.seed], references, lambda _: metrics)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"test": 3}', '{"checkpoint": "last", "test": [{}]}', '{"test": ["dev"]}']
)
def test_a_result_of_another_hand_is_none(tones: Path, tmp_path: Path, text: str) -> None:
    study = decoded_to(tones, tmp_path, {("none", 1): ["a"]}, ["a"])
    (run,) = study.runs
    (run.folder / "result.json").write_text(text)
    assert not done(run, study)


def test_figures_worked_by_hand(tones: Path, tmp_path: Path) -> None:
    """Two utterances of 4 and 6 words. none: 3 and 5 errors by seed, single: 1 and 2."""
    refs = ["a b c d", "a b c d a b"]
    said = {
        ("none", 1): ["a b c", "a b c d"],
        ("none", 2): ["a b", "a b c"],
        ("single", 1): ["a b c d", "a b c d a"],
        ("single", 2): ["a b c d", "a b c d"],
    }
    table = tabulate(decoded_to(tones, tmp_path, said, refs))
    none, single = table.rows
    assert none.wer.value == pytest.approx(0.4) and single.wer.value == pytest.approx(0.15)
    # Drawn are both of the first, both of the second, or one of each: none 1.5/4, 2.5/6, single 0, 1.5/6
    assert (none.wer.low, none.wer.high) == pytest.approx((1.5 / 4, 2.5 / 6))
    assert (single.wer.low, single.wer.high) == pytest.approx((0, 1.5 / 6))
    (found,) = single.differences
    assert found.to == "none" and found.by_seed == pytest.approx((-0.2, -0.3))
    assert found.estimate.value == pytest.approx(-0.25) and found.relative == pytest.approx(-0.25 / 0.4)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-1.5 / 4, -1 / 6))
    assert found.verdict == "lower" and none.differences == ()
    assert none.seconds == 600 and none.transfer == pytest.approx((1 / 19 + 1 / 20) / 2)
    assert "−" not in markdown(table) and "-25.0 (-37.5 to -16.7); -62 %; lower [-20.0, -30.0]" in markdown(table)


def test_a_difference_that_seeds_contradict_is_not_shown(tones: Path, tmp_path: Path) -> None:
    refs = ["a b c d"] * 50
    said = {("none", s): ["a b c"] * 50 for s in (1, 2, 3)} | {("all", 1): ["a b c d"] * 50}
    said |= {("all", s): ["a b c"] * 45 + ["a b c d"] * 5 for s in (2, 3)}
    found = tabulate(decoded_to(tones, tmp_path, said, refs)).rows[1].differences[0]
    assert found.estimate.high < 0 and found.verdict == "not shown"
    lone = decoded_to(tones, tmp_path / "lone", {key: value for key, value in said.items() if key[1] == 1}, refs)
    found = tabulate(lone).rows[1].differences[0]
    assert found.estimate.high < 0 and found.verdict == "one seed"


def test_the_detectable_difference_is_what_a_test_finds_four_times_in_five(tones: Path, tmp_path: Path) -> None:
    """Against a simulation: rates of runs scatter by 2 points; two arms of 4 seeds, one truly better by the limit."""
    rng = np.random.default_rng(0)
    words, count, seeds, scatter, utterances = 20, 300, 4, 0.02, 400

    def runs(rate: float) -> np.ndarray:
        """Errors [seeds, utterances]."""
        rates = (rate + scatter * rng.standard_normal(seeds)).clip(0, 1)
        return rng.binomial(words, rates[:, None], size=(seeds, utterances))

    reference = np.full(utterances, words)

    def of(errors: np.ndarray):
        found = ArmErrors(list(range(len(errors))), ["u"] * utterances, {"wer": errors}, {"wer": reference})
        return detectable(found, "dev", "wer", "none", seeds)

    value = float(np.mean([of(runs(0.3)).value ** 2 for _ in range(12)]) ** 0.5)
    noise = (2 * scatter**2 + 2 * 0.3 * 0.7 / (words * utterances)) / seeds
    assert value == pytest.approx(FOUND * noise**0.5, rel=0.25)
    differences = np.array([(runs(0.3 - value).sum() - runs(0.3).sum()) for _ in range(count)])
    differences = differences / (seeds * words * utterances)
    assert np.mean(differences < -1.96 * noise**0.5) == pytest.approx(0.8, abs=0.12)
    alone = of(runs(0.3)[:1])
    assert "one run" in alone.how and alone.value > 0


def test_other_transcripts_are_refused(tones: Path, tmp_path: Path) -> None:
    study = decoded_to(tones, tmp_path, {("none", 1): ["a"], ("all", 1): ["a"]}, ["a"])
    line = json.dumps({"id": "u0", "ref": "a b", "hyp": "a"}) + "\n"
    (study.of("all")[0].folder / "hyp-dev.jsonl").write_text(line)
    with pytest.raises(CorpusError, match="all, dev: the transcripts differ from those of none, dev"):
        tabulate(study)
    assert len(detectable_differences(study)) == 1


def test_a_run_that_fails_is_named(tones: Path, tmp_path: Path) -> None:
    text = STUDY.replace("optim.lr = 1e-5", 'transfer.stores = "gone.zarr"\ntransfer.views = ["x/alone/1"]')
    study = load_study(write(tones, "failing", text), tmp_path / "out")
    failures = run_study(study, choose_runs(study, "slow", "1"), jobs=1, on_progress=lambda _: None, limits=list)
    assert len(failures) == 1 and failures[0].startswith("slow/1: gone.zarr: there is no store")
    assert "none/1" in tabulate(study).missing
