"""Teach Qwen2.5-VL which of two answers is the better one, images included.

    tune-qwen25vl run preference --config preference dataset.source=pairs.jsonl
    tune-qwen25vl run --nproc_per_node 8 preference --config preference dataset.source=pairs.jsonl

The loss is dpo, ipo, hinge, simpo, orpo, mpo, or kto for answers that were liked or not. Parts,
adapters, packing, checkpoints and results are those of the recipe finetune, and so are the keys of
the YAML. A prompt stands once in its row, with both answers behind it; every distinct image goes
through the encoder once a step where encoder and merger are frozen, else once a batch.

What the policy is held against is the model without its adapters, or that of `reference_dir`, or
with `precompute_reference` log-probabilities that are computed once, before the first step, and
kept in `reference-dataset.jsonl`. A step trains on `batch_size * gradient_accumulation_steps` rows
of every rank, and its loss is the mean over all of them, however they are packed.
"""

import sys
from collections.abc import Iterator
from functools import partial

from omegaconf import DictConfig
from torchtune import config
from tqdm import tqdm

from torchtune_qwen25vl import evaluation
from torchtune_qwen25vl import training as ours


class PreferenceRecipe(ours.TreeRecipe[ours.PreferenceSettings]):
    """Sets everything up, trains, and saves the result.

    Args:
        cfg: settings of the YAML

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.
    """

    read_table = evaluation.InTraining
    objective: ours.Objective
    counted = "rows"

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg, ours.read_settings(cfg, ours.PreferenceSettings))

    def prepare(self) -> None:
        """Make the loss and what it compares with; compute what is kept of that."""
        settings = self.settings
        self.objective = ours.Objective(
            ours.read_loss(settings.loss),
            paired=settings.paired,
            has_reference=settings.has_reference,
            reference=self.reference(),
            frozen_media=self.frozen_media,
            chunk_rows=settings.loss_chunk_rows,
        )
        self.figures = self.objective.figures
        computed = partial(ours.computed_in, settings.precision, self.device, self.model)
        self.loss = computed(self.objective)
        self.of_reference = computed(self.objective.reference_log_probs)
        if settings.precompute_reference:
            self.dataset = self.with_reference("dataset", self.walk)
            if self.val_dataset is not None:
                self.val_dataset = self.with_reference("val_dataset", self.val_walk)
            self.objective.media.reference = None  # its memory is free from here on
            ours.shard_again(self.model)

    def with_reference(self, name: str, walk: ours.Walk) -> ours.WithReference:
        """Return a data set of the YAML with the reference's log-probabilities in its samples."""
        dataset = getattr(self, name)

        def compute(steps: list[list[ours.Key]]) -> Iterator[dict[int, list[float]]]:
            loader = self.loader(dataset, steps, walk)
            bar = tqdm(steps, desc="reference", disable=self.rank > 0, unit="step")
            for keys, data in zip(bar, loader, strict=True):
                self.objective.begin_step()
                found = {}
                for batch in self.ready(data).batches:
                    log_probs = self.of_reference(self.model, batch).tolist()
                    for sample, values in zip(batch["samples"].tolist(), log_probs, strict=True):
                        found[keys[sample]] = values
                yield {key.place: values for key, values in found.items() if key.counted}

        log_probs = ours.keep_log_probs(
            self.output_dir / f"reference-{name}.jsonl",
            compute,
            identity={
                **self.model_identity,
                **walk.identity(),
                **self.settings.reference_identity(name),
            },
            places=walk.places,
            share=self.share,
        )
        return ours.WithReference(dataset, log_probs, walk.empty)

    def collate(self) -> ours.TreeCollate:
        """Make the collate from the samples of a step to batches of trees."""
        return ours.TreeCollate(
            self.tokenizer.pad_id,
            self.placeholders,
            batch_size=self.settings.batch_size,
            pack_to=self.settings.pack_to,
            paired=self.settings.paired,
            across_batches=self.frozen_media,
            mask=self.mask,
        )


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: the YAML, with `key=value` from the command line over it."""
    settings = ours.read_settings(cfg, ours.PreferenceSettings)
    ours.run(partial(PreferenceRecipe, cfg), settings)


if __name__ == "__main__":
    sys.exit(ours.in_one_line(recipe_main))
