"""The settings of a tiny run of the recipe preference, and the run."""

import importlib.util
import sys
from pathlib import Path

import finetune_runs
import torch
from omegaconf import OmegaConf

RECIPE = Path(__file__).parents[1] / "recipes" / "preference.py"


def config(folder, output_dir, **changes):
    """Adapters in the decoder, packed pairs, validation; as finetune's but for what is here."""
    pairs = {"_component_": "preference_samples.Pairs"}
    cfg = finetune_runs.config(folder, output_dir)
    cfg.tokenizer = {"_component_": "preference_samples.Transform", "max_seq_len": 80}
    frozen = {"train": "frozen"}
    own = {
        "loss": {"name": "dpo", "beta": 0.2},
        "parts": {"vision": frozen, "merger": frozen, "decoder": {"train": "lora", "lr": 1e-2}},
        "dataset": pairs,
        "val_dataset": {**pairs, "size": 7},
        "pack_to": 160,
        **changes,
    }
    for key, value in own.items():
        cfg[key] = value
    return cfg


def recipe():
    """The recipe as a module."""
    spec = importlib.util.spec_from_file_location("preference", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(cfg):
    """Run the recipe, and return it."""
    made = recipe().PreferenceRecipe(OmegaConf.create(cfg))
    made.setup()
    made.train()
    made.finish(made.save())
    return made


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for path in sys.argv[1:]:
        run(OmegaConf.load(path))
    torch.distributed.destroy_process_group()
