"""Qwen2.5-VL for torchtune."""

from torchtune_qwen25vl._checkpointer import Qwen25VLCheckpointer
from torchtune_qwen25vl._collate import (
    packed_collate,
    packed_collate_labelled,
    padded_collate,
    padded_collate_labelled,
)
from torchtune_qwen25vl._component_builders import qwen2_5_vl
from torchtune_qwen25vl._convert_weights import hf_to_tune, tune_to_hf
from torchtune_qwen25vl._generation import Generation, PromptedModel, generate
from torchtune_qwen25vl._image_transform import Qwen25VLImageTransform, smart_resize
from torchtune_qwen25vl._linear import Tuning
from torchtune_qwen25vl._loss import LabelledRowsLoss, labelled_rows, linear_cross_entropy
from torchtune_qwen25vl._model import Qwen25VL
from torchtune_qwen25vl._model_builders import (
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
from torchtune_qwen25vl._parallelism import tensor_parallel_plan
from torchtune_qwen25vl._position_ids import mrope_position_ids
from torchtune_qwen25vl._pretrained import load_pretrained
from torchtune_qwen25vl._tokenizer import Qwen25VLTokenizer
from torchtune_qwen25vl._transform import Qwen25VLTransform, SkipSample
from torchtune_qwen25vl._video_transform import Qwen25VLVideoTransform

__all__ = [
    "Generation",
    "LabelledRowsLoss",
    "PromptedModel",
    "Qwen25VL",
    "Qwen25VLCheckpointer",
    "Qwen25VLImageTransform",
    "Qwen25VLTokenizer",
    "Qwen25VLTransform",
    "Qwen25VLVideoTransform",
    "SkipSample",
    "Tuning",
    "generate",
    "hf_to_tune",
    "labelled_rows",
    "linear_cross_entropy",
    "load_pretrained",
    "lora_qwen2_5_vl_3b",
    "lora_qwen2_5_vl_7b",
    "lora_qwen2_5_vl_32b",
    "lora_qwen2_5_vl_72b",
    "mrope_position_ids",
    "packed_collate",
    "packed_collate_labelled",
    "padded_collate",
    "padded_collate_labelled",
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
    "smart_resize",
    "tensor_parallel_plan",
    "tune_to_hf",
]
