"""Scenes, class folders and small encoders of the evaluation's tests."""

from evaluation.conftest import greys as greys
from evaluation.conftest import scenes as scenes
