"""Hostile input: literal files in malformed/, and fuzzed ones.

Whatever comes in, the answer is data, findings or an error of ours: no traceback, no hang, nothing half written.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from hostile import replaced, wrecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillhouse.cli import cli
from stillhouse.data.corpus.check import check_corpus
from stillhouse.data.errors import CorpusError, FeatureError, PartialError, StillhouseError
from stillhouse.data.features.settings import FeatureSettings, Variant
from stillhouse.data.features.writer import Rows, write_rows
from stillhouse.data.manifest import Utterance, read_manifest, to_line, write_manifest
from stillhouse.data.sources.common import Imported
from stillhouse.data.sources.kaldi import import_kaldi
from stillhouse.data.sources.lhotse import import_lhotse
from stillhouse.data.sources.nemo import import_nemo
from stillhouse.data.units import load_units, train_units

MALFORMED = Path(__file__).parent / "malformed"
FUZZ = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
IMPORTS = {"nemo": "nemo", "lhotse": "lhotse", "kaldi": "kaldi", "tables": "csv"}


def taken(result: Imported, folder: Path) -> None:
    """What an import gave can be written and read again, and every finding is whole."""
    for finding in result.findings:
        assert finding.what and finding.remedy and finding.where
        json.dumps(finding.facts()).encode()
    if result.utterances:
        write_manifest(folder / "again.jsonl", result.utterances)
        assert read_manifest(folder / "again.jsonl").utterances == result.utterances


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


def run(*words: object) -> Any:
    """The command's result; whatever it raises must be ours, or click's."""
    result = CliRunner().invoke(cli, [str(w) for w in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, StillhouseError), result.exception
    return result


# Literal files


@pytest.mark.parametrize("path", sorted((MALFORMED / "manifests").iterdir()), ids=lambda p: p.stem)
def test_malformed_manifests(path: Path) -> None:
    with nothing_written(MALFORMED):
        with pytest.raises(CorpusError) as caught:
            read_manifest(path)
        assert path.name in str(caught.value.where)
        if path.stem == "utf-16":
            return
        done = check_corpus(path)
        assert done.findings and all(f.what and f.remedy and f.file == str(path) for f in done.findings)
        if path.stem not in ("empty", "array", "binary"):
            assert [f.line for f in done.findings] == [2]
            assert done.utterances == (2 if path.stem == "twice" else 1)
        shown = run("corpus", "check", path, "--json")
        assert shown.exit_code == 1
        assert len(json.loads(shown.stdout)["findings"]) == len(done.findings)


SOURCES = [p for kind in IMPORTS for p in sorted((MALFORMED / kind).iterdir())]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_malformed_sources(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with nothing_written(MALFORMED), nothing_written(tmp_path):
        result = run("corpus", "import", IMPORTS[path.parent.name], path, tmp_path / "corpus.jsonl")
        assert isinstance(result.exception, CorpusError | PartialError)
        assert result.stdout == "" and path.name in result.stderr + str(result.exception)


@pytest.mark.parametrize("path", sorted((MALFORMED / "units").iterdir()), ids=lambda p: p.name)
def test_malformed_units(path: Path) -> None:
    with pytest.raises(CorpusError, match=r"corpus tokenizer|version"):
        load_units(path)


# Fuzzed files

LINES = [
    Utterance(id="a", text="Ä b", audio="a.wav", start_s=0.1, duration_s=0.3, session="s", split="dev"),
    Utterance(id="b", text="b", audio="x/../a.wav", speaker="p", meta={"k": "v"}),
    Utterance(id="c", text="text alone"),
]


@pytest.fixture
def here(tmp_path: Path, tone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    tone(tmp_path / "a.wav", 0.5)
    os.mkfifo(tmp_path / "pipe.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@FUZZ
@given(data=wrecked("".join(to_line(u) + "\n" for u in LINES).encode()))
def test_fuzzed_manifests(here: Path, data: bytes) -> None:
    path = here / "corpus.jsonl"
    path.write_bytes(data)
    try:
        corpus = read_manifest(path)
    except CorpusError:
        corpus = None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return
    done = check_corpus(path, full=True)
    assert corpus is None or done.utterances == len(corpus)
    assert corpus is not None or done.findings
    if corpus is not None:
        write_manifest(here / "again.jsonl", corpus.utterances)
        assert read_manifest(here / "again.jsonl").utterances == corpus.utterances


KALDI = {
    "wav.scp": b"r1 a.wav\nr2 sox a.wav -t wav - |\n",
    "segments": b"u1 r1 0.0 0.2\nu2 r2 0.1 0.4 0\n",
    "text": "u1 Ä b\nu2 c\n".encode(),
    "utt2spk": b"u1 s1\nu2 s1\n",
    "reco2file_and_channel": b"r1 r A\nr2 r B\n",
}


@FUZZ
@given(name=st.sampled_from(sorted(KALDI)), rest=st.data())
def test_fuzzed_kaldi(here: Path, name: str, rest: st.DataObject) -> None:
    folder = here / "data"
    folder.mkdir(exist_ok=True)
    for other, content in KALDI.items():
        (folder / other).write_bytes(rest.draw(wrecked(content)) if other == name else content)
    try:
        taken(import_kaldi([(None, folder)], here / "c.jsonl", audio_root=here, root=here), here)
    except CorpusError as e:
        assert e.where is not None


NEMO = {"audio_filepath": "a.wav", "offset": 0.1, "duration": 0.2, "text": "x", "speaker": "s", "lang": "en"}
CUT = {
    "id": "c", "start": 0.1, "duration": 0.3, "channel": 0, "type": "MonoCut",
    "supervisions": [
        {"id": "s", "recording_id": "r", "start": 0.05, "duration": 0.1, "channel": 0, "text": "x", "speaker": "p"}
    ],
    "recording": {
        "id": "r", "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
        "sampling_rate": 16000, "num_samples": 8000, "duration": 0.5, "channel_ids": [0], "transforms": [],
    },
}  # fmt: skip


@pytest.mark.parametrize("reader", [import_nemo, import_lhotse])
@FUZZ
@given(rest=st.data())
def test_fuzzed_json_lines(here: Path, reader: Callable[..., Imported], rest: st.DataObject) -> None:
    row = NEMO if reader is import_nemo else CUT
    good = json.dumps(row).encode()
    changed = rest.draw(st.one_of(wrecked(good), replaced(row).map(lambda v: json.dumps(v).encode())))
    path = here / "m.jsonl"
    path.write_bytes(good + b"\n" + changed + b"\n")
    try:
        result = reader([(None, path)], here / "c.jsonl", root=here)
    except CorpusError as e:
        assert e.where is not None
    else:
        taken(result, here)
        assert result.utterances or result.findings


@FUZZ
@given(rest=st.data())
def test_fuzzed_units(tmp_path: Path, rest: st.DataObject) -> None:
    folder = tmp_path / "units"
    if not folder.exists():
        train_units(["the cat", "the hat sat"] * 20, "sentencepiece", size=20).save(folder)
        shutil.copytree(folder, tmp_path / "good")
    name = rest.draw(st.sampled_from(["units.json", "spm.model"]))
    good = (tmp_path / "good" / name).read_bytes()
    for other in ("units.json", "spm.model"):
        shutil.copy(tmp_path / "good" / other, folder / other)
    (folder / name).write_bytes(rest.draw(wrecked(good)))
    try:
        units = load_units(folder)
    except CorpusError:
        return
    assert units.fingerprint == load_units(tmp_path / "good").fingerprint
    assert units.decode(units.encode("the hat").ids) == "the hat"


# Damaged HDF5 may crash the library that reads it, and the process with it: each of these runs in a child.
CHILD = """
import random, sys
from pathlib import Path
from stillhouse.data.errors import FeatureError
from stillhouse.data.features.file import FeatureFile

good, path = Path(sys.argv[1]).read_bytes(), Path(sys.argv[1] + ".fuzz.h5")
frames = FeatureFile(sys.argv[1]).gather(["u1"])[0]
random.seed(7)
refused = seen = 0
for k in range(int(sys.argv[2])):
    data = bytearray(good)
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.randrange(len(data))
        data[at] = random.choice([0, 255, data[at] ^ (1 << random.randrange(8)), random.randrange(256)])
    if random.random() < 0.1:
        data = data[: random.randrange(len(data))]
    path.write_bytes(data)
    try:
        with FeatureFile(path) as file:
            damaged = file.damaged_rows()
            same = (file.gather(["u1"])[0] == frames).all()
            assert same or any(id == "u1" for id, _ in damaged), k
            seen += bool(damaged)
    except FeatureError as e:
        refused += 1
print(refused, seen)
"""


def test_fuzzed_feature_files(tmp_path: Path) -> None:
    rows, rng = Rows(), np.random.default_rng(0)
    for k in range(3):
        rows.add(f"u{k}", Variant(1.0), k, rng.standard_normal((4 + k, 8)).astype(np.float16))
    write_rows(tmp_path / "f.h5", FeatureSettings(bins=8), rows)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "f.h5"), "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, seen = map(int, done.stdout.split())
    assert refused > 25 and seen > 0  # it has been hit where it matters


def test_foreign_hdf5(tmp_path: Path) -> None:
    def empty(file: h5py.File) -> None: ...

    def of_the_name(file: h5py.File) -> None:
        file.attrs["format"] = "stillhouse-features"

    def of_the_name_and_version(file: h5py.File) -> None:
        file.attrs.update({"format": "stillhouse-features", "version": 1})

    def groups_for_tables(file: h5py.File) -> None:
        file.attrs.update({"format": "stillhouse-features", "version": 1, "settings": "{}", "fingerprint": "x"})
        for name in ("offsets", "ids", "id_offsets", "speeds", "audio", "crc32c", "features"):
            file.create_group(name)

    def wide_tables(file: h5py.File) -> None:
        file.attrs.update({"format": "stillhouse-features", "version": 1, "settings": "{}", "fingerprint": "x"})
        for name in ("offsets", "ids", "id_offsets", "speeds", "audio", "crc32c", "features"):
            file.create_dataset(name, (1 << 20, 1 << 20), np.float64, chunks=(64, 64))

    def arrays_for_attributes(file: h5py.File) -> None:
        file.attrs.update({"format": np.zeros(3), "version": np.ones(3)})

    for make in (empty, of_the_name, of_the_name_and_version, groups_for_tables, wide_tables, arrays_for_attributes):
        path = tmp_path / f"{make.__name__}.h5"
        with h5py.File(path, "w") as file:
            make(file)
        for command in (["corpus", "info", path], ["corpus", "check", path]):
            assert isinstance(run(*command).exception, FeatureError), make.__name__
    np.save(tmp_path / "n.npy", np.zeros(3))
    (tmp_path / "n.npy").rename(tmp_path / "n.h5")
    assert isinstance(run("corpus", "info", tmp_path / "n.h5").exception, FeatureError)


def test_audio_that_would_wait_or_fill_the_memory(here: Path) -> None:
    """A named pipe has no end until someone writes; a FLAC header may claim 2^36 samples."""
    soundfile.write(here / "big.flac", np.zeros(1600, np.int16), 16000)
    flac = bytearray((here / "big.flac").read_bytes())
    flac[21] |= 0x0F
    flac[22:26] = b"\xff\xff\xff\xff"
    (here / "big.flac").write_bytes(flac)
    lines = [
        {"id": n, "text": "x", "audio": n} for n in ("pipe.wav", "big.flac", "/dev/zero", ".", "a.wav/b", "n" * 5000)
    ]
    (here / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for full in (False, True):
        done = check_corpus(here / "corpus.jsonl", full=full)
        assert [f.line for f in done.findings] == [1, 2, 3, 4, 5, 6], done.findings
    result = run("corpus", "features", here / "corpus.jsonl", here / "f.h5", "--workers", 0)
    assert isinstance(result.exception, PartialError)
    assert str(result.exception).count("\n  ") == 6


def test_a_manifest_with_a_root(here: Path) -> None:
    inside = here / "held"
    (inside / "wav").mkdir(parents=True)
    shutil.copy(here / "a.wav", inside / "wav" / "ok.wav")
    os.symlink(here / "a.wav", inside / "link.wav")
    os.symlink(inside / "wav", here / "back")
    cases = {"../a.wav": "up", str(here / "a.wav"): "absolute", "link.wav": "link", "wav/../../a.wav": "round"}
    fine = {
        "wav/ok.wav": "ok",
        f"{inside}/wav/ok.wav": "abs",
        "../held/wav/ok.wav": "away and back",
        "../back/ok.wav": "l",
    }
    for audio, id in (cases | fine).items():
        manifest = inside / "corpus.jsonl"
        manifest.write_text(json.dumps({"id": id, "text": "x", "audio": audio}) + "\n")
        assert len(read_manifest(manifest)) == 1
        with nothing_written(here):
            checked = run("corpus", "check", manifest, "--root", inside, "--json")
        kinds = [f["kind"] for f in json.loads(checked.stdout)["findings"]]
        made = run("corpus", "features", manifest, here / f"{id}.h5", "--root", inside, "--workers", 0)
        if audio in fine:
            assert kinds == [] and made.exit_code == 0
        else:
            assert kinds == ["root"]
            assert isinstance(made.exception, CorpusError) and "corpus.jsonl:1" in str(made.exception)
            assert "leads out of the root" in str(made.exception)
            assert not list(here.glob(f"{id}.h5*"))
