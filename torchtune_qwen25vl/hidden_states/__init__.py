"""Hidden states of questions about images: recorded, kept, probed; the parts of their recipe.

hidden_states   states of a batch, by selectors SITE/SPAN
Recorder        an observer that takes them from any forward
open_states     states of a run, memory-mapped
States          what that returns
Settings        the keys of the recipe
layout_of       which states a run has, and of which width
Layout          that
plan_run        what is to be done, from what is on disk
Plan            what all ranks have to know of it
Extractor       asks the model, and takes states
Writer          writes down states and how rows ended
write_outputs   table and HALP's parts
"""

from torchtune_qwen25vl.hidden_states._extract import Extractor
from torchtune_qwen25vl.hidden_states._layout import Layout
from torchtune_qwen25vl.hidden_states._record import Recorder, hidden_states
from torchtune_qwen25vl.hidden_states._run import (
    Plan,
    layout_of,
    plan_run,
    write_outputs,
)
from torchtune_qwen25vl.hidden_states._settings import Settings
from torchtune_qwen25vl.hidden_states._states import States, open_states
from torchtune_qwen25vl.hidden_states._writer import Writer

__all__ = [
    "Extractor",
    "Layout",
    "Plan",
    "Recorder",
    "Settings",
    "States",
    "Writer",
    "hidden_states",
    "layout_of",
    "open_states",
    "plan_run",
    "write_outputs",
]
