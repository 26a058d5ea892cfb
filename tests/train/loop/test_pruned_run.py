"""The trainer with the pruned loss, and `stillhouse align` on what it trained."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from stillhouse.train.commands.decode import align
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer


def test_pruned_training_learns_and_its_model_aligns(tones: Path, tmp_path: Path) -> None:
    changes = ["optim.steps=60", "run.eval_every=1000", "run.checkpoint_every=1000", "run.log_every=10"]
    changes += ["loss.kind=pruned", "loss.band=3"]
    Trainer(load_config(tones / "run.toml", changes), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(line["rnnt"] > 0 and line["simple"] > 0 for line in steps)
    assert steps[-1]["rnnt"] < 0.7 * steps[0]["rnnt"]
    assert steps[-1]["simple"] < steps[0]["simple"]

    arguments = [str(v) for v in (tmp_path / "run", tones / "corpus.jsonl", tones / "features.h5")]
    found = CliRunner().invoke(align, [*arguments, "--split", "dev", "--textgrid", str(tmp_path / "grids")])
    assert found.exit_code == 0, found.output
    rows = [line.split() for line in found.stdout.splitlines()]
    corpus = [json.loads(line) for line in (tones / "corpus.jsonl").read_text().splitlines()]
    for utterance in corpus:
        if utterance.get("split") != "dev":
            continue
        own = [row for row in rows if row[0] == utterance["id"]]
        assert [row[4] for row in own] == utterance["text"].split()
        times = [(float(row[2]), float(row[2]) + float(row[3])) for row in own]
        assert all(a <= b + 0.011 for a, b in zip([t[1] for t in times], [t[0] for t in times[1:]]))
        assert (tmp_path / "grids" / f"{utterance['id']}.TextGrid").exists()
