"""Operations as functions; the plain-torch form of each is the CPU path and the oracle of every faster one."""

from .lora_linear import lora_linear as lora_linear
from .lora_linear import summed_bias as summed_bias
from .low_rank import low_rank_product as low_rank_product
