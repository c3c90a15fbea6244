"""A checkpoint's chat template is followed, or refused by name."""

import json
import shutil

import pytest
from torchtune.data import Message

from parity import reference, vocabulary
from parity.reference import processors
from tests.data_samples import SAYINGS
from torchtune_qwen25vl import Qwen25VLTokenizer

PUBLISHED = (processors.Path(processors.__file__).with_name("chat_template.jinja")).read_text()
HELPFUL, AGENT = "You are a helpful assistant.", "You are a GUI agent.\nClick."
ASKED = [Message("user", "Hi")]
IMAGES_ONLY = """{% for message in messages %}
{% if loop.first and message.role != 'system' %}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] + '<|im_end|>\n' }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] in ('image', 'video') %}
{{- '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' }}
{%- else %}{{ part['text'] }}{% endif %}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""
TOOLS_ONLY = PUBLISHED.replace("{%- if content is string -%}", "{%- if true -%}").replace(
    "{{- content -}}", "{{- '' + content -}}"
)
MARKED = PUBLISHED.replace(
    "{{- '<|im_start|>' ~ message['role'] -}}",
    "{%- generation -%}{{- '<|im_start|>' ~ message['role'] -}}{%- endgeneration -%}",
)
NO_SYSTEM = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}
{{- '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
FILES = {
    "chat_template.json": lambda text: json.dumps({"chat_template": text}),
    "chat_template.jinja": lambda text: text,
    "tokenizer_config.json": lambda text: json.dumps({"chat_template": text}),
    "processor_config.json": lambda text: json.dumps({"chat_template": text}),
}


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(vocabulary.small(SAYINGS), tmp_path, dirs_exist_ok=True)
    return tmp_path


def tokenizer(folder, **options):
    return Qwen25VLTokenizer(folder / "tokenizer.json", **options)


def rendered(folder, messages=ASKED, **options):
    made = tokenizer(folder, **options)
    return made.decode(made.tokenize_messages(messages)[0], skip_special_tokens=False)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "template",
    [PUBLISHED, IMAGES_ONLY, TOOLS_ONLY, MARKED],
    ids=["both", "images", "tools", "marked"],
)
@pytest.mark.parametrize("system", [HELPFUL, AGENT], ids=["published", "agent"])
def test_another_default_system_text_is_rendered(folder, name, template, system):
    written = system if template is IMAGES_ONLY else system.replace("\n", "\\n")
    text = template.replace(HELPFUL, written)
    (folder / name).write_text(FILES[name](text))
    assert rendered(folder) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    theirs = reference.processor(folder)
    theirs.chat_template = text
    asked = [{"role": "user", "content": "Hi"}]
    assert rendered(folder) == theirs.apply_chat_template(asked)


def test_a_template_without_a_default_system_text(folder):
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    assert rendered(folder) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_conversations_own_system_text_goes_before(folder):
    (folder / "chat_template.jinja").write_text(PUBLISHED.replace(HELPFUL, "Click."))
    for own in ("Be brief.", ""):
        said = rendered(folder, [Message("system", own), *ASKED])
        assert said.startswith(f"<|im_start|>system\n{own}<|im_end|>\n<|im_start|>user")
    assert "system\nShort.<" in rendered(folder, default_system="Short.")


def test_the_file_in_force_is_read(folder):
    for name in reversed(("processor_config.json", "chat_template.json", "chat_template.jinja")):
        (folder / name).write_text(FILES[name](PUBLISHED.replace(HELPFUL, name)))
        assert f"system\n{name}<" in rendered(folder)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": NO_SYSTEM}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert "system" not in rendered(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("'<|im_start|>' ~ message['role']", "'<|im_start|>' ~ message['role'] | upper"),
        ("'<|vision_start|><|'", "'Picture 1: <|vision_start|><|'"),
        ("say(message['content'])", "say(message['content']) | trim"),
        ("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"),
        ("'<|im_end|>\\n'", "'<|im_end|>'"),
        ("You are a helpful assistant.", "Today is ' ~ strftime_now('%d') ~ '."),
        ("\\n# Tools", "\\n# Functions"),
        ("<tool_response>", "<result>"),
        ("{%- if tools -%}", "{%- if tools %%}"),
    ],
)
def test_a_template_that_is_not_understood_is_named(folder, old, new):
    assert old in PUBLISHED
    (folder / "chat_template.jinja").write_text(PUBLISHED.replace(old, new))
    with pytest.raises(ValueError, match=r"chat_template.jinja .*; give default_system to use"):
        tokenizer(folder)
    assert "system\nShort.<" in rendered(folder, default_system="Short.")


# Names of tokens in answers ----------------------------------------------------------------------

BOX = "at <|box_start|>(1,2)<|box_end|>\n<tool_call>{}</tool_call>"


def test_names_in_answers_are_text_or_tokens(folder):
    named = tokenizer(folder, markup_in_answers="tokens")
    said = [Message("user", BOX), Message("assistant", BOX)]
    tokens, mask = named.tokenize_messages(said)
    theirs = reference.processor(folder).tokenizer
    trained = [token for token, masked in zip(tokens, mask, strict=True) if not masked]
    assert trained == theirs(f"{BOX}<|im_end|>")["input_ids"]
    boxes = [named.special_tokens[name] for name in ("<|box_start|>", "<|box_end|>")]
    assert [token for token in tokens if token in boxes] == boxes  # of the answer, not the question
    as_text, _ = tokenizer(folder).tokenize_messages(said)
    assert not set(boxes) & set(as_text)


@pytest.mark.parametrize("name", ["<|image_pad|>", "<|im_end|>", "<|vision_start|>"])
def test_names_of_the_template_are_no_tokens_of_an_answer(folder, name):
    said = [*ASKED, Message("assistant", f"A {name}.")]
    with pytest.raises(ValueError, match=r"not those of the chat template, .*; take them out"):
        tokenizer(folder, markup_in_answers="tokens").tokenize_messages(said)
    assert f"A {name}.<|im_end|>" in rendered(folder, said)
    with pytest.raises(ValueError, match="markup_in_answers is 'text' or 'tokens', got 'token'"):
        tokenizer(folder, markup_in_answers="token")
