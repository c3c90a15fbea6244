"""Hidden states of questions about images: recorded, kept, probed.

hidden_states   states of a batch, by selectors SITE/SPAN
Recorder        an observer that takes them from any forward
read_selectors  selectors, from their texts
"""

from torchtune_qwen25vl.hidden_states._record import Recorder, hidden_states
from torchtune_qwen25vl.hidden_states._selectors import read_selectors

__all__ = ["Recorder", "hidden_states", "read_selectors"]
