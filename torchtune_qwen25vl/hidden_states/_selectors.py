"""What is recorded, as text: SITE/SPAN, where in the model and at which tokens.

layer.7/query_last        output of decoder block 7 at the last token of the prompt
layer.-1/image_mean       output of the last block, before the final norm
attn.all/last             what every block's attention adds to the stream
layer.0:28:7/image_last   blocks 0, 7, 14 and 21
layer.3n/4/query_last     block 3n/4 of a decoder of n
vision/mean               last block of the encoder, before the merger
halp                      what the published HALP scripts record
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

VISION_SITES = ("vision", "merger")
SITES = (*VISION_SITES, "embed", "attn", "mlp", "layer", "norm")
NUMBERED = ("vision", "attn", "mlp", "layer")
SPANS = (
    *("image_first", "image_last", "image_mean", "image_all"),
    *("query_last", "query_mean", "last", "mean", "all"),
)
DECODER_SPANS = tuple(span for span in SPANS if span != "mean")
VISION_SPANS = ("mean", "all")
WHOLE_SPANS = ("image_all", "all")  # of which a state is [n, width], not [width]
PRESETS = ("halp",)

_NUMBER = re.compile(r"(-?\d+)|(\d*)n(?:/(\d+))?(?:-(\d+))?")


@dataclass(frozen=True)
class Selector:
    """One thing to record.

    Attributes:
        site: of `SITES`
        index: which block, from 0; None at sites that are there once
        span: of `SPANS`
    """

    site: str
    index: int | None
    span: str

    def __str__(self) -> str:
        site = self.site if self.index is None else f"{self.site}.{self.index}"
        return f"{site}/{self.span}"

    @property
    def in_encoder(self) -> bool:
        """Whether the site is in the encoder, where there are patches and no text."""
        return self.site in VISION_SITES

    @property
    def is_whole(self) -> bool:
        """Whether a state is [n, width], a vector for each token of the span."""
        return self.span in WHOLE_SPANS


def read_selectors(
    wanted: Sequence[str], *, num_layers: int, vision_num_layers: int
) -> dict[str, Selector]:
    """Read selectors and presets.

    Args:
        wanted: `SITE/SPAN` each, or the name of a preset
        num_layers: blocks of the decoder
        vision_num_layers: blocks of the encoder

    Returns:
        Selectors by name, in order: a text that asks for one block is its name as it was written;
        of several, each has a name with its number.

    Raises:
        ValueError: if a text is no selector, or there is no such block.
    """
    if isinstance(wanted, str) or not wanted:
        raise ValueError(
            f"wanted is a list of selectors SITE/SPAN and presets ({', '.join(PRESETS)}), got "
            f"{wanted!r}"
        )
    texts = [one for text in wanted for one in (_halp(num_layers) if text == "halp" else [text])]
    blocks, read = {"vision": vision_num_layers}, dict[str, Selector]()
    for text in texts:
        found = list(_read(text, blocks.get(text[:6], num_layers)))
        read |= {text if len(found) == 1 else str(one): one for one in found}
    return read


def _halp(num_layers: int) -> list[str]:
    """Return what the published HALP scripts record: five blocks, at two tokens each."""
    quarters = [num_layers * quarter // 4 for quarter in range(4)]
    blocks = dict.fromkeys([*quarters, num_layers - 1])
    spans = ("image_last", "query_last")
    return ["vision/mean", *(f"layer.{block}/{span}" for span in spans for block in blocks)]


def _read(text: str, blocks: int) -> Iterator[Selector]:
    place, _, span = text.rpartition("/")
    site, dot, numbers = place.partition(".")
    if site not in SITES:
        raise ValueError(
            f"a selector is SITE/SPAN with a site of {', '.join(SITES)}, or a preset, "
            f"{', '.join(PRESETS)}; got {text!r}"
        )
    spans = VISION_SPANS if site in VISION_SITES else DECODER_SPANS
    if span not in spans:
        raise ValueError(f"the spans of {site} are {', '.join(spans)}, got {text!r}")
    if site not in NUMBERED:
        if dot:
            raise ValueError(f"{site} is there once and has no number, got {text!r}")
        yield Selector(site, None, span)
    elif not dot and site != "vision":
        raise ValueError(f"{site} needs a number, as {site}.0 or {site}.all, got {text!r}")
    else:
        for index in _indices(numbers or "-1", blocks, text):
            yield Selector(site, index, span)


def _indices(numbers: str, blocks: int, text: str) -> Sequence[int]:
    """Read which blocks: a number, `all`, or a slice; n is the number of blocks."""
    if numbers == "all":
        return range(blocks)
    parts = [_number(part, blocks, text) if part else None for part in numbers.split(":")]
    if len(parts) > 3 or parts[2:] == [0]:
        raise ValueError(f"a slice is FIRST:END:STEP with a step that is not 0, got {text!r}")
    if len(parts) > 1:
        if found := range(blocks)[slice(*parts)]:
            return found
        raise ValueError(f"{text!r} holds none of the {blocks} blocks")
    (index,) = parts
    assert index is not None
    if not -blocks <= index < blocks:
        raise ValueError(f"there are blocks 0 to {blocks - 1}, got {text!r}")
    return [index % blocks]


def _number(part: str, blocks: int, text: str) -> int:
    found = _NUMBER.fullmatch(part)
    if found is None or found[3] == "0":
        raise ValueError(
            f"a block is a number, all, a slice, or a fraction such as n/4, 3n/4 and n-1, got "
            f"{part!r} in {text!r}"
        )
    if found[1]:
        return int(found[1])
    return int(found[2] or 1) * blocks // int(found[3] or 1) - int(found[4] or 0)
