"""Several processes on one store: the same bytes, and the dead are replaced."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from stillhouse.data.errors import StoreError, UsageError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request, make_plan
from stillhouse.extract.pipeline.workers import parse_part, start_workers
from stillhouse.extract.store import Store
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded
from .test_crash import tree
from .test_extract import long_corpus

REQUEST = Request("t", [0, 2], ["alone", "both:4"])


def test_three_workers_make_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(bert), "device": "cpu"}
    summary = extract(
        tmp_path / "three", long_corpus(), loaded(bert), REQUEST, helpers=start_workers("t", load, 3, (0, 1))
    )
    extract(tmp_path / "one", long_corpus(), loaded(bert), REQUEST)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    assert summary.units_done_now == summary.units > 4 and summary.rows_done_now == 2 * summary.tokens
    assert len(summary.views) == 4 and verify(Store.open(tmp_path / "three")) == []


def test_a_failing_worker_is_told(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(tmp_path / "no model here"), "device": "cpu"}
    with pytest.raises(Exception, match="cannot be loaded"):
        extract(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST, helpers=start_workers("t", load, 2, (0, 1)))


def test_a_killed_worker_is_told_and_replaced(bert: Path, tmp_path: Path) -> None:
    load = {"source": str(bert), "device": "cpu"}
    make_plan(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST)

    def helpers(plan):
        crew = start_workers("t", load, 2, (0, 1))(plan)  # type: ignore[misc]
        os.kill(crew._processes[0].pid, signal.SIGKILL)
        return crew

    with pytest.raises(StoreError, match="worker-1 died"):
        extract(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST, helpers=helpers)
    assert extract(tmp_path / "s", long_corpus(1), loaded(bert), REQUEST).views


def test_parts() -> None:
    assert parse_part("2/4") == (2, 4) and parse_part(None) == (0, 1)
    for bad in ("4/4", "1", "-1/3", "a/b"):
        with pytest.raises(UsageError):
            parse_part(bad)
