"""Show what the alignment changed: ask LLaVA-1.6 about a picture, and read the answers without and with the LoRA adapter
side by side, in a browser or in the terminal.

Reads   a LLaVA-NeXT checkpoint (--model_path) and an adapter (--lora_path).
Writes  nothing that stays: an uploaded picture is deleted after an hour at the latest.
Needs   pip install -r requirements/train.txt -r requirements/host.txt

    python llava_gradio_lora_host.py --model_path liuhaotian/llava-v1.6-mistral-7b --lora_path checkpoints/llava-orpo-prod
    python llava_gradio_lora_host.py --lora_path checkpoints/llava-orpo-prod --load_4bit --host 0.0.0.0 --auth_file users.txt
    python llava_gradio_lora_host.py --lora_path checkpoints/llava-orpo-prod --image photo.jpg --question "Is there a dog?"
    python llava_gradio_lora_host.py --test_mode          # the embedded miniature, without a GPU and without downloads

The page is for a few users. For many, serve the model with vLLM: llava_gradio_lora_host_quantized.py.
"""

import argparse
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...] (--help lists the flags)",
    )

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    def count(text: str) -> int:
        if not 0 < int(text) < 65536:
            raise argparse.ArgumentTypeError(f"{text} is not from 1 to 65535")
        return int(text)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "LoRA adapter: hub id or folder")
    add(model, "--device", "auto (cuda, mps or cpu), all (spread over the GPUs), cuda:1, cpu …", default="auto")
    bits = model.add_mutually_exclusive_group()
    add(bits, "--load_4bit", "base weights in NF4 with double quantization", action="store_true")
    add(bits, "--load_8bit", "base weights in 8 bits (LLM.int8)", action="store_true")
    add(model, "--max_batch_size", "answers that are generated together", type=count, default=16)
    add(model, "--max_new_tokens", "longest answer, in tokens", type=count, default=1024)
    add(model, "--test_mode", "use the embedded miniature and its adapter, if no model is given", action="store_true")

    terminal = parser.add_argument_group("without a browser")
    add(terminal, "--image", "print answers about these pictures and exit", nargs="+", type=Path)
    add(terminal, "--question", "what to ask about each picture", nargs="+", default=["Describe this image."])

    server = parser.add_argument_group("server")
    add(server, "--host", "address to listen on; 0.0.0.0 lets other machines in", default="127.0.0.1")
    add(server, "--port", "port to listen on (default: the first free one from 7860)", type=count)
    add(server, "--share", "open a public link through gradio.live", action="store_true")
    add(server, "--auth_file", "let in only these users: a text file with one name:password per line", type=Path)
    args = parser.parse_args(argv)
    if args.question != parser.get_default("question") and not args.image:
        parser.error("--question needs --image; without them, the page asks for both")
    if args.test_mode and args.model_path == parser.get_default("model_path"):
        args.model_path = str(MINIATURE / "model")
        args.lora_path = args.lora_path or str(MINIATURE / "adapter")
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports

import asyncio
import difflib
import inspect
import io
import json
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import aclosing, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from itertools import groupby, product
from types import MethodType
from typing import NoReturn

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import gradio as gr
import jinja2
import numpy as np
import torch
from peft import LoraConfig
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file

# ---------------------------------------------------------------------------- blocks copied from earlier scripts


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# Copied from llava_orpo_training.load_image
def load_image(source: str | Path | bytes) -> Image.Image:
    """Open a picture from a path or bytes, upright (EXIF), in RGB, on white. Raises OSError if it is not a picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, of which convert() would clip all above 255
            brightest = 65535 if image.mode.startswith("I;16") else max(image.getextrema()[1], 1)
            image = Image.fromarray((np.asarray(image).clip(0) * 255.0 / brightest).astype("uint8"))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's parsers raise almost anything on a broken file
        raise OSError(str(error)) from error


# Copied from llava_orpo_training.build_prompt
def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Return the token ids of LLaVA-1.6's prompt: BOS and `[INST] <image>\\n{question} [/INST]`, or Vicuna's form of it.

    The number of image tokens depends on the picture's `image_size`, which is (width, height). As in the original code, the
    text before and after them is tokenized separately. A `<image>` or `</s>` inside the question is plain text.
    """
    tokenizer, (width, height) = processor.tokenizer, image_size
    num_image_tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"][0]
    before, after = "[INST] ", " [/INST]"
    if "[INST]" not in (processor.chat_template or before):
        before = "A chat between a curious human and an artificial intelligence assistant. "
        before += "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: "
        after = " ASSISTANT:"
    head = tokenizer(before, add_special_tokens=False).input_ids
    tail = tokenizer(f"\n{question}{after}", add_special_tokens=False, split_special_tokens=True).input_ids
    return [tokenizer.bos_token_id, *head, *[processor.image_token_id] * num_image_tokens, *tail]


# Copied from llava_orpo_training.ORIGINAL_KEYS
ORIGINAL_KEYS = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


# Copied from llava_orpo_training.read_original
def read_original(model_path: str, original: dict) -> tuple:
    """Return (config, processor, vision tower's name) for a checkpoint in LLaVA's own format, whose config.json is `original`.
    The tokenizer gets `<image>` and `<pad>` as its next two tokens, as in the hub's converted checkpoints."""
    from transformers import AutoConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    expected = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "vocab_size": 32000}
    for name, value in expected.items():
        if original.get(name) != value:
            stop(f"--model_path {model_path} has {name} {original.get(name)!r}; LLaVA-1.6 has {value!r}.")
    tower, vision = original["mm_vision_tower"], LlavaNextConfig().vision_config
    if tower != "openai/clip-vit-large-patch14-336":  # this one, which all published checkpoints name, is the default
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    llava = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_", "architectures", "auto_map")
    text = {name: value for name, value in original.items() if not name.startswith(llava)}
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    grid = original["image_grid_pinpoints"]  # (width, height) pairs, which some checkpoints write as text
    grid = [[height, width] for width, height in (json.loads(grid) if isinstance(grid, str) else grid)]
    config = LlavaNextConfig(vision_config=vision.to_dict(), text_config=text, image_grid_pinpoints=grid)
    config.vision_feature_layer = original["mm_vision_select_layer"]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) != 32002:
        stop(f"--model_path {model_path} has a tokenizer of {len(tokenizer) - 2:,} tokens; LLaVA-1.6 has 32,000.")
    side = vision.image_size
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=grid)
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    template = before + "<image>\n{{ messages[0]['content'][-1]['text'] }}" + after
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaNextProcessor(images, tokenizer, vision.patch_size, chat_template=template, **settings), tower


# Copied from llava_orpo_training.read_checkpoint
def read_checkpoint(model_path: str) -> tuple:
    """Return (config, processor, vision tower's name) of a checkpoint, as read_original does for LLaVA's own format; config
    and tower are None for the hub's layout. Stops if the checkpoint is not LLaVA-1.6."""
    from transformers import AutoProcessor, PreTrainedConfig

    try:
        found = PreTrainedConfig.get_config_dict(model_path)[0]
        kind = found.get("model_type", "unknown")
        if kind in ("llava_mistral", "llava_llama", "llava") and "mm_vision_tower" in found:
            return read_original(model_path, found)
        if kind != "llava_next":
            stop(f"--model_path {model_path} has no config.json of LLaVA-1.6; its model type is {kind}.")
        processor = AutoProcessor.from_pretrained(model_path, backend="pil", trust_remote_code=False)
    except Exception as error:
        stop(f"--model_path {model_path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}).")
    if re.search("im_start|start_header", processor.chat_template or ""):
        stop(f"--model_path {model_path} has a prompt template that is neither Mistral's nor Vicuna's.")
    return None, processor, None


# Copied from llava_orpo_training.load_llava
def load_llava(model_path: str, lora_path: str | None = None, device="auto", load_4bit=False, load_8bit=False):
    """Load a LLaVA-1.6 checkpoint, in the hub's layout or LLaVA's own, and an adapter; return (model, processor).

    The device "auto" is the first of cuda, mps and cpu that is there, and "all" spreads the layers over all GPUs. Weights
    are float32 on the CPU and bfloat16 on a GPU, or float16 if the GPU lacks it. `load_4bit` keeps the language model in NF4
    with double quantization, `load_8bit` in LLM.int8. Only safetensors files are read, and no code of a checkpoint is run.
    """
    from transformers import BitsAndBytesConfig, LlavaNextForConditionalGeneration

    adapter = read_adapter(lora_path) if lora_path else None  # before the base, whose reading takes minutes
    config, processor, tower = read_checkpoint(model_path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    bits = {"load_in_4bit": load_4bit, "load_in_8bit": load_8bit, "bnb_4bit_quant_type": "nf4"}
    bits |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    bits["llm_int8_skip_modules"] = ["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"]
    settings = {"dtype": dtype, "device_map": "auto" if device == "all" else {"": device}, "use_safetensors": True}
    settings |= {"config": config, "key_mapping": ORIGINAL_KEYS if tower else None, "output_loading_info": True}
    if load_4bit or load_8bit:
        settings["quantization_config"] = BitsAndBytesConfig(**bits)
    try:
        model, report = LlavaNextForConditionalGeneration.from_pretrained(model_path, **settings)
        if tower:
            complete_original(model, tower, report["missing_keys"])
    except Exception as error:
        stop(f"--model_path {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")
    for fault in ("missing", "unexpected"):
        if report[f"{fault}_keys"]:
            stop(f"--model_path {model_path} does not fit its config.json ({fault}: {min(report[f'{fault}_keys'])}).")
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    model = allow_cache_position(model.eval())
    if adapter:
        model = load_adapter(model, *adapter)
        if torch.equal(probe_logits(model, processor), probe_logits(model, processor, adapter=False)):
            stop(f"--lora_path {lora_path} does nothing: the logits of a prompt are the same with it and without it.")
    return model, processor


# Copied from llava_orpo_training.complete_original
def complete_original(model, tower: str, missing: set[str]) -> None:
    """Add what a checkpoint in LLaVA's own format lacks: 64 rows of vocabulary, as in the hub's converted checkpoints, and
    the vision weights from the tower's own checkpoint, if all are `missing`."""
    from transformers import CLIPVisionModel

    vision = {key for key in model.state_dict() if "vision_tower" in key}
    if vision <= missing:
        weights = CLIPVisionModel.from_pretrained(tower, dtype=model.dtype, use_safetensors=True).state_dict()
        model.model.vision_tower.load_state_dict(weights)
        missing -= vision
    model.resize_token_embeddings(model.config.text_config.vocab_size + 64, mean_resizing=False)
    for weight in (model.get_input_embeddings().weight, model.lm_head.weight):
        # a new row is the mean of the others, so that its logit is their mean and never the greatest
        weight.data[-64:] = weight.data[:-64].float().mean(0).to(weight.dtype)


# Copied from llava_orpo_training.allow_cache_position
def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    if not {"cache_position", "kwargs"} & inspect.signature(forward).parameters.keys():
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# Copied from llava_orpo_training.ADAPTER_KEYS
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower\.|multi_modal_projector\.|language_model\.|image_newline)": r"model.\1",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


# Copied from llava_orpo_training.rename_key
def rename_key(key: str) -> str:
    """Return today's name for a layer or weight of an adapter or a checkpoint."""
    for pattern, replacement in ADAPTER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


# Copied from llava_orpo_training.read_adapter
def read_adapter(lora_path: str) -> tuple[Path, "LoraConfig", dict[str, torch.Tensor]]:
    """Return a LoRA adapter's folder, which is fetched first if `lora_path` is a hub id, its configuration, and its weights."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    folder = Path(lora_path)
    try:
        if not folder.is_dir():
            files = ["*.json", "adapter_model.safetensors", "non_lora_trainables.bin"]
            folder = Path(snapshot_download(lora_path, allow_patterns=files))
        config, saved = PeftConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")
    except Exception as error:
        advice = "Give a hub id or a folder; convert an adapter_model.bin to safetensors first."
        stop(f"--lora_path {lora_path} is no adapter: {str(error).splitlines()[0]} {advice}")
    if config.peft_type != "LORA":
        stop(f"--lora_path {lora_path} is a {config.peft_type} adapter; this script reads LoRA.")
    if (folder / "non_lora_trainables.bin").exists():
        stop(f"--lora_path {lora_path} has more weights in non_lora_trainables.bin; merge it with LLaVA's own code.")
    weights = {rename_key(key): weight for key, weight in saved.items()}
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    if not config.exclude_modules and not any("vision_tower" in key for key in weights):
        config.exclude_modules = r".*vision_tower.*"  # its layers have the same names
    return folder, config, weights


# Copied from llava_orpo_training.load_adapter
def load_adapter(model, folder: Path, config, weights: dict[str, torch.Tensor], trainable: bool = False):
    """Put an adapter, as read_adapter returns it, on the model and return the PeftModel. Stops unless every weight is finite
    and has its layer, and every layer that the configuration names has its weights."""
    from peft import get_peft_model, set_peft_model_state_dict

    config.inference_mode, config.base_model_name_or_path = not trainable, None
    try:
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, {f"base_model.model.{key}": weights[key] for key in weights})
    except Exception as error:  # weights of another base or rank
        stop(f"--lora_path {folder} does not fit this base: {' '.join(str(error).split())[:300]}")
    faults = [f"the model has no layer for {key}" for key in report.unexpected_keys]
    faults += [f"it lacks {key}" for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    faults += [f"{key} is not finite" for key, weight in weights.items() if not weight.isfinite().all()]
    if faults:
        stop(f"--lora_path {folder} cannot be used on this base: {faults[0]}.")
    return adapted.eval()


# Copied from llava_orpo_training.probe_logits
@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt").to(model.device, model.dtype)
    ids = torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device)
    with nullcontext() if adapter else model.disable_adapter():
        return model.eval()(input_ids=ids, **pixels, logits_to_keep=16).logits[0].float()


# ---------------------------------------------------------------------------- the model, for several users at once


@dataclass(eq=False)
class Job:
    """One answer: what was asked, and what has come of it so far."""

    ids: list[int]  # of the prompt
    image: Image.Image
    adapter: bool
    sampling: tuple[float, float]  # temperature and top-p
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    over: bool = False  # whole, or failed
    failed: bool = False


class Engine:
    """Answers with base and adapter. A thread of its own takes all answers that wait and generates them as one batch; a
    question that comes in the meantime waits for that batch. Rows with and without the adapter share it."""

    def __init__(self, model, processor, max_batch_size: int):
        self.model, self.processor, self.max_batch_size = model, processor, max_batch_size
        self.models = ["Base", "Adapter"] if hasattr(model, "peft_config") else ["Base"]
        # PEFT picks the adapter by row only if it is plain LoRA on layers that see rows, which the vision layers do not
        added = [name for name, _ in model.named_parameters() if ".default." in name]
        self.mixes = bool(added) and all(re.search(r"\.language_model\..*\.lora_[AB]\.", name) for name in added)
        self.ends = set(np.ravel(model.generation_config.eos_token_id).tolist())
        self.jobs: list[Job] = []  # which somebody waits for
        threading.Thread(target=self.work, daemon=True).start()

    async def stream(self, image, conversations: dict[str, list], temperature=0.0, top_p=1.0, max_new_tokens=1024):
        """Yield {model: answer so far} again and again. `conversations` has the (question, answer) turns of each model, and
        the last answer is None. Closing the generator ends the generation."""
        sampling, jobs = (temperature, top_p) if temperature > 0 else (0, 1), {}
        for model, turns in conversations.items():
            ids = build_chat(self.processor, image.size, turns)
            room = self.model.config.text_config.max_position_embeddings - len(ids)
            if room < 1:
                raise Refusal("The conversation is longer than the model can read; start a new one with Clear.")
            jobs[model] = Job(ids, image, model == "Adapter", sampling, min(max_new_tokens, room))
        self.jobs += jobs.values()
        decode, answers, over = partial(self.processor.decode, skip_special_tokens=True), None, False
        try:
            while not over:
                over = all(job.over for job in jobs.values())
                # U+FFFD stands for the first bytes of a letter
                grown = {model: decode(job.tokens).strip("\ufffd \n") for model, job in jobs.items()}
                if grown != answers:
                    yield (answers := grown)
                await asyncio.sleep(0.02)
        finally:
            self.jobs = [job for job in self.jobs if job not in jobs.values()]
        if any(job.failed for job in jobs.values()):
            raise Refusal("The model failed on this question. Ask again, or start with a smaller --max_batch_size.")

    def work(self) -> None:
        """Answer those who wait, a batch at a time. The engine's thread runs this forever."""
        while True:
            time.sleep(0.01)
            waiting = [job for job in self.jobs if not job.over]
            alike = [job for job in waiting if job.sampling == waiting[0].sampling]
            batch = [job for job in alike if self.mixes or job.adapter == alike[0].adapter][: self.max_batch_size]
            try:
                if batch:
                    self.generate(batch)
            except Exception as error:  # such as a full GPU: these answers are lost, and the page goes on
                print(f"{len(batch)} answers failed: {type(error).__name__}: {error}", file=sys.stderr)
                for job in batch:
                    job.failed = job.over = True

    def generate(self, batch: list[Job]) -> None:
        """Generate the answers of a batch together. Each job gets its tokens as they come."""
        device, tokenizer = self.model.device, self.processor.tokenizer

        def follow(ids: torch.Tensor, scores, **_) -> torch.Tensor:  # a stopping criterion, called for each new token
            for job, token in zip(batch, ids[:, -1].tolist(), strict=True):
                if not job.over:
                    job.tokens.append(token)
                    job.over = token in self.ends or len(job.tokens) >= job.max_new_tokens
            return torch.tensor([job.over or job not in self.jobs for job in batch], device=device)

        images = list({id(job.image): job.image for job in batch}.values())  # who shares a picture shares its pixels
        rows = [[image is job.image for image in images].index(True) for job in batch]
        pixels = self.processor.image_processor(images, return_tensors="pt").to(device, self.model.dtype)
        (temperature, top_p), use_adapter = batch[0].sampling, nullcontext()
        options = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
        if self.mixes:
            options["adapter_names"] = ["default" if job.adapter else "__base__" for job in batch]
        elif len(self.models) == 2 and not batch[0].adapter:
            use_adapter = self.model.disable_adapter()
        ids = tokenizer.pad({"input_ids": [job.ids for job in batch]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode(), use_adapter:
            self.model.generate(
                **ids.to(device),
                **{name: values[rows] for name, values in pixels.items()},
                max_new_tokens=max(job.max_new_tokens for job in batch),
                do_sample=temperature > 0,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=[follow],
                **options,
            )


def build_chat(processor, image_size: tuple[int, int], turns: list) -> list[int]:
    """Return the token ids of a prompt that goes on from earlier turns about the same picture, whose answers end in `</s>`.
    `turns` are (question, answer), and the last answer is None."""
    pattern = "[INST] {} [/INST]" if "[INST]" in (processor.chat_template or "[INST]") else "USER: {} ASSISTANT:"
    encode = partial(processor.tokenizer, add_special_tokens=False, split_special_tokens=True)
    ids = build_prompt(processor, turns[0][0], image_size)
    for (_, answer), (question, _) in zip(turns, turns[1:], strict=False):
        ids += encode(answer).input_ids + [processor.tokenizer.eos_token_id]
        ids += encode(pattern.format(question)).input_ids
    return ids


# ---------------------------------------------------------------------------- objects that the base does not confirm

# what is looked for in an answer, as {word: name}: COCO's classes and other things that captions name
NAMES = """person man woman child boy girl baby bicycle bike car motorcycle airplane plane bus train truck boat ship bench
    bird cat dog horse sheep cow elephant bear zebra giraffe animal backpack bag umbrella handbag tie suitcase frisbee ski
    snowboard ball kite bat glove skateboard surfboard racket bottle glass cup mug fork knife spoon bowl banana apple sandwich
    broccoli carrot pizza donut cake food fruit chair couch sofa plant bed table toilet tv television laptop computer mouse
    remote keyboard phone microwave oven toaster sink refrigerator book clock vase scissors toothbrush lamp light bucket house
    tent tree flower mushroom fish star moon sun cloud sky grass sand beach water river lake mountain hill road street bridge
    building tower door window wall fence sign pole curtain carpet mirror painting candle basket box plate pillow towel hat
    cap helmet shoe shirt dress jacket glasses watch camera flag balloon statue leaf rock stairs shelf desk stove pot pan"""
OBJECTS = dict(people="person", men="man", women="woman", children="child", babies="baby", knives="knife")
OBJECTS |= {form: name for name in NAMES.split() for form in (name, f"{name}s", f"{name}es")}


async def find_doubtful(engine, image: Image.Image, answers: dict[str, str]) -> set[str]:
    """Return the words of the models' answers that name an object that the base denies when it is asked about it."""

    async def deny(name: str) -> bool:
        question = f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in this image?"
        replies = [reply async for reply in engine.stream(image, {"Base": [(question, None)]}, max_new_tokens=2)]
        return not replies[-1]["Base"].lower().startswith("yes")

    words = list(OBJECTS.keys() & re.findall(r"\w+", " ".join(answers.values()).lower()))
    denied = await asyncio.gather(*[deny(OBJECTS[word]) for word in words])
    return {word for word, no in zip(words, denied, strict=True) if no}


# ---------------------------------------------------------------------------- the page

Refusal = partial(gr.Error, print_exception=False)  # its sentence is shown in place of an answer


def open_picture(path: str | Path | None) -> Image.Image:
    """Return a user's picture, upright and in RGB. Raises gr.Error with a sentence for the user if it cannot be used."""
    formats = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"]
    if not path:
        raise Refusal("Choose a picture first.")
    if not Path(path).exists():
        raise Refusal("This picture is no longer on the server; choose it again.")
    try:
        with Image.open(path, formats=formats) as file:
            width, height = file.size  # read from the header, before memory is taken
        if width * height <= 50_000_000 and max(width, height) <= 100 * min(width, height):
            return load_image(path)
    except Exception:  # a broken file makes Pillow raise almost anything
        raise Refusal(f"This file is damaged, far too large or no picture; {', '.join(formats)} can be read.") from None
    raise Refusal(f"This picture has {width:,} x {height:,} pixels; make it smaller, or crop a narrow strip.")


def check_question(question: str) -> str:
    """Return the question as the model is asked it; an empty one asks for a description. Raises gr.Error if it is too long."""
    if len(question) > 4_000:
        raise Refusal(f"The question has {len(question):,} characters; 4,000 are allowed.")
    return question.strip() or "Describe this image."


def mark_answers(answers: dict[str, str], doubtful: set[str] = frozenset()) -> dict[str, list[tuple[str, str]]]:
    """Return each answer in pieces (piece, marks). The marks are "differs" for words that the other answer lacks, "doubtful"
    for those in `doubtful`, both or none. The first answer is compared with the last one, and the others with the first.

    A word is lacking if it occurs more often here than there; which one of several equal words, an alignment decides.
    """
    small = set("a an the and or of in on at to by with is are it its this that there which also some".split())
    split = {model: re.findall(r"\w+(?:[-'’]\w+)*|\W+", text) for model, text in answers.items()}
    lower = {model: [piece.lower() for piece in pieces] for model, pieces in split.items()}
    texts, marked = list(lower.values()), {}
    for model, words in lower.items():
        others = texts[-1] if words is texts[0] else texts[0]
        surplus = Counter(word for word in words if word[0].isalnum() and word not in small) - Counter(others)
        matches = difflib.SequenceMatcher(None, words, others).get_matching_blocks()
        aligned, differs = {match.a + n for match in matches for n in range(match.size)}, set()
        for number, word in enumerate(words):
            if number not in aligned and surplus[word]:
                surplus[word] -= 1
                differs.add(number)
        # the space between two marked words is marked as well
        differs |= {n for n, word in enumerate(words) if word.isspace() and {n - 1, n + 1} <= differs}
        marks = [" ".join(["differs"] * (n in differs) + ["doubtful"] * (w in doubtful)) for n, w in enumerate(words)]
        groups = groupby(range(len(words)), key=marks.__getitem__)
        marked[model] = [("".join(split[model][n] for n in group), mark) for mark, group in groups]
    return marked


ANSWERS = jinja2.Environment(autoescape=True).from_string("""\
{% for turn in turns | reverse %}<article><h3>{{ turn.question }}</h3>
  {% for model, answer in turn.answers.items() %}<section><h4>{{ model }}</h4>
    <p>{% for piece, marks in turn.marked.get(model) or [(answer, "")] -%}
        <span class="{{ marks }}">{{ piece or "…" }}</span>{% endfor %}</p>
    <button onclick="navigator.clipboard.writeText(this.previousElementSibling.innerText)">Copy</button></section>
  {% endfor %}</article>
{% else %}<p>The answers appear here, side by side.</p>{% endfor %}""")
CSS = """
#picture img { width: 100%; height: 100%; object-fit: contain }
#examples .gallery-item { height: 90px } #examples .gallery-item * { height: 100%; object-fit: contain }
#question button { background: var(--button-primary-background-fill); color: var(--button-primary-text-color) }
#answers article { display: flex; flex-wrap: wrap; gap: .3em 1.5em; padding-bottom: .8em }
#answers h3 { flex-basis: 100%; margin: 0; font-weight: 400 } #answers section { flex: 1 1 260px }
#answers h3, #answers p { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7 }
#answers h4 { margin: 0 } #answers button { all: unset; cursor: pointer; text-decoration: underline; font-size: .8em }
#answers .differs, #about mark { background: #ffdf80; color: #222; padding: .1em 0 }
#answers .doubtful, #about u { text-decoration: underline wavy #e33 1.5px; text-underline-offset: 3px }
"""
IDLE = {"submit_btn": "Ask", "stop_btn": False}  # the question's box, as long as no answer grows


async def ask(engine, check, picture, question, turns, models, temperature, top_p, length, remember):
    """Answer a question from the page. Yields the question's box, the conversation, and the conversation as HTML."""
    kept, typed = turns, question  # what is shown after a failure
    try:
        question = check_question(question)
        image = await asyncio.to_thread(open_picture, picture and picture["path"])
        if not models:
            raise Refusal("Choose at least one model in the settings.")
        conversations = {}
        for model in models:
            known = [(turn["question"], turn["answers"].get(model)) for turn in turns if remember]
            conversations[model] = [*filter(all, known), (question, None)]
        turn = {"question": question, "answers": dict.fromkeys(models, ""), "marked": {}}
        turns = [*turns, turn]
        yield gr.Textbox("", submit_btn=False, stop_btn="Stop"), turns, ANSWERS.render(turns=turns)
        async with aclosing(engine.stream(image, conversations, temperature, top_p, int(length))) as growing:
            async for turn["answers"] in growing:
                yield gr.skip(), turns, ANSWERS.render(turns=turns)
        turn["marked"] = mark_answers(turn["answers"])
        yield gr.skip(), turns, ANSWERS.render(turns=turns)
        kept, typed = turns, ""
        if check:
            turn["marked"] = mark_answers(turn["answers"], await check(engine, image, turn["answers"]))
        yield gr.Textbox(**IDLE), turns, ANSWERS.render(turns=turns)
    except gr.Error as error:
        gr.Warning(error.message)
        yield gr.Textbox(typed, **IDLE), kept, ANSWERS.render(turns=kept)


def check_picture(picture):
    """Take a picture that cannot be used off the page, with a sentence."""
    try:
        return gr.skip() if not picture or open_picture(picture["path"]) else None
    except gr.Error as error:
        gr.Warning(error.message)


async def answer(
    engine,
    image: gr.FileData,
    question: str = "",
    model: str = "",
    temperature: float = 0,
    top_p: float = 1,
    max_new_tokens: int = 512,
) -> str:
    """Ask a model about a picture; without a name, it is the last one. Each message is the whole answer so far."""
    model = model or engine.models[-1]
    if model not in engine.models or not 0 <= temperature <= 2 or not 0 < top_p <= 1 or max_new_tokens < 1:
        names = ", ".join(engine.models)
        raise Refusal(f"Give a model of {names}, temperature 0 to 2, top_p above 0 up to 1, max_new_tokens above 0.")
    picture = await asyncio.to_thread(open_picture, image and image["path"])
    conversations = {model: [(check_question(question), None)]}
    async with aclosing(engine.stream(picture, conversations, temperature, top_p, int(max_new_tokens))) as growing:
        async for answers in growing:
            yield answers[model]


def build_page(engine, about, max_new_tokens, remember, seats, check=None, temperature=0.0) -> gr.Blocks:
    """Return the page and its API over an engine, which has `models` (their names) and `stream` (see Engine).

    `about` is the text below the answers, and `seats` how many answers the engine generates at once. The settings start
    with `remember` and `temperature`. `check` returns the words of the answers to underline, as find_doubtful does.
    """
    pictures = [str(MINIATURE / f"amber/image/scene_9000{number:02}.webp") for number in (16, 6, 34, 19, 3, 5)]
    hint = "Ask about the picture, or press Ask for a description"
    with gr.Blocks(title="LLaVA-1.6, before and after alignment", delete_cache=(60, 3600)) as page:
        gr.Markdown("## LLaVA-1.6, before and after alignment")
        turns = gr.State([], time_to_live=3600)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                picture = gr.Image(label="Picture", height=240, elem_id="picture", buttons=["fullscreen"])
            with gr.Column(scale=5, min_width=280):
                box = gr.Textbox(placeholder=hint, show_label=False, elem_id="question", **IDLE)
                shown = gr.HTML(ANSWERS.render(), elem_id="answers")
                gr.Markdown(f"<small>{about} Uploaded pictures are deleted after an hour.</small>", elem_id="about")
        with gr.Row():
            gr.Examples(pictures, picture, label="Pictures to try", elem_id="examples")
            gr.Examples(["Describe this image.", "Is there a chair in this image?"], box, label="Questions to try")
        with gr.Accordion("Settings", open=False):
            chosen = gr.CheckboxGroup(engine.models, value=engine.models[:2], label="Models that answer")
            temperature = gr.Slider(0, 2, temperature, step=0.05, label="Temperature (0 takes the likeliest token)")
            top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p (draw from the likeliest tokens of this sum)")
            length = gr.Slider(1, max_new_tokens, min(512, max_new_tokens), step=1, label="Longest answer, in tokens")
            remember = gr.Checkbox(remember, label="Follow-up questions see the conversation about the picture")
        clear = gr.Button("Clear the answers", size="sm")
        inputs, changed = [picture, box, turns, chosen, temperature, top_p, length, remember], [box, turns, shown]
        blank = gr.update(**IDLE), [], ANSWERS.render()  # the page as it is before the first question
        limit = {"concurrency_id": "answers", "concurrency_limit": max(1, seats // 2)}  # two answers a question
        private = {"api_visibility": "private", "preprocess": False, "show_progress": "minimal"}
        asked = box.submit(partial(ask, engine, check), inputs, changed, show_progress_on=shown, **private, **limit)
        quick = private | {"queue": False, "show_progress": "hidden"}
        # what the page does first, or else a late piece of the answer would follow, or a later question would be cancelled
        gr.on([box.stop, clear.click, picture.change], None, cancels=asked)
        box.stop(lambda: blank[0], None, box, **quick)
        gr.on([clear.click, picture.change], lambda: blank, None, changed, **quick)
        picture.change(check_picture, picture, picture, **private | {"show_progress": "hidden"})
        gr.api(MethodType(answer, engine), api_name="answer", **limit)
    return page.queue(max_size=64, default_concurrency_limit=None)


def read_users(path: Path) -> list[tuple[str, str]]:
    """Return the (name, password) pairs of --auth_file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        stop(f"--auth_file {path} cannot be read ({error}).")
    users = [tuple(line.split(":", 1)) for line in lines if line and not line.startswith("#")]
    if not users or any(len(user) != 2 or not all(user) for user in users):
        stop(f"--auth_file {path} must have one name:password per line.")
    return users


def launch_page(page: gr.Blocks, host="127.0.0.1", port=None, share=False, users=None) -> None:
    """Let the page listen in threads of its own. Stops if the address or the port cannot be had."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    looks = {"css": CSS, "theme": theme, "footer_links": ["api"], "run_history": False, "ssr_mode": False}
    options = {"max_file_size": "20mb", "show_error": True, "quiet": True, "prevent_thread_lock": True}
    try:
        page.launch(server_name=host, server_port=port, share=share, auth=users, **looks, **options)
    except OSError as error:
        stop(f"--host {host} --port {port} cannot be listened on ({error}).")
    print(f"The page is at {page.share_url or page.local_url} (Ctrl+C ends it)")


async def print_answers(engine, paths: list[Path], questions: list[str], max_new_tokens: int) -> None:
    """Print the answers of all models to each question about each picture, side by side, with their differences marked."""
    for path, question in product(paths, questions):
        conversations = dict.fromkeys(engine.models, [(check_question(question), None)])
        stream = engine.stream(open_picture(path), conversations, max_new_tokens=max_new_tokens)
        answers = [answers async for answers in stream][-1]
        table = Table(*answers, title=Text(f"{path}: {question}"), title_justify="left", expand=True)
        cells = [[(text, mark and "black on yellow") for text, mark in cell] for cell in mark_answers(answers).values()]
        table.add_row(*[Text.assemble(*cell) for cell in cells])
        Console().print(table)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    users = args.auth_file and read_users(args.auth_file)
    model, processor = load_llava(args.model_path, args.lora_path, args.device, args.load_4bit, args.load_8bit)
    engine = Engine(model, processor, args.max_batch_size)
    if args.image:
        try:
            return asyncio.run(print_answers(engine, args.image, args.question, args.max_new_tokens))
        except gr.Error as error:
            stop(error.message)
    about = f"Base: `{args.model_path}`. <u>Underlined</u> objects are those that it denies, which can be wrong."
    if args.lora_path:
        about = f"<mark>Marked</mark> words are not in the other answer. Adapter: `{args.lora_path}`. {about}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the pictures are deleted
    with tempfile.TemporaryDirectory(prefix="llava_host_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # where Gradio keeps uploaded pictures
        page = build_page(engine, about, args.max_new_tokens, not args.test_mode, args.max_batch_size, find_doubtful)
        launch_page(page, args.host, args.port, args.share, users)
        page.block_thread()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted.", code=130)
