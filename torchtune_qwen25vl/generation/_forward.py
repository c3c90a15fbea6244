"""The two forwards of generation: one that reads prompts, and one for each token after them.

Shapes: b rows, s prompt tokens, v vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from torchtune_qwen25vl.model import KeyValues, Observe


def prefill(
    model: TransformerDecoder,
    batch: Mapping[str, Any],
    caches: Sequence[KeyValues],
    observe: Observe | None = None,
    *,
    last: Tensor | None = None,
) -> Tensor:
    """Read the prompts into the caches; return logits of the token after each, fp32 [b, v].

    Args:
        model: Qwen25VL
        batch: padded on the left, or on the right without a mask
        caches: empty ones
        observe: is shown what stands at each site of the model
        last: the last token of each row, bool [b, s]; None where padding is on the left
    """
    if last is None:
        last = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        last[:, -1] = True
    return model(
        batch["tokens"],
        input_pos=batch["input_pos"],
        mask=batch.get("mask"),
        encoder_input=batch.get("encoder_input"),
        placeholder_rows=batch.get("placeholder_rows"),
        output_mask=last,
        caches=caches,
        output="logits",
        observe=observe,
    )


def decode_one_token(
    model: TransformerDecoder,
    tokens: Tensor,
    positions: Tensor,
    attended: Tensor | None,
    caches: Sequence[KeyValues],
) -> Tensor:
    """Append one token per row to the caches; return logits of the next one, fp32 [b, v].

    Args:
        model: Qwen25VL
        tokens: the last token of each row, [b]
        positions: positions of these tokens, [b]
        attended: which of the cached tokens and this one are no padding, bool [b, cached + 1]; None
            where nothing is padded
        caches: filled by `prefill`
    """
    logits = model(
        tokens[:, None],
        input_pos=positions.view(-1, 1, 1).expand(-1, 1, 3),
        mask=None if attended is None else attended[:, None],
        caches=caches,
        output="logits",
    )  # [b, 1, v]
    return logits[:, -1]
