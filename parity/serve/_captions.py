"""Captions a folder by vLLM, once for each line of input: `python _captions.py JOB.json`.

Run in an environment that has vLLM; it imports nothing of this project. Each line is answered by a
line, the captions as JSON, once they are all made from the files.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

from PIL import Image
from vllm import LLM, SamplingParams


def main(job_path: str) -> None:
    """Load the model, and caption whenever a line comes."""
    job: dict[str, Any] = json.loads(Path(job_path).read_text())
    llm = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        max_model_len=1024,
        limit_mm_per_prompt={"image": 1},
        mm_processor_kwargs=job["limits"],
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
        max_num_seqs=job["batch_size"],
    )
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True)
    print("ready", flush=True)
    for _ in sys.stdin:
        asked = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": Image.open(path).convert("RGB")},
                        {"type": "text", "text": job["prompt"]},
                    ],
                }
            ]
            for path in job["photos"]
        ]
        results = llm.chat(
            asked,
            sampling,
            chat_template=job["template"],
            chat_template_content_format="openai",  # its guess puts a line break behind an image
            use_tqdm=False,
        )
        print(json.dumps([result.outputs[0].text.strip() for result in results]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
