"""What goes wrong on a Ray cluster is named at once: no cluster, a node without the store or without the model."""

from __future__ import annotations

import pickle
import socket
import time
from pathlib import Path

import pytest

from stillhouse.data.errors import NoStoreError, TeacherError, UsageError
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.progress import ExtractionProgress
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.pipeline.workers.on_ray import check_address, run_task

from ..conftest import loaded, make_corpus

REQUEST = Request("t", [1], ["alone"])


def test_a_dead_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    for dead in (address, f"ray://{address}"):
        with pytest.raises(UsageError, match=rf"--ray-address {dead}: no Ray cluster answers.*ray start --head"):
            check_address(dead)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UsageError, match="no Ray cluster runs on this machine"):
        check_address("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)  # what a killed cluster leaves
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UsageError, match="no Ray cluster answers"):
        check_address("auto")
    assert time.monotonic() - began < 30
    for wrong in ("nowhere", "host:", "host:port"):
        with pytest.raises(UsageError, match="no address of a Ray cluster"):
            check_address(wrong)
    check_address(None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_node_that_does_not_see_the_store(bert: Path, tmp_path: Path) -> None:
    """The task leaves nothing there, and says which node it was."""
    plan = make_plan(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    rest = "t", {"source": str(bert), "device": "cpu"}, (0, 1), 1
    missing = run_task(plan.created, str(tmp_path / "elsewhere"), *rest)
    assert isinstance(missing, NoStoreError) and not (tmp_path / "elsewhere").exists()
    node = socket.gethostname()
    assert f"the node {node} does not have the store" in str(missing) and "all nodes share" in str(missing)
    other = run_task("2001-01-01T00:00:00+00:00", str(tmp_path / "s"), *rest)
    assert isinstance(other, NoStoreError) and f"the node {node} has another store under this path" in str(other)
    assert str(pickle.loads(pickle.dumps(other))) == str(other)  # as Ray carries it
    done = run_task(plan.created, str(tmp_path / "s"), *rest)
    assert isinstance(done, ExtractionProgress) and done.items == done.items_total


def test_a_node_without_the_model(bert: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    error = run_task(
        plan.created, str(tmp_path / "s"), "t", {"source": str(tmp_path / "gone"), "device": "cpu"}, (0, 1), 1
    )
    assert isinstance(error, TeacherError) and "gone: there is no such folder" in str(error)
    assert f"the node {socket.gethostname()} has none" in str(error)


def test_how_busy_the_model_is_with_workers(bert: Path, tmp_path: Path) -> None:
    """What workers report counts, also if this process runs no work item itself, as with Ray."""

    class OneTask:
        def __init__(self, plan: object) -> None:
            self.created = plan.created  # type: ignore[attr-defined]

        def finish(self) -> ExtractionProgress:
            load = {"source": str(bert), "device": "cpu"}
            done = run_task(self.created, str(tmp_path / "s"), "t", load, (0, 1), 1)
            assert isinstance(done, ExtractionProgress)
            return done

    alone = extract(tmp_path / "one", make_corpus(), loaded(bert), REQUEST)
    summary = extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST, part=None, start_workers=OneTask)  # type: ignore
    assert 0 < summary.model_share <= 1 and 0 < alone.model_share <= 1
    nothing = extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    assert nothing.model_share == 0
