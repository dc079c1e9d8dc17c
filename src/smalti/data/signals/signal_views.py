"""Views of windows of signals: channels dropped, amplitude changed."""

import numpy as np
from jaxtyping import Float

from smalti.data.views import SampleViews
from smalti.errors import ConfigError


class SignalViews:
    """Makes the views of a window: channels dropped, amplitude changed; nothing moves in time."""

    def __init__(self, channel_dropout: float = 0.1, amplitude: tuple[float, float] = (0.8, 1.2), count: int = 1):
        """
        Args:
            channel_dropout: chance that a channel is zero, in [0, 1); one channel at least stays.
            amplitude: smallest and largest factor, one draw for all channels.
            count: views of a window.

        Raises:
            ConfigError: for numbers outside their range.
        """
        if not 0 <= channel_dropout < 1:
            raise ConfigError(f"channel_dropout={channel_dropout:g}: a fraction in [0, 1) is needed")
        if not 0 < amplitude[0] <= amplitude[1]:
            raise ConfigError(f"amplitude={list(amplitude)}: 0 < smallest <= largest is needed")
        self.channel_dropout, self.amplitude, self.count = channel_dropout, amplitude, count

    @property
    def num_views(self) -> int:
        """Views of a window."""
        return self.count

    def __call__(self, image: Float[np.ndarray, "1 T C"], rng: np.random.Generator) -> SampleViews:
        """The views of one window.

        Args:
            image: from :meth:`SignalSet.read`.
            rng: source of all randomness.
        """
        _, samples, channels = image.shape
        crops = np.empty((self.count, *image.shape), np.float32)
        low, high = self.amplitude
        for view in crops:
            factor = low + (high - low) * rng.random()
            is_kept = np.greater_equal(rng.random(channels), self.channel_dropout)
            if not is_kept.any():
                is_kept[int(rng.random() * channels)] = True
            view[:] = image * (factor * is_kept).astype(np.float32)
        boxes = np.tile(np.array([0, 0, samples, 1], np.float32), (self.count, 1))
        return SampleViews((crops,), boxes, np.zeros(self.count, bool), (1, samples))
