"""What an image shows, its caption, and how much of a caption is right.

Three kinds of scenes, each with the attributes that its caption names:

    relation   "a red circle left of a blue square"     colour, shape, relation, colour, shape
    count      "three green triangles"                  count, colour, shape
    digit      "a yellow square with the digit 7"       colour, shape, digit

Every image has one right caption: of two shapes, the larger is named first.
"""

import random
import re
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = ("two", "three", "four")
BACKGROUNDS = ((255, 255, 255), (235, 235, 225), (205, 225, 240), (240, 215, 215))
SIZES = ((112, 112), (140, 84), (84, 140), (112, 84), (84, 112))  # width, height in pixels

_COLOUR, _SHAPE = f"({'|'.join(COLOURS)})", f"({'|'.join(SHAPES)})"
_PATTERNS = {
    "relation": re.compile(rf"a {_COLOUR} {_SHAPE} ({'|'.join(RELATIONS)}) a {_COLOUR} {_SHAPE}"),
    "count": re.compile(rf"({'|'.join(COUNTS)}) {_COLOUR} {_SHAPE.replace(')', ')e?s')}"),
    "digit": re.compile(rf"a {_COLOUR} {_SHAPE} with the digit (\d)"),
}


@dataclass(frozen=True)
class Scene:
    """One image in words."""

    kind: str
    attributes: tuple[str, ...]  # in the order of the caption
    seed: int  # of sizes, places and background

    @property
    def caption(self) -> str:
        """What an assistant should say."""
        if self.kind == "relation":
            colour, shape, relation, other_colour, other_shape = self.attributes
            return f"a {colour} {shape} {relation} a {other_colour} {other_shape}"
        if self.kind == "count":
            count, colour, shape = self.attributes
            return f"{count} {colour} {shape}{'es' if shape == 'cross' else 's'}"
        colour, shape, digit = self.attributes
        return f"a {colour} {shape} with the digit {digit}"


def random_scene(seed: int) -> Scene:
    """Make the scene of this seed."""
    rng = random.Random(seed)
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    kind = rng.choice(["relation", "relation", "count", "digit", "digit"])
    if kind == "relation":
        other = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        return Scene(kind, (colour, shape, rng.choice(RELATIONS), *other), seed)
    if kind == "count":
        return Scene(kind, (rng.choice(COUNTS), colour, shape), seed)
    return Scene(kind, (colour, shape, str(rng.randrange(10))), seed)


def one_wrong(scene: Scene) -> Scene:
    """Change one attribute of a scene for another of its kind, always the same one."""
    rng = random.Random(f"wrong {scene.seed}")
    which = rng.randrange(len(scene.attributes))
    right = scene.attributes[which]
    kinds = (tuple(COLOURS), SHAPES, RELATIONS, COUNTS, tuple("0123456789"))
    (others,) = (kind for kind in kinds if right in kind)
    wrong = rng.choice([other for other in others if other != right])
    attributes = (*scene.attributes[:which], wrong, *scene.attributes[which + 1 :])
    return replace(scene, attributes=attributes)


def score(caption: str, scene: Scene) -> int:
    """Count the scene's attributes that a caption names, each in its place."""
    match = _PATTERNS[scene.kind].fullmatch(caption.strip())
    if match is None:
        return 0
    return sum(said == right for said, right in zip(match.groups(), scene.attributes, strict=True))


def draw(scene: Scene) -> Image.Image:
    """Draw shapes of 18 to 66 pixels on a plain ground, with a little noise in colour."""
    rng = random.Random(f"picture {scene.seed}")
    image = Image.new("RGB", rng.choice(SIZES), rng.choice(BACKGROUNDS))
    painter = ImageDraw.Draw(image)
    if scene.kind == "relation":
        colour, shape, relation, other_colour, other_shape = scene.attributes
        first, second = _related_places(image.size, relation, rng)
        _shape(painter, shape, _tint(colour, rng), first, rng.uniform(32, 38))
        _shape(painter, other_shape, _tint(other_colour, rng), second, rng.uniform(18, 23))
    elif scene.kind == "count":
        count, colour, shape = scene.attributes
        for place in _corners(image.size, COUNTS.index(count) + 2, rng):
            _shape(painter, shape, _tint(colour, rng), place, rng.uniform(26, 34))
    else:
        colour, shape, digit = scene.attributes
        x, y = (side / 2 + rng.uniform(-2, 2) for side in image.size)
        _shape(painter, shape, _tint(colour, rng), (x, y), rng.uniform(56, 66))
        ink = (20, 20, 20) if colour == "yellow" else (250, 250, 250)
        lower = 9 if shape == "triangle" else 0
        painter.text((x, y + lower), digit, ink, ImageFont.load_default(32), anchor="mm")
    return image


def _tint(colour: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + rng.randint(-15, 15))) for value in COLOURS[colour])


def _related_places(
    size: tuple[int, int], relation: str, rng: random.Random
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Choose two centres of which the first is left of (right of, above, below) the second."""
    width, height = size
    along, across = (width, height) if "of" in relation else (height, width)
    near, far = along / 4 + rng.uniform(-3, 3), along * 3 / 4 + rng.uniform(-3, 3)
    middle = [across / 2 + rng.uniform(-10, 10) for _ in range(2)]
    ends = [(near, middle[0]), (far, middle[1])]
    if relation in ("right of", "below"):
        ends.reverse()
    if "of" not in relation:
        ends = [(across_at, along_at) for along_at, across_at in ends]
    return ends[0], ends[1]


def _corners(size: tuple[int, int], count: int, rng: random.Random) -> list[tuple[float, float]]:
    """Choose centres in different quarters of the image."""
    width, height = size
    quarters = [(x * width, y * height) for x in (0.25, 0.75) for y in (0.25, 0.75)]
    return [
        (x + rng.uniform(-3, 3), y + rng.uniform(-3, 3)) for x, y in rng.sample(quarters, count)
    ]


def _shape(
    painter: ImageDraw.ImageDraw,
    shape: str,
    colour: tuple[int, ...],
    centre: tuple[float, ...],
    size: float,
) -> None:
    x, y = centre
    r = size / 2
    if shape == "circle":
        painter.ellipse((x - r, y - r, x + r, y + r), colour)
    elif shape == "square":
        painter.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), colour)
    elif shape == "triangle":
        painter.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], colour)
    else:
        painter.rectangle((x - r, y - r / 3, x + r, y + r / 3), colour)
        painter.rectangle((x - r / 3, y - r, x + r / 3, y + r), colour)
