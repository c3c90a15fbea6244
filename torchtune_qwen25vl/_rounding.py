"""What is lost in weights that are held and trained in bf16, as refusals and checks say it."""

from collections.abc import Iterator, Mapping
from typing import Any

ROUNDING = "torchtune_qwen25vl.training.StochasticAdamW"
"""The optimizer that loses nothing, and is what the configs have."""


def is_stochastic(optimizer: Mapping[str, Any]) -> bool:
    """Say whether an optimizer's section asks for stochastic rounding."""
    name = str(optimizer.get("_component_", "")).rpartition(".")[2]
    return bool(optimizer.get("bf16_stochastic_round")) or name == ROUNDING.rpartition(".")[2]


def lost_updates(part: str, optimizer: str) -> str:
    """Say what becomes of a part whose weights this optimizer trains in bf16."""
    return (
        f"{part} has weights trained in bf16, where {optimizer} rounds most updates away: at such "
        f"rates 3 to 16 % of them move. Set optimizer._component_={ROUNDING} with "
        "precision=bf16_stochastic, or precision=bf16_mixed, or precision=fp32"
    )


def warnings_of(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the warnings that a config of a recipe deserves before anything is built."""
    optimizer = config.get("optimizer") or {}
    if is_stochastic(optimizer):
        return
    if config.get("precision", "bf16_stochastic") in ("bf16", "bf16_stochastic"):
        name = str(optimizer.get("_component_", "")).rpartition(".")[2]
        for part, settings in (config.get("parts") or {}).items():
            if settings.get("train") in ("full", "dora"):
                yield f"WARNING: {lost_updates(part, name)}"
