"""Weights in and out: names, files, the hub, PEFT, torchtune's checkpointer.

hf_to_tune            convert a Hugging Face state dict to torchtune's
tune_to_hf            convert it back
hf_weight_to_tune     convert one weight
on_disk_names         names on disk of keys in either Hugging Face layout
refuse_mismatch       refuse weights that are missing, unknown or of other shapes
load_pretrained       load a model with its weights, and its transform
Qwen25VLCheckpointer  reads and writes weights for torchtune's recipes
fetch                 download a model from the hub, unless it is here
bytes_to_fetch        how many bytes of it are not here
find_weights          the folder and files of a checkpoint given in any way
Checkpoint            a folder's files beside the model they fill
materialize           give a model on the meta device its weights
compute_frequencies   compute on a device what no file holds
copy_settings         copy the files beside the weights
fingerprint           a short name of a checkpoint's content, wherever it lies
write_dtype           let config.json name the dtype of the weights
PICKLES               suffixes of files that are never opened
write_weights         write weights to the files named for them
Adapter               one of PEFT's form, merged into weights as they are read
find_adapter          the one in a folder that holds no model
tune_to_peft          convert adapters to PEFT's form
write_peft            write the two files of a PEFT adapter
"""

from torchtune_qwen25vl.weights._adapter import Adapter, find_adapter
from torchtune_qwen25vl.weights._checkpointer import Qwen25VLCheckpointer
from torchtune_qwen25vl.weights._hub import bytes_to_fetch, fetch
from torchtune_qwen25vl.weights._materialize import compute_frequencies, materialize
from torchtune_qwen25vl.weights._names import (
    hf_to_tune,
    hf_weight_to_tune,
    on_disk_names,
    refuse_mismatch,
    tune_to_hf,
)
from torchtune_qwen25vl.weights._peft import tune_to_peft, write_peft
from torchtune_qwen25vl.weights._pretrained import Checkpoint, load_pretrained
from torchtune_qwen25vl.weights._safetensors import (
    PICKLES,
    copy_settings,
    find_weights,
    fingerprint,
    write_dtype,
    write_weights,
)

__all__ = [
    "PICKLES",
    "Adapter",
    "Checkpoint",
    "Qwen25VLCheckpointer",
    "bytes_to_fetch",
    "compute_frequencies",
    "copy_settings",
    "fetch",
    "find_adapter",
    "find_weights",
    "fingerprint",
    "hf_to_tune",
    "hf_weight_to_tune",
    "load_pretrained",
    "materialize",
    "on_disk_names",
    "refuse_mismatch",
    "tune_to_hf",
    "tune_to_peft",
    "write_dtype",
    "write_peft",
    "write_weights",
]
