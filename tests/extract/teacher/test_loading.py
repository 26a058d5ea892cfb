"""What is wrong with a folder, or with the hub, is said in words, within seconds, and with what helps."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stillhouse.data.errors import TeacherError
from stillhouse.extract.teacher.model import load_teacher


def refused(source: str | Path, **options: str) -> str:
    with pytest.raises(TeacherError) as e:
        load_teacher(str(source), device="cpu", **options)  # type: ignore[arg-type]
    return str(e.value)


@pytest.mark.parametrize("source", ["./models/x", "/no/such/folder", "models/x/", "a/b/c", "../x", "~/x", ""])
def test_what_can_only_be_a_path_is_a_missing_folder(source: str) -> None:
    assert "there is no such folder" in refused(source)


def test_folders_that_are_no_models(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:5], b"\xff" * 100, b""):
        weights.write_bytes(damaged)
        assert f"{weights}: this file of weights is damaged" in refused(folder)
    weights.write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    assert "files of weights are missing: model-00002-of-00002.safetensors" in refused(folder)
    index.write_text("[]")
    assert "index of weights is damaged" in refused(folder)
    index.unlink()
    config = (folder / "config.json").read_text()
    for text in ("{", "[]", '{"model_type": "bert", "hidden_size": "x"}', '{"model_type": "no-such-model"}', "{}"):
        (folder / "config.json").write_text(text)
        assert "cannot be loaded" in refused(folder)
    changed = json.loads(config) | {"hidden_size": 24}
    (folder / "config.json").write_text(json.dumps(changed))
    assert "cannot be loaded" in refused(folder) or "lacks weights" in refused(folder)
    (folder / "config.json").unlink()
    assert "this folder has no config.json" in refused(folder)
    weights.unlink()
    assert "this folder has no config.json" in refused(folder)


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine, with one gated model, and no others."""

    def do_HEAD(self) -> None:
        gated = self.path.startswith("/org/gated/")
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access is restricted" if gated else "Repository not found")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    point_at(monkeypatch, url, tmp_path)
    yield url
    server.shutdown()
    server.server_close()


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_gated_model_says_how_to_log_in(hub: str) -> None:
    message = refused("org/gated")
    assert "this model is gated" in message and f"{hub}/org/gated" in message
    assert "hf auth login" in message and "HF_TOKEN" in message


def test_an_unknown_model_may_be_private(hub: str) -> None:
    message = refused("org/unknown")
    assert "no folder and no public model on the hub" in message and "hf auth login" in message


@pytest.mark.parametrize("source", ["sentence-transformers/all-MiniLM-L6-v2", "bert-base-uncased"])
def test_without_internet_a_folder_is_asked_for_in_seconds(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    began = time.monotonic()
    message = refused(source)
    assert time.monotonic() - began < 10
    assert "--teacher FOLDER" in message and "HF_HUB_OFFLINE=1" in message and f"hf download {source}" in message


def test_a_cached_model_loads_without_internet(bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    commit = "a" * 40
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / commit
    shutil.copytree(bert, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    began = time.monotonic()
    assert load_teacher("org/cached", device="cpu").revision == commit
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("source", ["bert base", "bert--base", "a/b?c"])
def test_a_name_that_no_hub_can_have(source: str) -> None:
    message = refused(source)
    assert "cannot be loaded: HFValidationError" in message and "give a folder with config.json" in message


def test_offline_by_choice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    point_at(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("org/none")
    assert "--teacher FOLDER" in message and "HF_HUB_OFFLINE=1 forbids" in message
