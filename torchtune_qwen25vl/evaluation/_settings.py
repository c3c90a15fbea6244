"""The keys of the evaluate recipe."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from omegaconf import ListConfig

from torchtune_qwen25vl.evaluation._choices import listed
from torchtune_qwen25vl.evaluation._metrics import BOXES, METRICS, WEIGHING
from torchtune_qwen25vl.evaluation._truths import Truth, choices_of, read_truth
from torchtune_qwen25vl.generation import Sampling, check_options
from torchtune_qwen25vl.jobs import Row, TableSettings

NAMES = {  # of columns
    "id": ("question_id", "id"),
    "image": ("image", "images", "image_name", "image_id"),
    "text": ("question", "prompt"),
}
BY_LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Columns:
    """Columns of the table; null for the names in use."""

    id: str | None = None
    image: str | None = None
    question: str | None = None
    reference: str | None = None
    choices: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings(TableSettings):
    """The keys of the evaluate recipe beside those of every job on a table."""

    command = "tune-qwen25vl run evaluate"
    results = "evaluation"
    takes_adapters = True
    names = NAMES
    decides = (*TableSettings.decides, "columns")

    inputs: Any = None  # what other jobs call `source`
    source: str | ListConfig | None = None  # tables
    columns: Columns = field(default_factory=Columns)
    limit: int | None = None  # the first rows only
    # what is scored
    metrics: str | ListConfig
    anls_threshold: float = 0.5
    iou_threshold: float = 0.5
    prompt: str = "{question}{choices}"
    review: int = 200  # rows on the page, the worst first

    def __post_init__(self) -> None:
        if self.inputs is not None and self.source is not None:
            raise ValueError(f"give source or inputs, got {self.source} and {self.inputs}")
        super().__post_init__()
        check_options(self.max_new_tokens, self.sampling)
        unknown = [name for name in self.scored if name not in METRICS]
        if unknown or not self.scored:
            raise ValueError(f"metrics are of {', '.join(METRICS)}, got {unknown or self.scored}")
        if BOXES in self.scored and len(self.scored) > 1:
            raise ValueError(
                f"the references of {BOXES} are boxes, so no metric of texts goes with it, got "
                f"metrics {self.scored}: score them in another run"
            )
        for name, least in (("limit", 1), ("review", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is at least {least}, got {value}")
        for name in ("anls_threshold", "iou_threshold"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is from 0 to 1, got {share}")

    @property
    def _inputs(self) -> list[Any]:
        given = self.inputs if self.source is None else self.source
        return list(given) if isinstance(given, (list, ListConfig)) else [given]

    @property
    def scored(self) -> list[str]:
        """The names of the metrics, one or many, each once."""
        metrics = [self.metrics] if isinstance(self.metrics, str) else self.metrics
        return list(dict.fromkeys(map(str, metrics)))

    @property
    def sampling(self) -> Sampling:
        """How a token of the answer is chosen: it is the likeliest."""
        return Sampling()

    @property
    def generates(self) -> bool:
        """Whether a metric needs answers."""
        return set(self.scored) != {WEIGHING}

    @property
    def weighs(self) -> bool:
        """Whether a metric needs the log-probabilities of letters."""
        return WEIGHING in self.scored

    @property
    def named_columns(self) -> dict[str, str | None]:
        """The column of each of `names` that the settings name; None for those in use."""
        columns = self.columns
        return {"id": columns.id, "image": columns.image, "text": columns.question}

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of all inputs, or the first of them."""
        return super().rows[: self.limit]

    @cached_property
    def truths(self) -> Mapping[str, Truth]:
        """What the table says of each row that can be asked about, by name.

        Raises:
            ValueError: naming the first row that has no reference, or no choices.
        """
        columns = asdict(self.columns)
        sound = [row for row in self.rows if not row.problem]
        return {row.name: read_truth(row, columns, self.scored) for row in sound}

    def values(self, row: Row) -> dict[str, Any]:
        """Return what the names in braces stand for."""
        choices = choices_of(row, self.columns.choices)
        lines = f"\n{listed(choices)}\n{BY_LETTER}" if choices else ""
        return super().values(row) | {"choices": lines}

    @property
    def text_tokens(self) -> int:
        """The most tokens of a row beside its images: no token is less than a character."""
        longest = max(len(self.values(row)["choices"]) for row in self.rows)
        return super().text_tokens + longest

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that answers depend on; metrics can be changed afterwards."""
        own = {
            "columns": asdict(self.columns),
            "generates": self.generates,
            "weighs": self.weighs,
        }
        return super().decisive() | own

    def told(self) -> dict[str, Any]:
        """Return the settings that are printed with the score."""
        names = ("limit", "max_new_tokens", "min_pixels", "system_prompt", "images_dir")
        return {
            "source": self.sources,
            "metrics": self.scored,
            "prompt": self.template,
            **{name: getattr(self, name) for name in names},
            "anls_threshold": self.anls_threshold,
            "iou_threshold": self.iou_threshold,
            "columns": asdict(self.columns),
        }
