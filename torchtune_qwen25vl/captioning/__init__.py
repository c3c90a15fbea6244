"""Captions for folders of images: the parts of `recipes/caption.py`.

Settings       the keys of the recipe
PRESETS        questions by name, and how they are answered
read_preset    one of them, changed here and there
plan_run       what is to be done, from what is on disk
PlannedRun     what all ranks have to know of it
show_plan      say it, for a dry run
tell_unused    what of the model's own settings captions do not follow
Questioner     images to questions for the model
Record         how one image ended
records_of     answers to records
write_down     records into the journal and into text files
STATES         how an image can end
write_outputs  tables and review page
Thumbnails     small images for that page
apply_edits    captions that were edited on that page into all of these
"""

from torchtune_qwen25vl.captioning._edits import apply_edits
from torchtune_qwen25vl.captioning._prompts import PRESETS, read_preset
from torchtune_qwen25vl.captioning._questions import Questioner
from torchtune_qwen25vl.captioning._records import STATES, Record, write_down
from torchtune_qwen25vl.captioning._run import (
    PlannedRun,
    plan_run,
    records_of,
    show_plan,
    tell_unused,
    write_outputs,
)
from torchtune_qwen25vl.captioning._settings import Settings
from torchtune_qwen25vl.captioning._thumbnails import Thumbnails

__all__ = [
    "PRESETS",
    "STATES",
    "PlannedRun",
    "Questioner",
    "Record",
    "Settings",
    "Thumbnails",
    "apply_edits",
    "plan_run",
    "read_preset",
    "records_of",
    "show_plan",
    "tell_unused",
    "write_down",
    "write_outputs",
]
