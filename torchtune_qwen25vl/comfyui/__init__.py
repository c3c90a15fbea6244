"""Nodes for ComfyUI; what they compute is in the rooms below.

NODE_CLASS_MAPPINGS         nodes by the names that workflows have for them
NODE_DISPLAY_NAME_MAPPINGS  what users read

`python -m torchtune_qwen25vl.comfyui install COMFYUI_DIR` makes ComfyUI find them, and `workflows/`
has two to begin with. The face can be imported without ComfyUI; the nodes work inside it.
"""

from torchtune_qwen25vl.comfyui._caption import Caption
from torchtune_qwen25vl.comfyui._inspect import InspectConditioning
from torchtune_qwen25vl.comfyui._loader import Loader
from torchtune_qwen25vl.comfyui._saved import LoadConditioning, SaveConditioning
from torchtune_qwen25vl.comfyui._text_encode import TextEncode

NODE_CLASS_MAPPINGS = {
    "Qwen25VLLoader": Loader,
    "Qwen25VLTextEncode": TextEncode,
    "Qwen25VLCaption": Caption,
    "Qwen25VLSaveConditioning": SaveConditioning,
    "Qwen25VLLoadConditioning": LoadConditioning,
    "Qwen25VLInspectConditioning": InspectConditioning,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "Qwen25VLLoader": "Load Text Encoder (Qwen2.5-VL)",
    "Qwen25VLTextEncode": "Text Encode (Qwen2.5-VL)",
    "Qwen25VLCaption": "Caption (Qwen2.5-VL)",
    "Qwen25VLSaveConditioning": "Save Conditioning (Qwen2.5-VL)",
    "Qwen25VLLoadConditioning": "Load Conditioning (Qwen2.5-VL)",
    "Qwen25VLInspectConditioning": "Inspect Conditioning (Qwen2.5-VL)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
