"fastai's collaborative filtering, finished: learners, callbacks and tools for embeddings and recommenders"
__version__ = "0.0.1"

from . import core,sources,data,embed,models,learner,metrics,recommend,bundle
from .core import *
from .sources import *
from .data import *
from .embed import *
from .models import *
from .learner import *
from .metrics import *
from .recommend import *
from .bundle import *

__all__ = [n for m in (core,sources,data,embed,models,learner,metrics,recommend,bundle) for n in m.__all__]
