"""Teach Qwen2.5-VL by rewards of its own answers, images included (GRPO and three relatives of it).

    tune-qwen25vl run policy --config policy dataset.source=questions.jsonl
    tune-qwen25vl run --nproc_per_node 8 policy --config policy dataset.source=questions.jsonl

Of every row `group_size` answers are drawn from the model in training, whose weights are not
copied; a prompt and its images are read once for all of them. Rewards, components of the YAML, say
how good each is, and the loss makes those more likely that are better than the rest of their group.
Prompts stand once in their rows, with all answers behind them. Parts, adapters, packing,
checkpoints and results are those of the recipe finetune, and so are the keys of the YAML.

A step trains on the answers to `batch_size * gradient_accumulation_steps` rows of every rank,
`iterations` times. The log has the difference between the log-probabilities of the sampler and
those of the trainer; answers and rewards of a step are in `answers/step_N.jsonl`.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import config

from torchtune_qwen25vl import evaluation
from torchtune_qwen25vl import training as ours


class PolicyRecipe(ours.TreeRecipe[ours.PolicySettings]):
    """Sets everything up, trains, and saves the result.

    Args:
        cfg: settings of the YAML

    Raises:
        ValueError: if a setting is wrong, before anything is loaded.
    """

    read_table = evaluation.InTraining
    counted = "answers"
    figures: ours.PolicyFigures
    objective: ours.PolicyObjective

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg, ours.read_settings(cfg, ours.PolicySettings))
        if self.settings.loss.get("name") == "dapo":
            self.counted = "tokens"

    def prepare(self) -> None:
        """Make sampler, rewards and loss."""
        settings = self.settings
        self.dataset = ours.Prompts(self.dataset)
        self.rewards = [self.make_reward(section) for section in settings.rewards]
        self.policy_loss = ours.read_policy_loss(settings.loss)
        self.objective = ours.PolicyObjective(
            self.policy_loss,
            temperature=settings.temperature,
            banned=self.placeholders,
            answers=settings.group_size,
            max_new_tokens=settings.max_new_tokens,
            reference=self.reference(),
            frozen_media=self.frozen_media,
            chunk_rows=settings.loss_chunk_rows,
        )
        self.figures = self.objective.figures
        self.loss = ours.computed_in(settings.precision, self.device, self.model, self.objective)
        self.draw = self.sampler(settings.temperature, settings.group_size)
        self.say = self.sampler(0.0, 1)

    def make_reward(self, section: DictConfig) -> tuple[str, ours.Reward, float]:
        """Return the name of a reward, the reward, and its weight."""
        own = {key: value for key, value in section.items() if key != "weight"}
        name = str(section["_component_"]).rpartition(".")[2]
        return name, config.instantiate(DictConfig(own)), float(section.get("weight", 1.0))

    def sampler(self, temperature: float, answers: int) -> ours.Sampler:
        """Make what gives so many answers to each prompt."""
        settings = self.settings
        return ours.Sampler(
            pad_id=self.tokenizer.pad_id,
            stop_tokens=self.tokenizer.stop_tokens,
            banned=self.placeholders,
            temperature=temperature,
            answers=answers,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            rows_in_flight=settings.rows_in_flight,
        )

    def next_batches(self, loader: Iterator[list[dict[str, Any]]]) -> ours.StepBatches:
        """Draw answers to the next prompts, ask their rewards, and make batches of them."""
        prompts = self.throughput.waiting(loader)
        start = time.perf_counter()
        with ours.answering(self.model, self.settings.precision):
            groups = self.draw(self.model, prompts, self.share.numbers(self.step))
        texts = self.texts(groups)
        rewards = self.judge(prompts, texts)
        worth = ours.advantages(rewards, self.policy_loss.scale_rewards, self.device)
        self.note(prompts, groups, rewards, time.perf_counter() - start)
        if self.rank == 0 and (self.step + 1) % self.settings.log_every_n_steps == 0:
            path = self.output_dir / "answers" / f"step_{self.step + 1}.jsonl"
            ours.write_answers(path, prompts, texts, rewards)
        samples = [
            {
                "answers": [
                    ours.answered(prompt, ended, counted=ours.is_counted(prompt)) for ended in group
                ],
                "advantages": advantages,
                "sampled": [ended.log_probs for ended in group],
            }
            for prompt, group, advantages in zip(prompts, groups, worth, strict=True)
        ]
        collate = ours.GroupCollate(
            self.tokenizer.pad_id,
            self.placeholders,
            batch_size=self.settings.batch_size,
            pack_to=self.settings.pack_to,
            across_batches=self.frozen_media,
            mask=self.mask,
        )
        return collate(samples)

    def texts(self, groups: Sequence[Sequence[Any]]) -> list[list[str]]:
        """Decode answers."""
        return [[self.tokenizer.decode(list(one.tokens)) for one in group] for group in groups]

    def judge(
        self, prompts: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]]
    ) -> torch.Tensor:
        """Return the reward of each answer, [prompts, answers], and count what each part gave.

        Answers to a prompt that only fills up a step have 0.
        """
        found = torch.zeros(len(texts), len(texts[0]))
        for number, (prompt, group) in enumerate(zip(prompts, texts, strict=True)):
            row = {**prompt["row"], "reference": prompt["reference"]}
            for answer, text in enumerate(group if ours.is_counted(prompt) else ()):
                total = 0.0
                for name, reward, weight in self.rewards:
                    value = reward(prompt["prompt"], text, row)
                    if value is not None:
                        total += weight * value
                        self.figures.add({f"rewards/{name}": (value, 1)})
                found[number, answer] = total
        return found

    def note(
        self,
        prompts: Sequence[Mapping[str, Any]],
        groups: Sequence[Sequence[Any]],
        rewards: torch.Tensor,
        seconds: float,
    ) -> None:
        """Count what the answers of a step were like, and note what they can teach."""
        counted = torch.tensor(list(map(ours.is_counted, prompts)))
        has_media = torch.tensor(["encoder_input" in prompt for prompt in prompts])
        self.teaches = ours.can_teach(rewards, self.device)
        self.teaches_media = ours.can_teach(rewards[has_media], self.device)
        own, spread = rewards[counted], rewards[counted].std(1)
        ended = [one for k in counted.nonzero()[:, 0].tolist() for one in groups[k]]
        self.figures.add(
            {
                "reward": (float(own.sum()), own.numel()),
                "reward_std": (float(spread.sum()), len(spread)),
                "groups_alike": (float((spread == 0).sum()), len(spread)),
                "answer_tokens": (sum(len(one.tokens) for one in ended), len(ended)),
                "cut": (sum(one.finish_reason == "length" for one in ended), len(ended)),
                "rollout_seconds": (seconds, 1),
            }
        )

    def update(self, data: ours.StepBatches, **changes: Any) -> ours.StepResult:
        """Train on the answers of a step, several times where that is asked for."""
        for number, batch in enumerate(data.batches):
            batch["number"] = number
        last = self.settings.iterations - 1
        for iteration in range(self.settings.iterations):
            self.objective.begin_iteration()
            result = super().update(
                data,
                check=self.check_gradients if self.teaches else None,
                scheduler=self.scheduler if iteration == last else None,
            )
        return result

    def check_gradients(self, model: torch.nn.Module, *, has_media: bool) -> None:
        """Check gradients, those of encoder and merger if answers to images differ in reward."""
        self.check(model, has_media=has_media and self.teaches_media)

    def collate(self) -> Any:
        """Hand on the prompts of a step as they are."""
        return list

    def validate(self) -> dict[str, float]:
        """Return the mean reward of the likeliest answer to each row of the validation data."""
        of_training, self.figures = self.figures, ours.PolicyFigures()
        dataset = ours.Prompts(self.val_dataset)
        walk = self.val_walk
        sampler = ours.ValidationSampler(walk.of_pass, self.share, walk.portions)
        for prompts in self.loader(dataset, sampler, walk):
            with ours.answering(self.model, self.settings.precision):  # on all ranks together
                groups = self.say(self.model, prompts, range(len(prompts)))
            rewards = self.judge(prompts, self.texts(groups))
            counted = sum(map(ours.is_counted, prompts))
            self.figures.add({"reward": (float(rewards.sum()), counted)})
        figures = self.figures.report(self.device)
        self.figures = of_training
        return {f"val_{name}": value for name, value in figures.items()}


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Entry point: the YAML, with `key=value` from the command line over it."""
    settings = ours.read_settings(cfg, ours.PolicySettings)
    ours.run(partial(PolicyRecipe, cfg), settings)


if __name__ == "__main__":
    sys.exit(ours.in_one_line(recipe_main))
