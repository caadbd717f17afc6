"""Data sets of tasks: every item is a whole meta-batch, ready for `maml(*episode)`."""

from fastmeta.data.episodes import Episodes
from fastmeta.data.meta_batches import Episode
from fastmeta.data.mini_imagenet import MiniImageNet
from fastmeta.data.omniglot import Omniglot
from fastmeta.data.sinusoid import Sinusoid

__all__ = ["Episode", "Episodes", "MiniImageNet", "Omniglot", "Sinusoid"]
