"""Colours for classes that are distinguishable, also for colour-blind people.

Sources: Okabe & Ito, "Color Universal Design", 2008 (the first eight); Viénot, Brettel & Mollon, "Digital video
colourmaps for checking the legibility of displays by dichromats", Color Res. Appl. 24(4), 1999 (simulation of two kinds
of colour blindness); CIE 1976 L*a*b* for distances.
Letters: K colours.
"""

import functools

import numpy as np

OKABE_ITO = (
    (70, 70, 70),  # instead of black, which would be invisible on dark pictures
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
"""The first is for the background, usually class 0."""
_EYES = (
    np.eye(3),
    np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),  # protanopes, linear RGB
    np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),  # deuteranopes
)
_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
_WHITE = _TO_XYZ.sum(1)


@functools.cache
def palette(num_classes: int) -> np.ndarray:
    """``(K, 3)`` uint8 sRGB colours, read-only: those of Okabe and Ito, then each farthest from all before it.

    The distance is the smallest L*a*b* distance over normal vision, protanopia and deuteranopia. More than about a
    dozen colours can't be distinguished at a glance; add labels.
    """
    chosen = [np.array(colour) for colour in OKABE_ITO[:num_classes]]
    if num_classes > len(OKABE_ITO):
        levels = np.linspace(0, 255, 11).round().astype(int)
        cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
        lightness = seen(cube)[0][:, 0]
        cube = cube[(lightness > 25) & (lightness < 92)]  # neither black nor white, which are common in pictures
        views = seen(cube)
        nearest = np.full(len(cube), np.inf)
        for number in range(num_classes):
            if number >= len(chosen):
                chosen.append(cube[nearest.argmax()])
            newest = seen(chosen[number][None])
            nearest = np.minimum(nearest, np.linalg.norm(views - newest, axis=-1).min(0))
    colours = np.stack(chosen).astype(np.uint8) if chosen else np.zeros((0, 3), np.uint8)
    colours.flags.writeable = False
    return colours


def seen(colours: np.ndarray) -> np.ndarray:
    """``(3, K, 3)`` L*a*b* of ``(K, 3)`` sRGB colours 0..255: for normal vision, protanopia and deuteranopia."""
    scaled = np.asarray(colours, dtype=np.float64) / 255
    linear = np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)
    xyz = np.stack([(linear @ eye.T).clip(0, 1) @ _TO_XYZ.T for eye in _EYES]) / _WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
