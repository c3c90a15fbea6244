"""Weights: read from a folder of theirs, written to one of ours, and read again by them."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from parity import reference
from parity.stages._stage import Measurement, Setting, Stage, max_error
from torchtune_qwen25vl import Qwen25VLCheckpointer, tune_to_hf
from torchtune_qwen25vl.weights import find_weights
from torchtune_qwen25vl.weights._names import on_disk_names


def measure_weights(setting: Setting) -> Iterator[Measurement]:
    """Every weight after a round trip; of random models also as transformers reads our folder."""
    for name in [setting.checkpoint] if setting.checkpoint else ["tiny", "tied"]:
        theirs = _on_disk(reference.disk_state_dict(reference.model(name)))
        with tempfile.TemporaryDirectory() as scratch:
            original, output = Path(scratch, "original"), Path(scratch, "output")
            if setting.checkpoint:
                original, _ = find_weights(setting.checkpoint)
            else:
                reference.model(name).save_pretrained(original, max_shard_size="300KB")
            checkpointer = Qwen25VLCheckpointer(str(original), str(output))
            state = checkpointer.load_checkpoint()
            back = tune_to_hf(state["model"])
            yield Measurement(f"{name}: to tune layout and back", _largest_error(back, theirs))
            if not setting.checkpoint:
                checkpointer.save_checkpoint(state, epoch=0)
                again = reference.load(str(output / "epoch_0"), torch.float32)
                written = _on_disk(reference.disk_state_dict(again))
                yield Measurement(f"{name}: written by ours", _largest_error(written, theirs))


def _on_disk(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = on_disk_names(weights)
    return {names[key]: weight for key, weight in weights.items()}


def _largest_error(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(max_error(ours[name], weight) for name, weight in theirs.items())


WEIGHTS = Stage(
    name="weights",
    what="every weight, read from their folder and written to one that they read again",
    tolerance="0: weights are renamed, split and joined, never computed with",
    fault="q and k exchanged on saving",
    measure=measure_weights,
)
