"""Faults of the weight conversion."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from parity.faults._fault import Fault, replaced
from torchtune_qwen25vl import tune_to_hf


def _exchange_q_and_k(right: Callable) -> Callable:
    def wrong(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = right(state_dict)
        for name in (name for name in weights if ".attn.qkv." in name):
            q, k, v = weights[name].chunk(3)
            weights[name] = torch.cat((k, q, v))
        return weights

    return wrong


FAULTS: dict[str, Fault] = {
    "q and k exchanged on saving": replaced(tune_to_hf, _exchange_q_and_k, "weights"),
}
