"fastai's collaborative filtering, finished: learners, callbacks and tools for embeddings and recommenders"
__version__ = "0.0.1"

from . import (core,sources,data,embed,models,losses,negatives,closed,loop,
    learner,callbacks,views,averaging,preds,metrics,recommend,newcomers,maps,
    interpret,blend,tables,features,bundle,folds,ensemble,stacked,many,seq_data,seq_models,sequence)
from .core import *
from .sources import *
from .data import *
from .embed import *
from .models import *
from .losses import *
from .negatives import *
from .closed import *
from .loop import *
from .learner import *
from .callbacks import *
from .views import *
from .averaging import *
from .preds import *
from .metrics import *
from .recommend import *
from .newcomers import *
from .maps import *
from .interpret import *
from .blend import *
from .tables import *
from .features import *
from .bundle import *
from .folds import *
from .ensemble import *
from .stacked import *
from .many import *
from .seq_data import *
from .seq_models import *
from .sequence import *

_modules = (core,sources,data,embed,models,losses,negatives,closed,loop,
    learner,callbacks,views,averaging,preds,metrics,recommend,newcomers,maps,
    interpret,blend,tables,features,bundle,folds,ensemble,stacked,many,seq_data,seq_models,sequence)
__all__ = [n for m in _modules for n in m.__all__]
