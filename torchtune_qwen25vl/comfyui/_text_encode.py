"""The node that embeds a prompt."""

from typing import Any, get_args

from torch import Tensor

from torchtune_qwen25vl.comfyui._conditioning import Conditioning, make_conditioning
from torchtune_qwen25vl.comfyui._host import ManagedEncoder, progress
from torchtune_qwen25vl.comfyui._images import all_images, reference_latent
from torchtune_qwen25vl.comfyui._loader import CATEGORY, ENCODER
from torchtune_qwen25vl.conditioning import Task


class TextEncode:
    """Embed a prompt for Qwen-Image, with the images that it edits."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Say what the node takes."""
        task = (
            "text_to_image takes no images; edit one; edit_plus (Qwen-Image-Edit 2509 and 2511) "
            "any number."
        )
        resize = (
            "Bring images to the area that Qwen's pipelines use: 1024 * 1024 pixels for edit, "
            "384 * 384 for edit_plus, and 1024 * 1024 for the VAE. Without it they are taken as "
            "they are."
        )
        images = "Each image of a batch is an image of the prompt."
        vae = "Encodes the images as reference latents, which an edit needs."
        return {
            "required": {
                "encoder": (ENCODER,),
                "prompt": ("STRING", {"multiline": True, "dynamicPrompts": True}),
                "task": (list(get_args(Task)), {"tooltip": task}),
                "resize": ("BOOLEAN", {"default": True, "tooltip": resize}),
            },
            "optional": {
                "vae": ("VAE", {"tooltip": vae}),
                "images": ("IMAGE", {"tooltip": images}),
                "images_2": ("IMAGE", {"tooltip": f"Images of another size. {images}"}),
                "images_3": ("IMAGE", {"tooltip": f"Images of another size. {images}"}),
            },
        }

    def encode(
        self,
        encoder: ManagedEncoder,
        prompt: str,
        task: Task,
        resize: bool,
        vae: Any = None,
        images: Tensor | None = None,
        images_2: Tensor | None = None,
        images_3: Tensor | None = None,
    ) -> tuple[Conditioning]:
        """Embed it; the encoder comes first, so that it may leave memory to the VAE."""
        shown = all_images((images, images_2, images_3))
        encoded = shown if vae is not None else []
        set_progress = progress(1 + len(encoded))
        embeds, mask = encoder.ready()(prompt, shown, task=task, resize=resize)
        latents = []
        for done, image in enumerate(encoded, 1):
            set_progress(done)
            latents.append(reference_latent(vae, image, resize=resize))
        set_progress(1 + len(encoded))
        return (make_conditioning(embeds, mask, latents),)
