"""Smalti: patch-level learning for vision transformers."""
