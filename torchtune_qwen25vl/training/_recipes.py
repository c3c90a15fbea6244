"""Which settings belong to which recipe."""

from torchtune_qwen25vl.training._distill_settings import DistillSettings
from torchtune_qwen25vl.training._policy_settings import PolicySettings
from torchtune_qwen25vl.training._preference_settings import PreferenceSettings
from torchtune_qwen25vl.training._settings import Settings

SETTINGS: dict[str, type[Settings]] = {
    "finetune": Settings,
    "preference": PreferenceSettings,
    "distill": DistillSettings,
    "policy": PolicySettings,
}
