"""diffusers' Qwen-Image pipelines around their model: prompts and images to embeddings."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from parity.reference.outputs import VERSION
from parity.reference.refusals import NotThereError

try:
    import diffusers
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
    from diffusers.utils import logging

    PIPELINES = {
        "text_to_image": diffusers.QwenImagePipeline,
        "edit": diffusers.QwenImageEditPipeline,
        "edit_plus": diffusers.QwenImageEditPlusPipeline,
    }
    OTHERS = {  # that encode prompts as one of these
        diffusers.QwenImageImg2ImgPipeline: "text_to_image",
        diffusers.QwenImageInpaintPipeline: "text_to_image",
        diffusers.QwenImageControlNetPipeline: "text_to_image",
        diffusers.QwenImageControlNetInpaintPipeline: "text_to_image",
        diffusers.QwenImageLayeredPipeline: "text_to_image",
        diffusers.QwenImageEditInpaintPipeline: "edit",
    }
except (ImportError, RuntimeError):  # diffusers asks for a newer transformers
    PIPELINES, OTHERS, AREAS = {}, {}, {}
else:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AREAS = {"edit": 1024 * 1024, "edit_plus": edit_plus.CONDITION_IMAGE_SIZE}


class TypedTextEncoder(nn.Module):
    """Their model, told which tokens are images: the pipelines do not say (diffusers#14194)."""

    dtype = torch.float32

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.model, self.device = model, model.device

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        """Run their model."""
        if kwargs.get("image_grid_thw") is not None and not VERSION.startswith("4."):
            is_image = input_ids == self.model.config.image_token_id
            kwargs["mm_token_type_ids"] = is_image.int()
        return self.model(input_ids=input_ids, **kwargs)


def pipeline(task: str, text_encoder: nn.Module, processor: Any) -> Any:
    """The pipeline of a task with this text encoder, and neither transformer nor VAE.

    Raises:
        NotThereError: if diffusers is not here, or does not go with this transformers.
    """
    if not PIPELINES:
        raise NotThereError("no diffusers that goes with this transformers")
    return made(PIPELINES[task], text_encoder, processor)


def made(kind: Any, text_encoder: nn.Module, processor: Any) -> Any:
    """A pipeline of any kind, likewise."""
    names = inspect.signature(kind.__init__).parameters.keys() - {"self"}
    own = {
        "text_encoder": text_encoder,
        "tokenizer": processor.tokenizer,
        "processor": processor,
    }
    return kind(**{name: own.get(name) for name in names})


@torch.no_grad()
def prompt_embeds(
    pipe: Any, prompts: Sequence[str], images: Sequence[Image.Image] = (), **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """What a pipeline's `encode_prompt` returns; its mask is None where all tokens are real."""
    if images:
        several = type(pipe) is PIPELINES["edit_plus"]
        kwargs["image"] = list(images) if several else images[0]
    embeds, mask = pipe.encode_prompt(list(prompts), **kwargs)
    return embeds, torch.ones(embeds.shape[:2], dtype=torch.long) if mask is None else mask


def condition_image(pipe: Any, task: str, image: Image.Image) -> Image.Image:
    """An image as the pipeline's `__call__` resizes it for the text encoder."""
    width, height = edit_plus.calculate_dimensions(AREAS[task], image.width / image.height)
    return pipe.image_processor.resize(image, height, width)


def whole_pipeline(task: str, text_encoder: nn.Module, processor: Any, width: int) -> Any:
    """The pipeline of a task with everything in it, of random weights and a few channels.

    Args:
        task: a task of `pipeline`
        text_encoder: whose embeddings have this width
        processor: with the tokenizer
        width: of the embeddings
    """
    pipe = pipeline(task, text_encoder, processor)
    torch.manual_seed(0)
    transformer: Any = diffusers.QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 6, 6),
    )
    vae: Any = diffusers.AutoencoderKLQwenImage(base_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02
    )
    parts = {"transformer": transformer.eval(), "vae": vae.eval(), "scheduler": scheduler}
    return type(pipe)(**{**pipe.components, **parts})
