"""A custom node folder of the test: ComfyUI's own text encoder at the sizes of the tiny file.

ComfyUI builds Qwen2.5-VL at 7B width whatever the file holds: 16 GB, in which a tiny file does not
load. So its own classes are given other sizes, and compute as they do. Releases before 2026 leave
the tower's output in the order of its windows; here that order is undone where they forget it, and
not with AS_RELEASED in the environment.
"""

import dataclasses
import inspect
import json
import os
from pathlib import Path

import torch
from comfy.text_encoders import llama, qwen_vl

SETTINGS = json.loads(Path(__file__).with_name("config.json").read_text())
TOWER = SETTINGS["vision_config"]
TEXT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
OWN = qwen_vl.Qwen2VLVisionTransformer
FORGETS = "argsort" not in inspect.getsource(OWN.forward) and "AS_RELEASED" not in os.environ


class Tower(OWN):
    def __init__(self, hidden_size, output_hidden_size, **options):
        super().__init__(
            hidden_size=TOWER["hidden_size"],
            output_hidden_size=output_hidden_size,
            intermediate_size=TOWER["intermediate_size"],
            num_heads=TOWER["num_heads"],
            num_layers=TOWER["depth"],
            **options,
        )
        self.fullatt_block_indexes = TOWER["fullatt_block_indexes"]

    def forward(self, pixel_values, image_grid_thw=None):
        embeds = super().forward(pixel_values, image_grid_thw)
        order, _ = self.get_window_index(image_grid_thw)
        return embeds[torch.argsort(order)] if FORGETS else embeds


llama.Qwen25_7BVLI_Config = dataclasses.make_dataclass(
    "Tiny",
    [(name, int, dataclasses.field(default=SETTINGS[name])) for name in TEXT],
    bases=(llama.Qwen25_7BVLI_Config,),
)
qwen_vl.Qwen2VLVisionTransformer = Tower
NODE_CLASS_MAPPINGS = {}
