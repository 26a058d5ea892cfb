"""Profiling: true parts and operators of the steps asked for, and a run that is none the different for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from stillhouse.train.run.load import load_run
from stillhouse.train.run.profile import Part, Profile, Profiled
from stillhouse.train.run.stopwatch import Stopwatch


def loop(profile: Profile, steps: int) -> None:
    watch, x = Stopwatch(torch.device("cpu")), torch.ones(64, 64)
    for step in range(1, steps + 1):
        with watch("encoder"):
            x = x @ x / 64
        with watch("loss"):
            for _ in range(3):
                x = x.exp().log()
        profile.step(step)
    profile.close()


def test_parts_and_operators_are_those_of_the_steps_asked_for(tmp_path: Path) -> None:
    found: list[Profiled | None] = []
    loop(Profile(tmp_path / "profile", 4, found.append), 12)
    (told,) = found
    assert told is not None and (told.after, told.steps, told.device) == (3, 4, "CPU")
    assert {p.name: p.calls for p in told.parts} == {"encoder": 1, "loss": 1}
    calls = {p.name: p.calls for p in told.ops}
    assert (calls["aten::mm"], calls["aten::exp"], calls["aten::div"]) == (1, 3, 1)
    assert 0 < sum(p.ms for p in told.parts) < told.ms
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    names = [e.get("name") for e in trace["traceEvents"]]
    assert names.count("aten::exp") == 4 * 3 and names.count("stillhouse/loss") == 4
    assert json.loads((tmp_path / "profile" / "profile.json").read_text())["parts"][0]["calls"] == 1
    table = (tmp_path / "profile" / "profile.txt").read_text()
    assert table == told.table() and table.startswith("steps 4 to 7 on CPU: ")


def test_a_run_that_ends_early_gives_what_there_was(tmp_path: Path) -> None:
    found: list[Profiled | None] = []
    loop(Profile(tmp_path / "a", 10, found.append), 5)
    loop(Profile(tmp_path / "b", 10, found.append), 3)
    loop(Profile(tmp_path / "c", 10, found.append), 1)
    assert found[0] is not None and found[0].steps == 2 and found[1:] == [None, None]
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()


def test_the_table_of_a_profile() -> None:
    parts = [Part("backward", 6.0, 0.0, 1.0)]
    ops = [Part("aten::mm", 2.5, 1.25, 14.5), Part("aten::add", 0.5, 0.0, 3.0)]
    assert Profiled(3, 10, 10.0, "CPU", parts, ops, "trace.json").table(ops=1).splitlines() == [
        "steps 4 to 13 on CPU: 10.0 ms a step",
        "",
        "part                                               ms  CUDA ms     %   calls",
        "backward                                         6.00     0.00  60.0     1.0",
        "",
        "operator (alone)                                   ms  CUDA ms     %   calls",
        "aten::mm                                         2.50     1.25  25.0    14.5",
    ]


def test_a_profiled_run_is_none_the_different(tones: Path, tmp_path: Path) -> None:
    found = []
    for name, *profile in (["plain"], ["profiled", "--profile", "2"]):
        command = [sys.executable, "-m", "stillhouse.cli", "train", str(tones / "run.toml"), "--json", *profile]
        command += ["--set", "optim.steps=8", "--set", "run.eval_every=4", "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    plain, profiled = found
    assert (plain["step"], plain["profile"], plain["best"]) == (8, None, profiled["best"])
    ours, theirs = (load_run(tmp_path / name, "last")[0].state_dict() for name in ("plain", "profiled"))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    told = profiled["profile"]
    assert (told["after"], told["steps"]) == (3, 2)
    assert {p["name"] for p in told["parts"]} >= {"data", "encoder", "loss", "backward", "optimiser"}
    assert Path(told["trace"]).exists() and "steps 4 to 5 on CPU" in done.stderr and "aten::" in done.stderr
    heard = [json.loads(line) for line in (tmp_path / "plain" / "dev.jsonl").read_text().splitlines()]
    assert {h["id"] for h in heard} == {f"u{n}" for n in range(60, 72)} and all(h["ref"] for h in heard)
