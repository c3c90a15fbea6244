"""Chance that depends on an item or a batch alone: a run that goes on draws what it would have."""

import hashlib

import torch


def seeded(seed: int, name: str, device: torch.device) -> torch.Generator:
    """Return the source of chance of an item or a batch, whatever was done before it.

    Args:
        seed: of the run
        name: of the item, or of the batch's first one
        device: of the model
    """
    digest = hashlib.sha256(f"{seed} {name!a}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
