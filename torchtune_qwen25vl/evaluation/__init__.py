"""Scores of a model's own answers to a table of questions: the parts of `recipes/evaluate.py`.

Settings       the keys of the recipe
Asker          asks the model: answers, and the log-probabilities of letters
Reply          what it gave for one row
Record         how a row ended
records_of     replies to records
write_outputs  score all rows; predictions, scores and page
InTraining     the same of the model in training, for `eval_by_generation`
read_section   keys of that section, checked
Truth          what the table says of a row
lmms_manifest  our model in lmms-eval, for its registry
METRICS        names of the metrics
score_rows     score answers that are there already
averaged       a mean with its standard error
Case           an answer beside what the table says
"""

from torchtune_qwen25vl.evaluation._ask import Asker
from torchtune_qwen25vl.evaluation._in_training import InTraining, read_section
from torchtune_qwen25vl.evaluation._lmms import lmms_manifest
from torchtune_qwen25vl.evaluation._metrics import METRICS, Case, averaged, score_rows
from torchtune_qwen25vl.evaluation._records import Record, Reply
from torchtune_qwen25vl.evaluation._run import records_of, write_outputs
from torchtune_qwen25vl.evaluation._settings import Settings
from torchtune_qwen25vl.evaluation._truths import Truth

__all__ = [
    "METRICS",
    "Asker",
    "Case",
    "InTraining",
    "Record",
    "Reply",
    "Settings",
    "Truth",
    "averaged",
    "lmms_manifest",
    "read_section",
    "records_of",
    "score_rows",
    "write_outputs",
]
