"""The settings of a tiny run of the recipe finetune, and what it logged."""

import re
from pathlib import Path

from omegaconf import OmegaConf


def config(folder, output_dir, **changes):
    samples = {"_component_": "training_samples.Samples"}
    return OmegaConf.create(
        {
            "model_dir": str(folder),
            "output_dir": str(output_dir),
            "parts": {
                "vision": {"train": "lora", "lr": 1e-3},
                "merger": {"train": "full", "lr": 1e-4, "weight_decay": 0.1},
                "decoder": {"train": "lora", "lr": 1e-3},
            },
            "adapters": {
                "lora_attn_modules": ["q_proj", "v_proj"],
                "apply_lora_to_mlp": True,
                "lora_rank": 4,
                "lora_alpha": 3,  # not twice the rank
                "lora_dropout": 0.1,
            },
            "optimizer": {"_component_": "torch.optim.AdamW"},
            "lr_scheduler": {
                "_component_": "torchtune.training.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 2,
            },
            "tokenizer": {"_component_": "training_samples.Transform"},
            "dataset": {**samples, "augment": True},
            "val_dataset": {**samples, "size": 7},
            "max_steps": 6,
            "batch_size": 2,
            "gradient_accumulation_steps": 2,
            "pack_to": 64,
            "device": "cpu",
            "precision": "fp32",
            "metric_logger": {
                "_component_": "torchtune.training.metric_logging.DiskLogger",
                "log_dir": "${output_dir}",
                "filename": "log.txt",
            },
            "eval_every_n_steps": 3,
            "save_every_n_steps": 2,
            **changes,
        }
    )


def logged(output_dir):
    """Figures in the log: {step: {name: value}}, those of a later run over those of an earlier."""
    figures = {}
    for line in (Path(output_dir) / "log.txt").read_text().splitlines():
        step, pairs = re.fullmatch(r"Step (\d+) \| (.*?) ?", line).groups()
        pairs = dict(pair.split(":") for pair in pairs.split(" "))
        figures.setdefault(int(step), {}).update({k: float(v) for k, v in pairs.items()})
    return figures


def losses(output_dir):
    return {step: figures["loss"] for step, figures in logged(output_dir).items()}
