"""The model of a run: built, sharded and filled; gathered, merged and saved."""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune import modules, training, utils
from torchtune.modules.peft import DoRALinear, get_merged_lora_ckpt

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl._files import replacing_folder
from torchtune_qwen25vl.model import (
    Qwen25VL,
    initializer_ranges,
    part_of,
    qwen2_5_vl_from_config,
)
from torchtune_qwen25vl.training._precision import Precision, dtype_of, shard
from torchtune_qwen25vl.transform import write_pixel_limits
from torchtune_qwen25vl.weights import (
    Checkpoint,
    compute_frequencies,
    copy_settings,
    materialize,
    tune_to_hf,
    write_dtype,
    write_peft,
    write_weights,
)

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"


def make_model(
    source: Path,
    tuning: Mapping[str, Any],
    *,
    precision: Precision,
    device: torch.device,
    seed: int,
    from_scratch: bool = False,
    checkpoint_activations: bool = False,
    compile_layers: bool = False,
) -> Qwen25VL:
    """Build the model to train on its device, sharded by FSDP2 if there is more than one rank.

    What has no weights yet, an adapter or a whole model from scratch, gets the same ones on any
    number of ranks.

    Args:
        source: folder of config.json and the weights
        tuning: arguments of `Tuning`, see `tuning`
        precision: what weights are held in, and products computed in
        device: where the weights go
        seed: seed of the weights that are new
        from_scratch: whether to start from random weights, reading config.json only
        checkpoint_activations: whether to keep only the input of each layer, of the encoder too,
            and to compute the layer again in the backward
        compile_layers: whether to run the decoder's layers through torch.compile

    Raises:
        ValueError: if the weights are not exactly those of config.json.
    """
    sharded = utils.get_world_size_and_rank()[0] > 1
    dtype = dtype_of(precision, device)
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = qwen2_5_vl_from_config(source, **tuning)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    weights = _first_weights(source, shapes, seed, from_scratch=from_scratch, lazily=sharded)
    if not sharded:
        materialize(model, weights, device=device, dtype=dtype)
    if compile_layers:
        training.compile_model(model, verbose=False)
    if checkpoint_activations:
        training.set_activation_checkpointing(model, {modules.TransformerSelfAttentionLayer})
    if sharded:
        shard(model, precision)
        # the loss projects with the output weight after the forward
        model.set_reshard_after_forward(False, recurse=False)
        training.load_from_full_model_state_dict(model, dict(weights), device, strict=True)
        compute_frequencies(model, device)
    with device:
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.initialize_dora_magnitude()
    return model


def _first_weights(
    source: Path, shapes: dict[str, tuple[int, ...]], seed: int, *, from_scratch: bool, lazily: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight the model starts with: those of the files, then those that are new."""
    missing = dict(shapes)
    if not from_scratch:
        for name, weight in Checkpoint(source, None, source).read(lazily=lazily):
            del missing[name]
            yield name, weight
    yield from _new_weights(missing, seed, initializer_ranges(source)).items()


def _new_weights(
    shapes: Mapping[str, tuple[int, ...]], seed: int, stds: Mapping[str, float]
) -> dict[str, Tensor]:
    """Draw the first values of weights that no file has, on the CPU.

    Adapters start without effect, as torchtune's and PEFT's do; all else starts as in transformers.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.zeros(shape)
        if name.endswith("lora_a.weight"):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        elif name.endswith(".scale"):
            nn.init.ones_(weight)
        elif len(shape) == 2 and not name.endswith("lora_b.weight"):
            nn.init.normal_(weight, std=stds[part_of(name)], generator=generator)
        weights[name] = weight
    return weights


def gather_weights(model: Qwen25VL, device: torch.device) -> dict[str, Tensor]:
    """Copy all weights to the CPU of the first rank; the others get nothing."""
    if utils.get_world_size_and_rank()[0] > 1:
        return training.gather_cpu_state_dict(model, _ranks.is_first(), device=device)
    return {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}


def save_model(
    target: Path,
    weights: dict[str, Tensor],
    *,
    source: Path,
    from_scratch: bool,
    tuning: Mapping[str, Any],
    limits: Mapping[str, int],
) -> None:
    """Write a folder that transformers loads, with adapters merged and files named as in `source`.

    Args:
        target: folder that appears whole or not at all
        weights: weights in tune layout, with adapters; consumed
        source: folder the run began from; its config.json, tokenizer and the rest are copied
        from_scratch: whether `source` has no weights
        tuning: arguments of `Tuning` that the model was built with
        limits: min_pixels and max_pixels of the training, for preprocessor_config.json
    """
    weights = get_merged_lora_ckpt(weights, tuning["lora_rank"], tuning["lora_alpha"])
    with replacing_folder(target) as folder:
        copy_settings(source, folder)
        write_pixel_limits(folder, **limits)
        if from_scratch:
            hf_weights = tune_to_hf(weights)
            write_weights(folder, hf_weights, dict.fromkeys(hf_weights, "model.safetensors"))
        else:
            Checkpoint(source, None, source).write(folder, weights)
        write_dtype(folder, weights)


def save_adapter(
    target: Path,
    weights: Mapping[str, Tensor],
    trained: Iterable[str],
    *,
    source: Path,
    tuning: Mapping[str, Any],
    limits: Mapping[str, int],
) -> None:
    """Write what was trained as a PEFT adapter of the model in `source`, with its tokenizer.

    Args:
        target: folder that appears whole or not at all
        weights: weights in tune layout, with adapters
        trained: names of the adapters, and of the weights trained in full
        source: folder the run began from; its tokenizer and processor are copied
        tuning: arguments of `Tuning` that the model was built with
        limits: min_pixels and max_pixels of the training, for preprocessor_config.json
    """
    chosen = {name: weights[name] for name in trained}
    if EMBEDDING in chosen and OUTPUT not in weights:
        # PEFT replaces the embedding alone, to whose old weight a tied output would stay tied
        chosen[OUTPUT] = chosen[EMBEDDING].clone()
    scale = {"rank": tuning["lora_rank"], "alpha": tuning["lora_alpha"]}
    with replacing_folder(target) as folder:
        copy_settings(source, folder, but=["config.json"])  # with one it would pass for a model
        write_pixel_limits(folder, **limits)
        write_peft(folder, chosen, **scale, base_model=str(source))
