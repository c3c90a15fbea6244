"""A tiny text encoder in every form in which people have one."""

import json

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file

FP8 = torch.float8_e4m3fn
NEW = {"model.": "model.language_model.", "visual.": "model.visual."}


def hub_weights(folder):
    """Names of the hub and their weights, fp32."""
    return load_file(folder / "model.safetensors")


def renamed(weights):
    """Under the names of transformers 5, as DiffSynth and musubi have them."""
    return {
        next((new + k.removeprefix(old) for old, new in NEW.items() if k.startswith(old)), k): w
        for k, w in weights.items()
    }


def is_linear(name):
    return name.endswith("proj.weight") or ".attn." in name or ".mlp." in name


def in_fp8(weights):
    """Linear layers in fp8, each under a scale of its own; and what they stand for."""
    small, scales, meant = {}, {}, {}
    for number, (name, weight) in enumerate(weights.items()):
        if weight.ndim < 2 or not is_linear(name) or "patch_embed" in name:
            small[name] = meant[name] = weight
            continue
        scale = torch.tensor(float(weight.abs().max()) / 448 * (1 + number % 3))
        small[name], scales[name] = (weight / scale).to(FP8), scale
        meant[name] = small[name].to(torch.float32) * scale
    return small, scales, meant


def save_scaled(path, small, scales, form):
    """In the old form, or the new one with notes of layers or in the metadata."""
    weights, metadata = dict(small), {}
    layers = {name.removesuffix(".weight"): scale for name, scale in scales.items()}
    note = {"format": "float8_e4m3fn"}
    for layer, scale in layers.items():
        if form == "old":
            weights[f"{layer}.scale_weight"] = scale
            weights[f"{layer}.scale_input"] = torch.tensor(7.0)
            continue
        weights[f"{layer}.weight_scale"] = scale
        weights[f"{layer}.input_scale"] = torch.tensor(7.0)
        if form == "notes":
            noted = json.dumps(note).encode()
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(noted), dtype=torch.uint8)
    if form == "old":
        weights["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    if form == "metadata":
        told = {"format_version": "1.0", "layers": dict.fromkeys(layers, note)}
        metadata["_quantization_metadata"] = json.dumps(told)
    save_file(weights, path, metadata=metadata)
    return path


TEXT = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
VISION = {
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(weights, *, is_vision):
    """Weights under llama.cpp's names, as numpy arrays."""
    for name, weight in weights.items():
        if name.startswith("visual.") != is_vision:
            continue
        values = weight.float().numpy()
        stem, _, kind = name.rpartition(".")
        if stem == "visual.patch_embed.proj":
            yield "v.patch_embd.weight", values[:, :, 0]
            yield "v.patch_embd.weight.1", values[:, :, 1]
        elif stem in (names := VISION if is_vision else TEXT):
            yield f"{names[stem]}.{kind}", values
        else:
            _, _, number, part = stem.split(".", 3)
            layer = f"{'v.' if is_vision else ''}blk.{number}"
            if part == "attn.qkv":
                for letter, piece in zip("qkv", np.split(values, 3), strict=True):
                    yield f"{layer}.attn_{letter}.{kind}", piece
            else:
                yield f"{layer}.{names[part]}.{kind}", values


SCALES_OF_BLOCKS = {"Q4_K": (0, 2), "Q6_K": (208,)}  # where in a block its fp16 scales lie


def _blocks(shape, kind):
    """Random blocks of a type, their scales being small numbers."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rows = np.random.default_rng(len(kind) * shape[0]).integers(
        0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8
    )
    for place in SCALES_OF_BLOCKS[kind]:
        scales = np.linspace(1e-4, 3e-4, len(rows), dtype=np.float16)
        rows[:, place : place + 2] = scales[:, None].view(np.uint8)
    return rows.reshape(shape[0], -1)


def write_gguf(path, weights, config, *, is_vision=False, kind="F32", left_out=()):
    """Write a decoder, or a vision tower; matrices whose rows are whole blocks are quantised.

    Returns:
        What the file means, by its names: each array as its quantised numbers say.
    """
    writer = gguf.GGUFWriter(path, "clip" if is_vision else "qwen2vl")
    (_describe_vision if is_vision else _describe_text)(writer, config)
    type_ = gguf.GGMLQuantizationType[kind]
    meant = {}
    for name, values in gguf_tensors(weights, is_vision=is_vision):
        if name in left_out:
            continue
        values = np.ascontiguousarray(values)
        block = gguf.GGML_QUANT_SIZES[type_][0]
        if kind != "F32" and values.ndim == 2 and values.shape[-1] % block == 0:
            is_written = kind in SCALES_OF_BLOCKS  # the package reads these and writes none
            packed = (
                _blocks(values.shape, kind) if is_written else gguf.quants.quantize(values, type_)
            )
            meant[name] = gguf.quants.dequantize(packed, type_)
            writer.add_tensor(name, packed, raw_dtype=type_)
        else:
            meant[name] = values
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _describe_text(writer, config):
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_sections([*config["rope_scaling"]["mrope_section"], 0])


def _describe_vision(writer, config):
    vision = config["vision_config"]
    writer.add_clip_projector_type("qwen2.5vl_merger")
    writer.add_vision_block_count(vision["depth"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_head_count(vision["num_heads"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_projection_dim(vision["out_hidden_size"])
    full = vision["fullatt_block_indexes"]
    writer.add_vision_n_wa_pattern(full[0] + 1)


def weights_of(meant):
    """Names of the hub and weights that GGUF arrays mean; the inverse of `gguf_tensors`."""
    text, vision = ({new: old for old, new in names.items()} for names in (TEXT, VISION))
    found, fused = {}, {}
    for name, values in meant.items():
        stem, _, kind = name.rpartition(".")
        tensor = torch.from_numpy(np.array(values))
        if name.startswith("v.patch_embd"):
            fused.setdefault("visual.patch_embed.proj.weight", {})[name] = tensor
        elif stem in text or stem in vision:
            found[f"{text.get(stem) or vision[stem]}.{kind}"] = tensor
        elif stem.startswith("v.blk."):
            _, _, number, part = stem.split(".")
            layer = f"visual.blocks.{number}"
            if part in vision:
                found[f"{layer}.{vision[part]}.{kind}"] = tensor
            else:
                fused.setdefault(f"{layer}.attn.qkv.{kind}", {})["qkv".index(part[-1])] = tensor
        else:
            _, number, part = stem.split(".")
            found[f"model.layers.{number}.{text[part]}.{kind}"] = tensor
    for name, parts in fused.items():
        pieces = [parts[key] for key in sorted(parts)]
        found[name] = torch.stack(pieces, 2) if "patch" in name else torch.cat(pieces)
    return found
