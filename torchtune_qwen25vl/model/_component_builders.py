"""Parts to model."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.peft import get_adapter_params

from torchtune_qwen25vl.model._attention import DecoderAttention
from torchtune_qwen25vl.model._decoder import Qwen25VL
from torchtune_qwen25vl.model._decoder_layer import DecoderLayer, RMSNorm
from torchtune_qwen25vl.model._embedding import TiedEmbedding, TiedOutput
from torchtune_qwen25vl.model._encoder import (
    PatchEmbed,
    PatchMerger,
    VisionAttention,
    VisionEncoder,
    VisionLayer,
)
from torchtune_qwen25vl.model._fused import FeedForward
from torchtune_qwen25vl.model._positional_embeddings import (
    MultimodalRotaryEmbedding,
    VisionRotaryEmbedding,
)
from torchtune_qwen25vl.model._tuning import MakeLinear, Tuning

CHANNELS = 3  # red, green, blue
VISION_NORM_EPS = 1e-6  # not in any config


def qwen2_5_vl(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    norm_eps: float,
    rope_base: float,
    mrope_section: Sequence[int],
    tie_word_embeddings: bool,
    image_token_id: int,
    video_token_id: int,
    vision_num_layers: int,
    vision_num_heads: int,
    vision_embed_dim: int,
    vision_intermediate_dim: int,
    patch_size: int,
    temporal_patch_size: int,
    spatial_merge_size: int,
    window_size: int,
    full_attn_indices: Sequence[int],
    attn_dropout: float = 0.0,
    **tuning: Any,
) -> Qwen25VL:
    """Build a Qwen2.5-VL of any size; see `qwen2_5_vl_3b` and its sisters for the published ones.

    Args:
        vocab_size: tokens with an embedding
        num_layers: decoder layers
        num_heads: query heads of the decoder
        num_kv_heads: key and value heads of the decoder
        embed_dim: width of the decoder
        intermediate_dim: inner width of the decoder's MLPs
        max_seq_len: longest sequence accepted, in tokens
        norm_eps: epsilon of the decoder's norms
        rope_base: base of the decoder's rotary embedding
        mrope_section: frequencies in each of its sections
        tie_word_embeddings: project to the vocabulary with the embedding matrix
        image_token_id: placeholder of images
        video_token_id: placeholder of videos
        vision_num_layers: layers of the vision encoder
        vision_num_heads: heads of the vision encoder
        vision_embed_dim: width of the vision encoder
        vision_intermediate_dim: inner width of its MLPs
        patch_size: pixels along the side of a patch
        temporal_patch_size: frames in a patch
        spatial_merge_size: patches of a placeholder along h and along w
        window_size: pixels along the side of an attention window
        full_attn_indices: vision layers that attend to the whole frame
        attn_dropout: dropout of attention weights in the decoder
        **tuning: which parts are trained, and how: the arguments of `Tuning`

    Raises:
        ValueError: if an option contradicts another.
    """
    tune = Tuning(**tuning)
    if tie_word_embeddings and tune.apply_lora_to_output:
        raise ValueError(
            "a tied output is the embedding and takes no adapter; leave apply_lora_to_output out"
        )
    vision = _vision_encoder(
        tune,
        embed_dim=vision_embed_dim,
        num_layers=vision_num_layers,
        num_heads=vision_num_heads,
        intermediate_dim=vision_intermediate_dim,
        out_dim=embed_dim,
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        spatial_merge_size=spatial_merge_size,
        window_size=window_size,
        full_attn_indices=full_attn_indices,
    )
    linear = tune.linear("decoder")
    head_dim = embed_dim // num_heads
    rope = MultimodalRotaryEmbedding(head_dim, rope_base, mrope_section)

    def decoder_layer() -> DecoderLayer:
        attn = DecoderAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=linear("q_proj", embed_dim, num_heads * head_dim, bias=True),
            k_proj=linear("k_proj", embed_dim, num_kv_heads * head_dim, bias=True),
            v_proj=linear("v_proj", embed_dim, num_kv_heads * head_dim, bias=True),
            output_proj=linear("output_proj", num_heads * head_dim, embed_dim, bias=False),
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        return DecoderLayer(
            attn=attn,
            mlp=_swiglu(linear, embed_dim, intermediate_dim, bias=False),
            sa_norm=RMSNorm(embed_dim, norm_eps),
            mlp_norm=RMSNorm(embed_dim, norm_eps),
        )

    tok_embeddings = (TiedEmbedding if tie_word_embeddings else nn.Embedding)(vocab_size, embed_dim)
    model = Qwen25VL(
        vision=vision,
        tok_embeddings=tok_embeddings,
        layers=[decoder_layer() for _ in range(num_layers)],
        pos_embeddings=rope,
        norm=RMSNorm(embed_dim, norm_eps),
        output=TiedOutput(tok_embeddings)
        if tie_word_embeddings
        else linear("output", embed_dim, vocab_size, bias=False),
        image_token_id=image_token_id,
        video_token_id=video_token_id,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
    )
    _set_trainable(model, tune)
    if tune.quantize_base:
        # a state dict holds no NF4: adapters and checkpoints are written from it
        _register_reparametrize_state_dict_hooks(model, dtype=tok_embeddings.weight.dtype)
    return model


def _vision_encoder(
    tune: Tuning,
    *,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    intermediate_dim: int,
    out_dim: int,
    patch_size: int,
    temporal_patch_size: int,
    spatial_merge_size: int,
    window_size: int,
    full_attn_indices: Sequence[int],
) -> VisionEncoder:
    linear, merger_linear = tune.linear("vision"), tune.linear("merger")
    patch_dim = CHANNELS * temporal_patch_size * patch_size**2
    unit_dim = spatial_merge_size**2 * embed_dim

    def layer() -> VisionLayer:
        attn = VisionAttention(
            num_heads=num_heads,
            q_proj=linear("q_proj", embed_dim, embed_dim, bias=True),
            k_proj=linear("k_proj", embed_dim, embed_dim, bias=True),
            v_proj=linear("v_proj", embed_dim, embed_dim, bias=True),
            output_proj=linear("output_proj", embed_dim, embed_dim, bias=True),
        )
        return VisionLayer(
            attn=attn,
            mlp=_swiglu(linear, embed_dim, intermediate_dim, bias=True),
            sa_norm=RMSNorm(embed_dim, VISION_NORM_EPS),
            mlp_norm=RMSNorm(embed_dim, VISION_NORM_EPS),
        )

    return VisionEncoder(
        patch_embed=PatchEmbed(patch_dim, embed_dim),
        layers=[layer() for _ in range(num_layers)],
        merger=PatchMerger(
            norm=RMSNorm(embed_dim, VISION_NORM_EPS),
            w1=merger_linear("w1", unit_dim, unit_dim, bias=True),
            w2=merger_linear("w2", unit_dim, out_dim, bias=True),
            spatial_merge_size=spatial_merge_size,
        ),
        rotary=VisionRotaryEmbedding(embed_dim // num_heads),
        patch_size=patch_size,
        spatial_merge_size=spatial_merge_size,
        window_size=window_size,
        full_attn_indices=full_attn_indices,
    )


def _swiglu(linear: MakeLinear, dim: int, intermediate_dim: int, *, bias: bool) -> FeedForward:
    return FeedForward(
        gate_proj=linear("w1", dim, intermediate_dim, bias=bias),
        down_proj=linear("w2", intermediate_dim, dim, bias=bias),
        up_proj=linear("w3", dim, intermediate_dim, bias=bias),
    )


def _set_trainable(model: Qwen25VL, tune: Tuning) -> None:
    adapters = get_adapter_params(model)
    for name, parameter in model.named_parameters():
        trainable = getattr(tune, f"{part_of(name)}_trainable")
        parameter.requires_grad_(trainable == "full" or name in adapters)


def part_of(name: str) -> Literal["decoder", "vision", "merger"]:
    if name.startswith("vision.merger."):
        return "merger"
    return "vision" if name.startswith("vision.") else "decoder"
