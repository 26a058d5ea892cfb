"""States of speech encoders against plain transformers, one utterance at a time, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stillhouse.data.errors import AudioError, TeacherError, UsageError
from stillhouse.extract.speech.encoder import SpeechEncoder, load_encoder

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CONVOLVED = SMALL | {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
RNG = np.random.default_rng(0)


def wav2vec2_extractor(normalise: bool = True) -> Any:
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=not normalise)


MODELS: dict[str, tuple[Any, Any, Any]] = {
    "wav2vec2": (transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(**CONVOLVED), wav2vec2_extractor()),
    "wav2vec2, layer norms first": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**CONVOLVED, do_stable_layer_norm=True, feat_extract_norm="layer"),
        wav2vec2_extractor(),
    ),
    "hubert": (transformers.HubertModel, transformers.HubertConfig(**CONVOLVED), wav2vec2_extractor(False)),
    "wavlm": (transformers.WavLMModel, transformers.WavLMConfig(**CONVOLVED), wav2vec2_extractor()),
    "data2vec-audio": (
        transformers.Data2VecAudioModel,
        transformers.Data2VecAudioConfig(**CONVOLVED | {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 5}),
        wav2vec2_extractor(),
    ),
    "wav2vec2-bert": (
        transformers.Wav2Vec2BertModel,
        transformers.Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=160),
        transformers.SeamlessM4TFeatureExtractor(),
    ),
    "parakeet": (
        transformers.ParakeetEncoder,
        transformers.ParakeetEncoderConfig(**SMALL, num_mel_bins=80, subsampling_conv_channels=8),
        transformers.ParakeetFeatureExtractor(feature_size=80),
    ),
    "whisper": (
        transformers.WhisperModel,
        transformers.WhisperConfig(
            d_model=32, encoder_layers=3, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1, max_source_positions=200,
        ),
        transformers.WhisperFeatureExtractor(feature_size=80),
    ),
}  # fmt: skip


ODD = CONVOLVED | {
    "conv_dim": (8, 12, 20), "conv_kernel": (11, 5, 3), "conv_stride": (7, 5, 3), "num_feat_extract_layers": 3,
    "conv_bias": True,
}  # fmt: skip
UNUSUAL: dict[str, tuple[Any, Any, Any]] = {
    "other strides and rate": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**ODD),
        transformers.Wav2Vec2FeatureExtractor(sampling_rate=24000),
    ),
    "as many layers as convolutions": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**CONVOLVED | {"num_hidden_layers": 7}),
        wav2vec2_extractor(),
    ),
    "convolutions behind the last layer": (
        transformers.Wav2Vec2Model,
        transformers.Wav2Vec2Config(**CONVOLVED, add_adapter=True, output_hidden_size=40),
        wav2vec2_extractor(),
    ),
    "MMS": (
        transformers.Wav2Vec2ForCTC,
        transformers.Wav2Vec2Config(
            **CONVOLVED, vocab_size=20, do_stable_layer_norm=True, feat_extract_norm="layer", adapter_attn_dim=8
        ),
        wav2vec2_extractor(),
    ),
    "batch norm of positions": (
        transformers.HubertModel,
        transformers.HubertConfig(**CONVOLVED, conv_pos_batch_norm=True),
        wav2vec2_extractor(False),
    ),
    "unispeech-sat": (
        transformers.UniSpeechSatModel,
        transformers.UniSpeechSatConfig(**CONVOLVED),
        wav2vec2_extractor(),
    ),
    "conformer": (
        transformers.Wav2Vec2ConformerModel,
        transformers.Wav2Vec2ConformerConfig(**CONVOLVED, position_embeddings_type="rotary"),
        wav2vec2_extractor(),
    ),
    "three mel frames a state": (
        transformers.Wav2Vec2BertModel,
        transformers.Wav2Vec2BertConfig(**SMALL, feature_projection_input_dim=240, add_adapter=True),
        transformers.SeamlessM4TFeatureExtractor(stride=3),
    ),
    "recogniser around the encoder": (
        transformers.ParakeetForCTC,
        transformers.ParakeetCTCConfig(
            encoder_config=SMALL | {"num_mel_bins": 80, "subsampling_conv_channels": 8, "subsampling_factor": 4},
            vocab_size=20,
            pad_token_id=0,
        ),
        transformers.ParakeetFeatureExtractor(feature_size=80),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNUSUAL))
def test_states_of_unusual_models_equal_plain_transformers(name: str, tmp_path: Path) -> None:
    kind, config, extractor = UNUSUAL[name]
    torch.manual_seed(1)
    built = kind(config).eval()
    for part in (built, extractor):
        part.save_pretrained(tmp_path)
    plain = built.get_encoder() if "encoder_config" in config.to_dict() else getattr(built, "wav2vec2", built)
    encoder = load_encoder(str(tmp_path))
    for seconds in (0.21, 1.3456):
        samples = RNG.standard_normal(int(encoder.sample_rate_hz * seconds)).astype(np.float32) * 0.1
        layers = [0, encoder.depth - 1, encoder.depth]
        found, hidden = encoder.states(samples, layers), expected((tmp_path, plain, extractor), samples)
        assert len(hidden) == encoder.depth + 1
        for k, states in zip(layers, found, strict=True):
            assert np.abs(states - hidden[k]).max() <= 1e-4 * np.abs(hidden[k]).max()
        assert abs(found.shape[1] - seconds * encoder.rate_hz) <= 2


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder as save_pretrained leaves it, and plain transformers of it."""
    kind, config, extractor = MODELS[request.param]
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("encoder")
    kind(config).save_pretrained(folder)
    extractor.save_pretrained(folder)
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    return folder, plain, transformers.AutoFeatureExtractor.from_pretrained(folder)


def expected(model: tuple[Path, Any, Any], samples: np.ndarray) -> list[np.ndarray]:
    """Plain transformers' states of the utterance alone; Whisper's with silence behind, and positions for that long."""
    _, plain, extractor = model
    if plain.config.model_type != "whisper":
        inputs = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.no_grad():
            result = plain(**inputs, output_hidden_states=True)
        kept = int(result.attention_mask.sum()) if "attention_mask" in result else None
        return [h[0, :kept].numpy() for h in result.hidden_states]
    frames = -(-len(samples) // 320)
    padded = np.pad(samples, (0, frames * 320 + 8000 - len(samples)))
    mel = extractor(padded, sampling_rate=16000, return_tensors="pt", padding="do_not_pad").input_features
    short = transformers.WhisperConfig(**plain.config.to_dict() | {"max_source_positions": frames + 25})
    encoder = transformers.WhisperModel(short).get_encoder().eval()
    weights = plain.get_encoder().state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][: frames + 25]
    encoder.load_state_dict(weights)
    with torch.no_grad():
        return [h[0, :frames].numpy() for h in encoder(mel, output_hidden_states=True).hidden_states]


@pytest.mark.parametrize("seconds", [0.13, 0.62503, 1.0, 2.3456])
def test_states_equal_plain_transformers(model: tuple[Path, Any, Any], seconds: float) -> None:
    encoder = load_encoder(str(model[0]))
    samples = RNG.standard_normal(int(16000 * seconds)).astype(np.float32) * 0.1
    plain = expected(model, samples)
    assert encoder.depth == len(plain) - 1 == 3 and encoder.width == 32
    assert encoder._layers is not None  # not the slow way
    for layers in ([0, 1, 2, 3], [2], [0], [3, 1]):
        found = encoder.states(samples, layers)
        assert found.shape == (len(layers), len(plain[0]), 32) and found.dtype == np.float32
        for k, states in zip(layers, found, strict=True):
            assert np.abs(states - plain[k]).max() <= 1e-4 * np.abs(plain[k]).max()


def test_convolutions_do_not_round_to_ten_bits_on_a_gpu(model: tuple[Path, Any, Any]) -> None:
    """torch allows it by default. Where there is no GPU, only the setting can be seen."""
    encoder, seen = load_encoder(str(model[0])), []
    convolution = next(m for m in encoder.encoder.modules() if isinstance(m, torch.nn.modules.conv._ConvNd))
    convolution.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    before = torch.backends.cudnn.allow_tf32
    encoder.states(np.zeros(16000, np.float32) + 0.01, [1])
    assert seen and not any(seen) and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.gpu
def test_states_on_a_gpu_are_those_on_the_cpu(model: tuple[Path, Any, Any]) -> None:
    samples = RNG.standard_normal(40000).astype(np.float32) * 0.1
    plain, found = (load_encoder(str(model[0]), device).states(samples, [0, 1, 3]) for device in ("cpu", "cuda"))
    for a, b in zip(plain, found, strict=True):
        assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()


def test_frames_lie_where_their_sound_is(model: tuple[Path, Any, Any]) -> None:
    """A click changes the input of the frames around it: the middle of these is where rate and offset say."""
    encoder = load_encoder(str(model[0]))
    quiet = np.random.default_rng(3).standard_normal(32000).astype(np.float32) * 0.01
    loud = quiet.copy()
    loud[16000:16016] += 1.0
    if hasattr(model[1].config, "conv_stride"):  # behind the convolutions, before a wide one that adds positions
        with torch.no_grad():
            inputs = [model[2](x, sampling_rate=16000, return_tensors="pt").input_values for x in (quiet, loud)]
            before, after = (model[1].feature_extractor(x)[0].T.numpy() for x in inputs)
    else:
        before, after = (expected(model, x)[0] for x in (quiet, loud))
    change = np.abs(after - before).sum(-1)
    assert abs(int(change.argmax()) / encoder.rate_hz + encoder.offset_s - 1.0005) <= 1.0 / encoder.rate_hz


def test_long_audio_goes_through_in_windows_near_to_the_whole(model: tuple[Path, Any, Any]) -> None:
    encoder = load_encoder(str(model[0]))
    samples = RNG.standard_normal(16000 * 9 + 123).astype(np.float32) * 0.1
    if encoder.kind == "whisper":
        assert encoder.longest_s == 3.5
    encoder.longest_s = 3.5
    import stillhouse.extract.speech.encoder as module

    assert module.OVERLAP_S > 1
    found = SpeechEncoder.states(encoder, samples[: int(16000 * 3.5)], [3])
    long = _short_overlap(encoder, samples)
    assert abs(long.shape[1] - len(samples) / encoder.framing.stride) <= 2
    inside = int(1.0 * encoder.rate_hz)
    assert np.abs(long[0, :inside] - found[0, :inside]).max() <= 0.02 * np.abs(found).max()


def _short_overlap(encoder: SpeechEncoder, samples: np.ndarray) -> np.ndarray:
    import stillhouse.extract.speech.encoder as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OVERLAP_S", 1.0)
        return encoder.states(samples, [3])


def test_what_cannot_be_is_named(model: tuple[Path, Any, Any], tmp_path: Path) -> None:
    encoder = load_encoder(str(model[0]))
    with pytest.raises(UsageError, match=r"layer 4 .*0 to 3"):
        encoder.states(np.zeros(16000, np.float32), [4])
    if encoder.kind not in ("whisper",):
        with pytest.raises(AudioError, match="utt-7"):
            encoder.states(np.zeros(40, np.float32), [1], id="utt-7")
    for file in model[0].glob("*"):
        if file.name != "preprocessor_config.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TeacherError, match=r"feature extractor.*preprocessor_config\.json"):
        load_encoder(str(tmp_path))


def test_a_language_model_is_no_speech_encoder(tmp_path: Path) -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="type bert is no speech encoder"):
        load_encoder(str(tmp_path))


def test_what_a_folder_lacks_or_has_wrong_is_named(tmp_path: Path) -> None:
    """Weights that are not in the file would be random numbers, and nobody would see it."""
    kind, config, extractor = MODELS["whisper"]

    def refused(words: str) -> None:
        with pytest.raises(TeacherError, match=words):
            load_encoder(str(tmp_path))

    kind(config).save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    without = {k: v for k, v in weights.items() if not k.startswith("decoder")}
    save_file(without, file, {"format": "pt"})
    assert load_encoder(str(tmp_path)).depth == 3  # it needs no decoder
    save_file({k: v for k, v in without.items() if "layers.1.fc1.weight" not in k}, file, {"format": "pt"})
    refused(r"lacks weights of the model: encoder\.layers\.1\.fc1\.weight \(1 in all\)")
    file.write_bytes(file.read_bytes()[:1000])
    refused("damaged or cut.*copy it again")
    file.unlink()
    refused("no weights.*safetensors")
    save_file(weights, file, {"format": "pt"})
    settings = tmp_path / "preprocessor_config.json"
    nested = {"processor_class": "WhisperProcessor", "feature_extractor": json.loads(settings.read_bytes())}
    settings.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert load_encoder(str(tmp_path)).sample_rate_hz == 16000
    (tmp_path / "processor_config.json").unlink()
    wav2vec2_extractor().save_pretrained(tmp_path)
    refused(
        r"fails on a second of noise, with the feature extractor Wav2Vec2FeatureExtractor.*preprocessor_config\.json"
    )
    with pytest.raises(TeacherError, match="there is no such folder"):
        load_encoder(str(tmp_path / "gone"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            load_encoder(str(tmp_path), "cuda")
