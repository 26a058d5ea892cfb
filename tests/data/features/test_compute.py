from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest

from stillhouse.data.audio.read import change_speed, read_audio
from stillhouse.data.errors import ConfigError, FeatureError, LockedError, PartialError, StaleError
from stillhouse.data.features.compute import FeatureFile, FeatureSettings, PartDone, compute_features, fbank
from stillhouse.data.features.file import FORMAT
from stillhouse.data.features.settings import Variant
from stillhouse.data.files.lock import FileLock
from stillhouse.data.manifest import Corpus, Utterance

Make = Callable[..., Corpus]
SPEEDS = (0.9, 1.0, 1.1)


@pytest.fixture(autouse=True)
def one_thread():
    """The work is done with one thread, and more of them sum in another order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def expected(corpus: Corpus, id: str, speed: float = 1.0) -> np.ndarray:
    u = corpus.by_id[id]
    samples = change_speed(read_audio(corpus.audio_path(u), u.start_s, u.duration_s), speed)
    return fbank(samples).astype(np.float16)


def test_every_row_is_fbank_of_its_sound(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(7)
    path = tmp_path / "new folder" / "features.h5"
    report = compute_features(corpus, path, SPEEDS, workers=0, part_s=1.0)
    assert (report.rows_before, report.rows_computed, report.text_only) == (0, 21, 0)
    file = FeatureFile(path)
    assert file.ids == [u.id for u in corpus.utterances]
    assert file.speeds == [0.9, 1.0, 1.1]
    assert file.settings == asdict(FeatureSettings())
    assert report.frames == sum(file.frames(file.ids, s).sum() for s in SPEEDS)
    order = ["u003", "u000", "u003", "u006"]
    speeds = [1.0, 1.1, 0.9, 1.0]
    packed, lengths = file.gather(order, speeds)
    assert packed.dtype == np.float16
    assert lengths.dtype == np.int64
    assert packed.shape == (lengths.sum(), 80)
    want = [expected(corpus, i, s) for i, s in zip(order, speeds, strict=True)]
    np.testing.assert_array_equal(packed, np.concatenate(want))
    np.testing.assert_array_equal(lengths, [len(w) for w in want])
    np.testing.assert_array_equal(file.frames(order, speeds), lengths)
    # Slower is longer, by the factor: 10 ms a frame, half a frame of rounding.
    for id, u in corpus.by_id.items():
        for s in SPEEDS:
            assert abs(file.frames([id], s)[0] - u.duration_s / s * 100) <= 0.5 + 1e-3
    assert file.damaged_rows() == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["features.h5"]


def test_a_gather_of_nothing_and_of_what_is_not_there(make_corpus: Make, tmp_path: Path) -> None:
    compute_features(make_corpus(2), tmp_path / "f.h5", workers=0)
    file = FeatureFile(tmp_path / "f.h5")
    packed, lengths = file.gather([], [])
    assert packed.shape == (0, 80)
    assert lengths.shape == (0,)
    with pytest.raises(FeatureError, match=r"no features of x at speed 1, u000 at speed 0\.9 .*speeds 1\).*--speeds"):
        file.gather(["x", "u000", "u001"], [1.0, 0.9, 1.0])
    with pytest.raises(ValueError, match="zip"):
        file.frames(["u000"], [1.0, 1.0])
    with pytest.raises(FeatureError, match=r"cannot open.*corpus features"):
        FeatureFile(tmp_path / "none.h5").gather(["u000"])


def test_the_layout_is_one_contiguous_matrix(make_corpus: Make, tmp_path: Path) -> None:
    compute_features(make_corpus(3), tmp_path / "f.h5", workers=0, part_s=0.1)
    with h5py.File(tmp_path / "f.h5") as file:
        data, offsets = file["features"], file["offsets"][:]
        assert file.attrs["format"] == FORMAT.encode()
        assert data.chunks is None
        raw = np.memmap(tmp_path / "f.h5", np.float16, "r", data.id.get_offset(), data.shape)
        np.testing.assert_array_equal(raw, data[:])
        np.testing.assert_array_equal(FeatureFile(tmp_path / "f.h5").gather(["u001"])[0], raw[offsets[1] : offsets[2]])


def _child(file: FeatureFile, pipe) -> None:
    pipe.send(file.gather(["u001", "u000"]))


@pytest.mark.parametrize("method", ["spawn"])
def test_a_reader_crosses_into_another_process(make_corpus: Make, tmp_path: Path, method: str) -> None:
    corpus = make_corpus(2)
    compute_features(corpus, tmp_path / "f.h5", workers=0)
    file = FeatureFile(tmp_path / "f.h5").open()
    own, other = get_context(method).Pipe()
    process = get_context(method).Process(target=_child, args=(file, other))
    process.start()
    packed, _ = own.recv()
    process.join()
    np.testing.assert_array_equal(packed, file.gather(["u001", "u000"])[0])
    assert len(pickle.dumps(file)) < 500


def test_going_on_computes_only_what_is_new(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(6)
    path = tmp_path / "f.h5"
    some = Corpus(corpus.path, corpus.utterances[1:4])
    compute_features(some, path, workers=0)
    before = FeatureFile(path).gather(["u002"])[0]
    parts: list[PartDone] = []
    report = compute_features(corpus, path, (1.0, 1.1), workers=0, part_s=0.5, on_part=parts.append)
    assert (report.rows_before, report.rows_computed) == (3, 9)
    assert sorted(i for p in parts for i in p.ids) == [u.id for u in corpus.utterances]
    file = FeatureFile(path)
    np.testing.assert_array_equal(file.gather(["u002"])[0], before)
    for id in corpus.by_id:
        for speed in (1.0, 1.1):
            np.testing.assert_array_equal(file.gather([id], speed)[0], expected(corpus, id, speed))
    stamp = os.stat(path)
    again = compute_features(some, path, workers=0)
    assert (again.rows_before, again.rows_computed) == (12, 0)
    assert os.stat(path).st_ino == stamp.st_ino
    assert FeatureFile(path).fingerprint == FeatureSettings().fingerprint


def test_other_settings_are_refused_in_words(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(2)
    path = tmp_path / "f.h5"
    compute_features(corpus, path, workers=0)
    with pytest.raises(StaleError, match=r"bins is 80 there and 40 here; .*delete") as caught:
        compute_features(corpus, path, settings=FeatureSettings(bins=40), workers=0)
    assert "rate_hz" not in str(caught.value)
    assert [p.name for p in tmp_path.glob("f.h5*")] == ["f.h5"]
    compute_features(corpus, tmp_path / "g.h5", settings=FeatureSettings(bins=40, rate_hz=8000), workers=0)
    assert FeatureFile(tmp_path / "g.h5").gather(["u001"])[0].shape[1] == 40
    for bad in ({"bins": 0}, {"rate_hz": 10}):
        with pytest.raises(ConfigError):
            FeatureSettings(**bad)
    for speeds in ((), (0.1,), (1.00001,)):
        with pytest.raises(ConfigError, match="speeds"):
            compute_features(corpus, path, speeds, workers=0)


def test_other_sound_under_the_same_id_is_refused_and_redone(
    make_corpus: Make, tone: Callable[..., Path], tmp_path: Path
) -> None:
    corpus = make_corpus(3)
    path = tmp_path / "f.h5"
    compute_features(corpus, path, (1.0, 0.9), workers=0)
    audio = corpus.audio_path(corpus.utterances[1])
    os.utime(audio, (1, 1))
    assert compute_features(corpus, path, workers=0).rows_computed == 0
    tone(audio, corpus.utterances[1].duration_s, 999)
    with pytest.raises(StaleError, match=r"of u001 has changed.*--redo-changed"):
        compute_features(corpus, path, workers=0)
    # Every speed that is there goes stale with its sound, asked for or not.
    report = compute_features(corpus, path, (1.0,), workers=0, redo_changed=True)
    assert report.rows_computed == 2
    file = FeatureFile(path).open()
    assert len(file.row_ids) == 6
    for id in corpus.by_id:
        np.testing.assert_array_equal(file.gather([id], 0.9)[0], expected(corpus, id, 0.9))
    longer = corpus.utterances[0].model_copy(update={"start_s": 0.01, "duration_s": 0.25})
    with pytest.raises(StaleError, match="u000"):
        compute_features(Corpus(corpus.path, [longer, *corpus.utterances[1:]]), path, workers=0)
    audio.unlink()
    assert compute_features(corpus, path, workers=0).rows_computed == 0


def test_a_moved_corpus_is_the_same_corpus(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(2)
    compute_features(corpus, tmp_path / "f.h5", workers=0)
    moved = tmp_path / "elsewhere"
    corpus.path.parent.rename(moved)
    assert (
        compute_features(Corpus(moved / "corpus.jsonl", corpus.utterances), tmp_path / "f.h5", workers=0).rows_computed
        == 0
    )


def test_unreadable_utterances_are_named_and_the_others_done(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(6)
    path = tmp_path / "f.h5"
    corpus.audio_path(corpus.utterances[0]).unlink()
    corpus.audio_path(corpus.utterances[2]).write_bytes(b"RIFF....")
    late = corpus.utterances[4].model_copy(update={"start_s": 9.0})
    text = Utterance(id="text", text="no audio")
    broken = Corpus(corpus.path, [*corpus.utterances[:4], late, corpus.utterances[5], text])
    with pytest.raises(PartialError, match="3 utterances failed") as caught:
        compute_features(broken, path, workers=0, part_s=0.5)
    for words in ("u000: ", "no such audio file", "u002: ", "not readable", "u004: ", "leaves the audio"):
        assert words in str(caught.value)
    assert FeatureFile(path).ids == ["u001", "u003", "u005"]
    with pytest.raises(PartialError, match="3 utterances"):
        compute_features(broken, path, workers=0)
    np.testing.assert_array_equal(FeatureFile(path).gather(["u005"])[0], expected(corpus, "u005"))


def test_nothing_to_compute(tmp_path: Path, make_corpus: Make) -> None:
    with pytest.raises(FeatureError, match="has audio"):
        compute_features(Corpus(tmp_path / "c.jsonl", [Utterance(id="a", text="b")]), tmp_path / "f.h5")
    corpus = make_corpus(1)
    corpus.audio_path(corpus.utterances[0]).unlink()
    with pytest.raises(PartialError, match="1 utterance failed"):
        compute_features(corpus, tmp_path / "f.h5")
    assert list(tmp_path.glob("f.h5*")) == []


def test_one_writer_at_a_time(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(1)
    with FileLock(tmp_path / "f.h5.parts" / "lock"), pytest.raises(LockedError, match="another process"):
        compute_features(corpus, tmp_path / "f.h5", workers=0)
    compute_features(corpus, tmp_path / "f.h5", workers=0)


def test_what_is_no_plain_file_is_refused_at_once(make_corpus: Make, tmp_path: Path) -> None:
    """The error does not tell the user to delete a folder."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    corpus = make_corpus(1)
    for name in ("folder", "pipe"):
        with pytest.raises(FeatureError, match="no plain file") as found:
            FeatureFile(tmp_path / name).open()
        assert "delete" not in str(found.value)
        with pytest.raises(FeatureError, match="no plain file"):
            compute_features(corpus, tmp_path / name, workers=0)


def test_another_file_is_not_called_damaged(make_corpus: Make) -> None:
    """If the arguments were swapped, the error must not tell the user to delete the corpus."""
    corpus = make_corpus(1)
    for refused in (FeatureFile(corpus.path).open, lambda: compute_features(corpus, corpus.path, workers=0)):
        with pytest.raises(FeatureError, match="not a feature file") as found:
            refused()
        assert "delete" not in str(found.value)


def test_processes_give_the_same_rows_and_a_dead_one_is_an_error_that_goes_on(
    make_corpus: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillhouse.data.features import parts as feature_parts

    corpus = make_corpus(12)
    gone = Utterance(id="gone", text="", audio="gone.wav")
    some = Corpus(corpus.path, [gone, *corpus.utterances])
    compute_features(corpus, tmp_path / "one.h5", workers=0)
    with pytest.raises(PartialError, match=r"1 utterance failed.*\n  gone: .*no such audio file"):
        compute_features(some, tmp_path / "two.h5", workers=2)
    one, two = FeatureFile(tmp_path / "one.h5"), FeatureFile(tmp_path / "two.h5")
    np.testing.assert_array_equal(one.gather(one.ids)[0], two.gather(one.ids)[0])
    assert two.ids == one.ids

    monkeypatch.setattr(feature_parts, "_work", _dies_at_the_third)
    with pytest.raises(FeatureError, match=r"a worker process died \(exit code -9\).*run the same command again"):
        compute_features(corpus, tmp_path / "three.h5", workers=1, part_s=0.5)
    monkeypatch.undo()
    report = compute_features(corpus, tmp_path / "three.h5", workers=0)
    assert report.rows_before > 0
    assert report.rows_before + report.rows_computed == 12
    assert FeatureFile(tmp_path / "three.h5").damaged_rows() == []


def _dies_at_the_third(pipe, settings: FeatureSettings, noise: object) -> None:
    from stillhouse.data.features.parts import compute_part

    for _ in range(2):
        pipe.send(compute_part(*pipe.recv(), settings))
    pipe.recv()
    os.kill(os.getpid(), 9)


def _elsewhere(file: h5py.File, name: str, link: h5py.ExternalLink | None, other: Path | None = None) -> None:
    """Replace a dataset by a link, or by a virtual dataset whose bytes lie in `other`."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    if link is not None:
        file[name] = link
        return
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(other, name, shape, dtype)
    file.create_virtual_dataset(name, layout)


def _unwritten(file: h5py.File, name: str) -> None:
    """Replace a dataset by one that has no bytes in the file."""
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    file.create_dataset(name, shape, dtype)


def test_damaged_files_are_refused(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(4)
    path, elsewhere = tmp_path / "f.h5", tmp_path / "other.h5"
    compute_features(corpus, path, workers=0)
    good = path.read_bytes()
    elsewhere.write_bytes(good)

    def refuse(data: bytes, match: str) -> None:
        path.write_bytes(data)
        with pytest.raises(FeatureError, match=match):
            FeatureFile(path).gather(["u000"])

    refuse(good[: len(good) // 2], "damaged")
    refuse(b"", "damaged")
    refuse(b"not hdf5" * 100, "damaged")
    path.write_bytes(good)
    with h5py.File(path, "r+") as file:
        at = file["features"].id.get_offset() + 2 * 80 * int(file["offsets"][2]) + 7
    flipped = bytearray(good)
    flipped[at] ^= 1
    path.write_bytes(flipped)
    assert FeatureFile(path).damaged_rows() == [("u002", Variant(1.0))]
    for change, match in (
        (lambda f: f.attrs.__setitem__("version", 9), "version 9"),
        (lambda f: f.attrs.__setitem__("format", "other"), "not a feature file"),
        (lambda f: f["ids"].__setitem__(0, 65), "do not match their checksum"),
        (lambda f: (f.attrs.__delitem__("tables_crc32c"), f["offsets"].__setitem__(1, 1 << 40)), "backwards"),
        (lambda f: f.__delitem__("speeds"), "damaged"),
        (lambda f: (f.__delitem__("crc32c"), f.__setitem__("crc32c", np.ones(1, np.int8))), "crc32c is int8"),
        (
            lambda f: (
                f.attrs.__delitem__("tables_crc32c"),
                f.__delitem__("crc32c"),
                f.__setitem__("crc32c", np.ones(1, np.uint32)),
            ),
            "disagree",
        ),
        (lambda f: (f.__delitem__("features"), f.create_group("features")), "damaged"),
        (lambda f: f.attrs.__setitem__("settings", "[1]"), "settings"),
        (lambda f: _elsewhere(f, "features", h5py.ExternalLink(elsewhere, "features")), "leads into another file"),
        (lambda f: _elsewhere(f, "records", h5py.ExternalLink(elsewhere, "records")), "leads into another file"),
        (lambda f: _elsewhere(f, "features", None, elsewhere), "lie in other files"),
        (lambda f: _elsewhere(f, "ids", None, elsewhere), "lie in other files"),
        (lambda f: _unwritten(f, "features"), "frames without bytes of their own"),
    ):
        path.write_bytes(good)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(FeatureError, match=match):
            FeatureFile(path).open()


def test_a_file_replaced_while_open_goes_on_reading_the_old_one(make_corpus: Make, tmp_path: Path) -> None:
    corpus = make_corpus(4)
    path = tmp_path / "f.h5"
    compute_features(Corpus(corpus.path, corpus.utterances[2:]), path, workers=0)
    file = FeatureFile(path).open()
    compute_features(corpus, path, workers=0)
    np.testing.assert_array_equal(file.gather(["u003"])[0], FeatureFile(path).gather(["u003"])[0])
    assert file.ids == ["u002", "u003"]


def test_gather_is_not_far_from_a_memory_map(tmp_path: Path) -> None:
    """A rough bar that a busy machine meets; tests/bench/bench_features.py measures the real one."""
    from stillhouse.data.features.writer import Rows, write_rows

    rng = np.random.default_rng(0)
    rows = Rows()
    for k in range(300):
        rows.add(f"u{k}", Variant(1.0), k, rng.standard_normal((int(rng.integers(200, 900)), 80)).astype(np.float16))
    write_rows(tmp_path / "f.h5", FeatureSettings(), rows)
    file = FeatureFile(tmp_path / "f.h5").open()
    raw = np.memmap(tmp_path / "f.h5", np.float16, "r", file._offset, (int(file.offsets[-1]), 80))
    batches = [rng.integers(0, 300, 32) for _ in range(20)]

    def mapped(batch: np.ndarray) -> np.ndarray:
        return np.concatenate([raw[file.offsets[k] : file.offsets[k + 1]] for k in batch])

    def seconds(read: Callable[[np.ndarray], np.ndarray]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            read(batch)
        return time.perf_counter() - begun

    names = {id(b): [f"u{k}" for k in b] for b in batches}
    np.testing.assert_array_equal(file.gather(names[id(batches[0])])[0], mapped(batches[0]))
    ratio = max(seconds(mapped) / seconds(lambda b: file.gather(names[id(b)])[0]) for _ in range(5))
    assert ratio > 0.4
