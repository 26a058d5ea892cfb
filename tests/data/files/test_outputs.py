"""No command writes over its inputs or over what it did not write, and two ids never share a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.cli import cli
from stillhouse.data.commands.paths import AnyPath
from stillhouse.data.errors import StillhouseError, UsageError
from stillhouse.data.files.outputs import (
    LONGEST_NAME,
    PAGE,
    check_file,
    check_folder,
    file_names,
    is_page,
    refuse_input,
)
from stillhouse.data.manifest import Utterance, write_manifest

IDS = st.text(st.sampled_from("aAbB/_.-\\ é\u0301É\0:~") | st.characters(codec="utf-8"), max_size=12)


@given(st.lists(IDS | st.sampled_from(["a/b", "a_b", "..", "con", "NUL.x", "x" * 300, "x" * 301, "-rf", "a.", ""])))
def test_file_names_are_injective(ids: list[str]) -> None:
    names = file_names(ids)
    assert set(names) == set(ids)
    assert len({name.casefold() for name in names.values()}) == len(names)
    for name in names.values():
        assert name.isascii() and "/" not in name and "\0" not in name and name[0] not in ".-_" and name[-1] != "."
        assert len(name) <= LONGEST_NAME and name.casefold().split(".")[0] not in ("con", "nul")


@given(st.lists(IDS))
def test_file_names_stay_injective_when_names_are_ids(ids: list[str]) -> None:
    names = file_names([*ids, *file_names(ids).values()])
    assert len({name.casefold() for name in names.values()}) == len(names)


def test_plain_ids_are_their_names() -> None:
    assert file_names(["LJ001-0001", "1089-134686-0000", "a_b"]) == {
        i: i for i in ("LJ001-0001", "1089-134686-0000", "a_b")
    }
    names = file_names(["a/b", "a_b"])
    assert names["a_b"] == "a_b" and names["a/b"].startswith("a_b-")
    assert file_names(["a/b"])["a/b"] == names["a/b"]  # the same in another run
    assert "A" not in file_names(["A", "a"]).values()


def linked(path: Path, how: str) -> Path:
    other = path.parent / "other"
    if how == "same":
        return path
    if how == "spelled":
        return path.parent / "x" / ".." / path.name
    if how == "symlink":
        other.symlink_to(path)
    else:
        os.link(path, other)
    return other


@pytest.mark.parametrize("how", ["same", "spelled", "symlink", "hard link"])
def test_an_input_is_refused_however_it_is_named(tmp_path: Path, how: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("x")
    (tmp_path / "x").mkdir()
    out = linked(path, how)
    with pytest.raises(UsageError, match="input of the command"):
        check_file(out, [None, tmp_path / "absent", path], force=True)
    with pytest.raises(UsageError, match="inside of"):
        refuse_input(tmp_path / "x" / "new", [tmp_path / "x"], inside=True)


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    check_file(tmp_path / "new.html", own=is_page)
    page, foreign = tmp_path / "page.html", tmp_path / "foreign.html"
    page.write_bytes(b"<!doctype html>\n<head>\n" + PAGE)
    foreign.write_text("<html>mine</html>")
    check_file(page, own=is_page)
    check_file(foreign, own=is_page, force=True)
    for path in (foreign, tmp_path):
        with pytest.raises(UsageError):
            check_file(path, own=is_page)
    with pytest.raises(UsageError, match="this is a folder"):
        check_file(tmp_path, force=True)


def test_only_own_folders_are_written_into(tmp_path: Path) -> None:
    for good in ("absent", "empty", "own", "hidden"):
        if good != "absent":
            (tmp_path / good).mkdir()
    (tmp_path / "own" / "mark").touch()
    (tmp_path / "hidden" / ".git").touch()
    for good in ("absent", "empty", "own", "hidden"):
        check_folder(tmp_path / good, lambda names: "mark" in names, "ours")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for bad in ("file", "dangling", "model"):
        with pytest.raises(UsageError, match="or ours"):
            check_folder(tmp_path / bad, lambda names: "mark" in names, "ours")


def run(*words: object) -> str:
    result = CliRunner().invoke(cli, [*map(str, words)])
    assert result.exit_code != 0 and isinstance(result.exception, StillhouseError | SystemExit), result.exception
    return str(result.exception) if isinstance(result.exception, StillhouseError) else result.output


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "corpus.jsonl", [Utterance(id="a", text="one two"), Utterance(id="b", text="three")])
    return tmp_path / "corpus.jsonl"


def test_score_writes_no_page_over_its_inputs(tmp_path: Path, corpus: Path) -> None:
    hyp, other, mine = tmp_path / "h.trn", tmp_path / "o.trn", tmp_path / "mine.html"
    for path in (hyp, other):
        path.write_text("one two (a)\nthree (b)\n")
    mine.write_text("<html>mine</html>")
    before = {path: path.read_bytes() for path in (hyp, other, corpus, mine)}
    for target in (hyp, other, corpus):
        told = run("score", hyp, "--corpus", corpus, "--against", other, "--html", target, "--force")
        assert "input of the command" in told
    assert "--force" in run("score", hyp, "--corpus", corpus, "--html", mine)
    assert before == {path: path.read_bytes() for path in before}
    for force in ([], [], ["--force"]):
        page = mine if force else tmp_path / "e.html"
        words = ["score", hyp, "--corpus", corpus, "--html", page, *force]
        assert CliRunner().invoke(cli, [*map(str, words)]).exit_code == 0 and PAGE in page.read_bytes()


@pytest.mark.parametrize("name", ["", " ", "gs://b/x", "file:x", "file://host/x", "http://x/y"])
def test_what_is_no_path(name: str, corpus: Path) -> None:
    before = sorted(corpus.parent.iterdir())
    for words in (
        ["extract", corpus, name, "--teacher", "x"],
        ["corpus", "import", "text", corpus, name],
        ["corpus", "tokenizer", corpus, name],
        ["train", corpus, "--out", name],
        ["export", "r", "--format", "onnx", "--out", name],
    ):
        assert "path" in run(*words)
    assert sorted(corpus.parent.iterdir()) == before


def test_paths_that_are_written_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def parsed(text: str, **options: bool) -> Path:
        return AnyPath(**options).convert(text, None, None)

    assert parsed("file:///a%20b/c") == Path("/a b/c") == parsed("file://localhost/a b/c") == parsed("file:/a b/c")
    assert parsed("~/x") == tmp_path / "x" and parsed("./~") == Path("./~")
    assert str(parsed("s3://b/x", stores=True)) == "s3:/b/x"
    with pytest.raises(click.BadParameter, match="NUL"):
        parsed("a\0b")
    with pytest.raises(click.BadParameter, match="s3:// is not supported"):
        parsed("s3://b/x")
    (tmp_path / "~").mkdir()
    assert parsed("~/x") == Path("~/x")


@pytest.mark.parametrize("what", ["model", "file", "data.zarr", "here"])
def test_a_store_is_not_written_into_something_else(tmp_path: Path, corpus: Path, what: str) -> None:
    place = {"here": Path(".")}.get(what, tmp_path / "place")
    if what == "model":
        place.mkdir()
        (place / "config.json").write_text("{}")
    elif what == "file":
        place.write_text("x")
    elif what == "data.zarr":
        (place / "data.zarr").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert "expected a new or empty folder, or a store" in run("extract", corpus, place, "--teacher", "absent")
    words = ["store", "import", corpus, place, "--from", "x", "--layers", "1", "--teacher", "absent"]
    assert "expected a new or empty folder, or a store" in run(*words)
    assert sorted(tmp_path.rglob("*")) == before


def test_import_and_split_replace_manifests_alone(tmp_path: Path, corpus: Path) -> None:
    text, hyps = tmp_path / "t.txt", tmp_path / "h.jsonl"
    text.write_text("One.\nTwo.\n")
    hyps.write_text('{"id": "a", "hyp": "x", "ref": "y"}\n')
    other = tmp_path / "other.jsonl"
    write_manifest(other, [Utterance(id="z", text="z")])
    before = {path: path.read_bytes() for path in (text, hyps, corpus, other)}
    assert "input" in run("corpus", "import", "text", text, text, "--force")
    assert "no earlier call" in run("corpus", "import", "text", text, hyps, "--force")
    assert "no earlier call" in run("corpus", "split", corpus, hyps, "--by", "id")
    assert "another corpus" in run("corpus", "split", corpus, other, "--by", "id")
    assert before == {path: path.read_bytes() for path in before}
    write_manifest(corpus, [Utterance(id=f"u{k}", text="x") for k in range(60)])
    for seed in ("1", "2"):
        words = ["corpus", "split", str(corpus), str(tmp_path / "out.jsonl"), "--by", "id", "--seed", seed]
        assert CliRunner().invoke(cli, words).exit_code == 0


def test_units_are_not_written_into_a_model(tmp_path: Path, corpus: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "spm.model").write_bytes(b"mine")
    assert "a folder of units" in run("corpus", "tokenizer", corpus, model)
    assert (model / "spm.model").read_bytes() == b"mine"
    words = ["corpus", "tokenizer", corpus, tmp_path / "units", "--kind", "characters"]
    for _ in range(2):
        assert CliRunner().invoke(cli, [*map(str, words)]).exit_code == 0
    run_folder = tmp_path / "run"
    shutil.copytree(tmp_path / "units", run_folder / "units")
    (run_folder / "identity.json").touch()
    assert "a folder of units" in run("corpus", "tokenizer", corpus, run_folder / "units")


def test_features_and_demos_leave_other_files_alone(tmp_path: Path, corpus: Path) -> None:
    before = corpus.read_bytes()
    run("corpus", "features", corpus, corpus)
    assert corpus.read_bytes() == before
    assert "a demo's" in run("demo", "--out", tmp_path) and corpus.read_bytes() == before


def test_nothing_else_is_written_into_a_store(tmp_path: Path) -> None:
    (tmp_path / "s.zarr" / "plan").mkdir(parents=True)
    (tmp_path / "s.zarr" / "store.json").write_text("{}")
    for out in ("s.zarr/x", "s.zarr/plan/deep/x.html"):
        with pytest.raises(UsageError, match=r"inside of the store .*s\.zarr"):
            refuse_input(tmp_path / out, [])
        with pytest.raises(UsageError, match=r"inside of the store .*s\.zarr"):
            check_folder(tmp_path / out, lambda names: True, "anything")
    refuse_input(tmp_path / "s.zarr", [])
    refuse_input(tmp_path / "s.zarr2" / "x", [])


@pytest.mark.parametrize("how", [">", ">>"])
def test_an_input_that_is_standard_output_is_named(tmp_path: Path, how: str) -> None:
    write_manifest(tmp_path / "c.jsonl", [Utterance(id="a", text="b")])
    (tmp_path / "link.jsonl").symlink_to("c.jsonl")
    command = f"{sys.executable} -m stillhouse.cli corpus info "
    run = partial(subprocess.run, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert run(f"{command} c.jsonl {how} facts.txt").returncode == 0
    before = (tmp_path / "c.jsonl").stat().st_size
    done = run(f"{command} link.jsonl {how} c.jsonl")
    assert done.returncode == 2 and "link.jsonl is also standard output" in done.stderr
    assert (tmp_path / "c.jsonl").stat().st_size == (before if how == ">>" else 0)
