"""vLLM as a second reference: the same folders asked the same questions.

ask_folder     compare a folder's answers with vLLM's, and say where they part
ask_all        the same for the folders that this project writes, as `.ci/serve` runs it
make_vllm      an environment of its own that has vLLM, made once
DEVIATIONS     what vLLM does otherwise, as data
"""

from parity.serve._deviations import DEVIATIONS
from parity.serve._environment import make_vllm
from parity.serve._run import ask_all, ask_folder

__all__ = ["DEVIATIONS", "ask_all", "ask_folder", "make_vllm"]
