"""Completion: what the shells' own protocol gives for commands, view addresses and utterance ids."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from stillhouse.cli import cli


def complete(arguments: list[object], incomplete: str) -> list[str]:
    found = ShellComplete(cli, {}, "stillhouse", "_STILLHOUSE_COMPLETE").get_completions(
        [str(a) for a in arguments], incomplete
    )
    return [item.value for item in found]


def test_commands():
    assert "neighbours" in complete(["inspect"], "ne") and complete([], "insp") == ["inspect"]


def test_views(store):
    both = ["known/both:8/0", "known/both:8/2", "known/both:8/4"]
    assert complete(["inspect", "stats", store.path, "--view"], "known/b") == both
    begun = complete(["inspect", "compare", store.path, "s00-0000", "--views"], "known/alone/4,known/b")
    assert begun == [f"known/alone/4,{v}" for v in both]


def test_utterances(store, tmp_path):
    expected = {"s01-0003", "s01-0004", "s01-0005"}
    assert set(complete(["inspect", "show", store.path], "s01")) == expected
    assert set(complete(["inspect", "neighbours", store.path], "s01")) == expected
    assert complete(["inspect", "show", tmp_path / "none"], "s") == []


@pytest.mark.parametrize(("shell", "expected"), [("bash", "plain,{}"), ("zsh", "plain\n{}\n_"), ("fish", "plain,{}")])
def test_each_shells_protocol(store, shell, expected):
    line = f"stillhouse inspect show {store.path} s00-0002"
    env = {**os.environ, "_STILLHOUSE_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": "4"}
    if shell == "fish":
        env["COMP_WORDS"], env["COMP_CWORD"] = line, "s00-0002"
    done = subprocess.run([sys.executable, "-m", "stillhouse.cli"], env=env, capture_output=True, text=True)
    assert expected.format("s00-0002") in done.stdout, done.stderr
    script = {**os.environ, "_STILLHOUSE_COMPLETE": f"{shell}_source"}
    printed = subprocess.run([sys.executable, "-m", "stillhouse.cli"], env=script, capture_output=True, text=True)
    assert "_STILLHOUSE_COMPLETE" in printed.stdout, printed.stderr
