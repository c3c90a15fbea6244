"""Qwen2.5-VL as a torchtune TransformerDecoder that has a vision encoder.

Shapes: b batch, s sequence, d width, v vocabulary, p patches, i images and videos, m merged units
(one per placeholder), h_d head dim.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune import modules
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from torchtune_qwen25vl.model._encoder import VisionEncoder
from torchtune_qwen25vl.model._positional_embeddings import MultimodalRotaryEmbedding

EncoderInput = Mapping[str, Mapping[str, Tensor]]


class RMSNorm(modules.RMSNorm):
    """torchtune's norm, rounded once.

    fp32 within and rounded at the end, as in torchtune 0.6.1; Hugging Face and torchtune's
    development version also round before the scale, which makes the bf16 error a third larger.
    torch does the upcast itself: handed fp32 and a bf16 scale, it warns and its fused kernel is
    lost.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.scale, self.eps)


class TiedEmbedding(nn.Embedding):
    """Embedding whose weight, [v, d], is the output projection too.

    Autograd would hold a gradient of that size for each of the two and then add them. The rows that
    were looked up can be added to `weight.grad` instead, where the output's gradient is by then.

    Attributes:
        adds_gradient: do that; needs a loss that gives the output a gradient, and `backward()`
    """

    adds_gradient = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int [b, s], to [b, s, d]."""
        if not (self.adds_gradient and self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(tokens)
        rows, inverse = tokens.unique(return_inverse=True)
        leaf = self.weight.detach()[rows].requires_grad_()  # [rows, d]

        def add(leaf: Tensor) -> None:
            assert leaf.grad is not None
            assert self.weight.grad is not None
            self.weight.grad.index_add_(0, rows, leaf.grad)
            leaf.grad = None

        leaf.register_post_accumulate_grad_hook(add)
        return F.embedding(inverse, leaf)


class DecoderLayer(TransformerSelfAttentionLayer):
    """torchtune's pre-norm layer, whose MLP can leave out tokens that nobody asks for."""

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        output_mask: Tensor | None = None,
    ) -> Tensor:
        """Transform [b, s, d]; with an output mask, bool [b, s], to the n wanted, [n, d]."""
        h = self.sa_norm(x)
        x = x + self.attn(h, h, mask=mask, input_pos=input_pos)
        x = x if output_mask is None else x[output_mask]
        return x + self.mlp(self.mlp_norm(x))


class Qwen25VL(TransformerDecoder):
    """Decoder in whose stream embeddings of images and videos take the place of placeholders.

    Everything torchtune expects of a `TransformerDecoder` is where it expects it; the encoder is
    the submodule `vision`. The model computes no positions and remembers nothing between calls
    but torchtune's key-value caches.

    Args:
        vision: encoder of images and videos
        tok_embeddings: v tokens to width d
        layers: decoder layers whose attention uses `pos_embeddings`
        pos_embeddings: multimodal rotary embedding, shared by all layers
        norm: final norm
        output: projection to the vocabulary, or `TiedLinear`
        image_token_id: placeholder of images
        video_token_id: placeholder of videos
        max_seq_len: longest sequence accepted and default length of caches
        num_heads: query heads
        head_dim: h_d
        output_hidden_states: layers before which to keep the hidden state; the number of layers
            itself keeps what the last one returns
    """

    def __init__(
        self,
        *,
        vision: VisionEncoder,
        tok_embeddings: nn.Embedding,
        layers: Sequence[TransformerSelfAttentionLayer],
        pos_embeddings: MultimodalRotaryEmbedding,
        norm: nn.Module,
        output: Any,
        image_token_id: int,
        video_token_id: int,
        max_seq_len: int,
        num_heads: int,
        head_dim: int,
        output_hidden_states: list[int] | None = None,
    ) -> None:
        super().__init__(
            tok_embeddings=tok_embeddings,
            layers=list(layers),
            max_seq_len=max_seq_len,
            num_heads=num_heads,
            head_dim=head_dim,
            norm=norm,
            output=output,
            output_hidden_states=output_hidden_states,
        )
        self.vision = vision
        self.pos_embeddings = pos_embeddings
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.skip_output_layer = False  # torchtune 0.6.1 has no such switch yet

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        encoder_input: EncoderInput | None = None,
        input_pos: Tensor | None = None,
        output_mask: Tensor | None = None,
    ) -> Tensor | list[Any]:
        """Compute logits.

        Args:
            tokens: int [b, s]
            mask: True where a token (row) may attend, bool [b, s, s], or [b, s, cache length] with
                caches; None is causal
            encoder_input: `{"vision": {"pixel_values": [p, patch_dim], "grid_thw": int [i, 3]}}`,
                the images and videos of all rows in the order of their placeholders
            input_pos: int [b, s, 3], axes t, h, w; for text also as in
                `MultimodalRotaryEmbedding.rotation`
            output_mask: the tokens whose logits are wanted, bool [b, s]; None is all

        Returns:
            fp32 [b, s, v], or [n, v] of the n tokens wanted; a list of chunks of it after
            `set_num_output_chunks`; normed hidden states [..., d] with `skip_output_layer`. With
            `output_hidden_states`, the list of those states followed by this.

        Raises:
            ValueError: if placeholders and embeddings do not match in number, media come without
                positions on three axes, or caches without mask or positions.
        """
        self._check(tokens, mask, encoder_input, input_pos)
        h = self._embed(tokens, encoder_input)  # [b, s, d]
        rotation = self.pos_embeddings.rotation(input_pos, tokens.shape)  # [b or 1, s, 2, h_d]
        hidden = []
        wants_last = len(self.layers) in self.output_hidden_states
        for index, layer in enumerate(self.layers):
            if index in self.output_hidden_states:
                hidden.append(h)
            is_trimmed = index == len(self.layers) - 1 and not wants_last
            wanted = output_mask if is_trimmed else None
            h = layer(h, mask=mask, input_pos=rotation, output_mask=wanted)
        if wants_last:
            hidden.append(h)
            h = h if output_mask is None else h[output_mask]
        output = self.unembed(h)
        return [*hidden, output] if hidden else output

    def unembed(self, h: Tensor) -> Tensor | list[Tensor]:
        """Norm and project hidden states [..., d]; see `forward` for what may be returned."""
        return self.norm(h) if self.skip_output_layer else super().unembed(h)

    def _embed(self, tokens: Tensor, encoder_input: EncoderInput | None) -> Tensor:
        h = self.tok_embeddings(tokens)  # [b, s, d]
        if encoder_input is None:
            # A token just generated may be anything, and asking the device would stall decoding.
            if tokens.shape[1] > 1:
                self._check_count(int(self._placeholders(tokens).sum()), 0)
            return h + self._absent_media(h.device) if self._is_collective() else h
        placeholders = self._placeholders(tokens)
        count = int(placeholders.sum())  # asked here: later the host would wait for the encoder
        vision_embeds = self.vision(**encoder_input["vision"])  # [m, d]
        self._check_count(count, len(vision_embeds))
        return h.masked_scatter(placeholders.unsqueeze(-1), vision_embeds.to(h.dtype))

    def _placeholders(self, tokens: Tensor) -> Tensor:
        return (tokens == self.image_token_id) | (tokens == self.video_token_id)  # [b, s]

    def _is_collective(self) -> bool:
        """Whether other ranks may be encoding images while this one has none."""
        return self.training or isinstance(self, FSDPModule)

    def _absent_media(self, device: torch.device) -> Tensor:
        """Zero that has been through the encoder: one unit of grey patches.

        A rank that skipped the encoder would leave the others waiting in its collectives.
        """
        merge = self.vision.spatial_merge_size
        patch_dim = self.vision.patch_embed.proj.in_features
        pixel_values = torch.zeros(merge**2, patch_dim, device=device)
        return 0.0 * self.vision(pixel_values, torch.tensor([[1, merge, merge]])).sum()

    def _check_count(self, placeholders: int, embeddings: int) -> None:
        if placeholders != embeddings:
            raise ValueError(
                f"tokens hold {placeholders} placeholders (id {self.image_token_id} or "
                f"{self.video_token_id}) but the encoder returned {embeddings} embeddings; was the "
                "prompt cut inside an image, or encoder_input left out?"
            )

    def _check(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        encoder_input: EncoderInput | None,
        input_pos: Tensor | None,
    ) -> None:
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"tokens must not be longer than max_seq_len, got {tokens.shape[1]} > "
                f"{self.max_seq_len}; shorten the sample or build the model with a larger one"
            )
        if encoder_input is not None and (input_pos is None or input_pos.ndim != 3):
            raise ValueError(
                "images and videos need positions on three axes, input_pos [b, s, 3], got "
                f"{None if input_pos is None else list(input_pos.shape)}; see mrope_position_ids"
            )
        if self.caches_are_setup() and (mask is None or input_pos is None):
            raise ValueError(
                "with caches set up, attention is no longer causal by itself and a position can no "
                "longer be told from the index; pass mask and input_pos"
            )
