"""The frozen weight of a layer: what each format answers, one file a format, and the table of them."""

from .dense import Dense as Dense
from .dense import Table, Transposed
from .eight_bit import EightBit
from .four_bit import FourBit
from .offloaded import brought as brought
from .offloaded import offload_of as offload_of
from .others import TO_SKIP as TO_SKIP
from .others import other_quantizer as other_quantizer
from .weight import FrozenWeight as FrozenWeight
from .weight import Quantized as Quantized
from .weight import Stored as Stored
from .weight import allow_training as allow_training
from .weight import forget_quantization as forget_quantization
from .weight import into_names as into_names
from .weight import is_quantized as is_quantized
from .weight import keeps_forward as keeps_forward
from .weight import loadable as loadable
from .weight import register as register
from .weight import saved_as as saved_as
from .weight import supported as supported
from .weight import touched as touched
from .weight import unregister as unregister
from .weight import weight_kind as weight_kind
from .weight import weight_of as weight_of

for kind in (Dense, Table, Transposed, FourBit, EightBit):
    register(kind)
