"""Everything that can be known before a model is loaded, in one table.

Only the headers of files are read, no weight and no image.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchtune_qwen25vl.device._choice import Choice, choose, downgrades
from torchtune_qwen25vl.device._machine import Machine
from torchtune_qwen25vl.device._memory import (
    LEAST_PIXELS,
    Footprint,
    pixel_budget,
    token_budget,
    weights_bytes,
)
from torchtune_qwen25vl.transform import PLACEHOLDER_PIXELS, Qwen25VLTransform
from torchtune_qwen25vl.weights import Adapter, Checkpoint, find_weights


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        what: thing that was looked at
        found: what it is like
        passed: whether the model can be run with it
        remedy: what the user can do if not
    """

    what: str
    found: str
    passed: bool = True
    remedy: str = ""


@dataclass
class Preflight:
    """What was found, and when all is well, how to run the model.

    Attributes:
        checks: lines of the table
        choice: device, dtype and attention
        max_pixels: most pixels of an image for which the free memory is enough
        batch_tokens: most tokens of a batch, with images of so many pixels
    """

    checks: list[Check] = field(default_factory=list)
    choice: Choice | None = None
    max_pixels: int = 0
    batch_tokens: int = 0

    @property
    def table(self) -> str:
        """Format the table as text."""
        width = max((len(check.what) for check in self.checks), default=0)
        lines = []
        for check in self.checks:
            lines.append(f"{'ok' if check.passed else 'NO':4}{check.what:{width}}  {check.found}")
            if not check.passed:
                lines.append(f"{'':4}{'':{width}}  -> {check.remedy}")
        return "\n".join(lines)

    def refuse(self) -> Choice:
        """Return how to run the model.

        Raises:
            ValueError: with the lines that did not pass, if there are any.
        """
        failed = [c for c in self.checks if not c.passed]
        if failed:
            problems = "; ".join(f"{c.what}: {c.found} -> {c.remedy}" for c in failed)
            raise ValueError(f"the model cannot be run here: {problems}")
        assert self.choice is not None
        return self.choice


@dataclass(frozen=True)
class Load:
    """What a model will be given.

    Attributes:
        text_tokens: tokens of each row's prompt and answer, without its image
        min_pixels: fewest pixels of an image; None for the checkpoint's own
        max_pixels: most pixels of an image; None for what memory allows
        own_limits: whether max_pixels is the checkpoint's own where it is None
    """

    text_tokens: int = 1024
    min_pixels: int | None = LEAST_PIXELS
    max_pixels: int | None = None
    own_limits: bool = False

    def limited_by(self, transform: Qwen25VLTransform) -> "Load":
        """Take those limits from a checkpoint's transform that are to be its own."""
        return replace(
            self,
            min_pixels=self.min_pixels or transform.min_pixels,
            max_pixels=self.max_pixels or (transform.max_pixels if self.own_limits else None),
        )


def check_model(
    source: str | os.PathLike[str],
    machine: Machine,
    load: Load,
    *,
    settings_dir: str | os.PathLike[str] | None = None,
    adapter: Adapter | None = None,
    allow_downgrade: bool = False,
    **wishes: str,
) -> Preflight:
    """Check whether a model on disk is whole, and can be run on a machine.

    Args:
        source: folder or .safetensors file
        machine: machine the model would run on
        load: what the model will be given
        settings_dir: folder of config.json and tokenizer, for weights that lie elsewhere
        adapter: is merged into the weights
        allow_downgrade: whether bf16 may replace fp32, and then 4 bits, if the model does not fit
        **wishes: dtype, attention, four_bit and cpu_kernels of `choose`
    """
    preflight = Preflight([Check("software", machine.versions)])
    try:
        folder, files = find_weights(source)
        settings = folder if settings_dir is None else Path(settings_dir)
        checkpoint = Checkpoint(folder, files, settings, adapter)
        load = load.limited_by(Qwen25VLTransform.from_folder(processor_of(settings, adapter)))
    except (ValueError, OSError) as error:
        remedy = "fetch the checkpoint again, or name another one"
        preflight.checks.append(Check("model files", str(error), False, remedy))
        return preflight
    shapes = checkpoint.files.shape_of
    found = f"{len(shapes)} weights in {len(set(checkpoint.files.file_of.values()))} files"
    preflight.checks.append(Check("model files", f"{found}, config, tokenizer"))
    chosen = choose(machine, checkpoint.dtypes, **wishes)  # type: ignore[arg-type]
    choice = _fitting(chosen, machine, checkpoint, load) if allow_downgrade else chosen
    needed, footprint, least = _needs(choice, checkpoint, load)
    preflight.checks.append(
        Check(
            f"memory of {machine.name}",
            f"{_gb(needed)} of weights and {_gb(least)} for the smallest image, "
            f"{_gb(machine.free)} of {_gb(machine.total)} free",
            needed + least <= machine.free,
            "free memory that other programs hold, take a smaller model, set four_bit=on, or "
            "allow_downgrade=True for whatever fits",
        )
    )
    preflight.choice = choice
    assert load.min_pixels is not None
    left, text_tokens = max(machine.free - needed, 0), load.text_tokens
    preflight.max_pixels = load.max_pixels or pixel_budget(
        left, footprint, text_tokens=text_tokens, min_pixels=load.min_pixels
    )
    preflight.batch_tokens = token_budget(
        left, footprint, max_pixels=preflight.max_pixels, text_tokens=text_tokens
    )
    return preflight


def processor_of(settings: Path, adapter: Adapter | None) -> Path:
    """Return the folder of tokenizer and processor: that of an adapter which has its own, or else.

    An adapter that was trained here comes with the limits of pixels of its training.
    """
    own = adapter is not None and (adapter.folder / "preprocessor_config.json").is_file()
    return adapter.folder if adapter is not None and own else settings


def _fitting(choice: Choice, machine: Machine, checkpoint: Checkpoint, load: Load) -> Choice:
    """Return the first choice that fits, from fine to coarse, or the finest if none does."""
    for candidate in (choice, *downgrades(choice, machine)):
        needed, _, least = _needs(candidate, checkpoint, load)
        if needed + least <= machine.free:
            return candidate
    return choice


def _needs(choice: Choice, checkpoint: Checkpoint, load: Load) -> tuple[int, Footprint, int]:
    """Return the bytes of the weights, the model's footprint, and the bytes of the least batch."""
    assert load.min_pixels is not None
    shapes = checkpoint.files.shape_of
    footprint = Footprint.of(checkpoint.model, choice.dtype)
    return (
        weights_bytes(shapes, choice.dtype, four_bit=choice.four_bit),
        footprint,
        footprint.batch(1, load.min_pixels // PLACEHOLDER_PIXELS, load.text_tokens),
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
