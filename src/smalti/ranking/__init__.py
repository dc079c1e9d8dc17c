"""Patch orders of images: compute, store, score, and compare them with image-independent orders."""
