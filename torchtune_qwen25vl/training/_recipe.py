"""The run that recipes share: set-up, loop, checkpoints, result; `Stepping` is what a step is."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from omegaconf import DictConfig, OmegaConf
from torchtune import config, training, utils
from tqdm import tqdm

from torchtune_qwen25vl import _ranks
from torchtune_qwen25vl.device import choose_kernels, look
from torchtune_qwen25vl.model import Qwen25VL, products_by
from torchtune_qwen25vl.training import _state as state
from torchtune_qwen25vl.training._answering import answering
from torchtune_qwen25vl.training._batches import Mask, row_mask
from torchtune_qwen25vl.training._ends import Stopped, StopRequest
from torchtune_qwen25vl.training._model import gather_weights, make_model, save_adapter, save_model
from torchtune_qwen25vl.training._parts import (
    GradientCheck,
    Part,
    parameter_groups,
    read_parts,
    trained_names,
    tuning,
)
from torchtune_qwen25vl.training._plan import count_steps, describe, warmup_steps
from torchtune_qwen25vl.training._precision import Precision
from torchtune_qwen25vl.training._samples import Share, TrainSampler
from torchtune_qwen25vl.training._settings import Settings
from torchtune_qwen25vl.training._stepping import Stepping
from torchtune_qwen25vl.training._throughput import Throughput
from torchtune_qwen25vl.training._walk import plan_walk, samples_of
from torchtune_qwen25vl.weights import find_weights, fingerprint

S = TypeVar("S", bound=Settings)


class Recipe(Stepping[S]):
    """A run from its YAML to its result, but for what is made for its steps.

    Args:
        cfg: settings of the YAML, for the logger
        settings: the same, checked

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.

    Attributes:
        read_table: makes of `eval_by_generation` what scores a model, given it and its transform
    """

    read_table: ClassVar[Callable[..., Callable[..., dict[str, float]]]]

    def __init__(self, cfg: DictConfig, settings: S) -> None:
        self.start = time.perf_counter()
        self.cfg, self.settings = cfg, settings
        self.world_size, self.rank = utils.get_world_size_and_rank()
        machine = look(settings.device)
        self.device = utils.get_device(str(machine.device))
        self.kernels, self.why_kernels = choose_kernels(machine, settings.cpu_kernels)
        named = isinstance(settings.model_dir, str)
        model_dir = settings.model_dir if named else config.instantiate(settings.model_dir)
        self.source, _ = find_weights(model_dir)
        self.output_dir = Path(settings.output_dir)
        self.parts = read_parts(settings.parts)
        adapters = OmegaConf.to_container(settings.adapters or DictConfig({}), resolve=True)
        assert isinstance(adapters, dict)
        self.tuning = tuning(self.parts, {str(key): value for key, value in adapters.items()})
        source = fingerprint(self.source)
        self.model_identity = {"source": source, "from_scratch": settings.from_scratch}
        self.share = Share(
            settings.batch_size * settings.gradient_accumulation_steps, self.rank, self.world_size
        )
        self.mask: Mask = "dense" if settings.pack_to is None else row_mask(self.device)
        section = settings.eval_by_generation
        self.table = None if section is None else self.read_table(section)

    def setup(self) -> None:
        """Make data, model, optimiser and schedule, as the last checkpoint left them, if any."""
        settings = self.settings
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.tokenizer = config.instantiate(settings.tokenizer)
        self.dataset = config.instantiate(settings.dataset, self.tokenizer)
        self.val_dataset = config.instantiate(settings.val_dataset, self.tokenizer)
        if not settings.resume:
            state.set_aside(self.output_dir)
        checkpoint = state.last_checkpoint(self.output_dir)
        begun = state.read_identity(checkpoint) if checkpoint else None
        self.walk, self.dataset = plan_walk(self.dataset, begun), samples_of(self.dataset)
        if self.val_dataset is not None:
            self.val_walk = plan_walk(self.val_dataset, None)
            self.val_dataset = samples_of(self.val_dataset)
        self.total_steps = count_steps(
            self.walk.of_pass, self.share, epochs=settings.epochs, max_steps=settings.max_steps
        )
        warmup = warmup_steps(settings.lr_scheduler, settings.warmup_ratio, self.total_steps)
        self.model = self.make_model()
        self.prepare()
        self.optimizer = config.instantiate(
            settings.optimizer, parameter_groups(self.model, self.parts)
        )
        self.scheduler = config.instantiate(
            settings.lr_scheduler, self.optimizer, num_training_steps=self.total_steps, **warmup
        )
        self.check = GradientCheck(self.parts)
        self.throughput = Throughput(self.model, self.device, settings.peak_tflops)
        self.step, self.best = 0, state.read_best(checkpoint)
        if checkpoint:
            self.step = state.load_step(
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
            print(self.plan(warmup.get("num_warmup_steps", 0)), flush=True)

    def make_model(self) -> Qwen25VL:
        """Make the model as the run begins with it."""
        settings, on_gpu = self.settings, self.device.type == "cuda"
        return make_model(
            self.source,
            self.tuning,
            precision=settings.precision,
            device=self.device,
            seed=settings.seed,
            from_scratch=settings.from_scratch,
            checkpoint_activations=settings.enable_activation_checkpointing,
            compile_layers=on_gpu if settings.compile is None else settings.compile,
        )

    def frozen_model(self, source: Path, precision: Precision) -> Qwen25VL:
        """Make another model, of which nothing is trained."""
        frozen = {name: Part("frozen") for name in self.parts}
        model = make_model(
            source,
            tuning(frozen, {}),
            precision=precision,
            device=self.device,
            seed=self.settings.seed,
        )
        return model.eval()

    def plan(self, warmup: int) -> str:
        """Write what the run is going to do, a few lines for people."""
        described = describe(
            self.model,
            self.parts,
            self.dataset,
            self.walk,
            self.share,
            steps=self.total_steps,
            warmup=warmup,
            seed=self.settings.seed,
        )
        return "\n".join((described, *self.why_kernels))

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
        settings, worse = self.settings, self.settings.stop_after_n_worse
        is_over = self.best.is_given_up(worse)
        steps = range(self.step, self.step if is_over else self.total_steps)
        walk = self.walk
        order: dict[str, Any] = {"shuffle": settings.shuffle, "seed": settings.seed}
        order |= {"portions": walk.portions, "window": walk.window}
        sampler = TrainSampler(walk.of_pass, self.share, steps, **order)
        loader = iter(self.loader(self.dataset, sampler, walk))
        bar = tqdm(total=self.total_steps, initial=self.step, disable=self.rank > 0, unit="step")
        self.throughput.restart()
        start = time.perf_counter()
        with StopRequest() as stop, bar:
            for _ in steps:
                loss = self.take_step(loader)
                bar.update()
                bar.set_postfix_str(f"loss {loss:.4f}")
                if self.step == steps.start + 10 and self.rank == 0:
                    seconds = (time.perf_counter() - start) / 10 * (self.total_steps - self.step)
                    bar.write(f"the steps left take about {seconds:.0f} s")
                if self.due(settings.eval_every_n_steps):
                    self.evaluate()
                    self.throughput.restart()
                stops, is_over = stop.came(self.device), self.best.is_given_up(worse)
                is_best = self.best.step == self.step
                if stops or is_over or is_best or self.due(settings.save_every_n_steps):
                    self.save_checkpoint()
                    self.throughput.restart()
                if stops:
                    raise Stopped(self.step, self.total_steps)
                if is_over:
                    bar.write(
                        f"over: {self.best.worse} evaluations were no better than {self.best}"
                    )
                    break
        if settings.save_best:
            best = state.named_checkpoint(self.output_dir, self.best.name)
            state.load_weights(best, self.model, identity=self.identity())

    def evaluate(self) -> None:
        """Log figures of the validation data and of the table, and note whether they are best."""
        figures = {} if self.val_dataset is None else self.validate()
        if self.table is not None:
            with answering(self.model, self.settings.precision):
                scores = _ranks.from_first(self.table(self.model, self.tokenizer))
            figures |= {f"val_{name}": mean for name, mean in scores.items()}
        self.log(figures)
        if self.settings.keep_best is not None:
            self.best = self.best.after(self.step, figures, self.settings.keep_best)

    def save_checkpoint(self) -> None:
        """Write a checkpoint to go on from."""
        state.save_step(
            self.output_dir,
            self.step,
            self.model,
            self.optimizer,
            identity=self.identity() | self.walk.learned(),
            keep_last=self.settings.keep_last_n_checkpoints,
            best=self.best,
        )

    def save(self) -> Path:
        """Write the result in the layout of transformers, or of PEFT."""
        target = self.output_dir / self.settings.save
        weights = gather_weights(self.model, self.device)
        limits = {name: getattr(self.tokenizer, name) for name in ("min_pixels", "max_pixels")}
        run: dict[str, Any] = {"source": self.source, "tuning": self.tuning, "limits": limits}
        if self.rank == 0 and self.settings.save == "adapter":
            save_adapter(target, weights, trained_names(self.model), **run)
        elif self.rank == 0:
            save_model(target, weights, from_scratch=self.settings.from_scratch, **run)
        return target

    def export(self, name: str) -> Path:
        """Write the result as it was at a checkpoint, without data and without training."""
        self.tokenizer = config.instantiate(self.settings.tokenizer)
        checkpoint = state.named_checkpoint(self.output_dir, name)
        self.model = self.make_model()
        identity = {"tuning": self.tuning, "precision": self.settings.precision}
        state.load_weights(checkpoint, self.model, identity={**self.model_identity, **identity})
        return self.save()

    def finish(self, folder: Path) -> None:
        """Close the logger, and call what is to look at the result."""
        if self.rank == 0:
            self.logger.close()
            seconds = time.perf_counter() - self.start
            config.instantiate(self.settings.after_training, folder, seconds)


def run(recipe: Callable[[], Recipe], settings: Settings) -> None:
    """Run a recipe, or export a checkpoint of it, on this rank of those that torchrun started.

    Args:
        recipe: makes the recipe, once the ranks know each other
        settings: settings of the run
    """
    distributed = training.is_distributed()
    if distributed:
        backend = training.get_distributed_backend(look(settings.device).device.type)
        torch.distributed.init_process_group(backend)
    made = recipe()
    with products_by(made.kernels):
        if settings.export is not None:
            print(f"{settings.export} is exported to {made.export(settings.export)}")
        else:
            made.setup()
            made.train()
            made.finish(made.save())
    if distributed:
        torch.distributed.destroy_process_group()
