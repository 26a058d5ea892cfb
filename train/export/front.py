"""What must feed an exported model whose features are the states of a speech encoder, which is not part of the export.

Guarantees: the text and the metadata name the encoder, its layer and the hash of its weights.
Try: `stillhouse export RUN --format onnx --out FOLDER`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def front_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of an encoder graph, by the settings of the features that it takes."""
    what = (
        f"states of layer {settings['layer']} of {settings['encoder']} go in; normalisation and projection are inside"
    )
    return {"comment": what} | {f"features_{name}": str(value) for name, value in settings.items()}


def front_readme(settings: Mapping[str, Any], inputs: Sequence[str] | None = None) -> str:
    """Return the text of README.md in the folder of an export. `inputs`: of the graph `frontend`, if it is there."""
    s = settings
    silence = (
        "\nWhisper gets the audio with half a second of silence behind it, not padded to 30 s. It has as many\n"
        "positions as there are frames, and the states of the silence are dropped.\n"
        if s["architecture"] == "whisper"
        else ""
    )
    where = "which is **not part of this export**" if inputs is None else "which is the graph `frontend`"
    return f"""# What feeds this model

This model does not take fbank. Its features are the states of a speech encoder, {where}.

| | |
|---|---|
| encoder | {s["encoder"]} |
| architecture | {s["architecture"]} |
| hash of the weights | {s["weights"]} |
| layer | {s["layer"]} (0 is what goes into the first layer, as in `hidden_states` of transformers) |
| width | {s["bins"]} |
| frames in a second | {s["frame_hz"]:g} |
| middle of the first frame | {s["offset_s"]:g} s |
| audio | mono, {s["rate_hz"]} Hz, one utterance in a pass |

The states are rounded to float16 before they go in. The normalisation is inside the model.
{silence}
`stillhouse corpus features CORPUS FEATURES --encoder MODEL --layer {s["layer"]}` computes them, and so does
`stillhouse.extract.speech.encoder.load_encoder(MODEL).states(samples, [{s["layer"]}])` in Python.
{"" if inputs is None else _graph_text(s, inputs)}"""


def _graph_text(settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """How to run the frontend graph."""
    last = {
        "whisper": (
            "The extractor\ngets padding=False, so that it does not fill 30 s. Leave out the last states, which belong "
            "to the half\nsecond of silence: 25 at 50 states a second."
        ),
        "parakeet_encoder": "Leave out states beyond the audio, which the mask's zeros give.",
    }.get(settings["architecture"], "All states belong to the audio.")
    names = ", ".join(f"`{name}`" for name in inputs)
    return f"""
The graph `frontend` takes one utterance. Its inputs, {names}, are what the encoder's feature extractor
(`AutoFeatureExtractor` of transformers) returns for the audio. The extractor is not part of the graph.

The output `features` [1, T, {settings["bins"]}] goes into `x` of the graph `encoder`, rounded to float16. {last}
"""
