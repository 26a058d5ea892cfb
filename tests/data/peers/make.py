"""Write the small files of this folder with Lhotse and with datasets of Hugging Face.

Run: pip install 'stillhouse[demo,peers]' and python tests/data/peers/make.py. The voices are espeak-ng's; the texts
are ours. Committed, so that the readers are tested on real files where the libraries are not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import soundfile

HERE = Path(__file__).resolve().parent
TEXTS = {"one": "The kettle sings.", "left": "Is it raining?", "right": "Not yet, I think."}


def main() -> None:
    warnings.simplefilter("ignore")
    os.chdir(HERE)
    for folder in ("audio", "lhotse", "huggingface"):
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    voices()
    lhotse()
    huggingface()


def voices() -> None:
    """audio/one.flac, a mono voice; audio/talk.flac, two speakers, a channel each, one after the other."""
    from stillhouse.data.audio.read import resample
    from stillhouse.train.demo.espeak import EspeakVoice, speak

    spoken = {}
    for name, voice in (("one", "en-us+f2"), ("left", "en-us+m3"), ("right", "en-gb-x-rp+f4")):
        rate_hz, (samples,) = speak(EspeakVoice(name, voice), [TEXTS[name]])
        spoken[name] = resample(samples.astype(np.float32) / 2**15, rate_hz, 8000)
    soundfile.write("audio/one.flac", spoken["one"], 8000)
    left, right = len(spoken["left"]), len(spoken["right"])
    talk = np.zeros((left + right, 2), np.float32)
    talk[:left, 0], talk[left:, 1] = spoken["left"], spoken["right"]
    soundfile.write("audio/talk.flac", talk, 8000)
    Path("audio/facts.json").write_text(json.dumps({"one_samples": len(spoken["one"]), "left": left, "right": right}))


def lhotse() -> None:
    from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet

    facts = json.loads(Path("audio/facts.json").read_text())
    turn, whole = facts["left"] / 8000, (facts["left"] + facts["right"]) / 8000
    from_file = Recording.from_file
    recordings = RecordingSet.from_recordings(
        [from_file(f"audio/{name}.flac", recording_id=name) for name in ("one", "talk")]
    )
    topic = {"topic": "weather"}
    supervisions = SupervisionSet.from_segments(
        [
            SupervisionSegment("one-1", "one", 0.0, facts["one_samples"] / 8000, 0, TEXTS["one"], "en", "anna", "F"),
            SupervisionSegment("talk-b", "talk", turn, whole - turn, 1, TEXTS["right"], "en", "clara", custom=topic),
            SupervisionSegment("talk-a", "talk", 0.0, turn, 0, TEXTS["left"], "en", "ben"),
        ]
    )
    cuts = CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    recordings.to_file("lhotse/recordings.jsonl.gz")
    supervisions.to_file("lhotse/supervisions.jsonl.gz")
    cuts.to_file("lhotse/cuts.jsonl.gz")
    cuts.trim_to_supervisions(keep_overlapping=False).to_file("lhotse/trimmed.jsonl")
    cuts.cut_into_windows(1.0).to_file("lhotse/windows.jsonl.gz")
    refused = [
        *cuts.perturb_speed(1.1),
        *cuts.perturb_volume(2.0),
        *cuts.pad(30),
        *cuts.resample(16000).subset(first=1),
    ]
    CutSet.from_cuts(refused).to_file("lhotse/changed.jsonl")


def huggingface() -> None:
    from datasets import Audio, ClassLabel, Dataset, DatasetDict

    def rows(*names: str) -> dict[str, list]:
        return {
            "audio": [{"path": f"{n}.flac", "bytes": Path(f"audio/{n}.flac").read_bytes()} for n in names],
            "sentence": [TEXTS["one"] if n == "one" else f"{TEXTS['left']} {TEXTS['right']}" for n in names],
            "speaker_id": [k + 7 for k in range(len(names))],
            "accent": [k for k in range(len(names))],
            "stars": [0.5 for _ in names],
        }

    # Cast and not encoded: that would ask for torchcodec, and gives the same bytes.
    made = {"train": rows("one", "talk"), "test": rows("one")}
    labels = ClassLabel(names=["us", "gb"])
    splits = DatasetDict(
        {
            name: Dataset.from_dict(part).cast_column("audio", Audio()).cast_column("accent", labels)
            for name, part in made.items()
        }
    )
    splits.save_to_disk("huggingface/dict")
    splits["test"].to_parquet("huggingface/test-00000-of-00001.parquet")
    for cache in Path("huggingface").rglob("cache-*"):
        cache.unlink()


if __name__ == "__main__":
    main()
