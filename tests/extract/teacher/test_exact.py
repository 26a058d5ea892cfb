"""States do not depend on batch neighbours, on what ran before, or on a mask of blocks that hides windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import teacher_of, windows_of

from stillhouse.data.errors import TeacherError
from stillhouse.data.manifest import Corpus, Utterance
from stillhouse.extract.commands.extract import extract as command
from stillhouse.extract.pipeline import generation
from stillhouse.extract.pipeline.corpus_diff import format_of, tried_windows
from stillhouse.extract.pipeline.corpus_diff import windows_of as windows_of_texts
from stillhouse.extract.pipeline.extract import extract, make_plan
from stillhouse.extract.pipeline.request import Request, teacher_record
from stillhouse.extract.store import Store
from stillhouse.extract.store.format.plan import read_plan
from stillhouse.extract.store.storage import open_files
from stillhouse.extract.store.views import parse_context
from stillhouse.extract.teacher.batching import make_batches
from stillhouse.extract.teacher.contexts import window_lengths
from stillhouse.extract.teacher.exact import choose_passes
from stillhouse.extract.teacher.model import load_teacher
from stillhouse.extract.teacher.passes import PADDED, Passes, sizes_of

from ..conftest import TEXTS, loaded, make_corpus


def save(folder: Path, bert: Path, model: Any) -> Path:
    """A folder with a model and the tokenizer of the tiny BERT."""
    from transformers import BertTokenizerFast

    model.save_pretrained(folder)
    BertTokenizerFast(str(bert / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mobilebert(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A model that mixes each token with its neighbours, padding included."""
    from transformers import MobileBertConfig, MobileBertModel

    torch.manual_seed(0)
    config = MobileBertConfig(
        vocab_size=loaded(bert).model.config.vocab_size,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        intra_bottleneck_size=16,
        max_position_embeddings=96,
        initializer_range=0.2,
    )
    model = MobileBertModel(config)
    model.embeddings.word_embeddings.weight.data[0] = 1  # as in trained models, where padding is no zero
    return save(tmp_path_factory.mktemp("mobilebert"), bert, model)


@pytest.fixture(scope="session")
def big_bird(tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Path:
    """A model that switches to full attention for good when it meets a short text."""
    from transformers import BigBirdConfig, BigBirdModel

    torch.manual_seed(0)
    config = BigBirdConfig(
        vocab_size=loaded(bert).model.config.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
        block_size=2,
        num_random_blocks=1,
        initializer_range=0.2,
    )
    return save(tmp_path_factory.mktemp("big_bird"), bert, BigBirdModel(config))


def check_against_transformers(root: Path, folder: Path) -> None:
    """Compare every state of a store of `alone` with a model that was loaded for this text alone."""
    from transformers import AutoModel

    store = Store.open(root, checksums=True)
    t = store.teacher(store.views[0].teacher).settings
    for uid in store.utterance_ids:
        tokens = store.gather([uid], store.views[:1]).token_id[t.name].tolist()
        if not tokens:
            continue
        model = AutoModel.from_pretrained(folder).eval()
        ids = torch.tensor([[*t.prefix_ids, *tokens, *t.suffix_ids]])
        with torch.inference_mode():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        for view in store.views:
            want = hidden[view.layer][0, len(t.prefix_ids) : len(t.prefix_ids) + len(tokens)].numpy()
            got = store.gather([uid], [view]).states[view]
            assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), (uid, view)


@pytest.mark.parametrize("which", ["mobilebert", "big_bird"])
def test_each_text_has_the_states_that_it_has_alone(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(which)
    teacher = load_teacher(str(folder), device="cpu")
    summary = extract(tmp_path / "s", make_corpus(TEXTS), teacher, Request("t", [0, 1, 2], ["alone"], dtype="float32"))
    assert "equal length" in summary.passes and summary.padding_share == 0
    assert (
        read_plan(open_files(tmp_path / "s")).generations[0].passes
        == {
            "mobilebert": "equal",
            "big_bird": "equal+fresh",
        }[which]
    )
    check_against_transformers(tmp_path / "s", folder)


def test_a_longer_neighbour_changes_nothing(mobilebert: Path, tmp_path: Path) -> None:
    short = Utterance(id="u", text="we sat", session="1")
    long = Utterance(id="v", text=TEXTS[8], session="2")
    states = []
    for name, utterances in (("a", [short]), ("b", [short, long])):
        corpus = Corpus(tmp_path / f"{name}.jsonl", utterances)
        teacher = load_teacher(str(mobilebert), device="cpu")
        extract(tmp_path / name, corpus, teacher, Request("t", [1, 2], ["alone"], dtype="float32"))
        store = Store.open(tmp_path / name)
        states.append([store.gather(["u"], [v]).states[v] for v in store.views])
    for a, b in zip(*states, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_the_choice_is_in_the_plan_and_a_resumed_run_follows_it(mobilebert: Path, tmp_path: Path) -> None:
    """A worker, here a fresh teacher that planned nothing, batches as the plan says."""
    request = Request("t", [2], ["alone"], dtype="float32")
    make_plan(tmp_path / "s", make_corpus(TEXTS), load_teacher(str(mobilebert), device="cpu"), request)
    teacher = load_teacher(str(mobilebert), device="cpu")
    assert teacher.passes == PADDED
    extract(tmp_path / "s", make_corpus(TEXTS), teacher, request)
    assert teacher.passes == Passes("equal")
    check_against_transformers(tmp_path / "s", mobilebert)


def test_a_plain_model_is_padded_and_its_plan_has_no_new_field(bert: Path, tmp_path: Path) -> None:
    """So earlier versions can read its store."""
    extract(tmp_path / "s", make_corpus(), loaded(bert), Request("t", [2], ["alone"]))
    (plan,) = (tmp_path / "s").rglob("plan.json")
    assert "passes" not in json.loads(plan.read_text())


@pytest.mark.parametrize("context", ["alone", "past:6", "past:6+block", "future:5", "both:5"])
def test_the_longest_and_the_shortest_window_of_a_corpus_are_tried(
    context: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows depend on neighbours, so they are counted for every utterance, not for some of them."""
    generator = np.random.default_rng(3)
    texts = [" ".join(["the"] * n) for n in generator.integers(0, 30, 300).tolist()]
    corpus = Corpus(tmp_path / "c", [Utterance(id=f"u{i}", session=f"s{i // 4}", text=t) for i, t in enumerate(texts)])
    teacher = loaded(bert)
    monkeypatch.setattr(teacher, "window", 24)  # other tests share the loaded teacher
    request = Request("t", [2], [context], join=" and ", core_tokens=12)
    draft = generation.draft_plan(
        open_files(tmp_path / "s"), corpus, teacher, teacher_record(teacher, request), request
    )
    drafted = generation.DraftedCorpus(draft, "t")
    record, everything = draft.plan.teachers["t"], np.arange(len(texts))
    windows = windows_of_texts(record, context, 12, drafted.texts, drafted.session, everything).windows
    tried = tried_windows(record, 12, drafted.texts, drafted.length, drafted.session)
    assert len(tried) < len(windows)
    for most in (max, min):
        assert most(len(w.ids) for w in tried) == most(len(w.ids) for w in windows)
    longest = np.zeros(len(texts), int)
    for window in windows:
        for kept in window.kept:
            longest[kept.utterance] = max(longest[kept.utterance], len(window.ids))
    form = format_of(record, 12)
    counted = window_lengths(parse_context(context), form, drafted.length, drafted.session)
    np.testing.assert_array_equal(counted, longest)


def test_the_dry_run_says_how_texts_share_batches(
    mobilebert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": f"u{i}", "text": t}) + "\n" for i, t in enumerate(TEXTS[:3])))
    command([str(corpus), str(tmp_path / "s"), "--teacher", str(mobilebert), "--dry-run"], standalone_mode=False)
    assert "passes       batches of texts of equal length" in capsys.readouterr().out
    assert not (tmp_path / "s").exists()


def modernbert() -> Any:
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    return ModernBertModel(
        ModernBertConfig(
            vocab_size=200,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=32,
            max_position_embeddings=96,
            local_attention=8,
            global_attn_every_n_layers=3,
            pad_token_id=0,
            initializer_range=0.2,
        )
    )


def test_blocks_keep_the_sliding_windows_of_the_model() -> None:
    """A mask of one block shows what the model shows by itself, in each layer."""
    teacher = teacher_of(modernbert(), "modernbert")
    windows = windows_of((6, 20, 60), blocks=True)
    passes = choose_passes(teacher, windows)
    assert passes == Passes(blocks="own")
    for window in windows:
        assert window.blocks is not None
        want = teacher.plain_states(window.ids)
        one = type(window)(window.ids, window.blocks * 0, [])
        got = teacher.states_by(passes, [one], range(5))
        assert all(torch.allclose(got[k][0], want[k], atol=1e-5) for k in range(5))
    # An additive mask in place of the model's own, which hides its windows, is seen to be another
    wide = teacher.states_by(Passes(), [type(window)(window.ids, window.blocks * 0, [])], [4])[4][0]
    assert not torch.allclose(wide, want[4], atol=1e-2)


def test_two_threads_do_not_share_a_mask_of_blocks() -> None:
    """The blocks of one pass are not seen by a pass in another thread, nor by the next one in this thread."""
    from concurrent.futures import ThreadPoolExecutor

    teacher = teacher_of(modernbert(), "modernbert")
    blocked, bare = windows_of((30,), blocks=True)[0], windows_of((30,))[0]
    passes = Passes(blocks="own")
    wanted = [teacher.states_by(passes, [w], [4])[4] for w in (blocked, bare)]
    assert not torch.equal(*wanted)
    pairs = [(teacher.clone_model(), w, want) for w, want in zip((blocked, bare), wanted, strict=True)] * 8
    with ThreadPoolExecutor(2) as pool:
        for got, (_, _, want) in zip(
            pool.map(lambda p: p[0].states_by(passes, [p[1]], [4])[4], pairs), pairs, strict=True
        ):
            assert torch.equal(got, want)


class _Odd(torch.nn.Module):
    """A model of one layer whose states depend on something else than the text."""

    def __init__(self, how: str) -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.table, self.how, self.calls = torch.nn.Embedding(200, 8), how, 0
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])
        self.config = PretrainedConfig()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table

    def forward(self, input_ids: Any, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        first = self.table(input_ids).cumsum(1)  # each state depends on the tokens before it
        last = self.layers[0](first)
        self.calls += 1
        if self.how == "batch":
            last = last + last.mean(0, keepdim=True)
        elif self.how == "chance":
            last = last + torch.rand(())
        elif self.how == "past":
            last = last * self.calls
        elif self.how == "fails" and input_ids.shape[1] > 20:
            raise IndexError("index out of range in self")
        return BaseModelOutput(last_hidden_state=last, hidden_states=(first, last))


def odd(how: str) -> Any:
    torch.manual_seed(0)
    return teacher_of(_Odd(how), how)


def test_a_model_that_mixes_the_rows_of_a_batch_runs_one_text_at_a_time() -> None:
    passes = choose_passes(odd("batch"), windows_of((4, 6, 9)))
    assert passes.rows == "single" == choose_passes(odd("batch"), windows_of((6, 6, 6))).rows
    assert [len(b) for b in make_batches(windows_of((4, 4, 9)), 4096, 24, passes)] == [1, 1, 1]


def test_a_model_that_remembers_gets_new_modules() -> None:
    teacher = odd("past")
    windows = windows_of((4, 6, 9))
    teacher.passes = choose_passes(teacher, windows)
    assert teacher.passes.fresh and teacher.model.calls == 0
    for window in windows:
        got = teacher.states([window], [1])[1][0]
        assert torch.allclose(got, teacher.plain_states(window.ids)[1], atol=1e-6)
    assert teacher.model.calls == 0  # the loaded model itself has run nothing


def test_a_model_with_chance_is_refused_with_the_difference() -> None:
    with pytest.raises(TeacherError, match=r"differ from pass to pass, by up to \d"):
        choose_passes(odd("chance"), windows_of((4, 6, 9)))


def test_a_text_that_is_too_long_for_the_model_names_the_window_that_fits() -> None:
    with pytest.raises(TeacherError, match=r"cannot run a text of 47 tokens: IndexError.*--window 20"):
        choose_passes(odd("fails"), windows_of((4, 47)))


def test_a_failure_in_the_middle_of_a_run_names_the_utterances_and_loses_nothing(bert: Path, tmp_path: Path) -> None:
    class Failing(type(loaded(bert))):  # type: ignore[misc]
        def states(self, windows: Any, layers: Any) -> Any:
            if max(len(w.ids) for w in windows) > 30:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return super().states(windows, layers)

    teacher = load_teacher(str(bert), device="cpu")
    teacher.__class__ = Failing
    with pytest.raises(TeacherError, match=r"(?s)t/alone shard 0: the model .* with u\d+.*mat1 and mat2.*committed"):
        extract(tmp_path / "s", make_corpus(), teacher, Request("t", [2], ["alone"]))
    teacher.__class__ = type(loaded(bert))
    assert extract(tmp_path / "s", make_corpus(), teacher, Request("t", [2], ["alone"])).views


def test_batches_of_equal_lengths_are_the_largest_of_that_kind() -> None:
    windows = windows_of((9, 3, 9, 3, 9, 5))
    batches = make_batches(windows, 18, 24, Passes("equal"))
    assert [[len(w.ids) for w in b] for b in batches] in ([[9, 9], [9], [5], [3, 3]], [[9], [9, 9], [5], [3, 3]])


@pytest.mark.parametrize("text", ["", "equal", "single+own+plain+fresh", "binary", "equal+fresh"])
def test_passes_are_spelled_in_one_way(text: str) -> None:
    assert str(Passes.parse(text)) == text


def test_a_damaged_spelling_is_refused(bert: Path, tmp_path: Path) -> None:
    for text in ("fresh+equal", "no", "equal+equal"):
        with pytest.raises(ValueError, match=text.replace("+", r"\+")):
            Passes.parse(text)


def test_sizes_are_found_wherever_a_configuration_has_them() -> None:
    from transformers import BigBirdConfig, Gemma3Config, LongformerConfig

    assert 64 in sizes_of(BigBirdConfig()) and 512 in sizes_of(LongformerConfig())
    assert Gemma3Config().text_config.sliding_window in sizes_of(Gemma3Config())


def test_the_encoder_of_an_encoder_decoder_is_a_teacher(bert: Path, tmp_path: Path) -> None:
    """Whether the folder has the encoder alone (T5EncoderModel), or the whole model."""
    from transformers import BartConfig, BartModel, T5Config, T5EncoderModel, T5ForConditionalGeneration

    size = loaded(bert).model.config.vocab_size
    config = T5Config(vocab_size=size, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(config)
    half = T5EncoderModel(config)
    half.load_state_dict({k: v for k, v in whole.state_dict().items() if k in half.state_dict()})
    bart = BartModel(
        BartConfig(
            vocab_size=size,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
        )
    )
    window = windows_of((12,))[0]
    for name, model in (("whole", whole), ("half", half), ("bart", bart)):
        teacher = load_teacher(str(save(tmp_path / name, bert, model)), device="cpu")
        ids = torch.from_numpy(window.ids.astype(np.int64))[None]
        with torch.inference_mode():
            want = model.eval().get_encoder()(input_ids=ids, output_hidden_states=True).hidden_states
        got = teacher.states([window], [0, 1, 2])
        assert (teacher.kind, teacher.depth) == ("encoder", 2)
        assert all(torch.allclose(got[k], want[k], atol=1e-5) for k in range(3))


def test_causal_models_are_not_asked_for_blocks(gpt2: Path) -> None:
    assert choose_passes(loaded(gpt2), windows_of((4, 12, 40))) == PADDED


def test_a_model_whose_attention_does_nothing_is_refused() -> None:
    """MRA returns zeros instead of attention where its CUDA kernel is missing."""
    from transformers import MraConfig, MraModel

    config = MraConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
    )
    with pytest.raises(TeacherError, match="no token changes the state of another") as e:
        teacher_of(MraModel(config), "mra")
    assert "kernels" in str(e.value.remedy)
