"""Every difference between torchtune 0.6.1 and its development version.

Shapes: b rows of a batch, s tokens.
"""

import torchtune.modules.loss
from torch import Tensor
from torch.nn import functional as F
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

# torchao moved both; each torchtune imports them from where its torchao has them
from torchtune.modules.common_utils import NF4Tensor
from torchtune.modules.low_precision.nf4_linear import linear_nf4, to_nf4

__all__ = [
    "RECIPES_SHIFT_LABELS",
    "NF4Tensor",
    "labelled_rows",
    "linear_nf4",
    "made_labels",
    "targets",
    "to_nf4",
]

# torchtune 0.6.1's recipes shift the labels; the development version's datasets do it before them
RECIPES_SHIFT_LABELS = not hasattr(torchtune.modules.loss, "SFTLoss")


def targets(labels: Tensor, ignore_index: int = CROSS_ENTROPY_IGNORE_IDX) -> Tensor:
    """Return what each position is to predict, [b, s].

    Args:
        labels: [b, s], as a collate gives them to a recipe
        ignore_index: what stands where there is no label
    """
    if not RECIPES_SHIFT_LABELS:
        return labels
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)


def made_labels(labels: Tensor, ignore_index: int = CROSS_ENTROPY_IGNORE_IDX) -> Tensor:
    """Return labels as a dataset of torchtune hands them on, [s].

    Args:
        labels: [s], each at its own token
        ignore_index: what stands where there is no label
    """
    if RECIPES_SHIFT_LABELS:
        return labels
    return F.pad(labels[1:], (0, 1), value=ignore_index)


def labelled_rows(labels: Tensor, ignore_index: int = CROSS_ENTROPY_IGNORE_IDX) -> Tensor:
    """Return the positions whose logits a stock recipe's loss will read, bool [b, s].

    Args:
        labels: [b, s], as a collate gives them to a recipe
        ignore_index: what stands where there is no label
    """
    return targets(labels, ignore_index) != ignore_index
