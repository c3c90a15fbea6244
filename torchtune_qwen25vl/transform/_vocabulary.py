"""The files of a tokenizer: vocabulary, merges, Qwen's named tokens, and tokens added to these."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

from torchtune_qwen25vl._files import read_object

SPECIAL_LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Keys of tokenizer_config.json that list special tokens, the second also as a mapping."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as its files say it is.

    Attributes:
        ids: ids of the ordinary tokens
        merges: merges, the first ones first
        named: ids of Qwen's 22 named tokens
        added: tokens beyond these, with their ids, and how each is found in a text
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    named: dict[str, int]
    added: list[tuple[int, AddedToken]]

    @property
    def added_ids(self) -> dict[str, int]:
        return {token.content: number for number, token in self.added}

    @property
    def special_added(self) -> set[str]:
        return {token.content for _, token in self.added if token.special}


def read_vocabulary(path: Path, merges_file: str | Path | None) -> Vocabulary:
    """Read a tokenizer in either form in which they are published.

    Args:
        path: `tokenizer.json`, or `vocab.json` together with `merges_file`
        merges_file: `merges.txt`

    Raises:
        ValueError: where a file is damaged, lacks one of Qwen's named tokens, names a token without
            an id, or the files contradict each other or the `vocab_size` of `config.json`.
    """
    content = read_object(path)
    if merges_file is not None:
        lines = Path(merges_file).read_text("utf-8").split("\n")
        pairs = [line.split(" ") for line in lines if line and line[:8] != "#version"]
        ids, tokens = content, {}
    elif isinstance(model := content.get("model"), dict):
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        ids = model["vocab"]
        tokens = {token["content"]: token for token in content["added_tokens"]}
        if missing := sorted(QWEN2_5_SPECIAL_TOKENS.keys() - tokens.keys()):
            raise ValueError(
                f"a Qwen2.5-VL tokenizer names {len(QWEN2_5_SPECIAL_TOKENS)} tokens, but {path} "
                f"lacks {', '.join(missing)}; is it another model's tokenizer?"
            )
    else:
        raise ValueError(
            f"path is a tokenizer.json, or a vocab.json together with merges_file; {path} has no "
            "merges in it: add merges_file"
        )
    tokens = {token["content"]: token for token in _beside(path.parent)} | tokens
    named = {
        name: tokens.pop(name, {"id": number})["id"]
        for name, number in QWEN2_5_SPECIAL_TOKENS.items()
    }
    added = [(token.pop("id"), AddedToken(**token)) for token in map(dict, tokens.values())]
    vocabulary = Vocabulary(ids, [(a, b) for a, b in pairs], named, added)
    _check(vocabulary, path)
    return vocabulary


def _beside(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the tokens that files beside the tokenizer's own add: content, id and flags."""
    settings, added = _settings(folder), folder / "added_tokens.json"
    if (known := settings.get("added_tokens_decoder")) is not None:
        for number, token in known.items():
            yield {**token, "id": int(number)}
    elif added.exists():
        special = set(_listed_special(settings))
        for content, number in read_object(added).items():
            flags = {"special": content in special, "normalized": content not in special}
            yield {"content": content, "id": number, **flags}


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_object(path) if path.exists() else {}


def _listed_special(settings: dict[str, Any]) -> Iterator[str]:
    for key in SPECIAL_LISTS:
        names = settings.get(key) or []
        for name in names.values() if isinstance(names, dict) else names:
            yield name["content"] if isinstance(name, dict) else name


def _check(vocabulary: Vocabulary, path: Path) -> None:
    """Refuse tokens without an id, and ids that cannot be."""
    ids = vocabulary.named | vocabulary.added_ids
    if lost := sorted(
        {*_listed_special(_settings(path.parent))} - ids.keys() - vocabulary.ids.keys()
    ):
        raise ValueError(
            f"a token has an id, but {path.with_name('tokenizer_config.json')} lists "
            f"{', '.join(lost)} and no file beside it says theirs; add them to its "
            "added_tokens_decoder"
        )
    for name, number in vocabulary.added_ids.items():
        if vocabulary.ids.get(name, number) != number:
            raise ValueError(
                f"a token has one id, but {path} has {name!r} as {vocabulary.ids[name]} in its "
                f"vocabulary and {number} among added tokens; correct the file"
            )
    config = path.with_name("config.json")
    settings = read_object(config) if config.exists() else {}
    size = settings.get("vocab_size") or (settings.get("text_config") or {}).get("vocab_size")
    name, number = max(ids.items(), key=lambda item: item[1])
    if size is not None and number >= size:
        raise ValueError(
            f"ids of tokens are below vocab_size = {size} of {config}, but {path} gives {name!r} "
            f"the id {number}; resize the model's embedding, or use the model's own tokenizer"
        )


def byte_pair_encoding(vocabulary: Vocabulary) -> Tokenizer:
    """Make Qwen's text encoding, in which no text can become one of Qwen's named tokens.

    Added tokens stand in the vocabulary too, because that is where the library takes an id from.
    """
    bpe = Tokenizer(
        models.BPE(vocab=vocabulary.ids | vocabulary.added_ids, merges=vocabulary.merges)
    )
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens([token for _, token in vocabulary.added])
    return bpe
