"fastai's collaborative filtering, finished: learners, callbacks and tools for embeddings and recommenders"
__version__ = "0.0.1"

import sys as _sys,warnings as _warnings

with _warnings.catch_warnings(): # torch warns of `torch.jit.script`, which fastai uses as it is imported
    _warnings.filterwarnings('ignore', '`torch.jit.script', FutureWarning)
    import fastai.layers as _layers

from .core import *
from .sources import *
from .ids import *
from .data import *
from .embed import *
from .models import *
from .losses import *
from .negatives import *
from .closed import *
from .graph import *
from .loop import *
from .capture import *
from .rows import *
from .factors import *
from .learner import *
from .callbacks import *
from .views import *
from .averaging import *
from .preds import *
from .metrics import *
from .recommend import *
from .lists import *
from .newcomers import *
from .evaluation import *
from .sides import *
from .tuning import *
from .maps import *
from .interpret import *
from .blend import *
from .tables import *
from .features import *
from .bundle import *
from .merged import *
from .folds import *
from .ensemble import *
from .stacked import *
from .many import *
from .seq_data import *
from .seq_models import *
from .sequence import *

__all__ = [n for k,m in list(_sys.modules.items()) if k.startswith('cfext.') for n in m.__all__]
