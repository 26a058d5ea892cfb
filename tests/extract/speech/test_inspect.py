"""`stillhouse inspect` on speech teachers: frames with their times, alone and beside a text teacher."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from stillhouse.cli import cli
from stillhouse.data.errors import StillhouseError
from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.extract.store import Store

from .test_teacher import change, copy_of, extract, run, sounds, whisper

__all__ = ["sounds", "whisper"]
TEXT = "the old kettle sang while the rain fell on the roof"  # words that the text teacher knows


@pytest.fixture(scope="module")
def corpus(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copied = copy_of(sounds, tmp_path_factory.mktemp("corpora") / "spoken")
    utterances = read_manifest(copied).utterances
    write_manifest(copied, [u.model_copy(update={"text": TEXT}) for u in utterances])
    return copied


@pytest.fixture(scope="module")
def store(whisper: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "speech"
    extract(corpus, path, whisper, "--layers", "1,last", "--dtype", "float32")
    return path


@pytest.fixture(scope="module")
def mixed(store: Path, corpus: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speech teacher beside a text teacher."""
    path = tmp_path_factory.mktemp("stores") / "mixed"
    shutil.copytree(store, path)
    run("extract", corpus, path, "--teacher", bert, "--name", "b", "--layers", "1,2", "--dtype", "float32")
    return path


def inspect(*arguments: object, code: int = 0) -> Result:
    return run("inspect", *arguments, code=code)


def facts(*arguments: object) -> Any:
    return json.loads(inspect(*arguments, "--json").stdout)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(cli, ["inspect", *map(str, arguments)])
    assert isinstance(result.exception, StillhouseError), result.output
    return str(result.exception)


def states_of(store: Path, utterance: str, view: str = "w/alone/1") -> np.ndarray:
    opened = Store.open(store)
    [chosen] = opened.resolve(view)
    return opened.gather([utterance], [chosen]).states[chosen]


def test_info_tells_frames_and_hours(store: Path, mixed: Path) -> None:
    said, told = inspect("info", store).stdout, facts("info", store)
    [teacher] = told["teachers"]
    lengths = Store.open(store).lengths("w")
    assert told["frames"] == teacher["tokens"] == int(lengths.sum()) and told["tokens"] == 0
    assert (teacher["kind"], teacher["axis"], teacher["rate_hz"], teacher["sample_rate_hz"]) == (
        "speech", "frame", 50.0, 16000,
    )  # fmt: skip
    assert "speech encoder" in said and "audio at 16,000 Hz" in said
    assert f"{int(lengths.sum()):,}, 50 in a second" in said
    assert " tokens" not in said
    both = facts("info", mixed)
    assert both["frames"] == told["frames"] and both["tokens"] == both["teachers"][1]["tokens"] > 0


def test_ls_names_what_it_counts(store: Path, mixed: Path) -> None:
    assert "frames" in inspect("ls", store).stdout and "tokens or frames" in inspect("ls", mixed).stdout
    utterances = {u["utterance"]: u for u in facts("ls", mixed, "--utterances")["utterances"]}
    assert utterances["u0"]["frames"] == {"w": 25} and utterances["silent"]["frames"] == {"w": 0}
    assert list(utterances["u0"]["tokens"]) == ["b"]


def test_show_gives_the_times_of_frames(store: Path, mixed: Path, corpus: Path) -> None:
    shown = facts("show", store, "u0", "--values")
    [teacher] = shown["teachers"]
    assert shown["text"] == "" and shown["text_from"] == "nothing" and teacher["tokens"] == []
    assert teacher["frames"][:2] == [{"begin_s": 0.0, "end_s": 0.01}, {"begin_s": 0.01, "end_s": 0.03}]
    assert len(teacher["frames"]) == 25 and np.array_equal(teacher["views"][0]["values"], states_of(store, "u0"))
    assert "0.010-0.030" in inspect("show", store, "u0").stdout
    assert facts("show", mixed, "u0", "--view", "w/*/*")["text"] == TEXT
    assert facts("show", store, "u0", "--corpus", corpus)["text_from"] == "corpus"
    assert "silent: number" in inspect("show", mixed, "silent", "--view", "w/*/1").stdout


def test_stats_count_every_frame(store: Path) -> None:
    [measured] = facts("stats", store, "--view", "w/alone/1", "--full")["views"]
    opened = Store.open(store)
    [view] = opened.resolve("w/alone/1")
    ids = [i for i in opened.utterance_ids if opened.lengths("w")[opened.rows([i])[0]]]
    states = opened.gather(ids, [view]).states[view]
    assert measured["tokens"] == len(states) and measured["first_tokens"] == 0 and measured["axis"] == "frame"
    assert measured["norm_mean"] == pytest.approx(np.linalg.norm(states, axis=1).mean(), rel=1e-5)
    assert "frames of each view" in inspect("stats", store).stdout


def test_similarity_is_at_the_same_times(store: Path, mixed: Path) -> None:
    told = facts("similarity", store)
    assert told["axis"] == "frame" and told["places"] > 50 and told["cka"][0][0] == pytest.approx(1, abs=1e-5)
    assert "name views of one kind of teacher" in refused("similarity", mixed)
    assert facts("similarity", mixed, "--view", "w/*/*")["cka"] == told["cka"]


def test_neighbours_of_a_time(store: Path, mixed: Path) -> None:
    [told] = facts("neighbours", mixed, "u1@0.305", "--view", "w/alone/1", "--count", "3")["views"]
    query = states_of(store, "u1")[15]  # frame k is over [k / 50 - 0.01, k / 50 + 0.01) s
    opened = Store.open(store)
    best = []
    for id in opened.utterance_ids:
        states = states_of(store, id)
        if id != "u1" and len(states):
            cosine = states @ query / np.linalg.norm(states, axis=1) / np.linalg.norm(query)
            best.append((-cosine.max(), id, int(cosine.argmax())))
    best.sort()
    found = [(n["utterance"], n["token"]) for n in told["neighbours"]]
    assert found == [(id, frame) for _, id, frame in best[:3]] and told["tokens"] == [15]
    assert [n["time_s"] for n in told["neighbours"]] == pytest.approx([frame / 50 for _, _, frame in best[:3]])
    assert "at " in inspect("neighbours", store, "u1@0.305").stdout
    assert "expected a time before 0.790 s" in refused("neighbours", store, "u1@7")
    assert "is of a text teacher" in refused("neighbours", mixed, "u1@0.3", "--view", "b/*/1")
    assert "is of a speech teacher" in refused("neighbours", mixed, "u1:kettle", "--view", "w/*/1")
    assert "no frames" in refused("neighbours", store, "silent@0")


def test_compare_frame_by_frame(store: Path) -> None:
    [told] = facts("compare", store, "u0")["views"]
    first, last = states_of(store, "u0"), states_of(store, "u0", "w/alone/3")
    cosine = (first * last).sum(1) / np.linalg.norm(first, axis=1) / np.linalg.norm(last, axis=1)
    assert told["cosine"] == pytest.approx(cosine.mean(), abs=1e-5) and told["tokens"][1]["piece"] == "0.01 s"
    assert "decoder" not in inspect("compare", store, "u0").stdout


def test_pictures_and_pages(store: Path, mixed: Path, tmp_path: Path) -> None:
    inspect("plot", store, tmp_path / "a.svg", "--kind", "similarity")
    assert (tmp_path / "a.svg").stat().st_size
    inspect("plot", mixed, tmp_path / "b.svg", "--kind", "norms")
    assert "speech teacher" in refused("plot", store, tmp_path / "c.svg", "--kind", "word", "--word", "kettle")
    inspect("report", mixed, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "speech encoder" in page and "tokens or frames" in page and "0.010-0.030" in page
    inspect("report", store, tmp_path / "s.html")


def test_export_holds_times(store: Path, mixed: Path, tmp_path: Path) -> None:
    told = facts("export", mixed, tmp_path / "x.npz", "u0", "u1")
    assert told["frames"] == {"w": 65} and list(told["tokens"]) == ["b"]
    with np.load(tmp_path / "x.npz") as file:
        ends = np.cumsum(file["w/length"])
        where = file["utterance"].tolist().index("u0")
        own = slice(ends[where] - file["w/length"][where], ends[where])
        assert np.array_equal(file["w/alone/1"][own], states_of(store, "u0"))
        assert file["w/time"].shape == (65, 2) and file["w/time"][own][1].tolist() == [0.01, 0.03]
    for suffix in ("h5", "safetensors"):
        inspect("export", store, tmp_path / f"x.{suffix}", "u0")
    inspect("export", store, tmp_path / "x.csv", "u0")
    with open(tmp_path / "x.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50 and rows[1]["begin"] == "0.01" and rows[1]["end"] == "0.03" and rows[1]["piece"] == ""


def test_diff_finds_other_audio(store: Path, whisper: Path, corpus: Path, tmp_path: Path) -> None:
    assert "the stores are equal" in inspect("diff", store, store).stdout
    other = copy_of(corpus, tmp_path / "other")
    change(other, "c0", channel=1)
    change(other, "c1", text="another text, which no speech teacher hears")
    extract(other, tmp_path / "b", whisper, "--layers", "1,last", "--dtype", "float32")
    told = inspect("diff", store, tmp_path / "b", "--json", code=1)
    utterances = json.loads(told.stdout)["utterances"]
    assert utterances["sounded_ids"] == ["c0"] and utterances["tokenised"] == 0
    assert all(n["equal"] == 1 and n["axis"] == "frame" for n in json.loads(told.stdout)["numbers"])
    assert "1 with other audio: c0" in inspect("diff", store, tmp_path / "b", code=1).stdout
