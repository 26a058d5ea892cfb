"""Studies whose runs were not trained: their folders hold made-up hypotheses and metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from stillhouse.train.study.definition import Study, StudyRun
from stillhouse.train.study.runs import done


def write(folder: Path, name: str, text: str) -> Path:
    """Write a STUDY.toml."""
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def pretend(
    study: Study,
    hypotheses: Callable[[StudyRun], list[str]],
    references: list[str],
    metrics: Callable[[StudyRun], Iterable[dict]],
) -> Study:
    """Make the folders of all runs of a study, as if each had been trained and decoded to `hypotheses`."""
    definition = study.definition
    for run in study.runs:
        run.folder.mkdir(parents=True)
        triples = zip(range(len(references)), references, hypotheses(run), strict=True)
        lines = [json.dumps({"id": f"u{n}", "ref": ref, "hyp": hyp}) + "\n" for n, ref, hyp in triples]
        for split in definition.test:
            run.hypotheses(split).write_text("".join(lines))
        result = {"checkpoint": definition.checkpoint, "test": definition.test}
        (run.folder / "result.json").write_text(json.dumps(result))
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics(run)))
        assert done(run, study)
    return study
