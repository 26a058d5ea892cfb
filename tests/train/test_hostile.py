"""Settings, studies, checkpoints, run folders and hypotheses that nobody meant well.

Whatever comes in, the answer is data or an error of ours, soon, in little memory, and nothing half written.
Feature files, manifests and units are wrecked in tests/data/test_hostile.py, stores in tests/extract/inspect.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hostile import WRONG, dumped, limited, places, put, run, spoilt, wrecked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stillhouse.data.errors import CheckpointError, ConfigError, StillhouseError
from stillhouse.data.files.atomic import sha256_plain
from stillhouse.train.config import Config, load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import checkpoint
from stillhouse.train.study.definition import load_study

slow = pytest.mark.slow
# A model of NaNs is told so by a warning
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ROOT = Path(__file__).resolve().parents[2]


def fuzz(examples: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=quiet)


# Settings

RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
@fuzz(40)
@given(rest=st.data())
def test_wrecked_recipes(tmp_path: Path, path: Path, rest: st.DataObject) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(rest.draw(wrecked(path.read_bytes())))
    if path.stem.startswith("study"):
        with limited(), suppress(StillhouseError):  # the command would draw a page of nothing, forty times
            load_study(copy, tmp_path / "out")
        return
    assert run("train", copy, "--out", tmp_path / "out").exit_code  # the corpus is not there at the latest


def settings_of(section: str) -> list[str]:
    return [f"{section}.{key}" for key in Config.model_fields[section].annotation.model_fields]  # type: ignore[union-attr]


HOSTILE = ["-1", "0", "1", "1e308", "nan", "inf", "-inf", "1000000000000", "9223372036854775808", "[]", "{}", "''",
           "'../..'", "true", "[1, 2]", "['x']", "[[]]", "1979-05-27", "'cuda:99'", "'\\u0000'", "2"]  # fmt: skip


@pytest.mark.parametrize("section", sorted(Config.model_fields))
def test_every_setting_hostile(tones: Path, tmp_path: Path, section: str) -> None:
    """What cannot be meant is refused in words, and what is allowed can be built, before any data is asked for."""
    from stillhouse.train.model.build import build_model

    rng = random.Random(section)
    for name in settings_of(section):
        for value in rng.sample(HOSTILE, 7):
            try:
                config = load_config(tones / "run.toml", [f"{name}={value}"])
            except ConfigError as e:
                assert name.split(".")[1] in str(e) or section in str(e)
                continue
            if section == "model" and value not in ("1000000000000", "9223372036854775808"):
                build_model(config, 6)


@pytest.fixture(scope="module")
def brief(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run of one step, without a dev split."""
    path = tmp_path_factory.mktemp("brief") / "run.toml"
    text = (tones / "run.toml").read_text().replace('dev = "dev"\n', "")
    path.write_text(text.replace("steps = 24", "steps = 1").replace("warmup_steps = 5", "warmup_steps = 0"))
    assert run("train", path, "--out", path.with_name("out")).exit_code == 0
    return path


@slow
@pytest.mark.parametrize("section", sorted(Config.model_fields))
def test_every_setting_hostile_in_a_run(brief: Path, tmp_path: Path, section: str) -> None:
    for number, (name, value) in enumerate((n, v) for n in settings_of(section) for v in HOSTILE):
        if name == "optim.steps" and value[0] in "19":
            continue  # meant, if it is
        run("train", brief, "--out", tmp_path / f"{number}", "--set", f"{name}={value}")


def test_settings_that_are_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 5000 + "]" * 5000)
    (tmp_path / "many.toml").write_text("a." * 5000 + "b = 1")
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    for name in ("loop", "deep", "many", "folder", "pipe"):
        for command in ("train", "study"):
            result = run(command, tmp_path / f"{name}.toml", "--out", tmp_path / "out")
            assert isinstance(result.exception, ConfigError), name
            assert not (tmp_path / "out").exists()


# Checkpoints and what lies beside them


@pytest.fixture(scope="module")
def trained(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    changes = ["optim.steps=4", "run.checkpoint_every=2", "run.eval_every=4", "data.dev='dev'", "run.keep=2"]
    Trainer(load_config(tones / "run.toml", changes), out, lambda _: None).run()
    return out


def commands(folder: Path, tones: Path) -> list[list[object]]:
    data = [tones / "corpus.jsonl", tones / "features.h5"]
    return [
        ["decode", folder, *data, "--split", "dev"],
        ["train", folder / "config.toml", "--out", folder],
        ["align", folder, *data, "--split", "dev", "--checkpoint", "last"],
    ]


def last(folder: Path) -> Path:
    (path,) = (folder / "checkpoints").glob("step-*4")
    return path


def halved(folder: Path) -> Path:
    """`folder` as a run killed between its two checkpoints leaves it; the first of them."""
    shutil.rmtree(last(folder))
    (path,) = (folder / "checkpoints").glob("step-*")
    return path


def spoil_file(folder: Path, rng: random.Random) -> str:
    """One file of a run folder wrecked; its name."""
    path = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (".lock", "lock")))
    data = path.read_bytes()
    how = rng.randrange(8)
    if how < 4:
        path.write_bytes(spoilt(data, rng))
    elif how == 4 and path.suffix in (".json", ".jsonl"):
        value = json.loads(data.splitlines()[0] if path.suffix == ".jsonl" else data)
        path.write_bytes(dumped(put(value, rng.choice(list(places(value))), rng.choice(WRONG))))
    else:
        path.unlink()
        if how == 5:
            os.mkfifo(path)
        elif how == 6:
            path.symlink_to(path.name)
        elif how == 7:
            path.mkdir()
    return f"{path.relative_to(folder)} {how}"


@pytest.mark.parametrize("cases", [24, pytest.param(1_500, marks=slow)])
def test_every_file_of_a_run(trained: Path, tones: Path, tmp_path: Path, cases: int) -> None:
    rng = random.Random(cases)
    for number in range(cases):
        folder = tmp_path / "run"
        shutil.copytree(trained, folder)
        what = spoil_file(folder, rng)
        kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
        result = run(*commands(folder, tones)[number % 3])
        assert result.exit_code == 0 or str(result.exception), what
        if number % 3 != 1:
            assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == kept
        shutil.rmtree(folder)


def test_a_pipe_for_every_file_of_a_run(trained: Path, tones: Path, tmp_path: Path) -> None:
    """Nobody writes into it: whoever opens it as a file waits for ever."""
    for file in sorted(p.relative_to(trained) for p in trained.rglob("*") if p.is_file()):
        for number in range(3):
            folder = tmp_path / "run"
            shutil.copytree(trained, folder)
            (folder / file).unlink()
            os.mkfifo(folder / file)
            run(*commands(folder, tones)[number])
            shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["dev.jsonl", "metrics.jsonl", "tb", "units", "checkpoints"])
def test_what_lies_where_a_run_writes(trained: Path, tones: Path, tmp_path: Path, name: str) -> None:
    """A run that has two steps to do, and a folder where its files belong, or a file where its folders do."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    if (folder / name).is_dir():
        shutil.rmtree(folder / name)
        (folder / name).touch()
    else:
        (folder / name).unlink()
        (folder / name).mkdir()
    found = run("train", folder / "config.toml", "--out", folder)
    assert found.exit_code and f"{folder / name}" in str(found.exception)


@pytest.mark.parametrize("cases", [pytest.param(30, marks=slow), pytest.param(1_500, marks=slow)])
def test_checkpoints_that_someone_signed(trained: Path, tones: Path, tmp_path: Path, cases: int) -> None:
    """States that say something else and tensors of other shapes and types, with checksums that are right."""
    rng = random.Random(cases)
    shutil.copytree(trained, tmp_path / "whole")
    halved(tmp_path / "whole")
    assert run(*commands(tmp_path / "whole", tones)[1]).exit_code == 0, (
        "what is spoilt below is what a run goes on from"
    )
    assert last(tmp_path / "whole")
    for number in range(cases):
        folder = tmp_path / "run"
        shutil.copytree(trained, folder)
        path = halved(folder) if number % 3 == 1 else last(folder)
        state = json.loads((path / "state.json").read_text())
        state.pop("digest")
        if rng.random() < 0.4:
            file = rng.choice(sorted(path.glob("*.safetensors")))
            tensors = load_file(file)
            name = rng.choice(sorted(tensors))
            other: list[Callable[[torch.Tensor], Any]] = [
                lambda t: t[None].clone(), lambda t: t.double(), lambda t: torch.full_like(t, float("nan")),
                lambda t: torch.zeros(0), lambda t: t.to(torch.int64), lambda t: t.reshape(-1)[:1].clone(),
            ]  # fmt: skip
            if rng.random() < 0.2:
                del tensors[name]
            else:
                tensors[name] = rng.choice(other)(tensors[name])
            save_file(tensors, file)
            state["sha256"][file.name] = sha256_plain(file)
        else:
            state = put(state, rng.choice(list(places(state))), rng.choice(WRONG), drop=rng.random() < 0.2)
        try:
            digest = {"digest": checkpoint._digest(state)}
        except (ValueError, TypeError):
            digest = {}
        (path / "state.json").write_bytes(dumped({**state, **digest}))
        run(*commands(folder, tones)[number % 3])
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("position", None), ("epoch", True), ("data", 3.5), ("best", {"step": 2}), ("best", [1]),
        ("window", {"sums": [1]}), ("precision", "int4"), ("bad_steps", -1),
    ],
)  # fmt: skip
def test_a_state_that_no_run_wrote_is_told(trained: Path, tones: Path, tmp_path: Path, name: str, value: Any) -> None:
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = halved(folder)
    state = json.loads((path / "state.json").read_text()) | {name: value}
    state.pop("digest")
    (path / "state.json").write_bytes(dumped({**state, "digest": checkpoint._digest(state)}))
    found = run(*commands(folder, tones)[1])
    assert isinstance(found.exception, CheckpointError) and f"{path}" in str(found.exception)


def test_a_pickle_is_no_checkpoint(trained: Path, tones: Path, tmp_path: Path) -> None:
    """What would run code on torch.load is refused by its checksum, and by the format with a right one."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    path = last(folder)
    torch.save({"w": torch.zeros(3)}, path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state.pop("digest")
    state["sha256"]["model.safetensors"] = sha256_plain(path / "model.safetensors")
    state["digest"] = checkpoint._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    result = run(*commands(folder, tones)[0], "--checkpoint", "4")
    assert isinstance(result.exception, CheckpointError), result


# Features that are not what they were, under a training

FEATURE_TABLES = ("offsets", "ids", "id_offsets", "speeds", "audio", "crc32c", "features")


@pytest.mark.parametrize("table", FEATURE_TABLES)
def test_features_of_other_types_and_shapes(tones: Path, brief: Path, tmp_path: Path, table: str) -> None:
    def other_type(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float64)

    def wider(values: np.ndarray) -> np.ndarray:
        return values[..., None]

    def shorter(values: np.ndarray) -> np.ndarray:
        return values[: len(values) // 2]

    def far(values: np.ndarray) -> np.ndarray:
        out = values.copy()
        out.reshape(-1)[-1:] = np.iinfo(out.dtype).max if out.dtype.kind in "iu" else 0
        return out

    for change in (other_type, wider, shorter, far, None):
        copy = tmp_path / "features.h5"
        shutil.copy(tones / "features.h5", copy)
        with h5py.File(copy, "r+") as file:
            values = file[table][()]
            del file[table]
            if change is not None:
                file[table] = change(values)
        result = run("train", brief, "--out", tmp_path / "out", "--set", f"data.features='{copy}'")
        assert isinstance(result.exception, StillhouseError) or result.exit_code == 0
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# Hypotheses

HYPS = [{"id": f"u{k}", "ref": "a b c", "hyp": "a c c"} for k in range(3)]


@fuzz(60)
@given(rest=st.data())
def test_wrecked_hypotheses(tones: Path, tmp_path: Path, rest: st.DataObject) -> None:
    good, path, page = tmp_path / "good.jsonl", tmp_path / "h.jsonl", tmp_path / "e.html"
    good.write_text("".join(json.dumps(h) + "\n" for h in HYPS))
    path.write_bytes(rest.draw(wrecked(good.read_bytes())))
    page.unlink(missing_ok=True)
    by = ["--by", "session", "--corpus", tones / "corpus.jsonl"]
    more = rest.draw(st.sampled_from([["--against", good], ["--html", page], by]))
    result = run("score", path, *more, "--errors", "2")
    assert result.exit_code == 0 or not page.exists()
    if result.exit_code == 0:
        result.stdout.encode()
