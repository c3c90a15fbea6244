"""Hidden states of questions about images: recorded, kept, probed; parts of their recipe.

hidden_states   states of a batch, by selectors SITE/SPAN
Recorder        an observer that takes them from any forward
Settings        the keys of the recipe
Questioner      makes questions of rows
plan_run        what is to be done, from what is on disk
Plan            what all ranks have to know of it
show_plan       what would be done
Extractor       asks the model, and takes states
STATES          how a row may end
"""

from torchtune_qwen25vl.hidden_states._extract import Extractor
from torchtune_qwen25vl.hidden_states._questions import Questioner
from torchtune_qwen25vl.hidden_states._record import Recorder, hidden_states
from torchtune_qwen25vl.hidden_states._records import STATES
from torchtune_qwen25vl.hidden_states._run import Plan, plan_run, show_plan
from torchtune_qwen25vl.hidden_states._settings import Settings

__all__ = [
    "STATES",
    "Extractor",
    "Plan",
    "Questioner",
    "Recorder",
    "Settings",
    "hidden_states",
    "plan_run",
    "show_plan",
]
