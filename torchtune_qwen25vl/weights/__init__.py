"""Weights in and out: names, files, the hub, PEFT, torchtune's checkpointer.

hf_to_tune            Hugging Face's state dict to torchtune's
tune_to_hf            and back
tune_to_peft          adapters as PEFT names them
Checkpoint            a folder's files beside the model they fill
materialize           weights onto a device, into a model that has none yet
compute_frequencies   what no file holds, onto a device
load_pretrained       a model with its weights, and its transform
Qwen25VLCheckpointer  what torchtune's recipes read and write weights with
find_weights          the folder and files of a checkpoint given in any way
copy_settings         copy what lies beside the weights
write_weights         write weights to the files named for them
fetch                 fetch a model from the hub
bytes_to_fetch        how much of it is not here
"""

from torchtune_qwen25vl.weights._checkpointer import Qwen25VLCheckpointer
from torchtune_qwen25vl.weights._hub import bytes_to_fetch, fetch
from torchtune_qwen25vl.weights._materialize import compute_frequencies, materialize
from torchtune_qwen25vl.weights._names import hf_to_tune, tune_to_hf
from torchtune_qwen25vl.weights._peft import tune_to_peft, write_peft
from torchtune_qwen25vl.weights._pretrained import Checkpoint, load_pretrained
from torchtune_qwen25vl.weights._safetensors import (
    copy_settings,
    find_weights,
    write_weights,
)

__all__ = [
    "Checkpoint",
    "Qwen25VLCheckpointer",
    "bytes_to_fetch",
    "compute_frequencies",
    "copy_settings",
    "fetch",
    "find_weights",
    "hf_to_tune",
    "load_pretrained",
    "materialize",
    "tune_to_hf",
    "tune_to_peft",
    "write_peft",
    "write_weights",
]
