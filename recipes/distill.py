"""Teach a small Qwen2.5-VL what a large one predicts, images included.

    tune-qwen25vl run distill --config distill teacher_dir=models/Qwen2.5-VL-7B-Instruct
    tune-qwen25vl run --nproc_per_node 8 distill --config distill dataset.source=train.jsonl

The loss of a labelled token is the divergence of the student's prediction from the teacher's,
`loss.kd_ratio` of it, and for the rest the cross entropy of its label. Both are computed a few rows
at a time, so that never more than `loss_chunk_rows` of either model's logits are there. Data,
parts, adapters, packing, checkpoints and results are those of the recipe finetune, and so are the
keys of the YAML.

The teacher has the same tokenizer. Its embedding may have more rows, or fewer (152,064 of 7B and
151,936 of 3B): what no tokenizer uses is left out of both predictions, before the softmax.
"""

import sys
from functools import partial

from omegaconf import DictConfig
from torchtune import config

from torchtune_qwen25vl import Qwen25VLTransform, evaluation
from torchtune_qwen25vl import training as ours
from torchtune_qwen25vl.weights import find_weights, fingerprint


class DistillRecipe(ours.Recipe[ours.DistillSettings]):
    """Sets everything up, trains, and saves the result.

    Args:
        cfg: settings of the YAML

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.
    """

    read_table = evaluation.InTraining

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg, ours.read_settings(cfg, ours.DistillSettings))
        self.teacher_source, _ = find_weights(self.settings.teacher_dir)
        self.model_identity["teacher"] = fingerprint(self.teacher_source)

    def prepare(self) -> None:
        """Make the teacher and the loss."""
        settings = self.settings
        ours.check_teacher(self.tokenizer, Qwen25VLTransform.from_folder(self.teacher_source))
        # a teacher takes no updates, for which weights would be held in fp32
        precision: ours.Precision = "fp32" if settings.precision == "fp32" else "bf16"
        teacher = self.frozen_model(self.teacher_source, precision)
        self.figures = objective = ours.Distillation(
            teacher,
            ours.read_distillation_loss(settings.loss),
            chunk_rows=settings.loss_chunk_rows,
        )
        self.loss = ours.computed_in(settings.precision, self.device, self.model, objective)


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: the YAML, with `key=value` from the command line over it."""
    settings = ours.read_settings(cfg, ours.DistillSettings)
    ours.run(partial(DistillRecipe, cfg), settings)


if __name__ == "__main__":
    sys.exit(ours.in_one_line(recipe_main))
