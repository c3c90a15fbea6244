"""What every long job over many items shares.

Item            one image to work on
Columns         where a table has what
find_items      list the images of all inputs
Workers         processes that may crash or hang
Task            what one of them does
Outcome         what came of it
attempt         do a task in this process
count_cores     processors this process may use
Ahead           values made in a thread, some ahead
plan_batches    which images go through the model together
Journal         what this rank has done, on disk
Past            what the journals of a folder say
Record          how one image ended
State           in which state
claimed         keep a second run out of a folder
merge_journals  all ranks' journals in one
read_journals   read them
set_aside       begin anew
Ranks           this process among its equals
Progress        a progress bar
summary         numbers by state
count_tokens    placeholders of an image, by its header
read_pixels     an image as the model will see it
read_task       a task for an item's image
read_thumbnail  a small JPEG of an image
"""

from torchtune_qwen25vl.jobs._ahead import Ahead
from torchtune_qwen25vl.jobs._batches import plan_batches
from torchtune_qwen25vl.jobs._images import count_tokens, read_pixels, read_task, read_thumbnail
from torchtune_qwen25vl.jobs._items import Columns, Item, find_items
from torchtune_qwen25vl.jobs._journal import (
    Journal,
    Past,
    Record,
    State,
    claimed,
    merge_journals,
    read_journals,
    set_aside,
)
from torchtune_qwen25vl.jobs._progress import Progress, summary
from torchtune_qwen25vl.jobs._ranks import Ranks
from torchtune_qwen25vl.jobs._workers import Outcome, Task, Workers, attempt, count_cores

__all__ = [
    "Ahead",
    "Columns",
    "Item",
    "Journal",
    "Outcome",
    "Past",
    "Progress",
    "Ranks",
    "Record",
    "State",
    "Task",
    "Workers",
    "attempt",
    "claimed",
    "count_cores",
    "count_tokens",
    "find_items",
    "merge_journals",
    "plan_batches",
    "read_journals",
    "read_pixels",
    "read_task",
    "read_thumbnail",
    "set_aside",
    "summary",
]
