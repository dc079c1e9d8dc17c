"""Views of windows: channels dropped, amplitude changed."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from smalti.data.signals.signal_views import SignalViews
from smalti.errors import ConfigError


def test_views_drop_channels_and_scale_but_never_shift():
    window = np.random.default_rng(0).normal(size=(1, 400, 4)).astype(np.float32)
    views = SignalViews(channel_dropout=0.5, amplitude=(0.8, 1.2))
    dropped = 0
    for seed in range(200):
        crop = views(window, np.random.default_rng(seed)).crops[0][0]
        factors = (crop * window.astype(float)).sum((0, 1)) / (window.astype(float) ** 2).sum((0, 1))
        assert_allclose(crop, window * factors, atol=1e-5)  # each channel is itself times a number
        kept = factors[factors > 0]
        assert len(kept) >= 1 and kept.min() == pytest.approx(kept.max()) and 0.8 <= kept[0] <= 1.2
        dropped += 4 - len(kept)
    assert abs(dropped / 800 - 0.48) < 0.06


def test_views_refuse_numbers_outside_their_range():
    with pytest.raises(ConfigError, match="channel_dropout=1"):
        SignalViews(channel_dropout=1.0)
    with pytest.raises(ConfigError, match=r"amplitude=\[1.2, 0.8\]"):
        SignalViews(amplitude=(1.2, 0.8))
