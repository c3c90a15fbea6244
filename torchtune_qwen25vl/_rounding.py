"""What is lost in weights that are held and trained in bf16, as plans and checks say it."""

from collections.abc import Iterator, Mapping
from typing import Any

ROUNDING = "torchtune_qwen25vl.training.StochasticAdamW"
"""The optimizer that loses nothing, and is what the configs have."""


def lost_updates(part: str, optimizer: str) -> str:
    """Say what becomes of a part that this optimizer trains in full in bf16."""
    return (
        f"WARNING: {part} is trained in bf16, where {optimizer} rounds most updates away: at such "
        f"rates 3 to 16 % of the weights move. Set optimizer._component_={ROUNDING}, or dtype=fp32"
    )


def warnings_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the warnings that a config of recipe finetune deserves before anything is built."""
    optimizer = config.get("optimizer") or {}
    name = str(optimizer.get("_component_", "")).rpartition(".")[2]
    if optimizer.get("bf16_stochastic_round") or name == ROUNDING.rpartition(".")[2]:
        return
    if config.get("dtype", "bf16") == "bf16":
        for part, settings in (config.get("parts") or {}).items():
            if settings.get("train") == "full":
                yield lost_updates(part, name)
