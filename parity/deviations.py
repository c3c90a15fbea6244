"""What versions of transformers do otherwise, as data: the reference is not one thing.

A stage passes under a version if every case equals ours, or exactly what ours gives under the
fault that a deviation names, or is refused by theirs exactly as a deviation names. The bounds were
read from the sources of 27 releases; CONTRIBUTING.md says how to run the harness on another one.
"""

import re
from dataclasses import dataclass

from parity import reference

GITHUB = "https://github.com/huggingface/transformers"
IMAGE_LIMITS = "limits of images for videos"
FRACTIONS = ("time of frames in fp64", "seconds rounded to 0.1")


@dataclass(frozen=True)
class Deviation:
    """What a range of versions does otherwise in one stage.

    Attributes:
        stage: name of the stage
        first: the first version that does it; "" where it always did
        fixed: the first version that no longer does it; "" where none is known
        what: in a few words
        fault: a key of FAULTS or RULES: ours under it equals theirs; "" for a refusal
        thread: where it is reported or mended; "" where no thread was found
        hides: faults that only its cases could see
        refusal: name of the exception by which theirs refuses the cases; `NotThereError` where this
            version has nothing that could be asked
        cases: parts of the names of the refused cases
    """

    stage: str
    first: str
    fixed: str
    what: str
    fault: str = ""
    thread: str = ""
    hides: tuple[str, ...] = ()
    refusal: str = ""
    cases: tuple[str, ...] = ()

    def holds(self, version: str) -> bool:
        """Whether this version does it."""
        return _number(self.first) <= _number(version) < _number(self.fixed or "999")

    @property
    def is_absence(self) -> bool:
        """Whether this version has nothing that could be asked."""
        return self.refusal == reference.NotThereError.__name__

    def refuses(self, case: str, refusal: str) -> bool:
        """Whether it says that theirs refuses this case by this exception."""
        kind, colon, _ = refusal.partition(":")
        named = any(f", {part}, " in f", {case}, " for part in self.cases)
        return bool(colon) and kind == self.refusal and named


DEVIATIONS = (
    Deviation("pixels", "", "5.21", "drops alpha without a background", "transparency ignored"),
    Deviation(
        "pixels",
        "",
        "4.53",
        "refuses images with a side below 28 pixels",
        thread=f"{GITHUB}/pull/38150",
        refusal="ValueError",
        cases=("1 x 1", "13 x 300", "ratio 200"),
    ),
    Deviation(
        "pixels",
        "",
        "4.53",
        "shrinks the short side of a long image to no pixels",
        thread=f"{GITHUB}/pull/38423",
        refusal="RuntimeError",
        cases=("37 x 3000 noise, 64 placeholders",),
    ),
    Deviation(
        "chat tokens",
        "",
        "4.53",
        "refuses images with a side below 28 pixels",
        thread=f"{GITHUB}/pull/38150",
        refusal="ValueError",
        cases=(
            "image within text",
            "four images",
            "image in a system",
            "image in an answer",
            "a picture as a result",
        ),
    ),
    Deviation(
        "video pixels",
        "",
        "4.53",
        "gives videos the limits of images, 3136 to 1003520 pixels a frame",
        IMAGE_LIMITS,
    ),
    Deviation(
        "chat tokens",
        "",
        "4.53",
        "gives videos the limits of images, 3136 to 1003520 pixels a frame",
        IMAGE_LIMITS,
    ),
    Deviation(
        "video pixels",
        "",
        "4.53",
        "does not sample frames",
        thread=f"{GITHUB}/pull/38105",
        hides=("frames of qwen-vl-utils",),
        refusal=reference.NotThereError.__name__,
        cases=("4 frames", "2 fps"),
    ),
    Deviation(
        "bits",
        "",
        "4.53",
        "attends to windows through one mask, in another order of sums",
        "windows through a mask",
        f"{GITHUB}/pull/37363",
    ),
    Deviation(
        "positions",
        "4.52",
        "5.3",
        "seconds between frame groups lose their fraction",
        "seconds of videos cut to whole ones",
        f"{GITHUB}/pull/48669",
        hides=FRACTIONS,
    ),
    Deviation(
        "positions",
        "5.3",
        "5.6",
        "all units of an image or a video have one time, their start times the interval",
        "all units at the time of the start",
        f"{GITHUB}/issues/45381 and 45325",
    ),
    Deviation(
        "positions",
        "5.6",
        "5.18",
        "seconds lose their fraction, and text resumes behind rows and columns only",
        "whole seconds, text behind the grid",
        f"{GITHUB}/pull/48669",
        hides=FRACTIONS,
    ),
    Deviation(
        "positions",
        "5.18",
        "",
        "text after a long video resumes behind rows and columns only",
        "text resumes behind the grid",
    ),
    Deviation(
        "preference",
        "",
        "4.56",
        "goes with no trl that trains it",
        hides=("reference with adapters on",),
        refusal=reference.NotThereError.__name__,
        cases=("text", "images"),
    ),
    Deviation(
        "prompt embeddings",
        "",
        "5.0",
        "goes with no diffusers that has these pipelines as they are now",
        hides=(
            "prompts on one axis",
            "prompts under the chat's template",
            "prompts from one token later on",
            "windows of images to edit not undone",
            "padding kept behind prompts",
        ),
        refusal=reference.NotThereError.__name__,
        cases=("every task",),
    ),
    Deviation(
        "prompt embeddings",
        "5.3",
        "5.6",
        "all units of an image have one time, their start times the interval",
        "all units at the time of the start",
        f"{GITHUB}/issues/45381 and 45325",
        hides=("prompts on one axis", "windows of images to edit not undone"),
    ),
)


def deviations_of(stage: str, version: str = reference.VERSION) -> list[Deviation]:
    """What this version does otherwise in this stage."""
    return [d for d in DEVIATIONS if d.stage == stage and d.holds(version)]


def _number(version: str) -> tuple[int, ...]:
    """5.23.0 and 5.23.0.dev0 as (5, 23, 0); nothing as ()."""
    found = re.match(r"[\d.]*", version)
    return tuple(map(int, filter(None, found[0].split(".")))) if found else ()
