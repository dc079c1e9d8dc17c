"""Input format of an exported model, in words for the terminal, the model card and the files' metadata."""

from collections.abc import Sequence
from typing import Literal

from smalti.models.encoder import Encoder

CARD = "README.md"
Input = Literal["normalized", "unit"]
"""Input of a model: normalised images, or pixels in 0..1."""


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


def model_card(encoder: Encoder, input: Input, size: tuple[int, int], usage: str, history: Sequence[str] = ()) -> str:
    """README of a folder of exported files.

    Args:
        encoder: the exported encoder.
        input: input of the files.
        size: height and width of the images in pixels.
        usage: code that loads them.
        history: lines about training, data, licence and measured gain.
    """
    height, width = size
    patch = "x".join(map(str, encoder.patch_size))
    provenance = "".join(f"- {line}\n" for line in history)
    return f"""# {encoder.name}

Depth {encoder.depth}, width {encoder.embed_dim}, patches of {patch} pixels. Exported by Smalti from:
{encoder.source or "weights as given"}.

**Input**: (B, {encoder.in_chans}, {height}, {width}), {input_words(encoder, input)}.
Input in another format gives wrong features without an error.

```python
{usage}
```
{f"{chr(10)}## Provenance{chr(10)}{chr(10)}{provenance}" if provenance else ""}"""
