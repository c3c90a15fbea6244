"""What stands at the sites of a model, shown to whoever asks while a forward runs.

An argument rather than hooks: a compiled layer runs no hook that was registered after it.
"""

from typing import Protocol

from torch import Tensor


class Observe(Protocol):
    """Called with what stands at each site, in the order in which it is computed."""

    def __call__(self, site: str, x: Tensor, *, index: int | None = None) -> None:
        """Look at a tensor that the model goes on using; it must not be changed.

        Args:
            site: "vision", output of a layer of the encoder, [p, d_v], patches in the order of
                `VisionEncoder.arrange`; "merger", embeddings in reading order, [m, d]; "embed",
                input of the first layer, [b, s, d]; "attn" and "mlp", what these add to the stream;
                "layer", output of a layer, before any final norm; "norm", the final norm's output
            x: what stands there
            index: which layer, from 0; None where a site has none
        """


def shown(observe: Observe | None, site: str, x: Tensor) -> Tensor:
    """Return `x`, after showing it to the observer if there is one."""
    if observe is not None:
        observe(site, x)
    return x
