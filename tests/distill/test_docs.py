"""docs/guide/transfer.md: its code runs, and it names every choice that the code has."""

from __future__ import annotations

import re
from pathlib import Path

import known_store
import torch

from stillhouse.distill.aligners import ALIGNERS
from stillhouse.distill.controls import CONTROLS
from stillhouse.distill.mixing import MIXINGS
from stillhouse.distill.targets import POSITIONS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "guide" / "transfer.md"


def test_the_example_runs(tmp_path, monkeypatch):
    store = known_store.build(tmp_path, layers=(3, 4))
    (tmp_path / "corpus.zarr").symlink_to(store.path)
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python quick\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    transcripts = {i: known_store.TEXTS[int(i.split("-")[1])] for i in store.utterance_ids}
    torch.manual_seed(0)
    names = {"transcripts": transcripts}
    exec(compile(code.replace("minilm", "known"), str(DOCS), "exec"), names)
    assert set(names["result"].per_view) == {"known/alone/4", "known/both:8/4", "known/alone/3"}


def test_the_page_names_every_choice():
    text = DOCS.read_text(encoding="utf-8")
    for choice in (*ALIGNERS, *CONTROLS, *MIXINGS, *POSITIONS, "cosine", "l1", "smooth_l1", "mse", "contrastive"):
        assert f"`{choice}`" in text, choice
