"""Qwen2.5-VL as a torchtune TransformerDecoder that has a vision encoder.

Shapes: b batch, s sequence, d width, v vocabulary, p patches, i images and videos, m merged units
(one per placeholder), h_d head dim.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.model._attention import KeyValues, prepare
from torchtune_qwen25vl.model._decoder_layer import DecoderLayer
from torchtune_qwen25vl.model._embedding import TiedEmbedding
from torchtune_qwen25vl.model._encoder import VisionEncoder
from torchtune_qwen25vl.model._observe import Observe, shown
from torchtune_qwen25vl.model._positional_embeddings import MultimodalRotaryEmbedding

EncoderInput = Mapping[str, Mapping[str, Tensor]]
Output = Literal["recipe", "logits", "hidden", "vision"]


class Qwen25VL(TransformerDecoder):
    """Decoder in whose stream embeddings of images and videos take the place of placeholders.

    Everything torchtune expects of a `TransformerDecoder` is where it expects it; the encoder is
    the submodule `vision`. The model computes no positions and remembers nothing between calls
    but the key-value caches of torchtune's `setup_caches`.

    Args:
        vision: encoder of images and videos
        tok_embeddings: v tokens to width d
        layers: decoder layers
        pos_embeddings: multimodal rotary embedding, computed once for all layers
        norm: final norm
        output: projection to the vocabulary, or `TiedOutput`
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
        layers: Sequence[DecoderLayer],
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

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Any = None,
        encoder_input: EncoderInput | None = None,
        input_pos: Tensor | None = None,
        output_mask: Tensor | None = None,
        caches: Sequence[KeyValues] | None = None,
        output: Output = "recipe",
        add_to_grad: bool = False,
        encode_absent: bool | None = None,
        placeholder_rows: Tensor | None = None,
        vision_embeds: Tensor | None = None,
        image_index: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Any:
        """Compute logits.

        Args:
            tokens: int [b, s]
            mask: as in `DecoderAttention`; bool [b, s, s], or [b, s, cache length] with caches
            encoder_input: `{"vision": {"pixel_values": [p, patch_dim], "grid_thw": int [i, 3]}}`,
                the images and videos of all rows in the order of their placeholders
            input_pos: int [b, s, 3], axes t, h, w; for text also as in `MultimodalRotaryEmbedding`
            output_mask: the tokens whose logits are wanted, bool [b, s], or their indices among all
                b * s, int64 [n], for which no device has to be asked; None is all
            caches: keys and values of each layer, appended to; by default those of `setup_caches`
            output: "recipe" is what torchtune's recipes ask for by attributes, see below; "logits"
                and "hidden" are these alone; "vision" is what the encoder returns, and no more
            add_to_grad: see `TiedEmbedding`; without effect where the embedding is not tied
            encode_absent: send a grey unit through the encoder where a batch has no media. Ranks
                that share the encoder's collectives must all take part in them. By default a
                sharded model does so in every batch without media.
            placeholder_rows: the tokens that stand for images and videos, as indices among all
                b * s, int64 [m]; by default those with a placeholder's id, which the device has to
                be asked for. Generated tokens never do, whatever their ids.
            vision_embeds: what "vision" returned, [any, d], in place of `encoder_input`
            image_index: which of the embeddings stands at each placeholder, int [m], for an image
                that is encoded once and shown several times; by default they stand in order
            observe: is shown what stands at each site, all tokens of it

        Returns:
            fp32 logits [b, s, v], or [n, v] of the n tokens wanted; for "hidden" normed hidden
            states [b, s, d] or [n, d]; for "vision" [m, d]. For "recipe" a list of chunks of the
            logits after `set_num_output_chunks`; and with `output_hidden_states` the list of those
            states followed by this.

        Raises:
            ValueError: if placeholders and embeddings do not match in number, media come without
                positions on three axes, or caches of `setup_caches` without mask or positions.
        """
        if output == "vision":
            return self._encode(encoder_input, encode_absent)
        media = encoder_input if vision_embeds is None else vision_embeds
        self._check(tokens, mask, media, input_pos, has_caches=caches is not None)
        places = self._placeholder_rows(tokens, media, placeholder_rows), image_index
        h = self._embed(tokens, media, places, add_to_grad, encode_absent, observe)
        h = shown(observe, "embed", h)  # [b, s, d]
        mask = prepare(mask, h)
        wanted = _indices(output_mask)
        rotation = self.pos_embeddings(input_pos, tokens.shape)  # [b or 1, s, 2, h_d]
        kept = self.output_hidden_states if output == "recipe" else []
        last, hidden = len(self.layers), []
        trims = last not in kept and observe is None  # in the last layer, else behind it
        for index, layer in enumerate(self.layers):
            if index in kept:
                hidden.append(h)
            h = layer(
                h,
                rotation=rotation,
                mask=mask,
                cache=None if caches is None else caches[index],
                wanted=wanted if trims and index == last - 1 else None,
                observe=None if observe is None else partial(observe, index=index),
            )
        if last in kept:
            hidden.append(h)
        if observe is not None:
            observe("norm", self.norm(h))
        if wanted is not None and not trims:
            h = h.flatten(0, 1).index_select(0, wanted)
        if output == "hidden":
            return self.norm(h)
        projected = self.unembed(h) if output == "recipe" else self.output(self.norm(h)).float()
        return [*hidden, projected] if hidden else projected

    def _embed(
        self,
        tokens: Tensor,
        media: EncoderInput | Tensor | None,
        places: tuple[Tensor, Tensor | None],
        add_to_grad: bool,
        encode_absent: bool | None,
        observe: Observe | None,
    ) -> Tensor:
        """Look up the tokens and put the embeddings of media in place of their placeholders."""
        rows, image_index = places
        is_tied = isinstance(self.tok_embeddings, TiedEmbedding)
        options = {"add_to_grad": add_to_grad} if is_tied else {}
        h = self.tok_embeddings(tokens, **options)  # [b, s, d]
        if media is None:
            self._check_count(len(rows), 0)
            return h + self._absent_media() if self._encodes_absent(encode_absent) else h
        if isinstance(media, Tensor):
            vision_embeds = media  # [m, d]
        else:
            vision_embeds = self.vision(**media["vision"], observe=observe)
        if image_index is not None:
            vision_embeds = vision_embeds[image_index]
        self._check_count(len(rows), len(vision_embeds))
        filled = h.flatten(0, 1).index_copy(0, rows, vision_embeds.to(h.dtype))
        return filled.view_as(h)

    def _placeholder_rows(
        self, tokens: Tensor, media: EncoderInput | Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """Return the indices of placeholders, [m]."""
        if rows is not None:
            return rows
        if media is None and tokens.shape[1] == 1:  # generated, and may be any
            return tokens.new_empty(0)
        return _indices(self.placeholders(tokens))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.norm.scale.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.norm.scale.dtype

    def placeholders(self, tokens: Tensor) -> Tensor:
        """Return which tokens have the id of a placeholder."""
        return (tokens == self.image_token_id) | (tokens == self.video_token_id)  # [b, s]

    def _encode(self, encoder_input: EncoderInput | None, encode_absent: bool | None) -> Tensor:
        """Return the embeddings of all media, [m, d]; none without media."""
        if encoder_input is not None:
            return self.vision(**encoder_input["vision"])
        none = self.norm.scale.new_zeros(0, len(self.norm.scale))
        return none + self._absent_media() if self._encodes_absent(encode_absent) else none

    def _encodes_absent(self, asked: bool | None) -> bool:
        return isinstance(self, FSDPModule) if asked is None else asked

    def _absent_media(self) -> Tensor:
        """Return a zero that has been through the encoder as one unit of grey patches."""
        merge = self.vision.spatial_merge_size
        patch_dim = self.vision.patch_embed.proj.in_features
        pixel_values = torch.zeros(merge**2, patch_dim, device=self.device)
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
        mask: Any,
        media: EncoderInput | Tensor | None,
        input_pos: Tensor | None,
        *,
        has_caches: bool,
    ) -> None:
        if tokens.shape[1] > self.max_seq_len:
            raise ValueError(
                f"tokens must not be longer than max_seq_len, got {tokens.shape[1]} > "
                f"{self.max_seq_len}; shorten the sample or build the model with a larger one"
            )
        if media is not None and (input_pos is None or input_pos.ndim != 3):
            raise ValueError(
                "images and videos need positions on three axes, input_pos [b, s, 3], got "
                f"{None if input_pos is None else list(input_pos.shape)}; see mrope_position_ids"
            )
        if not has_caches and self.caches_are_setup() and (mask is None or input_pos is None):
            raise ValueError(
                "with caches set up, attention is no longer causal by itself and a position can no "
                "longer be told from the index; pass mask and input_pos"
            )


def _indices(mask: Tensor | None) -> Any:
    """Return the indices of what is True, int64 [n]; indices and None stay what they are."""
    return mask.flatten().nonzero()[:, 0] if mask is not None and mask.dtype == torch.bool else mask
