"""Answers of vLLM, run by .venv-vllm's Python: `run_vllm.py PICTURES OUTPUT CHECKPOINT…` writes, for each checkpoint, the
text, the tokens and their log-probabilities of a caption for each picture of the JSON list PICTURES."""

import gc
import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, which has imported everything

from transformers import AutoProcessor
from vllm import LLM, SamplingParams

from llava_amber_validation_benchmark_with_lora import build_prompt, load_image

if __name__ == "__main__":
    pictures, output, *checkpoints = sys.argv[1:]
    found = {}
    for folder in checkpoints:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")
        engine = LLM(model=folder, enforce_eager=True, limit_mm_per_prompt={"image": 1}, max_num_seqs=32,
                     dtype="float32" if "float32" in folder else "auto", skip_mm_profiling=True,
                     distributed_executor_backend="uni")  # fmt: skip
        prompts = []
        for path in json.loads(pictures):
            image = load_image(path)
            ids = build_prompt(processor, "Describe this image.", image.size)
            first = ids.index(processor.image_token_id)
            ids = ids[: first + 1] + [token for token in ids[first:] if token != processor.image_token_id]
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
        answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=60, logprobs=0), use_tqdm=False)
        found[folder] = [{"text": answer.outputs[0].text.strip(), "tokens": list(answer.outputs[0].token_ids),
                          "logprobs": [next(iter(step.values())).logprob for step in answer.outputs[0].logprobs]}
                         for answer in answers]  # fmt: skip
        del engine
        gc.collect()
    with open(output, "w") as file:
        json.dump(found, file)
