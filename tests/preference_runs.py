"""The settings of a tiny run of the recipe preference, and the run."""

import finetune_runs
import own_runs

RECIPE = own_runs.path_of("preference")


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
    return own_runs.module_of("preference")


def run(cfg):
    """Run the recipe, and return it."""
    return own_runs.run("preference", cfg)
