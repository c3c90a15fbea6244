"""Answers that the model in training gives itself, and the batches of trees they become.

Shapes: s tokens of a prompt, n of an answer, g answers of a group, t trees, m longest answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils.rnn import pad_sequence
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from torchtune_qwen25vl._files import write_file
from torchtune_qwen25vl._torchtune import made_labels
from torchtune_qwen25vl.generation import Ended, Prompt, RunningBatch, Sampling
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.training._images import Images
from torchtune_qwen25vl.training._seeds import seed_of
from torchtune_qwen25vl.training._trees import Row, TreeCollate, plant

Sample = Mapping[str, Any]
Place = tuple[int, int]  # number of the prompt, number of the answer


class Prompts:
    """The prompts of a data set, see `SampleDataset.prompt`.

    Args:
        dataset: data set of this package

    Raises:
        ValueError: if it is another one.
    """

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "prompt"):
            raise ValueError(
                f"the recipe policy asks the prompts of rows, which {type(dataset).__name__} does "
                "not tell; take a data set of torchtune_qwen25vl.data"
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the prompt of a row."""
        return self.dataset.prompt(index)


@dataclass(frozen=True)
class Sampler:
    """Gives answers to prompts, each group from one reading of its prompt and its images.

    The weights are those of the model itself; caches last as long as the call.

    Attributes:
        pad_id: token at padding
        stop_tokens: an answer ends with the first of these
        banned: tokens that no answer holds, those that stand for images
        temperature: divides the logits
        answers: number of answers to a prompt
        max_new_tokens: length of the longest
        seed: seed of the run
        rows_in_flight: answers that are continued together at most; None for all
    """

    pad_id: int
    stop_tokens: Sequence[int]
    banned: tuple[int, ...]
    temperature: float
    answers: int
    max_new_tokens: int
    seed: int
    rows_in_flight: int | None = None

    def __call__(
        self, model: Qwen25VL, prompts: Sequence[Sample], numbers: Sequence[int]
    ) -> list[list[Ended[Place]]]:
        """Return the answers to each prompt.

        Args:
            model: model in training; it is left as it was
            prompts: what the transform made for inference, of those that do not count with labels
            numbers: number of each prompt in the run, from which its draws follow
        """
        batch: RunningBatch[Place] = RunningBatch(
            model,
            self.pad_id,
            Sampling(self.temperature),
            max_new_tokens=self.max_new_tokens,
            stop_tokens=self.stop_tokens,
            banned=self.banned,
            with_log_probs=True,
        )
        samples = [{k: v for k, v in prompt.items() if k != "labels"} for prompt in prompts]
        found: dict[Place, Ended[Place]] = {}
        left = list(range(len(prompts)))
        with gathered_weights(model):
            while left or batch.questions:
                entering = left[: self._space(len(batch.questions))]
                left = left[len(entering) :]
                if entering:
                    rows = [
                        Prompt((k, j), samples[k], self._chance(model, numbers[k], j))
                        for k in entering
                        for j in range(self.answers)
                    ]
                    batch.enter(rows, copies=self.answers)
                found |= {ended.question: ended for ended in batch.advance()}
        return [[found[k, j] for j in range(self.answers)] for k in range(len(prompts))]

    def _space(self, in_flight: int) -> int | None:
        """Say how many prompts may enter, beside so many rows; None for all."""
        if self.rows_in_flight is None:
            return None
        free = (self.rows_in_flight - in_flight) // self.answers
        return max(free, 0 if in_flight else 1)

    def _chance(self, model: Qwen25VL, number: int, answer: int) -> torch.Generator | None:
        if self.temperature == 0:
            return None
        generator = torch.Generator(model.norm.scale.device)
        return generator.manual_seed(seed_of(self.seed, number, answer))


@contextmanager
def gathered_weights(model: nn.Module) -> Iterator[None]:
    """Hold whole weights of a sharded model, so that ranks need not take their steps together."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(module is not model, recurse=False)
            module.reshard()


def answered(prompt: Sample, ended: Ended[Any], *, counted: bool) -> dict[str, Any]:
    """Return the sample of a prompt with an answer, on all of whose tokens it is trained.

    Args:
        prompt: what the transform made for inference
        ended: the answer
        counted: whether the answer counts; else it has no labels
    """
    tokens = torch.as_tensor(prompt["tokens"])
    own = torch.tensor(ended.tokens)  # [n]
    positions = torch.as_tensor(prompt["input_pos"])  # [s, 3]
    after = positions.max() + 1 + torch.arange(len(own))  # [n]
    labels = torch.full_like(tokens, CROSS_ENTROPY_IGNORE_IDX)
    told = own if counted else torch.full_like(own, CROSS_ENTROPY_IGNORE_IDX)
    return {
        "tokens": torch.cat((tokens, own)),
        "labels": made_labels(torch.cat((labels, told))),
        "input_pos": torch.cat((positions, after[:, None].expand(-1, 3))),
        **({"encoder_input": prompt["encoder_input"]} if "encoder_input" in prompt else {}),
    }


def is_counted(prompt: Sample) -> bool:
    """Say whether a prompt counts: one that only fills up a step is given labels, all ignored."""
    return "labels" not in prompt


def write_answers(
    path: Path, prompts: Sequence[Sample], texts: Sequence[Sequence[str]], rewards: Tensor
) -> None:
    """Write the answers of a step and their rewards, a JSON line each.

    Args:
        path: file, which appears whole or not at all
        prompts: what was asked
        texts: answers to each, g of them
        rewards: reward of each answer, [prompts, g]
    """
    lines = [
        {
            "prompt": prompt["prompt"],
            "answer": text,
            "reward": reward,
            "reference": prompt["reference"],
        }
        for prompt, group, values in zip(prompts, texts, rewards.tolist(), strict=True)
        for text, reward in zip(group, values, strict=True)
    ]
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_file(path, text.encode())


class GroupCollate(TreeCollate):
    """Prompts with their answers to batches of trees.

    A sample has "answers", a sample of each, "advantages" [g], and "sampled", the log-probabilities
    of the tokens of each answer under which they were drawn.

    Beside what `TreeCollate` makes, a batch has "advantages" [t, g] and "sampled" [t * g, m], which
    is 0 behind an answer's own tokens. Arguments are those of `TreeCollate`.
    """

    def _trees(
        self, samples: Sequence[Sample], groups: Sequence[Sequence[int]], images: Images
    ) -> list[Row]:
        return [plant(*(self._answer(one, images) for one in s["answers"])) for s in samples]

    def _marks(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        sampled = [torch.as_tensor(np.array(one)) for s in samples for one in s["sampled"]]
        return {
            "advantages": torch.stack([sample["advantages"] for sample in samples]),
            "sampled": pad_sequence(sampled, batch_first=True).float(),
        }
