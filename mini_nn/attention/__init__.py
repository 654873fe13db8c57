"""Attention: what may stand in the place of the softmax, and what the softmax itself is made of.

One family is one file, and all are called alike: see ``arguments``.
"""

from .chunked import *
from .cost import *
from .decay import *
from .delta import *
from .delta_chunks import *
from .delta_layers import *
from .efficient import *
from .feature_maps import *
from .funnel import *
from .gated_delta import *
from .generalized import *
from .linear import *
from .linformer import *
from .longformer import *
from .lsh import *
from .mesa import *
from .nystrom import *
from .path import *
from .patterns import *
from .performer import *
from .performer_layer import *
from .power_bert import *
from .random_features import *
from .random_matrix import *
from .retention import *
from .scale import *
from .scan import *
from .short_conv import *
from .softmax import *
from .sparse import *
from .strided_ff import *
from .taylor import *
from .topk import *
