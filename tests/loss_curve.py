"""A hundred losses of a training from nothing; run this file to write them anew."""

import tempfile
from pathlib import Path

import torch
from omegaconf import OmegaConf
from training_on_ranks import run

from parity import reference

PATH = Path(__file__).parent / "assets" / "loss_curve.txt"
STEPS = 100


def curve(folder):
    """The losses, made in this folder."""
    (folder / "model").mkdir()
    reference.config("tiny").save_pretrained(folder / "model")
    cfg = {
        "model_dir": str(folder / "model"),
        "output_dir": str(folder),
        "from_scratch": True,
        "parts": {
            "vision": {"train": "full", "lr": 1e-3},
            "merger": {"train": "full", "lr": 2e-3},
            "decoder": {"train": "full", "lr": 1e-3, "weight_decay": 0.1},
        },
        "optimizer": {"_component_": "torch.optim.AdamW"},
        "lr_scheduler": {
            "_component_": "torchtune.training.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 10,
        },
        "clip_grad_norm": 1.0,
        "tokenizer": {"_component_": "training_samples.Transform"},
        "dataset": {"_component_": "training_samples.Samples"},
        "max_steps": STEPS,
        "batch_size": 2,
        "pack_to": 64,
        "device": "cpu",
        "precision": "fp32",
        "metric_logger": {"_component_": "loss_curve.Losses"},
    }
    return run(OmegaConf.create(cfg)).logger.losses


class Losses:
    """A logger that keeps the losses."""

    def __init__(self):
        self.losses = []

    def log_dict(self, figures, step):
        self.losses.append(figures["loss"])

    def log_config(self, cfg):
        pass

    def close(self):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        PATH.write_text("".join(f"{loss!r}\n" for loss in curve(Path(temporary))))
