"""Operations as functions; the plain-torch form of each is the CPU path and the oracle of every faster one."""

from .lora_linear import add_updates_ as add_updates_
from .lora_linear import as_dtype as as_dtype
from .lora_linear import lora_linear as lora_linear
from .lora_linear import summed_bias as summed_bias
from .low_rank import low_rank_product as low_rank_product
from .row_norms import row_norms as row_norms
from .scale import scale_output as scale_output
