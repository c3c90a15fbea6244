r"""Messages to token ids: Qwen2.5-VL's chat template, and plain text kept plain.

A conversation becomes a row of *pieces*. A piece is a token of the template's own, or text:

    <|im_start|>user\n                         header, one for each turn
    <|vision_start|><|image_pad|>...<|vision_end|>What is this?
    <|im_end|>\n<|im_start|>assistant\n
    A cat.<|im_end|>                           trained on: what an assistant says, and its end
    \n

Texts that touch are encoded as one, because byte-pair merges cross the seam ("assistant\n" before
an answer that begins with a newline). A token is trained on where its first character is.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby, repeat
from pathlib import Path
from typing import Any, Literal

from torchtune.data import Message
from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from torchtune_qwen25vl.transform._chat_template import (
    TOOLS_AFTER,
    TOOLS_BEFORE,
    read_default_system,
)
from torchtune_qwen25vl.transform._turns import (
    HEADERS,
    PLACEHOLDERS,
    TOOL_ROLES,
    media_parts,
    turns,
)
from torchtune_qwen25vl.transform._vocabulary import byte_pair_encoding, read_vocabulary

Piece = tuple[int | str, bool]  # a token or a text, and whether it is trained on

_LAST_SPECIAL = QWEN2_5_SPECIAL_TOKENS["<|video_pad|>"]  # Qwen's named tokens above it are not
_NAMES = re.compile(f"({'|'.join(map(re.escape, QWEN2_5_SPECIAL_TOKENS))})")
SPECIAL = {name for name, token in QWEN2_5_SPECIAL_TOKENS.items() if token <= _LAST_SPECIAL}
TEMPLATES_OWN = {  # names that no answer may hold as tokens: turns and media end where these stand
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
}


def written_names(text: str) -> list[str]:
    """Return the names of Qwen's tokens that are written out in a text, in order."""
    return _NAMES.findall(text)


class Qwen25VLTokenizer(ModelTokenizer):
    """Byte-level BPE with the 22 named tokens of Qwen2.5-VL, and its chat template.

    Qwen's 22 names are text in a message: `<|im_start|>`, `<|image_pad|>` or `<tool_call>` typed by
    a user is encoded as the characters it is made of. transformers and torchtune's own Qwen2.5
    tokenizer turn all 22 names into their tokens wherever they stand (and transformers stops where
    a user writes a placeholder). Other conversations have the same tokens in transformers.

    Tokens that somebody added to Qwen's are encoded wherever their text stands, as transformers
    does. They are read from `tokenizer.json`, and from `tokenizer_config.json` and
    `added_tokens.json` in the same folder.

    `markup_in_answers` says what Qwen's names are in what an assistant says, "text" (the default)
    or "tokens". Text is the default because no row of data can then forge a turn, an image or an
    end, and because Qwen2.5-VL's own answers need no names: boxes are JSON, and calls of tools have
    a form of their own. With "tokens", as in transformers, `<|box_start|>(1,2)<|box_end|>` and
    `<tool_call>` written out in an answer are those tokens, and an answer with the name of a token
    that ends turns or stands for media (`TEMPLATES_OWN`) is refused. Other roles' texts stay text.

    Tools are those of the template published with Qwen2.5-VL's tokenizer: `tools` are listed in the
    system turn, an assistant message with `ipython=True` is one call (its content the JSON object
    with "name" and "arguments"), and messages of role "ipython" or "tool" are what the tools
    returned. An assistant message with `eot=False` shares its turn with the assistant message after
    it, as in text followed by a call, or several calls.

    Args:
        path: `tokenizer.json`, which may give the named tokens other ids than Qwen does, or
            `vocab.json` together with `merges_file`
        merges_file: `merges.txt`, where `path` is a `vocab.json`
        max_seq_len: most tokens a conversation may have; None for no limit
        markup_in_answers: "text" or "tokens", what Qwen's names are in an assistant's messages
        default_system: system text of a conversation without one; None for that of the chat
            template in the folder of `path`, which is Qwen's published one where there is none

    Raises:
        ValueError: where the files are not those of a Qwen2.5-VL tokenizer, contradict each other,
            or give a token an id beyond the `vocab_size` of the folder's `config.json`; where the
            folder's chat template is another one but for its default system text, and
            `default_system` is not given; or where `markup_in_answers` is unknown.

    Source: `tokenizer_config.json` and `chat_template.json` of Qwen/Qwen2.5-VL-7B-Instruct.
    """

    def __init__(
        self,
        path: str | Path,
        merges_file: str | Path | None = None,
        max_seq_len: int | None = None,
        *,
        markup_in_answers: Literal["text", "tokens"] = "text",
        default_system: str | None = None,
    ) -> None:
        if markup_in_answers not in ("text", "tokens"):
            raise ValueError(f"markup_in_answers is 'text' or 'tokens', got {markup_in_answers!r}")
        vocabulary = read_vocabulary(Path(path), merges_file)
        self._bpe = byte_pair_encoding(vocabulary)
        self.special_tokens = vocabulary.named | vocabulary.added_ids
        self._names = {token: name for name, token in self.special_tokens.items()}
        self._skipped = SPECIAL | vocabulary.special_added
        self.markup_in_answers = markup_in_answers
        self.default_system = default_system
        if default_system is None:
            self.default_system = read_default_system(Path(path).parent)
        self.max_seq_len = max_seq_len
        self.pad_id = self.special_tokens["<|endoftext|>"]
        self.eos_id = self.special_tokens["<|im_end|>"]
        self.stop_tokens = [self.eos_id, self.pad_id]

    def token_ids(self) -> dict[str, int]:
        """Return the id of every token by its name."""
        return self._bpe.get_vocab() | self.special_tokens

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Encode text, in which only added tokens have names.

        Qwen has no token for a beginning, so `add_bos` adds none.
        """
        return self._bpe.encode(text).ids + [self.eos_id] * add_eos

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens; ids that no token has (a model has 271 or 399 of them) are left out.

        `skip_special_tokens` leaves out those named tokens that are special: the tags of a call,
        code completion and repositories stay, as they do in transformers. An added token is special
        where its file says so.
        """
        texts = []
        for named, group in groupby(token_ids, key=self._names.__contains__):
            if named:
                skipped = self._skipped if skip_special_tokens else ()
                texts += [n for token in group if (n := self._names[token]) not in skipped]
            else:
                texts.append(self._bpe.decode(list(group)))
        return "".join(texts)

    def tokenize_messages(
        self,
        messages: Sequence[Message],
        *,
        num_placeholders: Sequence[int] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        inference: bool = False,
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation; return tokens and a mask that is True where one is not trained on.

        Trained on are the contents of assistant messages and the `<|im_end|>` of their turns,
        unless `Message.masked`; headers, images, videos and every other role never are.

        Args:
            messages: conversation; without a system message it gets the published default
            num_placeholders: number of placeholders of each image and video, in order
            tools: JSON schemas of functions the assistant may call
            inference: whether to end with the header of the assistant's answer

        Raises:
            ValueError: where a role or a kind of content is unknown, `num_placeholders` does not
                match the images and videos, or the result is longer than `max_seq_len`.
        """
        if (media := len(media_parts(messages))) != len(num_placeholders):
            raise ValueError(
                f"every image and video needs its number of placeholders, got "
                f"{len(num_placeholders)} numbers for {media}; Qwen25VLTransform counts them"
            )
        tokens, mask = self._encode_pieces(
            self._template(messages, iter(num_placeholders), tools or (), inference)
        )
        if self.max_seq_len is not None and len(tokens) > self.max_seq_len:
            raise ValueError(
                f"a conversation may have max_seq_len = {self.max_seq_len} tokens, this one has "
                f"{len(tokens)}; raise max_seq_len, or shorten the conversation"
            )
        return tokens, mask

    def _template(
        self,
        messages: Sequence[Message],
        num_placeholders: Iterator[int],
        tools: Sequence[Mapping[str, Any]],
        inference: bool,
    ) -> Iterator[Piece]:
        if not messages or messages[0].role != "system":
            system = "" if self.default_system is None and tools else self.default_system
            messages = [*([] if system is None else [Message("system", system)]), *messages]
        for index, turn in enumerate(turns(messages)):
            yield from self._markup(HEADERS[turn[0].role])
            trained = False
            for part, message in enumerate(turn):
                trained = message.role == "assistant" and not message.masked
                if part > 0:
                    yield "\n", trained
                yield from self._message(message, num_placeholders, trained)
            if index == 0 and tools:
                yield from self._tools(tools)
            yield from self._markup("<|im_end|>", trained)
            yield "\n", False
        if inference:
            yield from self._markup(HEADERS["assistant"])

    def _message(
        self, message: Message, num_placeholders: Iterator[int], trained: bool
    ) -> Iterator[Piece]:
        tag = "tool_call" if message.ipython else "tool_response"
        tagged = message.ipython or message.role in TOOL_ROLES
        if tagged:
            yield from self._markup(f"<{tag}>\n", trained)
        for part in message.content:
            if part["type"] == "text" and message.role == "assistant":
                yield from self._answer(part["content"], trained)
            elif part["type"] == "text" and part.get("markup"):
                yield from self._markup(part["content"], trained)
            elif part["type"] == "text":
                yield part["content"], trained
            else:
                token = self.special_tokens[PLACEHOLDERS[part["type"]]]
                yield from self._markup("<|vision_start|>")
                yield from [(token, False)] * next(num_placeholders)
                yield from self._markup("<|vision_end|>")
        if tagged:
            yield from self._markup(f"\n</{tag}>", trained)

    def _answer(self, text: str, trained: bool) -> Iterator[Piece]:
        """Yield what an assistant says, in which names of tokens are what the options say."""
        if self.markup_in_answers == "text":
            yield text, trained
            return
        if forged := sorted(TEMPLATES_OWN.intersection(written_names(text))):
            raise ValueError(
                f"with markup_in_answers = 'tokens' an answer may name tokens of boxes, calls and "
                f"code, but not those of the chat template, {', '.join(forged)}, in {text[:80]!r}; "
                "take them out, or choose 'text'"
            )
        yield from self._markup(text, trained)

    def _tools(self, tools: Sequence[Mapping[str, Any]]) -> Iterator[Piece]:
        yield from self._markup(TOOLS_BEFORE)
        for tool in tools:
            yield "\n" + json.dumps(tool, ensure_ascii=False), False
        yield from self._markup(TOOLS_AFTER)

    def _markup(self, text: str, trained: bool = False) -> Iterator[Piece]:
        """Yield text of the template's own, in which names of tokens are those tokens."""
        for piece in filter(None, _NAMES.split(text)):
            yield self.special_tokens.get(piece, piece), trained

    def _encode_pieces(self, pieces: Iterator[Piece]) -> tuple[list[int], list[bool]]:
        tokens: list[int] = []
        mask: list[bool] = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece[0], str)):
            contents, trained = zip(*group, strict=True)
            if is_text:
                text = "".join(contents)
                encoding = self._bpe.encode(text)
                ends = list(accumulate(map(len, contents)))
                tokens += encoding.ids
                starts = map(self._start, encoding.ids, encoding.offsets, repeat(text))
                mask += [not trained[bisect_right(ends, start)] for start in starts]
            else:
                tokens += contents
                mask += [not flag for flag in trained]
        return tokens, mask

    def _start(self, token: int, span: tuple[int, int], text: str) -> int:
        """Return where a token begins in a text, without the space that an added one swallows."""
        start, end = span
        if token in self._names and not (spanned := text[start:end]).isspace():
            start += len(spanned) - len(spanned.lstrip())
        return start
