"""The frozen weight of a layer: what each format answers, one file a format, and the table of them."""

from .dense import Dense as Dense
from .dense import Table as Table
from .dense import Transposed as Transposed
from .eight_bit import EightBit as EightBit
from .four_bit import FourBit as FourBit
from .model import allow_training as allow_training
from .model import forget_quantization as forget_quantization
from .model import into_names as into_names
from .model import loadable as loadable
from .model import saved_as as saved_as
from .others import TO_SKIP as TO_SKIP
from .others import other_quantizer as other_quantizer
from .weight import FrozenWeight as FrozenWeight
from .weight import Quantized as Quantized
from .weight import Stored as Stored
from .weight import is_quantized as is_quantized
from .weight import keeps_forward as keeps_forward
from .weight import kinds as kinds
from .weight import register as register
from .weight import supported as supported
from .weight import unregister as unregister
from .weight import weight_kind as weight_kind
from .weight import weight_of as weight_of

for kind in (Dense, Table, Transposed, FourBit, EightBit):
    register(kind)
