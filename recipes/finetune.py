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
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from torchtune import config, training, utils
from tqdm import tqdm

from torchtune_qwen25vl import Qwen25VL
from torchtune_qwen25vl import training as ours
from torchtune_qwen25vl.device import look
from torchtune_qwen25vl.weights import find_weights, fingerprint


class FinetuneRecipe:
    """Sets everything up, trains, and saves the result.

    Args:
        cfg: settings of the YAML

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.start = time.perf_counter()
        self.cfg, self.settings = cfg, ours.read_settings(cfg)
        settings = self.settings
        self.world_size, self.rank = utils.get_world_size_and_rank()
        self.device = utils.get_device(str(look(settings.device).device))
        named = isinstance(settings.model_dir, str)
        model_dir = settings.model_dir if named else config.instantiate(settings.model_dir)
        self.source, _ = find_weights(model_dir)
        self.output_dir = Path(settings.output_dir)
        self.parts = ours.read_parts(settings.parts)
        adapters = OmegaConf.to_container(settings.adapters or DictConfig({}), resolve=True)
        self.tuning = ours.tuning(self.parts, adapters)
        source = fingerprint(self.source)
        self.model_identity = {"source": source, "from_scratch": settings.from_scratch}
        self.share = ours.Share(
            settings.batch_size * settings.gradient_accumulation_steps, self.rank, self.world_size
        )
        self.mask: Literal["dense", "lengths", "flex"] = "dense"
        if settings.pack_to is not None:
            self.mask = "flex" if self.device.type == "cuda" else "lengths"

    def setup(self) -> None:
        """Make data, model, optimiser and schedule, as the last checkpoint left them, if any."""
        settings = self.settings
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.tokenizer = config.instantiate(settings.tokenizer)
        self.dataset = config.instantiate(settings.dataset, self.tokenizer)
        self.val_dataset = config.instantiate(settings.val_dataset, self.tokenizer)
        if not settings.resume:
            ours.set_aside(self.output_dir)
        checkpoint = ours.last_checkpoint(self.output_dir)
        begun = ours.read_identity(checkpoint) if checkpoint else None
        self.walk = ours.plan_walk(self.dataset, begun)
        self.total_steps = ours.count_steps(
            self.walk.places, self.share, epochs=settings.epochs, max_steps=settings.max_steps
        )
        warmup = ours.warmup_steps(settings.lr_scheduler, settings.warmup_ratio, self.total_steps)
        self.model = self.make_model()
        groups = ours.parameter_groups(self.model, self.parts)
        self.optimizer = config.instantiate(settings.optimizer, groups)
        self.scheduler = config.instantiate(
            settings.lr_scheduler, self.optimizer, num_training_steps=self.total_steps, **warmup
        )
        self.loss = partial(
            ours.summed_loss, chunk_rows=settings.loss_chunk_rows, kernel=settings.loss_kernel
        )
        self.check = ours.GradientCheck(self.parts)
        self.throughput = ours.Throughput(self.model, self.device, settings.peak_tflops)
        self.step = 0
        if checkpoint:
            self.step = ours.load_step(
                checkpoint,
                self.model,
                self.optimizer,
                self.scheduler,
                identity=self.identity(),
                total_steps=self.total_steps,
            )
        if self.rank == 0:
            self.logger = config.instantiate(settings.metric_logger)
            self.logger.log_config(self.cfg)
            plan = ours.describe(
                self.model,
                self.optimizer,
                self.parts,
                self.dataset,
                self.walk,
                self.share,
                steps=self.total_steps,
                warmup=warmup.get("num_warmup_steps", 0),
                seed=settings.seed,
            )
            print(plan, flush=True)

    def make_model(self) -> Qwen25VL:
        """Make the model as the run begins with it."""
        settings = self.settings
        return ours.make_model(
            self.source,
            self.tuning,
            dtype=training.get_dtype(settings.dtype, self.device),
            device=self.device,
            seed=settings.seed,
            from_scratch=settings.from_scratch,
            checkpoint_activations=settings.enable_activation_checkpointing,
            compile_layers=settings.compile,
        )

    def identity(self) -> dict[str, Any]:
        """Return what may not change for a run to go on as if it had never stopped.

        The number of steps is not in it: a run may be lengthened by more max_steps or epochs, and
        its schedule is the longer one from there on. Nor are rows that turned bad: the run goes on
        without those that skip_bad_rows names since it began.
        """
        return {
            **self.settings.identity(),
            **self.model_identity,
            **self.walk.identity(),
            "tuning": self.tuning,
            "parts": {name: asdict(part) for name, part in self.parts.items()},
            "samples of a step": self.share.step_samples,
        }

    def train(self) -> None:
        """Take the steps that are left.

        Raises:
            Stopped: after the step in which SIGTERM came, and its checkpoint.
        """
        settings = self.settings
        steps = range(self.step, self.total_steps)
        sampler = ours.TrainSampler(
            self.walk.places, self.share, steps, shuffle=settings.shuffle, seed=settings.seed
        )
        loader = iter(self.loader(self.dataset, sampler, empty=self.walk.empty))
        bar = tqdm(total=self.total_steps, initial=self.step, disable=self.rank > 0, unit="step")
        self.throughput.restart()
        start = time.perf_counter()
        with ours.StopRequest() as stop, bar:
            for _ in steps:
                result = self.take_step(loader)
                bar.update()
                bar.set_postfix_str(f"loss {result.loss:.4f}")
                if self.step == steps.start + 10 and self.rank == 0:
                    seconds = (time.perf_counter() - start) / 10 * (self.total_steps - self.step)
                    bar.write(f"the steps left take about {seconds:.0f} s")
                if self.due(settings.eval_every_n_steps):
                    self.log({"val_loss": self.validate()})
                    self.throughput.restart()
                stops = stop.came(self.device)
                if stops or self.due(settings.save_every_n_steps):
                    self.save_checkpoint()
                    self.throughput.restart()
                if stops:
                    raise ours.Stopped(self.step, self.total_steps)

    def take_step(self, loader: Iterator[ours.StepBatches]) -> ours.StepResult:
        """Train on the next batches, and log what came of it."""
        settings = self.settings
        data = self.ready(self.throughput.waiting(loader))
        ours.seed_step(settings.seed, self.step)
        rates = {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
        result = ours.train_step(
            self.model,
            self.optimizer,
            data.batches,
            scheduler=self.scheduler,
            max_grad_norm=settings.clip_grad_norm,
            check=self.check,
            loss=self.loss,
        )
        self.step += 1
        self.throughput.add(data)
        if self.due(settings.log_every_n_steps):
            self.log(vars(result) | rates | self.throughput.report())
        return result

    def due(self, every: int | None) -> bool:
        """Say whether what is done every so many steps is due after this one."""
        return every is not None and (self.step % every == 0 or self.step == self.total_steps)

    def loader(self, dataset: Any, sampler: Any, **options: Any) -> DataLoader:
        """Make the loader of one step's batches after another."""
        settings = self.settings
        collate = ours.StepCollate(
            self.tokenizer.pad_id,
            batch_size=settings.batch_size,
            pack_to=settings.pack_to,
            mask=self.mask,
        )
        return ours.make_loader(
            dataset, sampler, collate, seed=settings.seed, **options, **settings.dataloader
        )

    def ready(self, data: ours.StepBatches) -> ours.StepBatches:
        """Put batches on the device, equally many on every rank."""
        ours.to_device(data, self.device, mask=self.mask)
        return ours.equal_numbers(data, self.device)

    def validate(self) -> float:
        """Return the mean loss over the labels of the validation data."""
        sampler = ours.ValidationSampler(len(self.val_dataset), self.share)
        steps = self.loader(self.val_dataset, sampler)
        batches = (batch for data in steps for batch in self.ready(data).batches)
        return ours.mean_loss(self.model, batches, device=self.device, loss=self.loss)

    def log(self, figures: dict[str, float]) -> None:
        """Hand figures of this step to the logger."""
        if self.rank == 0:
            self.logger.log_dict(figures, step=self.step)

    def save_checkpoint(self) -> None:
        """Write a checkpoint to go on from."""
        ours.save_step(
            self.output_dir,
            self.step,
            self.model,
            self.optimizer,
            identity=self.identity(),
            keep_last=self.settings.keep_last_n_checkpoints,
        )

    def save(self) -> Path:
        """Write the result in the layout of transformers, or of PEFT."""
        target = self.output_dir / self.settings.save
        weights = ours.gather_weights(self.model, self.device)
        limits = {name: getattr(self.tokenizer, name) for name in ("min_pixels", "max_pixels")}
        run: dict[str, Any] = {"source": self.source, "tuning": self.tuning, "limits": limits}
        if self.rank == 0 and self.settings.save == "adapter":
            ours.save_adapter(target, weights, ours.trained_names(self.model), **run)
        elif self.rank == 0:
            ours.save_model(target, weights, from_scratch=self.settings.from_scratch, **run)
        return target

    def export(self, name: str) -> Path:
        """Write the result as it was at a checkpoint, without data and without training."""
        self.tokenizer = config.instantiate(self.settings.tokenizer)
        checkpoint = ours.named_checkpoint(self.output_dir, name)
        self.model = self.make_model()
        ours.load_weights(
            checkpoint, self.model, identity={**self.model_identity, "tuning": self.tuning}
        )
        return self.save()

    def finish(self, folder: Path) -> None:
        """Close the logger, and call what is to look at the result."""
        if self.rank == 0:
            self.logger.close()
            seconds = time.perf_counter() - self.start
            config.instantiate(self.settings.after_training, folder, seconds)


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: the YAML, with `key=value` from the command line over it."""
    settings, distributed = ours.read_settings(cfg), training.is_distributed()
    if distributed:
        backend = training.get_distributed_backend(look(settings.device).device.type)
        torch.distributed.init_process_group(backend)
    recipe = FinetuneRecipe(cfg)
    if settings.export is not None:
        print(f"{settings.export} is exported to {recipe.export(settings.export)}")
    else:
        recipe.setup()
        recipe.train()
        recipe.finish(recipe.save())
    if distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(ours.in_one_line(recipe_main))
