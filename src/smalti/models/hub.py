"""The Hugging Face hub, where it can be reached."""

import contextlib
import socket
import urllib.parse
from collections.abc import Iterator

import huggingface_hub


@contextlib.contextmanager
def hub_cache_only_when_unreachable() -> Iterator[None]:
    """Use only the hub's cache if its host name can't be resolved: its client would retry for a minute."""
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
