"""Captions for folders of images: the parts of `recipes/caption.py`, and its short command."""

from torchtune_qwen25vl.captioning._answers import Answer, Answerer, Question
from torchtune_qwen25vl.captioning._main import main, read_words
from torchtune_qwen25vl.captioning._outputs import TextFiles, read_table, write_tables
from torchtune_qwen25vl.captioning._plan import Plan, Policy, make_plan, moved, place, with_file
from torchtune_qwen25vl.captioning._prompts import PRESETS, Preset, Wording, printable, read_preset
from torchtune_qwen25vl.captioning._questions import Batch, Questioner, count_all_tokens
from torchtune_qwen25vl.captioning._review import write_review
from torchtune_qwen25vl.captioning._settings import Settings, read_settings
from torchtune_qwen25vl.jobs import (
    Ahead,
    Columns,
    Item,
    Journal,
    Past,
    Progress,
    Ranks,
    Record,
    Workers,
    claimed,
    count_cores,
    find_items,
    merge_journals,
    plan_batches,
    read_journals,
    set_aside,
    summary,
)

__all__ = [
    "PRESETS",
    "Ahead",
    "Answer",
    "Answerer",
    "Batch",
    "Columns",
    "Item",
    "Journal",
    "Past",
    "Plan",
    "Policy",
    "Preset",
    "Progress",
    "Question",
    "Questioner",
    "Ranks",
    "Record",
    "Settings",
    "TextFiles",
    "Wording",
    "Workers",
    "claimed",
    "count_all_tokens",
    "count_cores",
    "find_items",
    "main",
    "make_plan",
    "merge_journals",
    "moved",
    "place",
    "plan_batches",
    "printable",
    "read_journals",
    "read_preset",
    "read_settings",
    "read_table",
    "read_words",
    "set_aside",
    "summary",
    "with_file",
    "write_review",
    "write_tables",
]
