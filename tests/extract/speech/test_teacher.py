"""Speech teachers in a store: states against the encoder, frames by the headers, resumed and refreshed runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result

from stillhouse.cli import cli
from stillhouse.data.audio.read import read_audio
from stillhouse.data.errors import AudioError, StaleError, UsageError
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest
from stillhouse.extract.pipeline.extract import extract as extract_states
from stillhouse.extract.pipeline.layout import PlanDraft
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.speech.encoder import SpeechEncoder, load_encoder
from stillhouse.extract.speech.teacher import SoundWindow, SpeechTeacher
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from .test_encoder import MODELS
from .test_rows import saved

RNG = np.random.default_rng(0)


def noise(seconds: float, rate_hz: int = 16000, channels: int = 1) -> np.ndarray:
    return 0.1 * RNG.standard_normal((int(seconds * rate_hz), channels))


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("whisper", tmp_path_factory.mktemp("models") / "whisper")


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files, segments of a file with two channels, other rates, long audio, and a text without audio."""
    folder = tmp_path_factory.mktemp("sounds")
    utterances = []
    for k, seconds in enumerate((0.5, 0.8, 1.3, 0.61, 9.2)):
        soundfile.write(folder / f"{k}.flac", noise(seconds), 16000)
        utterances.append(Utterance(id=f"u{k}", text=f"text {k}", audio=f"{k}.flac", session=f"s{k // 2}"))
    soundfile.write(folder / "both.wav", noise(2, 16000, 2), 16000, subtype="FLOAT")
    for channel in (0, 1):
        cut = {"start_s": 0.25 + channel, "duration_s": 0.7503, "channel": channel}
        utterances.append(Utterance(id=f"c{channel}", text="a", audio="both.wav", **cut))
    for rate_hz in (8000, 22050, 44100):
        soundfile.write(folder / f"r{rate_hz}.ogg", noise(1.234, rate_hz), rate_hz)
        utterances.append(Utterance(id=f"r{rate_hz}", text="a", audio=f"r{rate_hz}.ogg"))
    utterances.append(Utterance(id="silent", text="a text without audio"))
    write_manifest(folder / "corpus.jsonl", utterances)
    return folder / "corpus.jsonl"


def copy_of(sounds: Path, folder: Path) -> Path:
    shutil.copytree(sounds.parent, folder)
    return folder / "corpus.jsonl"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def extract(corpus: Path, store: Path, teacher: Path, *options: object, code: int = 0) -> Result:
    return run("extract", corpus, store, "--teacher", teacher, "--name", "w", *options, code=code)


def expected(corpus: Corpus, teacher: Path, utterance: str, layers: list[int]) -> np.ndarray:
    encoder, u = load_encoder(str(teacher)), corpus.by_id[utterance]
    samples = read_audio(corpus.audio_path(u), u.start_s, u.duration_s, encoder.sample_rate_hz, u.channel)
    return encoder.states(samples, layers)


def change(corpus: Path, utterance: str, **fields: object) -> None:
    utterances = read_manifest(corpus).utterances
    write_manifest(corpus, [u.model_copy(update=fields) if u.id == utterance else u for u in utterances])


def test_states_are_those_of_the_encoder(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    said = extract(sounds, tmp_path / "s", whisper, "--layers", "1,last", "--dtype", "float32")
    assert "1 utterances have no audio, and so no frames: silent" in said.stderr
    assert "less than 16000 Hz, and nothing in the upper band of the model: r8000" in said.stderr
    store, corpus = Store.open(tmp_path / "s", checksums=True), read_manifest(sounds)
    views = store.resolve("w/alone/*")
    assert [v.layer for v in views] == [1, 3]
    batch = store.gather(corpus.by_id, views)
    assert batch.token_id == batch.span == {}
    ends = np.cumsum(batch.lengths["w"])
    for u, end, length in zip(corpus.utterances, ends.tolist(), batch.lengths["w"].tolist(), strict=True):
        if u.audio is None:
            assert length == 0
            continue
        plain = expected(corpus, whisper, u.id, [1, 3])
        assert plain.shape[1] == length
        for view, states in zip(views, plain, strict=True):
            assert np.array_equal(batch.states[view][end - length : end], states)
    record = store.teacher("w")
    assert (record.kind, record.axis, record.rate_hz, record.offset_s) == ("speech", "frame", 50.0, 0.0)
    assert record.sample_rate_hz == 16000 and record.tokens == ends[-1]
    attributes = json.loads((tmp_path / "s/data.zarr/w/zarr.json").read_text())["attributes"]["stillhouse"]
    assert (attributes["rate_hz"], attributes["offset_s"], attributes["sample_rate_hz"]) == (50.0, 0.0, 16000)
    hidden = json.loads((tmp_path / "s/data.zarr/w/hidden/zarr.json").read_text())
    assert hidden["dimension_names"] == ["context", "layer", "frame", "dimension"]
    assert not (tmp_path / "s/data.zarr/w/token_id").exists()
    assert verify(store) == []
    assert json.loads((tmp_path / "s/store.json").read_text())["version"] == 2


@pytest.fixture(scope="module")
def encoder(whisper: Path) -> SpeechEncoder:
    return load_encoder(str(whisper))


def extracted(
    encoder: SpeechEncoder, manifest: Path, root: Path, layers: Sequence[int] = (1,), refresh: bool = False,
    dtype: str = "float16", check: Callable[[PlanDraft], None] | None = None,
) -> tuple[Store, list[str]]:  # fmt: skip
    """Extract, and return the store and the utterances whose audio was read for the model."""
    heard: list[str] = []

    class Listening(SpeechTeacher):
        def states(self, windows: Sequence[SoundWindow], layers: Sequence[int]) -> dict[int, torch.Tensor]:
            heard.extend(w.utterance.id for w in windows)
            return super().states(windows, layers)

    corpus = read_manifest(manifest)
    request = Request("w", list(layers), ["alone"], dtype=dtype)
    extract_states(root, corpus, Listening(encoder, corpus), request, refresh=refresh, check=check)
    return Store.open(root, checksums=True), sorted(heard)


def rewrite(corpus: Path, name: str, samples: np.ndarray, rate_hz: int = 16000) -> None:
    soundfile.write(corpus.parent / name, samples, rate_hz)


def test_only_what_sounds_otherwise_is_extracted_again(encoder: SpeechEncoder, sounds: Path, tmp_path: Path) -> None:
    corpus, root = copy_of(sounds, tmp_path / "c"), tmp_path / "s"
    before, heard = extracted(encoder, corpus, root)
    ids = [u.id for u in read_manifest(corpus).utterances if u.audio is not None]
    assert heard == sorted(ids)
    view = before.views[0]
    old = {i: before.gather([i], [view]).states[view] for i in ids}
    assert extracted(encoder, corpus, root)[1] == []
    # Another text, the same samples in another container, a touched file and a moved corpus change nothing.
    change(corpus, "u0", text="another text")
    samples, rate_hz = soundfile.read(corpus.parent / "1.flac", dtype="int16")
    soundfile.write(corpus.parent / "1.wav", samples, rate_hz)
    change(corpus, "u1", audio="1.wav")
    (corpus.parent / "2.flac").touch()
    corpus = copy_of(corpus, tmp_path / "moved")
    assert extracted(encoder, corpus, root)[1] == []
    assert len(Store.open(root).plan.generations) == 1
    # Other samples of the same length, other times, another channel, and new or missing audio do.
    samples[4000:4100] = 0
    soundfile.write(corpus.parent / "1.wav", samples, rate_hz)
    change(corpus, "c0", start_s=0.26)
    change(corpus, "c1", channel=0)
    change(corpus, "u4", audio=None)
    change(corpus, "silent", audio="3.flac")
    with pytest.raises(StaleError, match="5 utterances have other audio than in the store: ") as error:
        extracted(encoder, corpus, root)
    assert {"u1", "c0", "c1", "u4", "silent"} <= set(str(error.value).replace(",", " ").replace(";", " ").split())
    after, heard = extracted(encoder, corpus, root, refresh=True)
    assert heard == ["c0", "c1", "silent", "u1"]
    assert extracted(encoder, corpus, root)[1] == []
    for i in ids:
        now = after.gather([i], [view]).states[view]
        assert np.array_equal(now, old[i]) == (i not in ("u1", "c0", "c1", "u4")), i
    assert after.lengths("w")[after.rows(["u4"])] == 0 and verify(after) == []
    # An utterance more, and one that is gone.
    utterances = read_manifest(corpus).utterances
    write_manifest(corpus, [u for u in utterances if u.id != "u2"] + [Utterance(id="new", text="n", audio="0.flac")])
    after, heard = extracted(encoder, corpus, root, refresh=True)
    assert heard == ["new"] and "u2" not in after.utterance_ids
    assert np.array_equal(after.gather(["new"], [view]).states[view], old["u0"])


def test_more_layers_of_audio_that_has_changed_since(encoder: SpeechEncoder, sounds: Path, tmp_path: Path) -> None:
    """The times stay and the stamp too, as where a file system keeps neither: the hash of the samples decides."""
    corpus, root = copy_of(sounds, tmp_path / "c"), tmp_path / "s"
    extracted(encoder, corpus, root)
    changed = corpus.parent / "3.flac"
    before = changed.read_bytes()
    teacher = SpeechTeacher(encoder, read_manifest(corpus))

    def spoil(_: PlanDraft) -> None:
        rewrite(corpus, "3.flac", noise(0.61))

    with pytest.raises(StaleError, match="u3: its audio has changed since other layers of this store were extracted"):
        extracted(encoder, corpus, root, layers=(1, 2), check=spoil)
    changed.write_bytes(before)
    store, heard = extracted(encoder, corpus, root, layers=(1, 2))
    assert "u3" in heard and [v.layer for v in store.views] == [1, 2]
    states = teacher.encoder.states(read_audio(changed), [2])[0].astype(np.float16)
    assert np.array_equal(store.gather(["u3"], store.resolve("w/alone/2")).states[store.views[1]], states)


def test_audio_that_cannot_be_read(encoder: SpeechEncoder, sounds: Path, tmp_path: Path) -> None:
    corpus, root = copy_of(sounds, tmp_path / "c"), tmp_path / "s"
    (corpus.parent / "0.flac").unlink()
    change(corpus, "c1", start_s=5.0)
    with pytest.raises(AudioError, match=r"the audio of 2 utterances cannot be extracted:\n  u0: .*\n  c1: .*leaves"):
        extracted(encoder, corpus, root)
    assert not (root / "store.json").exists()
    corpus = copy_of(sounds, tmp_path / "d")
    data = bytearray((corpus.parent / "2.flac").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 900] = bytes(900)  # in the middle, where no header shows it
    (corpus.parent / "2.flac").write_bytes(data)
    with pytest.raises(AudioError, match=r"^u2: .*2\.flac: the audio is damaged|^u2: .*ends early"):
        extracted(encoder, corpus, root)
    soundfile.write(corpus.parent / "2.flac", noise(1.3), 16000)
    assert len(extracted(encoder, corpus, root)[0].views) == 1


def test_codes_that_do_not_cut_the_states_are_refused_before_anything_is_written(
    whisper: Path, sounds: Path, tmp_path: Path
) -> None:
    width = load_encoder(str(whisper)).width
    assert width % 7
    refused = extract(sounds, tmp_path / "s", whisper, "--layers", "1", "--dtype", "pq:7", code=1)
    assert f"pq:7 cannot cut states of width {width} into 7 equal parts" in str(refused.exception)
    assert not (tmp_path / "s" / "store.json").exists()


def test_what_only_texts_have(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    for options, said in {
        ("--context", "both:8"): "hears an utterance alone, and not both:8",
        ("--transform", "lower"): "--transform is for texts",
        ("--join", " "): "--join is for texts",
        ("--leading-space", "yes"): "--leading-space is for texts",
        ("--batch-tokens", "9"): "--batch-tokens is for texts",
        ("--window", "99"): "has no --window",
        ("--trust-remote-code", str(whisper)): "has no --trust-remote-code",
        ("--layers", "4"): "no layer 4",
    }.items():
        command = ["extract", sounds, tmp_path / "s", "--teacher", whisper, *options]
        error = CliRunner().invoke(cli, [str(word) for word in command]).exception
        assert isinstance(error, UsageError) and said in str(error)
        assert not (tmp_path / "s/store.json").exists()


@pytest.mark.parametrize("name", list(MODELS))
def test_frames_are_counted_without_the_model(name: str, tmp_path: Path) -> None:
    """Of every length around the first frames, and of windows over audio that is too long for one."""
    encoder = load_encoder(str(saved(name, tmp_path)))
    encoder.longest_s = min(encoder.longest_s, 2.0)
    sizes = [399, 400, 401, 559, 560, 561, 719, 720, 1999, 2500, 4099, 31999, 32000, 32001, 61234]
    for size in sizes:
        frames = encoder.frames(size)
        if frames:
            assert encoder.states(RNG.standard_normal(size).astype(np.float32), [0]).shape[1] == frames, size
        else:
            with pytest.raises(AudioError):
                encoder.states(RNG.standard_normal(size).astype(np.float32), [0])
    assert encoder.frames(1) <= 1 and encoder.frames(4000) > 0
