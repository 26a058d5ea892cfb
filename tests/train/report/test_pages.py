"""The pages of a run and of a study: self-contained, true to the facts, no wider than a window in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from stillhouse.data.errors import CheckpointError
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.report import html as report
from stillhouse.train.report.run import read_run, render
from stillhouse.train.study import report as study_report
from stillhouse.train.study.table import ArmRow, ClassRow, Detectable, ErrorDifference, Estimate, Table

NASTY = "<script>alert(1)</script> &amp; <b>"


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of 8 steps whose hypotheses, records and profile were then made memorable."""
    out = tmp_path_factory.mktemp("pages") / "a-run"
    changes = ["optim.steps=8", "run.eval_every=4", "run.checkpoint_every=4", "run.log_every=2", "model.dropout=0.25"]
    Trainer(load_config(tones / "run.toml", changes), out).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            views = {f"transfer/teacher-of-a-long-name/both:128/{n}": 0.5 + n / 50 for n in range(12)}
            line |= {"lambda": 0.5, "skipped": 0.5 if line["step"] == 6 else 0.0} | views
            line["share"] = {"data": 0.015, "transfer": 0.0425}
            line["time"] = {"encoder": 0.2, "backward": 0.4, "transfer": 0.01, "teacher": 0.005}
        elif line["step"] == 4:
            line |= {"wer": 0.998, "cer": 0.996, "rnnt": 3.5}
        else:
            line |= {"wer": 1.0, "cer": 1.0, "rnnt": 3.25}
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    heard = [("a b c d", "a b c"), ("a b", NASTY), ("c d", "c d")]
    triples = [{"id": f"utterance-{n}", "ref": ref, "hyp": hyp} for n, (ref, hyp) in enumerate(heard)]
    (out / "dev.jsonl").write_text("".join(json.dumps(t) + "\n" for t in triples))
    (out / "profile").mkdir()
    ops = [{"name": "aten::" + "x" * 90, "ms": 1.5, "device_ms": 0.0, "calls": 3.0}]
    profile = {"after": 3, "steps": 2, "ms": 99.5, "device": "CPU", "parts": [], "ops": ops, "trace": "t"}
    (out / "profile" / "profile.json").write_text(json.dumps(profile))
    (out / "bad").mkdir()
    (out / "bad" / "step-5.safetensors").touch()
    return out


def test_a_runs_facts(run: Path) -> None:
    facts = read_run(run).facts
    assert (facts.name, facts.step, facts.steps) == ("a-run", 8, 8)
    assert facts.best == {"step": 4, "wer": 0.998, "cer": 0.996, "rnnt": 3.5}
    assert facts.last == {"step": 8, "wer": 1.0, "cer": 1.0, "rnnt": 3.25}
    assert facts.share == pytest.approx({"data": 0.015, "transfer": 0.0425})
    assert facts.times == pytest.approx({"encoder": 0.2, "backward": 0.4, "transfer": 0.01, "teacher": 0.005})
    assert facts.skipped == 1 and facts.bad == ["step-5.safetensors"]
    given = {f"{name}.{s.name}": s.value for name, many in facts.settings.items() for s in many if s.given}
    assert given["model.dropout"] == "0.25" and given["data.speeds"] == "1.0, 1.1" and "loss.ctc_weight" not in given
    assert [c.step for c in facts.checkpoints] == [4, 8] and all(
        c.bytes > 1e4 and not c.wrong for c in facts.checkpoints
    )
    weights = Trainer(load_config(run / "config.toml"), run).model.state_dict()
    assert facts.parameters == sum(v.numel() for v in weights.values())
    assert facts.dev is not None and facts.dev.wer.reference == 8 and facts.data["data"]["utterances"] == 60
    json.dumps(asdict(facts), allow_nan=False)


def test_a_runs_page(run: Path) -> None:
    page = render(read_run(run))
    assert page.startswith("<!doctype html>")
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|<link|src=|@import|url\((?!#)", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    for told in (
        "99.8 %",
        "100.0 % at step 8",
        "4.2 %",
        "step-5.safetensors",
        "steps skipped",
        "<del>d</del>",
        "99.5 ms",
    ):
        assert told in page, told
    for caption in ("Learning rate", "Weight of the transfer", "Distance to the teacher", "Error rate on dev"):
        assert page.count(f"<figcaption>{caption}") == 1
    assert render(read_run(run)) == page


def test_a_run_that_has_just_begun_or_is_damaged_has_a_page(run: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.mkdir()
    shutil.copyfile(run / "config.toml", new / "config.toml")
    assert "Nothing was logged yet" in render(read_run(new))
    shutil.copytree(run / "checkpoints", new / "checkpoints")
    (new / "checkpoints" / "step-00000008" / "state.json").write_text("{")
    (new / "metrics.jsonl").write_text('7\n{"kind": "train", "step": 1, "epoch": 0, "loss": NaN}\n')
    found = read_run(new)
    assert [bool(c.wrong) for c in found.facts.checkpoints] == [False, True] and found.facts.step == 1
    assert "not a checkpoint" in render(found)
    with pytest.raises(CheckpointError, match="this is not a run's folder"):
        read_run(tmp_path)


def test_the_command_writes_the_page_or_the_facts(run: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from stillhouse.train.commands.report import report as command

    done = CliRunner().invoke(command, [str(run), str(tmp_path / "new" / "page.html")])
    assert done.exit_code == 0 and done.output.strip() == str(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text() == render(read_run(run))
    facts = json.loads(CliRunner().invoke(command, [str(run), "--json"]).output)
    assert facts["best"]["wer"] == 0.998 and not (run / "report.html").exists()
    assert CliRunner().invoke(command, [str(run), str(run / "config.toml")]).exit_code != 0


def test_curves_are_not_cut_off_at_the_top_and_keep_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(report, "figure", lambda plot, name: seen.append(plot) or "svg")
    flat = [(n, 100.0 - 0.01 * (n % 2)) for n in range(10_001)]
    assert report.curve({"nothing": [(1, float("nan"))], "wer": flat}, "%") == "svg"
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    seen[0](axes)
    (line,) = axes.lines
    assert line.get_color() == report.COLOURS[1]  # as in a plot where the first one has points
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 1.05 * max(line.get_ydata())
    assert len(line.get_xdata()) <= 400 and line.get_xdata()[0] < 20 and line.get_xdata()[-1] > 9_980
    assert report.thinned([(1, 2.0), (2, 4.0), (3, 9.0)], most=2) == [(1.5, 3.0), (3, 9.0)]


def test_losses_are_on_a_log_axis_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss falls from 300 to 0.5: on a linear axis its second half is a line along the bottom."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(report, "figure", lambda plot, name: (axes := Figure().subplots(), plot(axes))[0])
    falling = [(float(step), 300 * 0.9**step) for step in range(60)]
    drawn = report.draw(
        [
            ("Loss per unit", {"rnnt": falling, "rnnt on dev": falling[::10]}, "loss"),
            ("Distance", {"a": [(1.0, 1.0), (2.0, 0.0)]}, "loss"),
            ("Error rate on dev", {"WER": falling}, "%"),
        ]
    )
    scales = {caption: axes.get_yscale() for caption, axes in drawn}  # type: ignore[attr-defined]
    assert scales == {"Loss per unit": "log", "Distance": "linear", "Error rate on dev": "linear"}
    axes = drawn[0][1]
    axes.figure.draw_without_rendering()  # type: ignore[attr-defined]
    shown = [text.get_text() for text in axes.get_yticklabels()]  # type: ignore[attr-defined]
    assert {"1", "10", "100"} <= set(shown) and not any("e" in text or "$" in text for text in shown)


def study() -> Table:
    """Arms with the longest texts that a study's table has."""

    def differing(to: str) -> ErrorDifference:
        estimate = Estimate(-0.123, -0.234, -0.012)
        return ErrorDifference(to, estimate, -0.42, (-0.101, -0.123, -0.145, -0.123, -0.145), "not shown")

    rows = [
        ArmRow(
            arm=f"planted-shuffled-{n}",
            split="test-new",
            seeds=(1, 2, 3, 4, 5),
            steps=140_000,
            seconds=100_000.0,
            wer=Estimate(0.223, 0.212, 0.234),
            cer=Estimate(0.123, 0.112, 0.134),
            differences=(differing("none"), replace(differing("single"), verdict="lower")),
            transfer=0.1234,
            dev_loss=1.2345,
        )
        for n in range(4)
    ]
    changes = {
        row.arm: 'transfer.views = ["minilm/both:32/6", "smollm/past:64/30"], transfer.mixing = "sample"'
        for row in rows
    }
    commands = {
        row.arm: f"stillhouse train base.toml --set 'transfer.views={9 * ['minilm/both:32/6']}'" for row in rows
    }
    found = Detectable("test-new", 0.012, 5, 225, "from the 5 runs of none, which differ in the seed alone")
    classes = tuple(
        ClassRow(row.arm, row.split, name, 1_234, Estimate(0.223, 0.212, 0.234), row.differences)
        for row in rows
        for name in ("homophones", "unseen")
    )
    return Table("a-study", "wer", ("none", "single"), rows, [found], [], changes, commands, classes)


def test_a_study_in_a_terminal_of_80_columns() -> None:
    """Tables are not wider, and an arm called none is no absence of a difference."""
    shown = study_report.markdown(study())
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= 80 and shown.count("| planted-shuffled-3 |") == 1 + 2 * 2 + 2 * 2 + 1
    assert "Words of the class “unseen”: 1,234. Share that is wrong:" in shown
    assert "WER minus that of the arm “none”: points (95 %)" in shown
    assert "-12.3 (-23.4 to -1.2); -42 %; not shown |" in shown
    assert "| [-10.1, -12.3, -14.5, -12.3, -14.5] |" in shown and "`stillhouse train base.toml --set" in shown
    page = study_report.html(study(), {})
    assert "minus that of the arm “none”" in page and "minus that of none" not in page + shown


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("which", ["run", "study"])
def test_in_a_browser_nothing_is_wider_than_the_window(run: Path, tmp_path: Path, which: str, width: int) -> None:
    """In a frame of that width, for a window is no narrower than 500; at 1,200 no table has to be scrolled either."""
    if BROWSER is None:
        pytest.skip("no chromium here")
    page = render(read_run(run)) if which == "run" else study_report.html(study(), {})
    measure = """<script>addEventListener("load", () => { const inner = [...document.querySelectorAll(".scroll, pre")];
      parent.document.title = document.documentElement.scrollWidth + " of " + innerWidth + "; "
        + inner.filter(e => e.scrollWidth > e.clientWidth).length + " of " + inner.length; })</script>"""
    inner = page.replace("</body>", measure + "</body>").replace("&", "&amp;").replace('"', "&quot;")
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!doctype html><title>?</title>"
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{inner}"></iframe>',
        encoding="utf-8",
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,1000", "--dump-dom"]
    done = subprocess.run([*command, outer.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\d+) of (\d+); (\d+) of (\d+)</title>", done.stdout)
    if found is None:
        pytest.skip(f"the browser does not run here: {done.stderr[-200:]}")
    wide, window, scrolled, tables = map(int, found.groups())
    assert wide <= window == width and tables >= 2
    assert scrolled == 0 or width < 1200
