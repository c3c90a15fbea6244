"""Chance that depends on a batch alone, so that a run that goes on draws what it would have."""

import hashlib

import torch


def seeded(seed: int, first: str, device: torch.device) -> torch.Generator:
    """Return the source of chance of a batch, whatever was done before it.

    Args:
        seed: of the run
        first: name of the batch's first item
        device: of the model
    """
    digest = hashlib.sha256(f"{seed} {first!a}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
