"""vLLM as a second reference: the same folders asked the same questions.

ask_folder       compare a folder's answers with vLLM's, and say where they part
ask_all          the same for the folders that this project writes, as `.ci/serve` runs it
trained_folder   the model that `shapes_tiny` trains, made once
find_vllm        the Python of an environment that has vLLM
make_vllm        the same; it is made where there is none
captioning_vllm  vLLM as a program that captions photos, for the bench
template_of      the chat template for a folder that has none
VLLM_DEVIATIONS  what vLLM does otherwise, as data
"""

from parity.serve._deviations import VLLM_DEVIATIONS
from parity.serve._environment import find_vllm, make_vllm
from parity.serve._folders import trained_folder
from parity.serve._peers import captioning_vllm, template_of
from parity.serve._run import ask_all, ask_folder

__all__ = [
    "VLLM_DEVIATIONS",
    "ask_all",
    "ask_folder",
    "captioning_vllm",
    "find_vllm",
    "make_vllm",
    "template_of",
    "trained_folder",
]
