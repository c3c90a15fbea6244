"""The model: vision encoder, decoder, builders, tuning, loss, parallelism.

Qwen25VL                decoder in whose stream embeddings of images and videos stand
qwen2_5_vl              build any size
part_of                 which part a parameter belongs to: vision, merger or decoder
qwen2_5_vl_3b           build 3B
qwen2_5_vl_7b           build 7B
qwen2_5_vl_32b          build 32B
qwen2_5_vl_72b          build 72B
lora_qwen2_5_vl_3b      build 3B with adapters
lora_qwen2_5_vl_7b      build 7B with adapters
lora_qwen2_5_vl_32b     build 32B with adapters
lora_qwen2_5_vl_72b     build 72B with adapters
qlora_qwen2_5_vl_3b     build 3B with adapters, the decoder in NF4
qlora_qwen2_5_vl_7b     build 7B with adapters, the decoder in NF4
qlora_qwen2_5_vl_32b    build 32B with adapters, the decoder in NF4
qlora_qwen2_5_vl_72b    build 72B with adapters, the decoder in NF4
qwen2_5_vl_from_config  build what a config.json describes
initializer_ranges      standard deviation of new weights that a config.json gives each part
Tuning                  which parts are trained, and how
LabelledRowsLoss        torchtune loss of logits of labelled rows
linear_cross_entropy    cross entropy that never holds all logits
labelled_cross_entropy  the same of rows that all have a label
linear_log_probs        log-probability of each label, likewise
linear_divergence       divergence from a teacher's predictions, likewise
Divergence              which one
tensor_parallel_plan    which linear layers are split over devices
Int4Linear              a layer of the decoder in int4, for inference
hold_in_int4            have the decoder's layers hold int4, before they are given their weights
multiplies_int4         whether torch multiplies in int4 on a device
pack                    pack weights for inference on a CPU by oneDNN
products_by             have a library multiply in training on a CPU
Library                 which one
product_dtype           dtype in which a product is computed, autocast or not
has_segment_kernel      whether torch has one kernel for all samples of a packed row
KeyValues               keys and values of one layer, which attention appends to
Observe                 is shown what stands at the sites of a model while a forward runs
"""

from torchtune_qwen25vl.model._attention import KeyValues
from torchtune_qwen25vl.model._autocast import product_dtype
from torchtune_qwen25vl.model._component_builders import part_of, qwen2_5_vl
from torchtune_qwen25vl.model._config import initializer_ranges
from torchtune_qwen25vl.model._decoder import Qwen25VL
from torchtune_qwen25vl.model._divergence import Divergence, linear_divergence
from torchtune_qwen25vl.model._int4 import Int4Linear, hold_in_int4, multiplies_int4
from torchtune_qwen25vl.model._log_probs import linear_log_probs
from torchtune_qwen25vl.model._loss import (
    LabelledRowsLoss,
    labelled_cross_entropy,
    linear_cross_entropy,
)
from torchtune_qwen25vl.model._model_builders import (
    lora_qwen2_5_vl_3b,
    lora_qwen2_5_vl_7b,
    lora_qwen2_5_vl_32b,
    lora_qwen2_5_vl_72b,
    qlora_qwen2_5_vl_3b,
    qlora_qwen2_5_vl_7b,
    qlora_qwen2_5_vl_32b,
    qlora_qwen2_5_vl_72b,
    qwen2_5_vl_3b,
    qwen2_5_vl_7b,
    qwen2_5_vl_32b,
    qwen2_5_vl_72b,
    qwen2_5_vl_from_config,
)
from torchtune_qwen25vl.model._observe import Observe
from torchtune_qwen25vl.model._packed import pack
from torchtune_qwen25vl.model._parallelism import tensor_parallel_plan
from torchtune_qwen25vl.model._products import Library, products_by
from torchtune_qwen25vl.model._segments import has_segment_kernel
from torchtune_qwen25vl.model._tuning import Tuning

__all__ = [
    "Divergence",
    "Int4Linear",
    "KeyValues",
    "LabelledRowsLoss",
    "Library",
    "Observe",
    "Qwen25VL",
    "Tuning",
    "has_segment_kernel",
    "hold_in_int4",
    "initializer_ranges",
    "labelled_cross_entropy",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_log_probs",
    "lora_qwen2_5_vl_3b",
    "lora_qwen2_5_vl_7b",
    "lora_qwen2_5_vl_32b",
    "lora_qwen2_5_vl_72b",
    "multiplies_int4",
    "pack",
    "part_of",
    "product_dtype",
    "products_by",
    "qlora_qwen2_5_vl_3b",
    "qlora_qwen2_5_vl_7b",
    "qlora_qwen2_5_vl_32b",
    "qlora_qwen2_5_vl_72b",
    "qwen2_5_vl",
    "qwen2_5_vl_3b",
    "qwen2_5_vl_7b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_72b",
    "qwen2_5_vl_from_config",
    "tensor_parallel_plan",
]
