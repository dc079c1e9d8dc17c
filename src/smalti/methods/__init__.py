"""One paper, one file. Importing this package fills the registry."""

from smalti.methods import dino, droppos, loca, mae, mp3, neco, part
from smalti.methods.base import Method, get_method, method_names

__all__ = ["Method", "dino", "droppos", "get_method", "loca", "mae", "method_names", "mp3", "neco", "part"]
