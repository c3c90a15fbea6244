"""A checkpoint's chat template: known by what it renders, or refused by name.

Qwen2.5-VL is published with one template for images, which knows no tools, and one for tools, which
knows no images; both are copied with other spaces, tags and system texts. So a template is not
compared as text. It renders a few conversations, and is understood where these come out as the
published ones do but for the system text of a conversation that has none.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from torchtune_qwen25vl._files import read_object

Turn = Mapping[str, Any]

DEFAULT_SYSTEM = "You are a helpful assistant."
TOOLS_BEFORE = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)

_BEGINNING = re.compile(
    r"(?:<\|im_start\|>system\n(?P<system>(?:(?!<\|im_).)*)<\|im_end\|>\n)?"
    r"<\|im_start\|>user\nHi<\|im_end\|>\n",
    re.DOTALL,
)
_HI_TURN = "<|im_start|>user\nHi<|im_end|>\n"
_SYSTEM: Turn = {"role": "system", "content": "Be brief."}
_HI: Turn = {"role": "user", "content": "Hi"}
_TALK: list[Turn] = [
    _SYSTEM,
    _HI,
    {"role": "assistant", "content": " Ho \n"},
    {"role": "user", "content": "?"},
]
_TALKED = (
    f"<|im_start|>system\nBe brief.<|im_end|>\n{_HI_TURN}"
    "<|im_start|>assistant\n Ho \n<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
)
_SHOWN: list[Turn] = [
    _SYSTEM,
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "This "},
            *[{"type": kind, kind: "..."} for kind in ("image", "image", "video")],
            {"type": "text", "text": " and\nthat?"},
        ],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "Both."}]},
]
_SEEN = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nThis "
    + "<|vision_start|><|image_pad|><|vision_end|>" * 2
    + "<|vision_start|><|video_pad|><|vision_end|> and\nthat?<|im_end|>\n"
    "<|im_start|>assistant\nBoth.<|im_end|>\n"
)
_TOOL = {"type": "function", "function": {"name": "f"}}
_CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "\u00e5"}}}
_CALLS: list[Turn] = [
    _SYSTEM,
    _HI,
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "1"},
    {"role": "tool", "content": "2"},
]
_LISTED = f"{TOOLS_BEFORE}\n{json.dumps(_TOOL)}{TOOLS_AFTER}"
_CALLED = (
    f"<|im_start|>system\nBe brief.{_LISTED}<|im_end|>\n{_HI_TURN}"
    '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": "\u00e5"}}\n</tool_call>'
    "<|im_end|>\n<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
)


_FAILED = "an error: "
_REMEDY = "give default_system to use the published template with that text"


def read_default_system(folder: Path) -> str | None:
    """Read what a folder's chat template puts into the system turn of a conversation without one.

    Returns:
        The text, that of the published template where the folder has no template; None where its
        template adds no system turn.

    Raises:
        ValueError: naming the file, if its template renders anything else otherwise.
    """
    if (found := next(_templates(folder), None)) is None:
        return DEFAULT_SYSTEM
    path, text = found
    try:
        template = _environment().from_string(text)
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{path} has a chat template that is damaged ({error}); {_REMEDY}"
        ) from error
    rendered = _rendered(template, [_HI])
    if (beginning := _BEGINNING.fullmatch(rendered)) is None:
        raise _refused(path, rendered, "one turn of a user, after a system turn or none")
    asked = _TALKED + "<|im_start|>assistant\n"
    _same(path, _rendered(template, _TALK), _TALKED)
    _same(path, _rendered(template, _TALK, add_generation_prompt=True), asked)
    if not (seen := _rendered(template, _SHOWN)).startswith(_FAILED):  # the published one for tools
        _same(path, seen, _SEEN)
    system = beginning["system"]
    told = _rendered(template, [_HI], tools=[_TOOL])
    if told != rendered:  # as they are equal with the published one for images
        _same(path, told, f"<|im_start|>system\n{system or ''}{_LISTED}<|im_end|>\n{_HI_TURN}")
        _same(path, _rendered(template, _CALLS, tools=[_TOOL]), _CALLED)
    return system


def _templates(folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield the templates of a folder, the one in force in transformers' processor first."""
    for name in ("processor_config.json", "chat_template.json"):
        if (path := folder / name).exists() and (text := read_object(path).get("chat_template")):
            yield path, text
    if (path := folder / "chat_template.jinja").exists():
        yield path, path.read_text("utf-8")
    if (path := folder / "tokenizer_config.json").exists():
        text = read_object(path).get("chat_template")
        if isinstance(text, list):  # several, each with its name
            text = {one["name"]: one["template"] for one in text}.get("default")
        if text:
            yield path, text


def _rendered(template: Any, messages: list[Turn], **options: Any) -> str:
    given: Mapping[str, Any] = {"tools": None, "add_generation_prompt": False} | options
    try:
        return template.render(messages=messages, **given)
    except Exception as error:  # a template is a program, which may fail in any way
        return f"{_FAILED}{error}"


def _same(path: Path, rendered: str, published: str) -> None:
    if rendered != published:
        raise _refused(path, rendered, repr(published))


def _refused(path: Path, rendered: str, published: str) -> ValueError:
    return ValueError(
        f"a chat template renders what Qwen2.5-VL's published one does, but for its default system "
        f"text; {path} gives {rendered!r} instead of {published}; {_REMEDY}"
    )


class _Generation(Extension):
    """Tags that mark what an assistant says; they render what is between them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """Make the environment in which transformers renders chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = lambda value, **form: json.dumps(
        value, **{"ensure_ascii": False, **form}
    )
    environment.globals["raise_exception"] = _raise
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)
