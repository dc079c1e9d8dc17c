"""Evaluation of encoders; importing this registers the protocols."""

from smalti.evaluation import protocols as protocols
