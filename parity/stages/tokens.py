"""Chat tokens: the whole way from messages and pictures to token ids, on the corpus."""

import functools
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

from parity import reference, vocabulary
from parity.conversations import Conversation, corpus, corpus_texts
from parity.stages._stage import Measurement, Setting, Stage, refused
from torchtune_qwen25vl import Qwen25VLTransform
from torchtune_qwen25vl.weights import find_weights

NAMED = frozenset(QWEN2_5_SPECIAL_TOKENS.values())
LIMITS: dict[str, Any] = {"min_pixels": 3136, "max_pixels": 50176}


def vocabularies(setting: Setting) -> dict[str, Path]:
    """Folders with tokenizers: the checkpoint's, or a small one and Qwen's own."""
    if setting.checkpoint:
        return {setting.checkpoint: find_weights(setting.checkpoint)[0]}
    small = {"small vocabulary": vocabulary.small(corpus_texts())}
    return small if setting.small else small | {"Qwen's vocabulary": vocabulary.real()}


@functools.cache
def transforms(folder: Path, checkpoint: bool) -> tuple[Qwen25VLTransform, Any]:
    """Ours and theirs with the tokenizer in this folder and the same pixel limits."""
    if checkpoint:
        ours = Qwen25VLTransform.from_folder(folder)
        limits = {"min_pixels": ours.min_pixels, "max_pixels": ours.max_pixels}
    else:
        ours, limits = Qwen25VLTransform(folder / "tokenizer.json", **LIMITS), LIMITS
    return ours, reference.processor(folder, **limits)


def differing(ours: Tensor, theirs: Tensor) -> float:
    """How many tokens differ, place by place; those beyond the shorter row all do."""
    return float(sum(a != b for a, b in zip_longest(ours.tolist(), theirs.tolist())))


def measure(setting: Setting) -> Iterator[Measurement]:
    """Friendly conversations token by token; of hostile ones, the named tokens.

    Text that names tokens stays text in ours and does not in theirs. Ours is therefore held against
    theirs for the same conversation without those names: the same named tokens must come out.
    """
    for name, folder in vocabularies(setting).items():
        ours, theirs = transforms(folder, bool(setting.checkpoint))
        for chat in corpus():
            tokens = our_tokens(ours, chat)
            case = f"{chat.name}, {name}"
            try:
                expected = reference.ask(their_tokens, theirs, chat.without_names())
            except reference.RefusalError as refusal:
                yield refused(case, refusal)
                continue
            if chat.hostile:
                tokens, expected = named(tokens), named(expected)
            yield Measurement(case, differing(tokens, expected))


def our_tokens(transform: Qwen25VLTransform, chat: Conversation) -> Tensor:
    """Tokens of a conversation, [s]."""
    sample = {"messages": chat.messages(), "tools": chat.tools}
    return transform(sample, inference=chat.inference)["tokens"]


def their_text(processor: Any, chat: Conversation) -> str:
    """A conversation as their chat template renders it."""
    return processor.apply_chat_template(
        list(chat.turns), tools=list(chat.tools) or None, add_generation_prompt=chat.inference
    )


def their_tokens(processor: Any, chat: Conversation) -> Tensor:
    """Tokens their processor makes of a conversation, [s]."""
    inputs = processor(
        text=[their_text(processor, chat)],
        images=chat.media("image") or None,
        videos=chat.media("video") or None,
        return_tensors="pt",
    )
    return inputs["input_ids"][0]


def named(tokens: Tensor) -> Tensor:
    """Those of the tokens that have a name, in order."""
    return tokens[[token in NAMED for token in tokens.tolist()]]


CHAT_TOKENS = Stage(
    name="chat tokens",
    what="token ids of whole conversations; text that names tokens stays text",
    tolerance="0: integers",
    fault="texts that touch encoded apart",
    measure=measure,
)
