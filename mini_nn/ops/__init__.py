"""The primitives, under NumPy's names and signatures; deep-learning ones under torch's."""

from . import methods
from .activation import *
from .attention import *
from .conv import *
from .elementwise import *
from .fused import *
from .index import *
from .linalg import *
from .pooling import *
from .products import *
from .reduce import *
from .shape import *

methods.graft()
