"""The model as `text_encoder=` of diffusers' Qwen-Image pipelines.

Shapes: b rows, s tokens, d width, p patches, i images, n tokens that are no padding.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

from torchtune_qwen25vl._position_ids import mrope_position_ids
from torchtune_qwen25vl.generation import Sampling, evaluating, generate
from torchtune_qwen25vl.model import Qwen25VL

STOP_TOKENS = [QWEN2_5_SPECIAL_TOKENS[name] for name in ("<|im_end|>", "<|endoftext|>")]


class EncoderOutput(NamedTuple):
    """What the pipelines read of a text encoder's output."""

    hidden_states: tuple[Tensor]  # of the last layer behind the final norm alone, [b, s, d]


class DiffusersTextEncoder(nn.Module):
    """The text encoder that QwenImage, Img2Img, Inpaint, ControlNet, Edit, EditPlus, Layered take.

    The pipelines ask transformers' model without the types of tokens from which transformers 5
    knows where images stand, and get positions on one axis for them (huggingface/diffusers, issue
    14194). This one reads where they stand from the tokens, so its positions are right.

    Args:
        model: Qwen25VL
        compat: "diffusers-1d" computes what the pipelines do around transformers 5: positions on
            one axis
        sampling: how `generate` chooses a token; greedy by default
    """

    def __init__(
        self,
        model: Qwen25VL,
        *,
        compat: Literal["qwen", "diffusers-1d"] = "qwen",
        sampling: Sampling | None = None,
    ) -> None:
        if compat not in ("qwen", "diffusers-1d"):
            raise ValueError(f"compat is 'qwen' or 'diffusers-1d', got {compat!r}")
        super().__init__()
        self.model, self.compat, self.sampling = model, compat, sampling or Sampling()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the hidden states."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        output_hidden_states: bool = True,
        mm_token_type_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """Encode prompts; the output layer and all other layers' states are left out.

        Args:
            input_ids: int [b, s]
            attention_mask: [b, s], 0 at padding, on either side
            pixel_values: patches of all images [p, patch_dim]
            image_grid_thw: their grids, [i, 3]
            output_hidden_states: must be asked for; nothing else is computed
            mm_token_type_ids: types of the tokens, not needed

        Returns:
            Hidden states of the last layer behind the final norm, zero at padding.

        Raises:
            ValueError: if hidden states are not asked for, or images do not match placeholders.
        """
        if not output_hidden_states:
            raise ValueError("the text encoder returns hidden states: pass output_hidden_states")
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = kept.bool()  # [b, s]
        positions = self._positions(input_ids, kept, image_grid_thw)  # [b, s, 3]
        lengths = kept.sum(-1).cpu()  # [b]
        with evaluating(self.model):
            hidden = self.model(
                input_ids[kept][None],  # [1, n]
                input_pos=positions[kept][None],
                encoder_input=_encoder_input(pixel_values, image_grid_thw),
                mask=lengths if len(lengths) > 1 else None,
                output="hidden",
            )[0]  # [n, d]
        states = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
        states[kept] = hidden
        return EncoderOutput((states,))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        *,
        max_new_tokens: int,
    ) -> Tensor:
        """Continue prompts, as Layered does for its captions.

        Args:
            input_ids: int [b, s]
            attention_mask: [b, s], 0 at padding, on the left
            pixel_values: as for `forward`
            image_grid_thw: likewise
            mm_token_type_ids: likewise
            max_new_tokens: length of the longest continuation

        Returns:
            Prompts and what follows, int64 [b, s + new].

        Raises:
            ValueError: if prompts are padded on the right, or the weights have no output layer.
        """
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = kept.bool()  # [b, s]
        s = input_ids.shape[1]
        causal = torch.ones(s, s, dtype=torch.bool, device=kept.device).tril()
        itself = torch.eye(s, dtype=torch.bool, device=kept.device)
        batch: dict[str, Any] = {
            "tokens": input_ids,
            "input_pos": self._positions(input_ids, kept, image_grid_thw),
            "mask": causal & kept[:, None] | itself,  # [b, s, s]
            "encoder_input": _encoder_input(pixel_values, image_grid_thw),
        }
        answer = generate(
            self.model,
            batch,
            max_new_tokens=max_new_tokens,
            stop_tokens=STOP_TOKENS,
            **self.sampling._asdict(),
        )
        return torch.cat((input_ids, answer.tokens), dim=1)

    def _positions(self, tokens: Tensor, kept: Tensor, grids: Tensor | None) -> Tensor:
        if self.compat == "diffusers-1d":
            counted = (kept.cumsum(-1) - 1).clamp(min=0)  # [b, s]
            return counted[..., None].expand(-1, -1, 3)
        return mrope_position_ids(
            tokens,
            grids,
            attention_mask=kept,
            image_token_id=self.model.image_token_id,
            video_token_id=self.model.video_token_id,
        )


def _encoder_input(
    pixel_values: Tensor | None, grids: Tensor | None
) -> dict[str, dict[str, Tensor]] | None:
    if pixel_values is None or grids is None:
        return None
    return {"vision": {"pixel_values": pixel_values, "grid_thw": grids}}
