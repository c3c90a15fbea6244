"""One layer of the decoder, and its norm.

Shapes: b batch, s sequence, d width.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchtune import modules
from torchtune.modules import TransformerSelfAttentionLayer

from torchtune_qwen25vl.model._attention import KeyValues
from torchtune_qwen25vl.model._observe import Observe, shown


class RMSNorm(modules.RMSNorm):
    """torchtune's norm, rounded once.

    fp32 within and rounded at the end, as in torchtune 0.6.1; Hugging Face and torchtune's
    development version also round before the scale, which makes the bf16 error a third larger.
    torch does the upcast itself: handed fp32 and a bf16 scale, it warns and its fused kernel is
    lost.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.scale, self.eps)


class DecoderLayer(TransformerSelfAttentionLayer):
    """torchtune's pre-norm layer, whose MLP can leave out tokens that nobody asks for."""

    def forward(
        self,
        x: Tensor,
        *,
        rotation: Tensor,
        mask: Any = None,
        cache: KeyValues | None = None,
        wanted: Tensor | None = None,
        observe: Observe | None = None,
    ) -> Tensor:
        """Transform [b, s, d]; where the indices of n among b * s tokens are given, to [n, d].

        `observe` is shown "attn", "mlp" and "layer"; the other arguments are those of
        `DecoderAttention`.
        """
        options: dict[str, Any] = {"rotation": rotation, "mask": mask, "cache": cache}
        x = x + shown(observe, "attn", self.attn(self.sa_norm(x), **options))
        x = x if wanted is None else x.flatten(0, 1).index_select(0, wanted)
        x = x + shown(observe, "mlp", self.mlp(self.mlp_norm(x)))
        return shown(observe, "layer", x)
