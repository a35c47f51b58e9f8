"""RL post-training of language models with token credit: reward -> group advantage -> token credit -> update."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cepo")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0.0.0"
