"""States against plain transformers on the same ids: every layer, encoder and decoder, alone and with context."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.errors import TeacherError, UsageError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store, View
from stillhouse.extract.store.format.plan import TeacherRecord as Record
from stillhouse.extract.teacher.model import Teacher, load_teacher

from ..conftest import TEXTS, loaded, make_corpus

TEACHERS = ["minilm", "bert", "gpt2", "llama"]


def plain_states(teacher: Teacher, ids: list[int]) -> list[torch.Tensor]:
    """hidden_states [L+1] of [n, D] through transformers alone."""
    with torch.inference_mode():
        out = teacher.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [h[0] for h in out.hidden_states]


def session_ids(store: Store, record: Record, session: list[str]) -> list[np.ndarray]:
    g = store.gather(session, [View(record.name, record.contexts[0], record.layers[0])])
    return np.split(g.token_id[record.name], np.cumsum(g.lengths[record.name])[:-1])


@pytest.mark.parametrize("which", TEACHERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_layer_alone_and_with_context(
    which: str, dtype: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Whole sessions fit into the window here, so each utterance's pass can be written down by hand."""
    teacher = loaded(request.getfixturevalue(which))
    texts = [t for t in TEXTS if len(t) < 60]
    corpus = make_corpus(texts, per_session=3)
    room = teacher.window - 2
    wide = f"past:{room // 2}" if teacher.kind == "decoder" else f"both:{room // 4}"
    layers = list(range(teacher.depth + 1))
    extract(tmp_path / "s", corpus, teacher, Request("t", layers, ["alone", wide], dtype=dtype, core_tokens=1))
    store = Store.open(tmp_path / "s", checksums=True)
    record = store.teacher("t").settings
    left, right = (room // 2, 0) if teacher.kind == "decoder" else (room // 4, room // 4)
    worst = 0.0
    for session in ([f"u{i}" for i in s] for s in corpus.sessions()):
        tokens = session_ids(store, record, session)
        for u, uid in enumerate(session):
            before = np.concatenate([np.zeros(0, int), *tokens[:u]])[-left:] if left else []
            after = np.concatenate([np.zeros(0, int), *tokens[u + 1 :]])[:right]
            for context, a, b in (("alone", [], []), (wide, before, after)):
                n = len(tokens[u])
                if n == 0:
                    continue
                ids = [*record.prefix_ids, *map(int, a), *map(int, tokens[u]), *map(int, b), *record.suffix_ids]
                at = len(record.prefix_ids) + len(a)
                for layer, want in enumerate(plain_states(teacher, ids)):
                    got = store.gather([uid], [View("t", context, layer)]).states[View("t", context, layer)]
                    exact = want[at : at + n].numpy()
                    scale = np.abs(exact).max()
                    difference = np.abs(got.astype(np.float32) - exact)
                    if dtype == "float32":
                        assert difference.max() <= 1e-4 * scale
                    else:
                        ulp = np.spacing(np.abs(exact).astype(np.float16)).astype(np.float32)
                        assert (difference <= ulp + 1e-5 * scale).all()
                    worst = max(worst, float(difference.max()))
    assert worst > 0  # the oracle is another computation, not the same tensor


@pytest.mark.parametrize("which", TEACHERS)
def test_stopping_early_changes_nothing(which: str, request: pytest.FixtureRequest) -> None:
    """One layer asked for alone equals that layer of a whole pass, bit for bit, the last one included."""
    from stillhouse.extract.teacher.contexts import Window

    teacher = loaded(request.getfixturevalue(which))
    assert teacher._blocks is not None
    ids = [*teacher.tokeniser.prefix, 7, 9, 8, 11, 6]
    plain = [h[0] for h in teacher._plain(torch.tensor([ids]))]  # transformers' way, with the same matrix products
    for layer in range(teacher.depth + 1):
        got = teacher.states([Window(np.array(ids, np.int32), None, [])], [layer])
        assert list(got) == [layer]
        assert torch.equal(got[layer][0], plain[layer])


def test_blocks_beyond_the_highest_layer_do_not_run(minilm: Path) -> None:
    from stillhouse.extract.teacher.contexts import Window

    teacher = loaded(minilm)
    ran: list[int] = []
    assert teacher._blocks is not None
    hooks = [b.register_forward_hook(lambda *_, k=k: ran.append(k)) for k, b in enumerate(teacher._blocks)]
    teacher.states([Window(np.array([101, 2023, 102], np.int32), None, [])], [0, 3])
    for h in hooks:
        h.remove()
    assert ran == [0, 1, 2]


def test_bfloat16_is_within_a_hundredth(minilm: Path) -> None:
    """Relative L2 of every layer against float32, over real sentences."""
    from stillhouse.extract.teacher.contexts import Window

    low, full = load_teacher(str(minilm), device="cpu", dtype="bfloat16"), loaded(minilm)
    tokens = full.tokeniser.encode([t for t in TEXTS if t.isascii() and t], "none")
    parts = np.split(tokens.ids, np.cumsum(tokens.length)[:-1])
    windows = [Window(np.array([101, *ids, 102], np.int32), None, []) for ids in parts]
    a, b = full.states(windows, range(7)), low.states(windows, range(7))
    for layer in range(7):
        left = torch.cat([a[layer][i, : len(w.ids)].float() for i, w in enumerate(windows)])
        right = torch.cat([b[layer][i, : len(w.ids)].float() for i, w in enumerate(windows)])
        assert (left - right).norm() <= 0.01 * left.norm()
    assert not torch.equal(a[6], b[6].float())


def test_kinds_and_special_tokens(minilm: Path, gpt2: Path, llama: Path) -> None:
    assert (loaded(minilm).kind, loaded(minilm).depth, loaded(minilm).width) == ("encoder", 6, 384)
    assert loaded(minilm).tokeniser.prefix == [101] and loaded(minilm).tokeniser.suffix == [102]
    assert loaded(gpt2).kind == "decoder" and loaded(gpt2).tokeniser.prefix == [0]  # EOS, for want of a BOS
    assert loaded(llama).kind == "decoder" and loaded(llama).tokeniser.prefix == [1]  # BOS
    assert loaded(gpt2).tokeniser.suffix == [] and loaded(gpt2).window == 64


def test_layer_numbers(minilm: Path) -> None:
    assert loaded(minilm).layer_numbers([-1, 0, 3, 6]) == [0, 3, 6]
    with pytest.raises(UsageError, match=r"0 to 6"):
        loaded(minilm).layer_numbers([7])


def test_pickled_weights_are_refused(bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "pickled")
    state = loaded(bert).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="safetensors"):
        load_teacher(str(folder), device="cpu")


def test_lacking_weights_are_refused(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    weights = {k: v for k, v in weights.items() if "layer.1." not in k}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="lacks weights"):
        load_teacher(str(folder), device="cpu")


def test_remote_code_is_refused(bert: Path, tmp_path: Path) -> None:
    import json

    folder = shutil.copytree(bert, tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    config["model_type"] = "own-kind"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(TeacherError, match="own code"):
        load_teacher(str(folder), device="cpu")
