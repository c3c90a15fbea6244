"""Captions for folders of images: the parts of `recipes/caption.py`, and its short command."""

from torchtune_qwen25vl.captioning._ahead import Ahead
from torchtune_qwen25vl.captioning._answers import Answer, Answerer, Question
from torchtune_qwen25vl.captioning._batches import plan_batches
from torchtune_qwen25vl.captioning._items import Columns, Item, find_items
from torchtune_qwen25vl.captioning._journal import (
    Journal,
    Past,
    Record,
    claimed,
    merge_journals,
    read_journals,
    set_aside,
)
from torchtune_qwen25vl.captioning._main import main, read_words
from torchtune_qwen25vl.captioning._outputs import TextFiles, read_table, write_tables
from torchtune_qwen25vl.captioning._plan import Plan, Policy, make_plan, moved, place, with_file
from torchtune_qwen25vl.captioning._progress import Progress, summary
from torchtune_qwen25vl.captioning._prompts import PRESETS, Preset, Wording, printable, read_preset
from torchtune_qwen25vl.captioning._questions import Batch, Questioner, count_all_tokens
from torchtune_qwen25vl.captioning._ranks import Ranks
from torchtune_qwen25vl.captioning._review import write_review
from torchtune_qwen25vl.captioning._settings import Settings, read_settings
from torchtune_qwen25vl.captioning._workers import Workers, count_cores

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
