"""The model card of an export, and the format of its input in words, for the terminal, the card and files' metadata."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from smalti.models.encoder import Encoder
from smalti.models.licences import HUB_NAMES

CARD = "README.md"
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}
"""Format of an export -> the hub's name of the library that loads it."""
Input = Literal["normalized", "unit"]
"""Input of a model: normalised images, or pixels in 0..1."""


@dataclass(frozen=True)
class Provenance:
    """Where an encoder comes from, for its card."""

    lines: tuple[str, ...] = ()
    """Training, data, licence and measured gain, one line of Markdown each."""
    licence: str | None = None
    """Licence of the start weights; None: not known, or there are none."""
    base_model: str | None = None
    """Start weights by their name on the Hugging Face hub; None: they are not from there."""
    method: str | None = None
    """The method that trained it."""
    repository: str | None = None
    """``OWNER/NAME`` on the hub to which the export is uploaded; None: it isn't."""


def front_matter(to: str, provenance: Provenance) -> dict[str, Any]:
    """What the hub reads of a card: licence, library, tags, base model.

    Args:
        to: format of the export, a key of :data:`LIBRARIES`.
        provenance: of the encoder.
    """
    licence = provenance.licence
    own: dict[str, Any] = {}
    if licence is not None:
        known = licence.lower() in HUB_NAMES
        own = {"license": licence.lower()} if known else {"license": "other", "license_name": licence}
    tags = ["smalti", "vision-transformer", "self-supervised-learning", provenance.method]
    return {
        **own,
        "library_name": LIBRARIES[to],
        "pipeline_tag": "image-feature-extraction",
        "tags": [tag for tag in tags if tag],
        **({"base_model": provenance.base_model} if provenance.base_model else {}),
    }


def input_words(encoder: Encoder, input: Input) -> str:
    """Channels, range, mean and std of a model's input, in one line."""
    if encoder.takes_signals:
        return "float32 windows of signals, not normalised"
    mean, std = (numbers(values) for values in (encoder.mean, encoder.std))
    channels = "RGB" if encoder.in_chans == 3 else f"{encoder.in_chans} channels"
    if input == "unit":
        return f"float32, {channels}, in 0..1; the model itself subtracts mean {mean} and divides by std {std}"
    return f"float32, {channels}, normalised: (pixels in 0..1 - mean) / std, with mean {mean}, std {std}"


def input_metadata(encoder: Encoder, input: Input) -> dict[str, str]:
    """Entries of a file's metadata: ``input``, ``range``, ``mean`` and ``std``."""
    return {
        "input": input,
        "range": input_words(encoder, input),
        "mean": numbers(encoder.mean),
        "std": numbers(encoder.std),
    }


def numbers(values: Sequence[float]) -> str:
    """Numbers without trailing zeros."""
    return f"({', '.join(f'{value:g}' for value in values)})"


def model_card(
    encoder: Encoder, to: str, input: Input, size: tuple[int, int], usage: str, provenance: Provenance
) -> str:
    """README of a folder of exported files, with the front matter that the Hugging Face hub reads.

    Args:
        encoder: the exported encoder.
        to: format, a key of :data:`LIBRARIES`.
        input: input of the files.
        size: height and width of the images in pixels.
        usage: code that loads them.
        provenance: of the encoder; without lines, the card names the files that it was loaded from.
    """
    height, width = size
    patch = "x".join(map(str, encoder.patch_size))
    lines = "".join(f"- {line}\n" for line in provenance.lines)
    origin = "" if lines else f" from: {encoder.source or 'weights as given'}"
    return f"""---
{yaml.safe_dump(front_matter(to, provenance), sort_keys=False)}---

# {encoder.name}

Depth {encoder.depth}, width {encoder.embed_dim}, patches of {patch} pixels. Exported by Smalti{origin}.

**Input**: (B, {encoder.in_chans}, {height}, {width}), {input_words(encoder, input)}.
Input in another format gives wrong features without an error.

```python
{usage}
```
{f"{chr(10)}## Provenance{chr(10)}{chr(10)}{lines}" if lines else ""}"""
