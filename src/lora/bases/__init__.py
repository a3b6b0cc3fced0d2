"""The frozen weight of a layer: what each format answers, one file a format, and the table of them."""

from .dense import Dense, Transposed
from .eight_bit import EightBit
from .four_bit import FourBit
from .weight import register

for kind in (Dense, Transposed, FourBit, EightBit):
    register(kind)
