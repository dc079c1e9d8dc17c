"""Settings for decoding image files: the input range, and the maximum number of pixels."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from smalti.config import build, field_names, settings
from smalti.errors import ConfigError

Range = tuple[float, float]


def ranges(scale: Range | tuple[Range, ...]) -> list[Range]:
    """One range, or one per channel, as a list."""
    return [one for one in (scale if isinstance(scale[0], tuple) else (scale,)) if isinstance(one, tuple)]


@settings
class PixelConfig:
    """Maximum image size and input range."""

    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Images with more pixels are refused before decoding, since a file of 2 kB can decode to gigabytes. The default
    admits a panorama of 26000x6800. Pixels with more than four channels count as several."""
    scale: Range | tuple[Range, ...] | None = None
    """Input range mapped to 0..1: one pair, or one per channel, such as [0, 4095] for 12-bit data in 16-bit files;
    values outside are clipped. None: 0..255 for 8-bit files, 0..65535 for unsigned 16-bit, 0..1 for floats."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: Range | tuple[Range, ...] | str | None) -> Range | tuple[Range, ...] | str | None:
        for one in [] if scale is None or isinstance(scale, str) else ranges(scale):
            if not one[0] < one[1]:
                raise ValueError(f"the lower end {one[0]:g} must be below the upper end {one[1]:g}")
        return scale

    @property
    def pixels(self) -> "PixelConfig":
        """Only these settings, without those of a subclass."""
        return PixelConfig(max_pixels=self.max_pixels, scale=self.scale)


NO_PIXELS = PixelConfig()
"""The defaults."""


def trained_pixels(tree: Mapping[str, Any]) -> PixelConfig:
    """How a run decodes its images, from the settings in its ``config.yaml``.

    Raises:
        ConfigError: if they can't be used.
    """
    data = tree.get("data")
    if isinstance(data, Mapping) and data.get("scale") == "percentiles":
        raise ConfigError("data.scale=percentiles is for training; give the range here: data.scale=[LOW,HIGH]")
    known = {name: data[name] for name in field_names(PixelConfig) if name in data} if isinstance(data, Mapping) else {}
    return build(PixelConfig, known, "config.yaml", group="data")
