"""Decoding leaves the host program's OpenCV as it was and prints nothing."""

import subprocess
import sys

import cv2
import numpy as np

from smalti.data.images.opencv import imdecode


def test_an_image_is_decoded_as_opencv_does() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = cv2.imencode(".png", pixels)[1].tobytes()
    assert np.array_equal(imdecode(data, cv2.IMREAD_UNCHANGED), pixels)


def test_damaged_files_are_none_and_the_log_level_stays(capfd) -> None:
    before = cv2.utils.logging.getLogLevel()
    data = cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes()
    for damaged in (b"no image", data[:40]):
        assert imdecode(damaged, cv2.IMREAD_UNCHANGED) is None
    assert cv2.utils.logging.getLogLevel() == before
    assert capfd.readouterr().err == ""


def test_importing_smalti_leaves_the_threads_of_opencv() -> None:
    code = (
        "import cv2; cv2.setNumThreads(2); level = cv2.utils.logging.getLogLevel()\n"
        "import smalti.runs.train\n"
        "print(cv2.getNumThreads() == 2, cv2.utils.logging.getLogLevel() == level)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
