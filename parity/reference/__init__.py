"""Theirs: everything the harness asks of Hugging Face transformers. Nothing else imports it."""

import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from parity.reference.models import (
    IDS,
    RANDOM_MODELS,
    config,
    config_dict,
    disk_state_dict,
    ids,
    in_two_precisions,
    load,
    load_model,
    model,
    random_model,
    randomise,
)
from parity.reference.outputs import (
    VERSION,
    answer,
    decoder_layers,
    encode,
    forward_kwargs,
    generate,
    greedy,
    linear_patch_embed,
    media_kwargs,
    patch_positions,
    positions,
    process_logits,
    since_4_52,
    step_loss,
    vision_layers,
    window_order,
)
from parity.reference.pipelines import (
    OTHERS,
    TypedTextEncoder,
    condition_image,
    made,
    pipeline,
    prompt_embeds,
    whole_pipeline,
)
from parity.reference.processors import (
    Qwen2VLImageProcessor,
    image_processor,
    processor,
    smart_resize,
    video_patches,
)
from parity.reference.refusals import NotThereError, RefusalError, ask
from parity.reference.sites import first_outputs, see, site_outputs

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

__all__ = [
    "IDS",
    "OTHERS",
    "RANDOM_MODELS",
    "VERSION",
    "NotThereError",
    "Qwen2VLImageProcessor",
    "Qwen2_5_VLConfig",
    "Qwen2_5_VLForConditionalGeneration",
    "RefusalError",
    "TypedTextEncoder",
    "answer",
    "ask",
    "condition_image",
    "config",
    "config_dict",
    "decoder_layers",
    "disk_state_dict",
    "encode",
    "first_outputs",
    "forward_kwargs",
    "generate",
    "greedy",
    "ids",
    "image_processor",
    "in_two_precisions",
    "linear_patch_embed",
    "load",
    "load_model",
    "made",
    "media_kwargs",
    "model",
    "patch_positions",
    "pipeline",
    "positions",
    "process_logits",
    "processor",
    "prompt_embeds",
    "random_model",
    "randomise",
    "see",
    "since_4_52",
    "site_outputs",
    "smart_resize",
    "step_loss",
    "video_patches",
    "vision_layers",
    "whole_pipeline",
    "window_order",
]
