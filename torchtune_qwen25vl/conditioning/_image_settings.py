"""The keys of the image recipe."""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torchtune_qwen25vl.conditioning._settings import Columns
from torchtune_qwen25vl.conditioning._settings import Settings as EmbedSettings
from torchtune_qwen25vl.conditioning._sizes import read_size
from torchtune_qwen25vl.conditioning._sources import find_prompts
from torchtune_qwen25vl.conditioning._templates import Task
from torchtune_qwen25vl.jobs import JobSettings, Row

PRESETS = {"fast": (20, 4.0), "balanced": (30, 4.0), "high": (50, 4.0)}  # steps, true_cfg_scale
LIGHTNING = (8, 1.0)  # with a LoRA that was made for few steps


@dataclass(frozen=True, kw_only=True)
class ImageSettings(JobSettings):
    """The keys of the image recipe beside those of every job."""

    command = "tune-qwen25vl run image"
    results = "images"
    input_kind = "a table of prompts, a folder of text files, or a list with a prompt a line"
    own_limits = True
    decides = (
        *("model", "text_encoder", "tokenizer", "seed", "columns", "images_dir", "lora"),
        *("preset", "steps", "true_cfg_scale", "negative_prompt", "size", "max_sequence_length"),
    )

    min_pixels: int | None = None
    batch_size: int = 32
    batch_tokens: int = 4096
    # what goes in
    images_dir: str | None = None
    columns: Columns = field(default_factory=Columns)
    # how it is drawn
    preset: Literal["fast", "balanced", "high"] = "balanced"
    steps: int | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str = " "
    size: str | None = None
    lora: str | None = None
    max_sequence_length: int | None = 512
    # the text encoder
    text_encoder: str | None = None
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            read_size(self.size)
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps are at least 1, got {self.steps}")
        if self.lora is not None and not Path(self.lora).expanduser().is_file():
            raise ValueError(f"lora is a file of an adapter, {self.lora} is none")
        for name in ("four_bit", "settings_dir", "allow_downgrade", "min_pixels", "max_pixels"):
            if getattr(self, name) not in (None, False, "auto", "off"):
                raise ValueError(f"{name} means nothing to drawing: leave it out")

    @property
    def schedule(self) -> tuple[int, float]:
        """Steps, and the scale of guidance; 1 is none."""
        steps, scale = LIGHTNING if self.lora else PRESETS[self.preset]
        scale = scale if self.true_cfg_scale is None else self.true_cfg_scale
        return self.steps or steps, scale

    def prompts(self, task: Task) -> list[Row]:
        """Read the prompts of all inputs."""
        columns = asdict(self.columns)
        return find_prompts(
            self.sources,
            images_dir=self.images_dir,
            columns=columns | {"text": columns["prompt"]},
            takes_images=task != "text_to_image",
        )

    @cached_property
    def embeds_dir(self) -> Path:
        """Folder of embeddings, inside that of the images."""
        return self.folder / "prompt_embeds"

    def embedding(self, task: Task, source: Path) -> EmbedSettings:
        """Return the settings with which prompts are embedded first."""
        same = ("device", "dtype", "attention", "cpu_kernels", "workers", "seconds_per_image")
        also = ("batch_size", "batch_tokens", "retry_failed")
        shared = {name: getattr(self, name) for name in (*same, *also)}
        return EmbedSettings(
            **shared,
            inputs=self.inputs,
            output_dir=str(self.embeds_dir),
            model=self.text_encoder or str(source),
            tokenizer=self._tokenizer(source),
            task=task,
            max_sequence_length=self.max_sequence_length if task == "text_to_image" else None,
        )

    def _tokenizer(self, source: Path) -> str | None:
        """A single file has none of its own: it gets that of the pipeline."""
        is_file = self.text_encoder is not None and Path(self.text_encoder).expanduser().is_file()
        return self.tokenizer or (str(source / "tokenizer") if is_file else None)

    def decisive(self) -> dict[str, Any]:
        """Values of the settings that images depend on."""
        return super().decisive() | {"columns": asdict(self.columns)}
