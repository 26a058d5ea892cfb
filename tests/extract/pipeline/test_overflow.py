"""States that a dtype cannot hold: the error, the remedy that it gives, and the dry run that sees it before."""

from __future__ import annotations

import copy
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.data.errors import LockedError, StaleError, StoreError
from stillhouse.extract.pipeline.estimate import render, size_up
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.locks import Scratch
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.storage import open_files
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.teacher.model import Teacher

from ..conftest import loaded, make_corpus

CORPUS = make_corpus(["the old kettle", "she would not wear it there", "we"])
REQUEST = Request("t", [1], ["alone"])


def scaled(folder: Path, factor: float) -> Teacher:
    """A teacher whose states are `factor` times as large."""
    teacher = copy.copy(loaded(folder))
    states = teacher.states
    teacher.states = lambda windows, layers: {k: v * factor for k, v in states(windows, layers).items()}  # type: ignore
    teacher.clone_model = lambda: teacher  # type: ignore[method-assign]
    return teacher


def test_the_remedy_works_on_the_same_store(bert: Path, tmp_path: Path) -> None:
    big = scaled(bert, 1e6)
    with pytest.raises(
        StoreError, match=r"u\d: .*t/alone/1 is not finite in float16 \(the largest.*\d,\d{3}\).*--dtype bf"
    ):
        extract(tmp_path / "s", CORPUS, big, REQUEST)
    for dtype in ("bfloat16", "float32"):
        store = tmp_path / dtype
        with pytest.raises(StoreError, match="not finite"):
            extract(store, CORPUS, big, REQUEST)
        assert len(extract(store, CORPUS, big, replace(REQUEST, dtype=dtype)).views) == 1
        assert verify(Store.open(store)) == [] and Store.open(store).teacher("t").settings.dtype == dtype
        fresh = tmp_path / f"fresh-{dtype}"
        extract(fresh, CORPUS, big, replace(REQUEST, dtype=dtype))
        one, two = (Store.open(s).gather(["u0", "u2"], Store.open(s).views, dtype="float32") for s in (store, fresh))
        assert all(np.array_equal(one.states[v], two.states[v]) for v in one.states)


def test_a_store_with_states_keeps_its_dtype(bert: Path, tmp_path: Path) -> None:
    """The remedy then is another name in the same store, and that works."""
    extract(tmp_path / "s", CORPUS, loaded(bert), REQUEST)
    with pytest.raises(StaleError, match="the stored dtype"):
        extract(tmp_path / "s", CORPUS, loaded(bert), replace(REQUEST, dtype="float32"))
    with pytest.raises(StoreError, match="--dtype bfloat16 --name t-bfloat16, because the store has states"):
        extract(tmp_path / "s", CORPUS, scaled(bert, 1e6), replace(REQUEST, layers=[1, 2]))
    named = replace(REQUEST, name="t-bfloat16", layers=[1, 2], dtype="bfloat16")
    assert extract(tmp_path / "s", CORPUS, scaled(bert, 1e6), named).views == [
        "t-bfloat16/alone/1",
        "t-bfloat16/alone/2",
    ]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_setting_may_change_before_the_first_commit(bert: Path, gpt2: Path, tmp_path: Path, dtype: str) -> None:
    """Also where the norms of int8 are committed, and where the store has another teacher, which stays as it is."""
    extract(tmp_path / "s", CORPUS, loaded(gpt2), Request("other", [1], ["alone"]))
    before = Store.open(tmp_path / "s").gather(["u0"], Store.open(tmp_path / "s").views)

    class Broken(Exception):
        pass

    def stop(_: Any) -> None:
        raise Broken

    with pytest.raises(Broken):
        extract(tmp_path / "s", CORPUS, loaded(bert), replace(REQUEST, dtype=dtype), on_progress=stop)
    planned = [g.number for g in Store.open(tmp_path / "s").plan.generations]
    summary = extract(tmp_path / "s", CORPUS, loaded(bert, 32), replace(REQUEST, dtype="float32"))
    store = Store.open(tmp_path / "s")
    assert summary.views == ["t/alone/1"] and verify(store) == []
    assert store.teacher("t").settings.window == 32 and len(store.plan.generations) == len(planned) == 2
    assert store.plan.generations[-1].number > max(planned)
    after = store.gather(["u0"], store.resolve("other/*/*"))
    assert all(np.array_equal(before.states[v], after.states[v]) for v in after.states)


def hold(root: Path, ready: Any, done: Any) -> None:
    with Scratch(Paths(open_files(root))):
        ready.set()
        done.wait(60)


def test_not_while_another_process_writes(bert: Path, tmp_path: Path) -> None:
    make_plan(tmp_path / "s", CORPUS, loaded(bert), REQUEST)
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    writer = context.Process(target=hold, args=(tmp_path / "s", ready, done))
    writer.start()
    try:
        assert ready.wait(60)
        with pytest.raises(LockedError, match="a writer is at work"):
            extract(tmp_path / "s", CORPUS, loaded(bert), replace(REQUEST, dtype="float32"))
    finally:
        done.set()
        writer.join()
    assert Store.open(tmp_path / "s").teacher("t").settings.dtype == "float16"


@pytest.mark.parametrize("dtype", ["float16", "int8", "bfloat16", "float32"])
def test_what_the_model_itself_yields(bert: Path, tmp_path: Path, dtype: str) -> None:
    request = replace(REQUEST, dtype=dtype)
    with pytest.raises(StoreError, match=r"not finite.*the model itself yields it") as caught:
        extract(tmp_path / "s", CORPUS, scaled(bert, float("nan")), request)
    assert "--dtype" not in str(caught.value)


def test_a_dry_run_sees_it(bert: Path, tmp_path: Path) -> None:
    fine = size_up(tmp_path / "s", CORPUS, loaded(bert), REQUEST)
    ids = torch.tensor([[2, *loaded(bert).tokeniser.encode([CORPUS.utterances[1].text], "none").ids.tolist(), 3]])
    assert fine.largest_value is not None and not fine.overflows and fine.largest_view == "t/alone/1"
    own = loaded(bert).model(ids, output_hidden_states=True).hidden_states[1][0, 1:-1].abs().max()
    assert float(own) <= fine.largest_value * 1.0001 < 65_504
    big = size_up(tmp_path / "s", CORPUS, scaled(bert, 1e6), REQUEST)
    assert big.overflows and json.loads(json.dumps(big.as_json()))["overflows"]
    assert "is beyond float16; give --dtype bfloat16" in render(big)
    assert not size_up(tmp_path / "s", CORPUS, scaled(bert, 1e6), replace(REQUEST, dtype="bfloat16")).overflows
    assert not (tmp_path / "s" / "store.json").exists()
