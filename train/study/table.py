"""What the runs of a study show: error rates, paired differences, and how small a difference could be seen.

Invariant: two arms are compared over the seeds that both have and the same utterances, resampled together; figures
follow from the hypotheses and metrics of the run folders alone. Exercised by: `stillhouse study STUDY --table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.errors import CorpusError
from ..report.html import read_metrics
from ..score.hypotheses import read_hypotheses
from ..score.wer import bootstrap_sums, error_counts
from .definition import Study, StudyRun, differing
from .runs import check, done, hypotheses

Curve = list[tuple[float, float]]  # (step, value)
RESAMPLES = 2_000
FOUND = 1.96 + 0.84  # standard errors of a difference that a two-sided test at 5 % finds four times in five


@dataclass(frozen=True)
class Estimate:
    """A rate, or a difference of rates; `low` and `high` bound its 95 % bootstrap interval over utterances."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ErrorDifference:
    """This arm less `to`, over the seeds that both have; `by_seed` in the order of the seeds.

    verdict: "lower" or "higher" where the difference is more than 1.96 times its standard error, taken from the spread
    over utterances and the spread between seeds together; else "not shown"; "one seed" where that spread is unknown.
    """

    to: str
    estimate: Estimate
    relative: float  # of the other's rate
    by_seed: tuple[float, ...]
    verdict: str


@dataclass(frozen=True)
class ArmRow:
    """One arm on one split, averaged over its seeds."""

    arm: str
    split: str
    seeds: tuple[int, ...]
    wer: Estimate
    cer: Estimate
    differences: tuple[ErrorDifference, ...]
    steps: int
    seconds: float  # of training a run, the mean
    transfer: float | None  # the transfer loss over the last tenth of training, the mean
    dev_loss: float | None  # the RNN-T loss a unit of data.dev at the end, the mean


@dataclass(frozen=True)
class Detectable:
    """The smallest true difference of two arms with `seeds` seeds each that would most likely (4 in 5) be found."""

    split: str
    value: float
    seeds: int
    utterances: int
    how: str


@dataclass(frozen=True)
class Table:
    study: str
    metric: str
    against: tuple[str, ...]
    rows: tuple[ArmRow, ...]
    detectable: tuple[Detectable, ...]
    missing: tuple[str, ...]  # runs that are not done
    changes: dict[str, str]  # what each arm changes
    commands: dict[str, str]  # arm -> the command that makes it

    def of(self, split: str) -> list[ArmRow]:
        return [row for row in self.rows if row.split == split]


@dataclass(frozen=True)
class _Errors:
    """Errors int [S, U] by metric and reference lengths int [U] of one arm's runs on one split."""

    seeds: list[int]
    ids: list[str]
    errors: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]


def tabulate(study: Study) -> Table:
    """Of the runs that are done.

    Errors: StaleError where they cannot be compared, CorpusError where two were not decoded over the same transcripts.
    """
    check(study)
    definition = study.definition
    finished = {arm: [run for run in study.of(arm) if done(run, study)] for arm in definition.arms}
    rows: list[ArmRow] = []
    for split in definition.test:
        found = {arm: _read(runs, split) for arm, runs in finished.items() if runs}
        _refuse_other_transcripts(found, split)
        for arm, errors in found.items():
            before = study.against[: study.against.index(arm)] if arm in study.against else study.against
            others = {to: found[to] for to in before if to in found}
            rows.append(_row(arm, split, finished[arm], errors, others, definition.metric))
    missing = tuple(str(run) for run in study.runs if not done(run, study))
    commands = {arm: f"stillhouse study {study.path} --only {arm} --out {study.out}" for arm in definition.arms}
    return Table(
        study.name,
        definition.metric,
        tuple(study.against),
        tuple(rows),
        tuple(limits(study)),
        missing,
        differing(study),
        commands,
    )


def limits(study: Study) -> list[Detectable]:
    """What each test split can show, as far as the arm that others are compared with is done."""
    arm, definition = study.against[0], study.definition
    runs = [run for run in study.of(arm) if done(run, study)]
    return [
        detectable(_read(runs, split), split, definition.metric, arm, len(definition.seeds))
        for split in definition.test
        if runs
    ]


def curves(study: Study) -> dict[str, dict[str, Curve]]:
    """{caption: {arm: its curve, the mean over the seeds that have begun}}."""
    kinds = {
        "Error rate on dev": ("dev", study.definition.metric, 100.0),
        "Transducer loss": ("train", "rnnt", 1.0),
        "Transducer loss on dev": ("dev", "rnnt", 1.0),
        "Transfer loss": ("train", "transfer", 1.0),
    }
    metrics = {arm: [_metrics(run) for run in study.of(arm)] for arm in study.definition.arms}
    return {
        caption: {arm: _mean_curve(runs, kind, key, scale) for arm, runs in metrics.items()}
        for caption, (kind, key, scale) in kinds.items()
    }


def _mean_curve(runs: Sequence[list[dict]], kind: str, key: str, scale: float) -> Curve:
    found: dict[int, list[float]] = {}
    for lines in runs:
        for m in lines:
            if m["kind"] == kind and m.get(key) is not None:
                found.setdefault(m["step"], []).append(scale * m[key])
    return [(step, float(np.mean(values))) for step, values in sorted(found.items())]


def _metrics(run: StudyRun) -> list[dict]:
    path = run.folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def detectable(errors: _Errors, split: str, metric: str, arm: str, seeds: int) -> Detectable:
    """From the reference arm alone: how far apart two of its runs are, which differ in nothing but the seed.

    Per pair of seeds, the larger of the squared difference and its bootstrap variance over utterances, averaged: runs
    may by chance land near each other, and a small test set may hide how far they are apart. With one seed, twice the
    bootstrap variance of its rate, as if two runs had nothing in common: an upper bound for the test set's part, and
    nothing for the seeds'.
    """
    rates = _rates(errors, metric)
    point = errors.errors[metric].sum(1) / max(1, errors.reference[metric].sum())
    if len(errors.seeds) > 1:
        pairs = [(i, j) for i in range(len(point)) for j in range(i)]
        seen = float(np.mean([(point[i] - point[j]) ** 2 for i, j in pairs]))
        drawn = float(np.mean([np.var(rates[:, i] - rates[:, j]) for i, j in pairs]))
        variance, how = max(seen, drawn), f"from the {len(point)} runs of {arm}, which differ in the seed alone"
    else:
        variance, how = 2 * float(np.var(rates[:, 0])), f"from the utterances of one run of {arm}: more seeds tell more"
    return Detectable(split, FOUND * (variance / seeds) ** 0.5, seeds, len(errors.ids), how)


def _read(runs: Sequence[StudyRun], split: str) -> _Errors:
    ids: list[str] = []
    texts: list[str] = []
    errors: dict[str, list[np.ndarray]] = {"wer": [], "cer": []}
    reference: dict[str, np.ndarray] = {}
    for run in runs:
        path = hypotheses(run, split)
        triples = read_hypotheses(path)
        if ids and (ids, texts) != ([t[0] for t in triples], [t[1] for t in triples]):
            raise _other(path, hypotheses(runs[0], split))
        ids, texts = [t[0] for t in triples], [t[1] for t in triples]
        for metric, rows in errors.items():
            table = error_counts(texts, [t[2] for t in triples], characters=metric == "cer")
            rows.append(table[:, :3].sum(1))
            reference[metric] = table[:, 3]
    return _Errors([run.seed for run in runs], ids, {m: np.stack(rows) for m, rows in errors.items()}, reference)


def _refuse_other_transcripts(found: dict[str, _Errors], split: str) -> None:
    first = next(iter(found.items()), None)
    for arm, errors in found.items():
        assert first is not None
        same = all(np.array_equal(errors.reference[m], first[1].reference[m]) for m in errors.reference)
        if errors.ids != first[1].ids or not same:
            raise _other(f"{arm}, {split}", f"{first[0]}, {split}")


def _other(where: object, other: object) -> CorpusError:
    return CorpusError(
        "decoded over other transcripts than " + str(other),
        where=where,
        remedy="delete the result.json of the older runs, and the study decodes them again",
    )


def _rates(errors: _Errors, metric: str) -> np.ndarray:
    """Error rates of bootstrap samples: [resamples, S]."""
    columns = np.concatenate([errors.errors[metric], errors.reference[metric][None]])
    sums = bootstrap_sums(columns.T, resamples=RESAMPLES)
    return sums[:, :-1] / np.maximum(1, sums[:, -1:])


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _mean(errors: _Errors, metric: str) -> Estimate:
    value = errors.errors[metric].sum(1).mean() / max(1, errors.reference[metric].sum())
    return _estimate(value, _rates(errors, metric).mean(1))


def _row(
    arm: str, split: str, runs: Sequence[StudyRun], errors: _Errors, others: dict[str, _Errors], metric: str
) -> ArmRow:
    metrics = [_metrics(run) for run in runs]
    trained = [[m for m in lines if m["kind"] == "train"] for lines in metrics]
    evaluated = [m["rnnt"] for lines in metrics for m in lines if "rnnt" in m and _is_last(m, runs[0])]
    seconds = [sum(m["seconds"] for m in lines) for lines in trained]
    ends = [m["transfer"] for lines in trained for m in lines[-max(1, len(lines) // 10) :] if "transfer" in m]
    differences = tuple(_difference(errors, other, to, metric) for to, other in others.items())
    return ArmRow(
        arm,
        split,
        tuple(errors.seeds),
        _mean(errors, "wer"),
        _mean(errors, "cer"),
        tuple(d for d in differences if d is not None),
        runs[0].config.optim.steps,
        float(np.mean(seconds)),
        float(np.mean(ends)) if ends else None,
        float(np.mean(evaluated)) if len(evaluated) == len(runs) else None,
    )


def _is_last(line: dict, run: StudyRun) -> bool:
    return line["kind"] == "dev" and line["step"] == run.config.optim.steps


def _difference(mine: _Errors, theirs: _Errors, to: str, metric: str) -> ErrorDifference | None:
    common = sorted(set(mine.seeds) & set(theirs.seeds))
    if not common:
        return None
    at = [[errors.seeds.index(seed) for seed in common] for errors in (mine, theirs)]
    drawn = (_rates(mine, metric)[:, at[0]] - _rates(theirs, metric)[:, at[1]]).mean(1)
    words = max(1, mine.reference[metric].sum())
    a, b = (e.errors[metric].sum(1)[i] / words for e, i in zip((mine, theirs), at, strict=True))
    by_seed = a - b
    between = by_seed.var(ddof=1) / len(common) if len(common) > 1 else 0.0
    error = float(np.sqrt(drawn.var() + between))
    value = float(by_seed.mean())
    verdict = "not shown" if abs(value) <= 1.96 * error else ("lower" if value < 0 else "higher")
    if len(common) == 1:
        verdict = "one seed"
    relative = value / float(b.mean()) if b.mean() else 0.0
    return ErrorDifference(to, _estimate(value, drawn), relative, tuple(float(x) for x in by_seed), verdict)
