"""A table answered by a model that is being trained, for `eval_by_generation` of its recipes."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from omegaconf import DictConfig, OmegaConf

from torchtune_qwen25vl.evaluation._ask import Asker
from torchtune_qwen25vl.evaluation._records import Record
from torchtune_qwen25vl.evaluation._results import score_records
from torchtune_qwen25vl.evaluation._run import record_of
from torchtune_qwen25vl.evaluation._settings import Settings
from torchtune_qwen25vl.jobs import Ahead, RowQuestion, RowQuestioner, Workers, read_settings
from torchtune_qwen25vl.model import Qwen25VL
from torchtune_qwen25vl.transform import Qwen25VLTransform

KEYS = (
    *("source", "images_dir", "columns", "limit", "metrics", "anls_threshold", "iou_threshold"),
    *("prompt", "prompt_file", "system_prompt", "max_new_tokens"),
    *("min_pixels", "max_pixels", "batch_size", "batch_tokens"),
)
USUAL = {"limit": 64, "batch_size": 8, "batch_tokens": 16384}
OWN = {"model": "the one in training", "workers": 0}


def read_section(section: Mapping[str, Any]) -> Settings:
    """Read `eval_by_generation` of a YAML; its table is not looked at.

    Raises:
        ValueError: if a key is unknown, missing, or of another kind.
    """
    if unknown := sorted(set(map(str, section)) - set(KEYS)):
        raise ValueError(f"eval_by_generation has no keys {unknown}; it takes {list(KEYS)}")
    cfg = OmegaConf.merge(OWN, USUAL, DictConfig(section))
    assert isinstance(cfg, DictConfig)
    try:
        return read_settings(cfg, Settings)
    except ValueError as error:
        raise ValueError(f"eval_by_generation: {error}") from error


class InTraining:
    """A table, read once; every call asks the model that is being trained.

    Args:
        section: `eval_by_generation` of a YAML: keys of the recipe evaluate, as far as they are not
            about the model or about files. Limits of pixels are those of the training, and 64 rows
            are asked, unless it says otherwise

    Raises:
        ValueError: if a key is none of these, or a row has no reference.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        self._settings = read_section(section)
        try:
            self._settings.truths  # noqa: B018
        except ValueError as error:
            raise ValueError(f"eval_by_generation: {error}") from error

    def __call__(self, model: Qwen25VL, transform: Qwen25VLTransform) -> dict[str, float]:
        """Return the mean of each metric; the model is left as it was.

        On several ranks every one of them asks all rows, as forwards of a sharded model are those
        of all ranks.

        Raises:
            ValueError: if there is no row that can be scored.
        """
        results = score_records(self._settings, self._answers(model, transform))
        if len(results.failed) == len(results.rows):
            raise ValueError(
                f"eval_by_generation: no row of {', '.join(self._settings.sources)} has a score, "
                f"the first as {results.failed[0].problem}"
            )
        means = {name: score.mean for name, score in results.scores.items()}
        return {name: mean for name, mean in means.items() if mean is not None}

    def _answers(self, model: Qwen25VL, transform: Qwen25VLTransform) -> dict[str, Record]:
        """Ask the model all rows; return how they ended, by name."""
        settings = self._settings
        questioner = RowQuestioner(
            transform, settings, max_pixels=settings.max_pixels or transform.max_pixels
        )
        size, rows = settings.batch_size, settings.rows
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        most = settings.batch_tokens or sys.maxsize
        asker = Asker(model, transform, settings, settings.truths, batch_tokens=most)
        records: dict[str, Record] = {}
        with closing(Ahead(questioner.batches(batches, Workers(0), ahead=size))) as ahead:

            def questions() -> Iterator[Sequence[RowQuestion]]:
                for batch in ahead:
                    for name, problem in batch.problems.items():
                        records[name] = Record(name, "failed", reason=problem)
                    yield batch.questions

            for replies in asker(questions()):
                for reply in replies:
                    name, problem = reply.question.name, reply.reason
                    records[name] = (
                        Record(name, "failed", reason=problem)
                        if problem
                        else record_of(reply, settings)
                    )
        return records
