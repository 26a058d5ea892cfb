"""How exact the times of `stillhouse align` are, against boundaries that are known.

The truth is what espeak-ng says of its own samples (the demo's test voices), words that it speaks one at a time with
silences between them, and the demo's recordings joined with silences between them.

Usage: python tests/bench/bench_align.py DEMO [RUN …] [--out docs/bench/align.md], DEMO made by `make demo`, and RUN the
folders of runs in it, or elsewhere, that read its features or a speech encoder's states of its audio.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parent))
from measuring import Row, write_table

from stillhouse.data.audio.read import resample
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.train.decode.align import align, find_delay
from stillhouse.train.decode.decode import decoding_loader
from stillhouse.train.demo.corpus import speak_in_new_processes
from stillhouse.train.demo.espeak import EspeakVoice, speak_with_events
from stillhouse.train.demo.plan import FULL, plan, voice_set
from stillhouse.train.demo.stories import read_stories
from stillhouse.train.run.load import load_run, trained_on

RATE_HZ = 16000
Truth = dict[str, dict[int, tuple[float, float | None]]]  # start and end by id and number of the word


def words_of_events(text: str, events: list[tuple[int, int]], rate_hz: int) -> dict[int, tuple[float, float | None]]:
    """The words that have an event of their own: espeak-ng speaks some, such as "of the", as one."""
    begins = [m.start() for m in re.finditer(r"\S+", text)]
    numbers = [int(np.searchsorted(begins, at, "right")) - 1 if at >= 0 else -1 for _, at in events]
    found: dict[int, tuple[float, float | None]] = {}
    for place, number in enumerate(numbers):
        if number < 0 or numbers.count(number) > 1 or re.search(r"\w", text[begins[number] : events[place][1]]):
            continue
        alone = number + 1 == len(begins) or number + 1 in numbers
        end = events[place + 1][0] / rate_hz if place + 1 < len(events) else None
        found[number] = (events[place][0] / rate_hz, end if alone else None)
    return found


def demo_truth(voices: list[EspeakVoice]) -> Truth:
    """The words of all that these voices read in the demo, which each process speaks again from the beginning."""
    readings = [[r for r in plan(read_stories(), voice_set("espeak"), FULL) if r.voice == v] for v in voices]
    texts = [[s for r in own for s in r.story.sentences] for own in readings]
    found: Truth = {}
    with ProcessPoolExecutor(2, get_context("spawn"), max_tasks_per_child=1) as pool:
        for voice, own, (rate_hz, spoken) in zip(voices, readings, pool.map(speak_with_events, voices, texts)):
            results = iter(spoken)
            for r in own:
                for k, sentence in enumerate(r.story.sentences, 1):
                    events = next(results)[1]
                    found[f"{voice.name}-{r.story.number:02d}-{k:02d}"] = words_of_events(sentence, events, rate_hz)
    return found


def write_joined(folder: Path, parts: dict[str, tuple[str, list[np.ndarray]]], silence_s: tuple[float, float]) -> Truth:
    """Write a corpus and its features: for each id the parts with silences, and the parts' bounds as truth."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    utterances, truth = [], {}
    for id, (text, waves) in parts.items():
        pieces, at, bounds = [], 0, {}
        for k, wave in enumerate(waves):
            pause = np.zeros(int(rng.uniform(*silence_s) * RATE_HZ), np.float32)
            bounds[k] = ((at + len(pause)) / RATE_HZ, (at + len(pause) + len(wave)) / RATE_HZ)
            pieces += [pause, wave]
            at += len(pause) + len(wave)
        audio = np.concatenate(pieces)
        audio += rng.normal(0, 3e-4, len(audio))  # a recording is never digital silence
        soundfile.write(folder / f"{id}.wav", audio.clip(-1, 1), RATE_HZ)
        utterances.append(Utterance(id=id, text=text, audio=f"{id}.wav", duration_s=len(audio) / RATE_HZ))
        truth[id] = bounds
    write_manifest(folder / "corpus.jsonl", utterances)
    command = [sys.executable, "-m", "stillhouse.cli", "corpus", "features", "corpus.jsonl", "features.h5"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return truth


def loud_part(wave: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    return wave[loud[0] : loud[-1] + 1]


def single_words(folder: Path, corpus: Path, voices: list[EspeakVoice]) -> Truth:
    """Each word of some sentences spoken alone, and joined with up to 0.3 s between two words."""
    chosen = [u for u in read_manifest(corpus).select("test-new").utterances if u.speaker == voices[0].name]
    of_voice = [chosen[k :: len(voices)] for k in range(len(voices))]
    spoken = speak_in_new_processes(voices, [[w for u in own for w in u.text.split()] for own in of_voice])
    parts = {}
    for own, (rate_hz, waves) in zip(of_voice, spoken):
        rest = iter(waves)
        for u in own:
            each = [resample(next(rest).astype(np.float32) / 32768, rate_hz, RATE_HZ) for _ in u.text.split()]
            parts[u.id] = (u.text, [loud_part(w) for w in each])
    return write_joined(folder, parts, (0.0, 0.3))


def joined_recordings(folder: Path, demo: Path, truth: Truth) -> Truth:
    """Three recordings of a voice at a time, with 0.1 to 1 s before each."""
    chosen = [u for u in read_manifest(demo / "corpus.jsonl").select("test-new").utterances if u.id in truth]
    groups = [chosen[k : k + 3] for k in range(0, len(chosen) - 2, 3)]
    waves = {u.id: soundfile.read(demo / u.audio, dtype="float32")[0] for u in chosen}
    parts = {g[0].id: (" ".join(u.text for u in g), [waves[u.id] for u in g]) for g in groups}
    bounds = write_joined(folder, parts, (0.1, 1.0))
    found: Truth = {}
    for group in groups:
        before, own = 0, found.setdefault(group[0].id, {})
        for u, (start_s, _) in zip(group, bounds[group[0].id].values()):
            shifted = {k + before: (a + start_s, b and b + start_s) for k, (a, b) in truth[u.id].items()}
            own.update(shifted)
            before += len(u.text.split())
    return found


def features_for(run: Path, corpus: Path, features: Path, split: str | None, folder: Path) -> Path:
    """Return features of a corpus for a run: `features`, or a new file in `folder` if an encoder computes them."""
    encoder = trained_on(run).encoder
    if encoder is None:
        return features
    path = folder / f"{run.name}-{corpus.parent.name}.h5"
    command = [sys.executable, "-m", "stillhouse.cli", "corpus", "features", str(corpus), str(path)]
    command += [
        "--encoder",
        encoder["encoder"],
        "--layer",
        str(encoder["layer"]),
        *(["--split", split] if split else []),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return path


def measure(what: str, run: Path, corpus: Path, features: Path, split: str | None, truth: Truth, bar: bool) -> Row:
    """Align a corpus, and compare the words whose bounds are known."""
    model, units, _, _ = load_run(run)
    loader = decoding_loader(read_manifest(corpus).select(split), features, units)
    device = torch.device("cpu")
    delay_s = find_delay(model, loader, device=device) or 0.0
    starts, ends, lasts, true = [], [], [], []
    shortest = np.inf
    for alignment in align(model, loader, device=device, delay_s=delay_s):
        shortest = min([shortest, *(w.end_s - w.start_s for w in alignment.words)])
        if alignment.untimed:
            continue
        for number, (start_s, end_s) in truth.get(alignment.id, {}).items():
            word = alignment.words[number]
            starts.append(abs(word.start_s - start_s))
            if end_s is not None:
                ends.append(abs(word.end_s - end_s))
                lasts.append(word.end_s - word.start_s)
                true.append(end_s - start_s)
    start, end = (1000 * float(np.median(x)) for x in (starts, ends))
    note = (
        f"{len(starts)} words; 90 % of starts within {1000 * np.quantile(starts, 0.9):.0f} ms; ends {end:.0f} ms; "
        f"words last {np.mean(lasts):.3f} s, in truth {np.mean(true):.3f} s, the shortest {1000 * shortest:.0f} ms; "
        f"delay {1000 * delay_s:.0f} ms"
    )
    return Row(what, start, start, start, "≤ 40" if bar else "–", start <= 40 and shortest > 0, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--out", type=Path, default=Path("docs/bench/align.md"))
    args = parser.parse_args()
    voices = list(voice_set("espeak").test)
    truth = demo_truth(voices)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        alone, joined = Path(folder, "alone"), Path(folder, "joined")
        sets = [
            ("sentences", args.demo, "test-new,test-known", truth),
            ("single words with silences", alone, None, single_words(alone, args.demo / "corpus.jsonl", voices)),
            ("recordings with silences", joined, None, joined_recordings(joined, args.demo, truth)),
        ]
        for run in args.runs or [args.demo / "run"]:
            model, units, _, _ = load_run(run)
            kind = f"{'streaming' if model.encoder.causal else 'whole utterances'}, {units.kind}"
            if encoder := trained_on(run).encoder:
                kind += f", states of {encoder['architecture']}, {model.encoder.subsampling} a state"
            for what, where, split, own in sets:
                corpus = where / "corpus.jsonl"
                features = features_for(run, corpus, where / "features.h5", split, Path(folder))
                rows.append(measure(f"{kind}: {what}, ms", run, corpus, features, split, own, not model.encoder.causal))
    remarks = [
        "The median distance of the start of a word from where it is known to begin. The voices are not in training. "
        "Boundaries are those of espeak-ng's own events, and of the joints.",
    ]
    write_table(args.out, "Times of words", "python tests/bench/bench_align.py DEMO RUN …", rows, remarks)
    if not all(row.holds for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
