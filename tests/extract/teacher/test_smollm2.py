"""A real causal decoder as teacher: its states equal plain transformers', and context helps it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.data.text import transform
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View, to_float32
from stillhouse.extract.teacher.convert import convert
from stillhouse.extract.teacher.model import Teacher, load_teacher

pytestmark = pytest.mark.slow
LAYERS = [0, 1, 15, 29, -1]


@pytest.fixture(scope="module")
def folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    out = tmp_path_factory.mktemp("teachers") / "smollm2"
    convert(smollm2, out)
    return out


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(str(folder), device="cpu", window=512)


@pytest.fixture(scope="module")
def chapter(corpora: Path) -> Corpus:
    """The first chapter of LibriSpeech dev-clean, in order."""
    path = corpora / "text" / "librispeech-dev-clean.tsv"
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    first = lines[0][0].rsplit("-", 1)[0]
    texts = [(i, t) for i, t in lines if i.rsplit("-", 1)[0] == first]
    return Corpus(path, [Utterance(id=i, text=t, session=first) for i, t in texts])


def ids_of(teacher: Teacher, corpus: Corpus) -> list[list[int]]:
    """Return ids as in running text, with a space before the first word."""
    return [
        teacher.tokeniser._hf(" " + transform(u.text, "sentence_case").text, add_special_tokens=False).input_ids
        for u in corpus.utterances
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_views_are_the_models_hidden_states(folder: Path, chapter: Corpus, dtype: str, tmp_path: Path) -> None:
    """`alone` and `past:64` of a chapter's first utterances, against one pass an utterance written down by hand."""
    corpus = Corpus(chapter.path, chapter.utterances[:12])
    teacher = load_teacher(str(folder), device="cpu", dtype=dtype, window=512)
    extract(
        tmp_path / "s",
        corpus,
        teacher,
        Request("smol", LAYERS, ["alone", "past:64"], "sentence_case", dtype="float32", core_tokens=1),
    )
    store = Store.open(tmp_path / "s", checksums=True)
    plain = load_teacher(str(folder), device="cpu").model
    ids = ids_of(teacher, corpus)
    assert store.resolve(["smol/*/last"]) == [View("smol", c, 30) for c in ("alone", "past:64")]
    off: dict[View, list[np.ndarray]] = {}
    for u, utterance in enumerate(corpus.utterances):
        before = [i for other in ids[:u] for i in other]
        for context, left in (("alone", []), ("past:64", before[-64:])):
            with torch.inference_mode():
                want = plain(torch.tensor([[1, *left, *ids[u]]]), output_hidden_states=True).hidden_states
            for layer in (0, 1, 15, 29, 30):
                view = View("smol", context, layer)
                got = store.gather([utterance.id], [view]).states[view]
                exact = want[layer][0, 1 + len(left) :].numpy()
                assert got.shape == exact.shape
                off.setdefault(view, []).append(np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1))
    for view, found in off.items():
        each = np.concatenate(found)
        if dtype == "float32":
            assert each.max() <= 1e-4, view
        else:  # a first word that draws attention like a BOS, its norm fifty times the others', is off by more
            assert (view.layer == 0 or np.median(each) > 1e-3) and np.median(each) <= 0.01 and each.max() <= 0.1, view


def test_context_is_of_use_to_it(teacher: Teacher, chapter: Corpus, tmp_path: Path) -> None:
    """The five utterances before lower its word perplexity to less than half: its head is the embedding."""
    corpus = Corpus(chapter.path, chapter.utterances[:40])
    ids = ids_of(teacher, corpus)
    longest = max(sum(map(len, ids[max(0, u - 5) : u])) for u in range(len(ids)))
    assert longest <= 400
    extract(tmp_path / "s", corpus, teacher, Request("smol", [-1], ["alone", "past:200"], "sentence_case"))
    store = Store.open(tmp_path / "s")
    weight = teacher.model.get_input_embeddings().weight
    nats = {"alone": 0.0, "past:200": 0.0}
    words = 0
    for u, utterance in list(enumerate(corpus.utterances))[5:]:
        words += len(utterance.text.split())
        for context in nats:
            view = View("smol", context, 30)
            states = torch.from_numpy(to_float32(store.gather([utterance.id], [view]).states[view], "float16"))
            scores = torch.log_softmax(states[:-1] @ weight.T, dim=-1)
            nats[context] -= float(scores[torch.arange(len(ids[u]) - 1), ids[u][1:]].sum())
    alone, past = (float(np.exp(n / words)) for n in nats.values())
    assert past < alone / 2, (alone, past)
