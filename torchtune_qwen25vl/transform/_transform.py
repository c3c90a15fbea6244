"""A conversation to one sample of tensors.

Shapes: s tokens, p patches, i images and videos.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, Message
from torchtune.modules.transforms import Transform

from torchtune_qwen25vl._position_ids import mrope_position_ids
from torchtune_qwen25vl.transform._chat import Chat, Medium
from torchtune_qwen25vl.transform._geometry import PLACEHOLDER_PIXELS
from torchtune_qwen25vl.transform._image import Qwen25VLImageTransform, smart_resize
from torchtune_qwen25vl.transform._patches import IMAGE_MEAN, IMAGE_STD
from torchtune_qwen25vl.transform._pixels import as_pixels, size
from torchtune_qwen25vl.transform._processor import read_processor
from torchtune_qwen25vl.transform._tokenizer import Qwen25VLTokenizer
from torchtune_qwen25vl.transform._turns import PLACEHOLDERS, media_parts
from torchtune_qwen25vl.transform._video import GEOMETRY, VIDEO, Qwen25VLVideoTransform

RATES = {"fps", "num_frames"}
OVER_LONG = ("error", "shrink_images", "truncate", "skip")


class SkipSample(ValueError):
    """A sample that `over_long="skip"` leaves out: whoever reads the data catches and counts it."""


class Qwen25VLTransform(Transform):
    """The transform from torchtune messages with images and videos to one sample of tensors.

    It is the `tokenizer` of a torchtune recipe: it tokenizes, decodes and knows the ids a recipe
    asks for. Content parts of a message are `{"type": "text", "content": str}`,
    `{"type": "image", "content": PIL image, uint8 tensor or uint8 array}` and
    `{"type": "video", "content": frames}`, the last with what else `Qwen25VLVideoTransform` reads.

    An image part with `"resized": True` holds pixels that are resized already, for example by a
    worker process: its sides are multiples of 28, no pixel limit applies, and it is turned into
    patches as it is. A text part with `"markup": True` holds text of a template: names of Qwen's
    tokens in it are those tokens.

    A sample longer than `max_seq_len` is never cut inside a turn or an image. `over_long` says what
    becomes of it:

        "error"          ValueError (the default)
        "shrink_images"  the largest `max_pixels` for all its images with which it fits, not under
                         `min_pixels`; videos, and images that are resized already, stay as they
                         are; ValueError where that is not enough
        "truncate"       its first turns, up to the last answer that fits; ValueError where none of
                         them is trained on, or an answer is asked for (`inference`)
        "skip"           SkipSample, a ValueError for the reader of the data to catch and count

    Args:
        path: `tokenizer.json`, or `vocab.json` together with `merges_file`
        merges_file: `merges.txt`, where `path` is a `vocab.json`
        max_seq_len: most tokens a sample may have; None for no limit
        over_long: treatment of a longer sample
        min_pixels: images of fewer pixels are enlarged
        max_pixels: images of more pixels are shrunk; a placeholder stands for 784 pixels
        image_mean: mean of each channel of images, where full intensity is 1
        image_std: standard deviation of each channel of images, where full intensity is 1
        video: arguments of `Qwen25VLVideoTransform`, but not the geometry of its patches
        markup_in_answers: "text" or "tokens", what the names of Qwen's tokens are in an assistant's
            messages (`Qwen25VLTokenizer`)
        default_system: system text of a conversation without one, likewise

    Raises:
        ValueError: where an argument is out of its range, or the tokenizer or chat template is
            another model's.
    """

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        *,
        max_seq_len: int | None = None,
        over_long: Literal["error", "shrink_images", "truncate", "skip"] = "error",
        min_pixels: int = 3136,
        max_pixels: int = 1003520,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        video: Mapping[str, Any] | None = None,
        markup_in_answers: Literal["text", "tokens"] = "text",
        default_system: str | None = None,
    ) -> None:
        if over_long not in OVER_LONG:
            raise ValueError(f"over_long is one of {', '.join(OVER_LONG)}, got {over_long!r}")
        if unknown := sorted(map(str, (video or {}).keys() - VIDEO - GEOMETRY)):
            raise ValueError(f"video has no {', '.join(unknown)}; it takes {', '.join(VIDEO)}")
        if fixed := sorted(GEOMETRY & (video or {}).keys()):
            raise ValueError(
                f"the geometry of patches is the model's, but video has {', '.join(fixed)}; leave "
                "it out"
            )
        self.tokenizer = Qwen25VLTokenizer(
            path,
            merges_file,
            markup_in_answers=markup_in_answers,
            default_system=default_system,
        )
        self.max_seq_len = max_seq_len
        self.over_long = over_long
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.normalisation: dict[str, Any] = {"image_mean": image_mean, "image_std": image_std}
        self.image_transform = self._image_transform(max_pixels)
        self.video_transform = Qwen25VLVideoTransform(**video or {})
        self.special_tokens = self.tokenizer.special_tokens
        self.pad_id = self.tokenizer.pad_id
        self.eos_id = self.tokenizer.eos_id
        self.stop_tokens = self.tokenizer.stop_tokens

    @classmethod
    def from_folder(cls, folder: str | Path, **arguments: Any) -> Self:
        """Make the transform of a checkpoint: its tokenizer, its processor's settings, `arguments`.

        Arguments go before the checkpoint's settings; those of `video` do so one by one, but `fps`
        and `num_frames` together.

        Raises:
            ValueError: where the folder has no preprocessor_config.json, a setting is not what the
                transforms compute, or the tokenizer is another model's.
        """
        folder = Path(folder)
        path, merges_file = folder / "tokenizer.json", None
        if not path.exists():
            path, merges_file = folder / "vocab.json", folder / "merges.txt"
        settings, video = read_processor(folder), arguments.pop("video", None) or {}
        if RATES & video.keys():
            settings["video"] = {k: v for k, v in settings["video"].items() if k not in RATES}
        settings["video"] |= video
        return cls(path, merges_file, **settings | arguments)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode text as `Qwen25VLTokenizer.encode` does."""
        return self.tokenizer.encode(text, add_bos, add_eos)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens as `Qwen25VLTokenizer.decode` does."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def tokenize_messages(
        self, messages: Sequence[Message], **kwargs: Any
    ) -> tuple[list[int], list[bool]]:
        """Encode messages as `Qwen25VLTokenizer.tokenize_messages` does."""
        return self.tokenizer.tokenize_messages(messages, **kwargs)

    def __call__(self, sample: Mapping[str, Any], inference: bool = False) -> dict[str, Any]:
        """Make one sample of tensors.

        Args:
            sample: "messages", and where an assistant may call them, "tools", JSON schemas
            inference: whether to end with the header of the assistant's answer

        Returns:
            The rest of `sample`, and
                "tokens" int64 [s]
                "mask" bool [s], True where a token is not trained on
                "labels" int64 [s], the tokens trained on, not shifted; not with `inference`
                "input_pos" int64 [s, 3]
                "placeholders" bool [s], True where a token stands for an image or a video
                "encoder_input" {"vision": {"pixel_values": [p, 1176], "grid_thw": int64 [i, 3]}},
                    images and videos in the order of the conversation, where it has any

        Raises:
            ValueError: where a message cannot be read, or the sample is too long.
        """
        rest = dict(sample)
        messages, tools = rest.pop("messages"), rest.pop("tools", None) or ()
        media = [self._read(part, self.image_transform) for part in media_parts(messages)]
        chat = Chat(messages, tools, media, inference)
        tokens, mask = self._tokenize(chat)
        if len(tokens) > self._limit:
            chat = self._fitted(chat, len(tokens))
            tokens, mask = self._tokenize(chat)
        made = self._tensors(tokens, mask, chat.media)
        if not inference:
            made["labels"] = made["tokens"].masked_fill(made["mask"], CROSS_ENTROPY_IGNORE_IDX)
        return rest | made

    @property
    def _limit(self) -> float:
        return math.inf if self.max_seq_len is None else self.max_seq_len

    def _image_transform(self, max_pixels: int) -> Qwen25VLImageTransform:
        return Qwen25VLImageTransform(
            min_pixels=self.min_pixels, max_pixels=max_pixels, **self.normalisation
        )

    def _read(self, part: Mapping[str, Any], image_transform: Qwen25VLImageTransform) -> Medium:
        if part["type"] == "video":
            video = self.video_transform({**part, "video": part["content"]})
            seconds = float(video["second_per_grid_ts"])
            return Medium(video["pixel_values_videos"], video["video_grid_thw"], seconds)
        if part.get("resized"):
            image = image_transform.of_resized(part["content"])
        else:
            image = image_transform({"image": part["content"]})
        return Medium(image["pixel_values"], image["image_grid_thw"])

    def _tokenize(self, chat: Chat) -> tuple[list[int], list[bool]]:
        return self.tokenizer.tokenize_messages(
            chat.messages,
            num_placeholders=[medium.num_placeholders for medium in chat.media],
            tools=chat.tools,
            inference=chat.inference,
        )

    def _fitted(self, chat: Chat, length: int) -> Chat:
        """Return what `over_long` leaves of a conversation of this length."""
        too_long = (
            f"a sample may have max_seq_len = {self.max_seq_len} tokens, this one has {length}, "
            f"{sum(medium.num_placeholders for medium in chat.media)} of them images and videos"
        )
        if self.over_long == "skip":
            raise SkipSample(f"{too_long}; it is left out because over_long is 'skip'")
        if self.over_long == "shrink_images":
            return self._shrunk(chat, length, too_long)
        if self.over_long == "truncate" and not chat.inference:
            return self._truncated(chat, too_long)
        raise ValueError(
            f"{too_long}; raise max_seq_len, lower max_pixels = {self.max_pixels}, or choose "
            "another over_long"
        )

    def _shrunk(self, chat: Chat, length: int, too_long: str) -> Chat:
        """Make the images of a conversation as large as they may be, found by bisection."""
        parts = media_parts(chat.messages)
        shrinks = [part["type"] == "image" and not part.get("resized") for part in parts]
        sizes = [size(as_pixels(part["content"])) for part in compress(parts, shrinks)]
        in_media = sum(medium.num_placeholders for medium in chat.media)
        shrinkable = sum(medium.num_placeholders for medium in compress(chat.media, shrinks))

        def shrunk_length(max_pixels: int) -> int:
            limits = {"min_pixels": self.min_pixels, "max_pixels": max_pixels}
            resized = [smart_resize(*hw, **limits) for hw in sizes]
            return (
                length
                - shrinkable
                + sum(height * width // PLACEHOLDER_PIXELS for height, width in resized)
            )

        choices = range(self.min_pixels, self.max_pixels + 1, PLACEHOLDER_PIXELS)
        fitting = bisect_right(choices, self._limit, key=shrunk_length)
        if fitting == 0:
            raise ValueError(
                f"{too_long}, and {shrunk_length(self.min_pixels)} with all images at min_pixels = "
                f"{self.min_pixels}; raise max_seq_len, or leave the sample out: videos and images "
                f"that are resized already, {in_media - shrinkable} tokens, cannot be shrunk"
            )
        transform = self._image_transform(choices[fitting - 1])
        media = [
            self._read(part, transform) if shrink else medium
            for part, medium, shrink in zip(parts, chat.media, shrinks, strict=True)
        ]
        return replace(chat, media=media)

    def _truncated(self, chat: Chat, too_long: str) -> Chat:
        """Return the longest beginning that fits, ends with an answer, and trains something."""
        for beginning in chat.beginnings():
            tokens, mask = self._tokenize(beginning)
            if len(tokens) <= self._limit and not all(mask):
                return beginning
        raise ValueError(
            f"{too_long}, and no beginning of it that fits has an answer to train on; raise "
            "max_seq_len, lower max_pixels, or leave the sample out"
        )

    def _tensors(
        self, tokens: list[int], mask: list[bool], media: Sequence[Medium]
    ) -> dict[str, Any]:
        row = torch.tensor(tokens)
        ids: Any = {f"{of}_token_id": self.special_tokens[n] for of, n in PLACEHOLDERS.items()}
        images = [medium.grid_thw for medium in media if medium.seconds is None]
        videos = [medium.grid_thw for medium in media if medium.seconds is not None]
        tensors: dict[str, Any] = {
            "tokens": row,
            "mask": torch.tensor(mask),
            "placeholders": torch.isin(row, torch.tensor([*ids.values()])),
            "input_pos": mrope_position_ids(
                row.unsqueeze(0),
                torch.cat(images) if images else None,
                torch.cat(videos) if videos else None,
                [medium.seconds for medium in media if medium.seconds is not None],
                **ids,
            ).squeeze(0),  # [s, 3]
        }
        if media:
            fields = ("pixel_values", "grid_thw")
            vision = {name: torch.cat([getattr(one, name) for one in media]) for name in fields}
            tensors["encoder_input"] = {"vision": vision}
        return tensors
