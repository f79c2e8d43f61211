"""What was trained, in use: predictions, vectors, generated text, search."""

from .adapter import Adapter, load
from .index import Hit, Index

__all__ = ["Adapter", "Hit", "Index", "load"]
