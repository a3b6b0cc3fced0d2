"""Operations as functions; the plain-torch form of each is the CPU path and the oracle of every faster one.

| file | what it is |
|---|---|
| lora_linear | one linear, differentiated by torch itself |
| operator | several linears of one input as one operator: its function, schema, fake and registered gradients |
| autograd | the same for eager calls, past the operator's dispatch |
| call | the value that all of these take |
| dispatch, plan | who computes a call; on what each of its products runs, and why |
| reference, launch | the computation in plain torch, and with the kernels |
| library | how an operator is told to torch |
| recompute, philox | an input made again; a dropout mask made again |
| frozen_linear, dequantize | the product with a quantized weight; its dense form |
| prompt_attention | the gated attention to learned prompts, beside a model's own |
| scale, row_norms | an output scale; the norms of the rows that DoRA divides by |
| rehearsal | what stands for the kernels where a step is only rehearsed, on the meta device |
| offload | checkpoints in pinned host memory, for `prepare` |
"""

from .lora_linear import add_updates_ as add_updates_
from .lora_linear import as_dtype as as_dtype
from .lora_linear import lora_linear as lora_linear
from .lora_linear import low_rank_product as low_rank_product
from .lora_linear import summed_bias as summed_bias
from .prompt_attention import add_prompt_attention as add_prompt_attention
from .scale import scale_output as scale_output
