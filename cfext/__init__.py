"fastai's collaborative filtering, finished: learners, callbacks and tools for embeddings and recommenders"
__version__ = "0.0.1"

from . import core
from .core import *

__all__ = [*core.__all__]
