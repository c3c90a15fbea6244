"""What every long job over many items shares: captions now, hidden states and embeddings likewise.

A recipe reads its settings, checks the model, plans on the first rank, and goes through its share
of the batches; a journal of its own kind of record holds what was done.

run_command    run a recipe on the words of a command line
run_job        run a job to its exit code
read_words     the config that the words of a command line make
JobSettings    the keys that every job has
TableSettings  the keys that every job on a table has beside
read_settings  settings of a config, checked
check_model    fetch a model and check it; no weights are read
digest_of      name the state of a model's files
Run            what the results of a run depend on
Item           one image to work on
as_path        a path of any text
Row            one row of a table that has a text and images
read_rows      read the rows of tables
Held           an image inside one
as_text        a value of a table as text
is_json        whether JSON can hold a value
refuse_absent  refuse inputs that are not there
find_items     list the images of all inputs
count_tokens   placeholders of all images, by their headers
tokens_of      placeholders of one
plan_batches   which items go through the model together
begin          claim a folder, and find out what was done there before
claimed        keep a second run out of a folder
take_up        what this run has done before
Past           what the journals of a folder say
read_journals  read them
Journal        what this rank has done, on disk
Ranks          this process among its equals
Workers        processes that may crash or hang
Task           what one of them does
Outcome        what came of it
attempt        do a task in this process
Answerer       questions to answers, whatever the memory
note_answers   ask what is read ahead, and note every answer
Question       a prompt, ready for the model
Answer         what the model said to it
RowQuestioner  rows of a table to questions
RowQuestion    one of them
RowPlan        what is to be done with all rows
plan_rows      make it
RowRecord      how one row ended
row_failure    the record of a row that failed
show_row_plan  say what would be done
show_rows      the same without a model
ROW_STATES     how a row may end
sources_of     images of a row, undecoded
InHalves       work on batches that may not fit, or hold a bad item
refuse_nan     stop a run whose model gives no numbers
seeded         chance that depends on an item or a batch alone
read_task      a task for an item's image
read_pixels    an image as the model will see it
Ahead          values made in a thread, some ahead
Progress       a progress bar
name_failed    failed items in the log
summary        numbers of records by state
styled         the file of a page with the style of all pages
thumbnail      an image made small, as JPEG
jpeg_of        the same of one that is read
image_tag      a JPEG as an element of a page
FULL           error numbers of a full disk
"""

from torchtune_qwen25vl._ahead import Ahead
from torchtune_qwen25vl.jobs._answers import Answer, Answerer, Question
from torchtune_qwen25vl.jobs._asking import note_answers
from torchtune_qwen25vl.jobs._batches import plan_batches
from torchtune_qwen25vl.jobs._begin import begin
from torchtune_qwen25vl.jobs._chance import seeded
from torchtune_qwen25vl.jobs._command import run_command, run_job
from torchtune_qwen25vl.jobs._halves import InHalves, refuse_nan
from torchtune_qwen25vl.jobs._images import count_tokens, read_pixels, read_task, tokens_of
from torchtune_qwen25vl.jobs._items import Item, find_items, refuse_absent
from torchtune_qwen25vl.jobs._journal import Journal, Past, Run, claimed, read_journals, take_up
from torchtune_qwen25vl.jobs._model import check_model, digest_of
from torchtune_qwen25vl.jobs._pages import image_tag, jpeg_of, styled, thumbnail
from torchtune_qwen25vl.jobs._paths import as_path
from torchtune_qwen25vl.jobs._progress import FULL, Progress, name_failed, summary
from torchtune_qwen25vl.jobs._ranks import Ranks
from torchtune_qwen25vl.jobs._row_images import is_json
from torchtune_qwen25vl.jobs._row_plan import (
    ROW_STATES,
    RowPlan,
    RowRecord,
    plan_rows,
    row_failure,
    show_row_plan,
    show_rows,
)
from torchtune_qwen25vl.jobs._row_questions import RowQuestion, RowQuestioner, sources_of
from torchtune_qwen25vl.jobs._settings import JobSettings, read_settings
from torchtune_qwen25vl.jobs._table_rows import Held, Row, as_text, read_rows
from torchtune_qwen25vl.jobs._table_settings import TableSettings
from torchtune_qwen25vl.jobs._words import read_words
from torchtune_qwen25vl.jobs._workers import Outcome, Task, Workers, attempt

__all__ = [
    "FULL",
    "ROW_STATES",
    "Ahead",
    "Answer",
    "Answerer",
    "Held",
    "InHalves",
    "Item",
    "JobSettings",
    "Journal",
    "Outcome",
    "Past",
    "Progress",
    "Question",
    "Ranks",
    "Row",
    "RowPlan",
    "RowQuestion",
    "RowQuestioner",
    "RowRecord",
    "Run",
    "TableSettings",
    "Task",
    "Workers",
    "as_path",
    "as_text",
    "attempt",
    "begin",
    "check_model",
    "claimed",
    "count_tokens",
    "digest_of",
    "find_items",
    "image_tag",
    "is_json",
    "jpeg_of",
    "name_failed",
    "note_answers",
    "plan_batches",
    "plan_rows",
    "read_journals",
    "read_pixels",
    "read_rows",
    "read_settings",
    "read_task",
    "read_words",
    "refuse_absent",
    "refuse_nan",
    "row_failure",
    "run_command",
    "run_job",
    "seeded",
    "show_row_plan",
    "show_rows",
    "sources_of",
    "styled",
    "summary",
    "take_up",
    "thumbnail",
    "tokens_of",
]
