"""OpenCV's decoder, without its own messages about damaged files."""

import cv2
import numpy as np


def imdecode(data: bytes, flags: int) -> np.ndarray | None:
    """``cv2.imdecode``, silent: a damaged file becomes our error with the file's name.

    The log level of OpenCV is the host program's again afterwards.

    Args:
        data: a file.
        flags: of ``cv2.imdecode``.

    Returns:
        The image as OpenCV gives it; None if it can't be decoded.
    """
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        return image
    except cv2.error:  # impossible numbers in a header
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)
