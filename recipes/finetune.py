"""Fine-tune Qwen2.5-VL, each of its parts in its own way, on one device or many.

    tune-qwen25vl run finetune --config finetune_lora
    tune-qwen25vl run --nproc_per_node 8 finetune --config finetune_full output_dir=/data/run1

It does what the stock recipes cannot. Vision encoder, merger and decoder are frozen, trained in
full or through adapters, each with its own learning rate. Rows are packed with samples that do not
see each other, the loss projects labelled rows only, and any rank may have any mix of text, images
and videos. From a checkpoint, written every so many steps and on SIGTERM, a run goes on bit for
bit; `export=step_N` writes its result. A run that cannot go on says why in one line (exit code 2).

A step trains on `batch_size * gradient_accumulation_steps` samples of every rank, and its loss is
the mean over all their labels. The samples go through the model `batch_size` at a time, padded; or,
with `pack_to`, in as few rows of at most so many tokens as they fit into. The result is the same.
"""

import sys
from functools import partial

from omegaconf import DictConfig
from torchtune import config

from torchtune_qwen25vl import evaluation
from torchtune_qwen25vl import training as ours


class FinetuneRecipe(ours.Recipe[ours.Settings]):
    """Sets everything up, trains, and saves the result.

    Args:
        cfg: settings of the YAML

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.
    """

    read_table = evaluation.InTraining

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg, ours.read_settings(cfg))

    def prepare(self) -> None:
        """Make the loss."""
        settings = self.settings
        loss = partial(
            ours.summed_loss, chunk_rows=settings.loss_chunk_rows, kernel=settings.loss_kernel
        )
        self.loss = ours.computed_in(settings.precision, self.device, self.model, loss)


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: the YAML, with `key=value` from the command line over it."""
    ours.run(partial(FinetuneRecipe, cfg), ours.read_settings(cfg))


if __name__ == "__main__":
    sys.exit(ours.in_one_line(recipe_main))
