"""Vocabularies to tokenize with: Qwen's own, and a small one that is always there.

Both are folders with `vocab.json`, `merges.txt` and `tokenizer.json`, as a checkpoint has them.
"""

import base64
import functools
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX, bytes_to_unicode
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
LAST_SPECIAL = QWEN2_5_SPECIAL_TOKENS["<|video_pad|>"]  # those after it are named, but not special

Pair = tuple[str, str]


class NoVocabularyError(RuntimeError):
    """Qwen's vocabulary is not on this machine; the message says what is missing."""


@functools.cache
def real() -> Path:
    """Qwen2.5's vocabulary: 151,643 tokens, 151,387 merges and the 22 named tokens.

    It is derived from the ranks that the package dashscope carries for its own tokenizer, and kept
    in the user's cache folder.

    Raises:
        NoVocabularyError: where dashscope is not installed, or carries other ranks.
    """
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise NoVocabularyError(
            "Qwen's vocabulary comes from the package dashscope, which is not installed; it is in "
            "the dev group"
        )
    ranks = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    content = ranks.read_bytes() if ranks.exists() else b""
    if (found := hashlib.sha256(content).hexdigest()) != RANKS_SHA256:
        raise NoVocabularyError(
            f"{ranks} should be Qwen's ranks with SHA-256 {RANKS_SHA256}, found {found}; this "
            "dashscope carries another vocabulary or none"
        )
    return _folder(f"qwen-{RANKS_SHA256[:12]}", lambda: _from_ranks(content))


@functools.cache
def small(texts: tuple[str, ...]) -> Path:
    """Bytes, up to 500 merges learned from these texts, and Qwen's named tokens at their ids."""
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return _folder(f"small-{digest[:12]}", lambda: _learned(texts))


def _folder(name: str, build: Callable[[], tuple[dict[str, int], list[Pair]]]) -> Path:
    """The folder of this name in the user's cache, written once and renamed into place."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchtune-qwen25vl"
    if not (cache / name).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            written = Path(scratch) / name
            written.mkdir()
            _write(written, *build())
            try:
                written.rename(cache / name)
            except OSError:  # another process was faster
                if not (cache / name).exists():
                    raise
    return cache / name


def _write(folder: Path, vocab: dict[str, int], merges: list[Pair]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = _pipeline(Tokenizer(models.BPE(vocab, merges)))
    for name, token in QWEN2_5_SPECIAL_TOKENS.items():
        added = AddedToken(name, normalized=False, special=token <= LAST_SPECIAL)
        tokenizer.add_tokens([added])
    tokenizer.save(str(folder / "tokenizer.json"))


def _pipeline(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_ranks(content: bytes) -> tuple[dict[str, int], list[Pair]]:
    """Vocabulary and merges from lines of base64 bytes and rank."""
    pairs = (line.split() for line in content.splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    letters = bytes_to_unicode()
    spelling = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = [
        (spelling[left], spelling[right])
        for left, right in (_last_merge(token, ranks) for token in ranks if len(token) > 1)
    ]
    return {spelling[token]: rank for token, rank in ranks.items()}, merges


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts a token is merged from: its bytes, merged with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _learned(texts: Iterable[str]) -> tuple[dict[str, int], list[Pair]]:
    tokenizer = _pipeline(Tokenizer(models.BPE()))
    alphabet = sorted(bytes_to_unicode().values())
    trainer = BpeTrainer(
        vocab_size=256 + 500, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return model["vocab"] | QWEN2_5_SPECIAL_TOKENS, merges
