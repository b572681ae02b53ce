"""Merge a LoRA adapter into LLaVA-1.6, quantize it for vLLM, and measure what that cost in quality.

Reads   a LLaVA-NeXT checkpoint (--model_path), an adapter (--lora_path), and pictures with questions (--dataset).
Writes  to --output_dir: a checkpoint that vLLM and transformers load, and quantization_report.json. Exit code 4 if it
        answers too differently from what it was made of (--max_kl).
Needs   pip install -r requirements/train.txt -r requirements/quantize.txt

    python llava_quantize_vllm.py --model_path liuhaotian/llava-v1.6-mistral-7b --lora_path checkpoints/llava-orpo-prod
    python llava_quantize_vllm.py --lora_path checkpoints/llava-orpo-prod --scheme BF16      # merge only
    python llava_quantize_vllm.py --test_mode             # the embedded miniature, no GPU, no downloads
"""

import argparse
import importlib.util
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"

SCHEMES = {"FP8_DYNAMIC": "FP8-Dynamic", "FP8_BLOCK": "FP8-Block", "W8A8": "W8A8", "W4A16": "W4A16", "BF16": "BF16"}
CALIBRATED = ("W8A8", "W4A16")  # rounded with regard to activations, which takes data and the whole model in memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter folder; without one, the base alone is quantized")
    add(model, "--merge_lora", "merge the adapter into the weights it was trained on (after QLoRA: rounded to NF4), "
        "NF4-rounded ones, or the base's own", choices=["trained", "nf4", "base"], default="trained")  # fmt: skip
    add(model, "--device", "auto (cuda, then mps, then cpu), all (layers spread over the GPUs), or cuda:1, cpu …",
        default="auto")  # fmt: skip
    add(model, "--test_mode", "use the embedded miniature, its adapter and its pairs where these are not given",
        action="store_true")  # fmt: skip

    to = parser.add_argument_group("quantization")
    add(to, "--output_dir", "new folder for the checkpoint (default: quantized_models/<model>-<scheme>)", type=Path)
    add(to, "--scheme", "FP8_DYNAMIC: 8-bit floats, a scale a row and a token; FP8_BLOCK: a scale a block of 128x128; "
        "W8A8: 8-bit integers; W4A16: 4-bit weights; both by GPTQ, on --dataset; BF16: merge only",
        choices=list(SCHEMES), default="FP8_DYNAMIC")  # fmt: skip
    add(to, "--ignore", "layers left as they are, by a part of their names or by re:…; embeddings and head always are", nargs="*",
        default=["lm_head", "vision_tower", "multi_modal_projector"])  # fmt: skip
    add(to, "--calibration_samples", "pictures with questions that GPTQ sees", type=int, default=256)

    gate = parser.add_argument_group("quality gate")
    add(
        gate,
        "--dataset",
        "pictures and questions: hub id, folder, .parquet or .jsonl",
        default="openbmb/RLAIF-V-Dataset",
    )
    add(
        gate,
        "--gate_samples",
        "pictures with questions asked before and after; 0 leaves the gate out",
        type=int,
        default=64,
    )
    add(gate, "--max_new_tokens", "tokens an answer may have in the gate", type=int, default=128)
    add(gate, "--max_kl", "mean KL divergence a token, in nats, above which the gate fails", type=float, default=0.02)
    args = parser.parse_args(argv)
    for name in ("calibration_samples", "max_new_tokens", "max_kl"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} is {getattr(args, name)}; it must be above 0")
    if args.gate_samples < 0:
        parser.error(f"--gate_samples is {args.gate_samples}; it must be at least 0")
    name = Path(args.model_path).name
    if args.test_mode:
        if args.model_path == parser.get_default("model_path"):
            args.model_path, name = str(MINIATURE / "model"), "miniature"
            args.lora_path = args.lora_path or str(MINIATURE / "adapter")
        if args.dataset == parser.get_default("dataset"):
            args.dataset = str(MINIATURE / "preferences")
    args.output_dir = args.output_dir or Path("quantized_models") / f"{name}-{SCHEMES[args.scheme]}"
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports
    if importlib.util.find_spec("llmcompressor") is None:
        sys.exit(
            "error: llmcompressor is not installed; pip install -r requirements/train.txt -r requirements/quantize.txt"
        )

import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import wraps
from typing import NoReturn

for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(name, value)

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from loguru import logger
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, LlavaNextForConditionalGeneration

# ---------------------------------------------------------------------------- blocks copied from earlier scripts

# Copied from llava_orpo_training.MAIN_PROCESS
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes


# Copied from llava_orpo_training.console
console = Console(stderr=True, quiet=not MAIN_PROCESS)


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# Copied from llava_orpo_training.load_image
def load_image(source: str | Path | bytes) -> Image.Image:
    """Open a picture from a path or from a file's bytes, turned upright (EXIF) and in RGB, with white where it is
    transparent. Raises OSError if it is not a picture."""
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(source) if isinstance(source, bytes) else source))
        if image.mode[0] in "IF":  # 16 or 32 bits a pixel, of which convert() would clip all above 255
            values = np.asarray(image, dtype="float64").clip(0)
            brightest = 65535 if image.mode.startswith("I;16") else max(values.max(), 1)
            return Image.fromarray((values * 255 / brightest).astype("uint8")).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # Pillow's parsers raise almost anything on a broken file
        raise OSError(str(error)) from error


# Copied from llava_orpo_training.build_prompt
def build_prompt(processor, question: str, image_size: tuple[int, int]) -> list[int]:
    """Return the token ids of LLaVA-1.6's prompt, which is `[INST] <image>\\n{question} [/INST]` after BOS, or Vicuna's form
    where the processor's chat template is Vicuna's.

    `image_size` is the picture's (width, height) in pixels, on which the number of image tokens depends. As in the original
    code, the text before and after them is tokenized separately. A `<image>` or `</s>` inside the question is plain text.
    """
    tokenizer = processor.tokenizer
    width, height = image_size
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


# Copied from llava_orpo_training.check_weights
def check_weights(folder: Path) -> None:
    """Refuse a checkpoint folder whose weights are pickled, incomplete or broken off; the sentence names the file."""
    index = folder / "model.safetensors.index.json"
    try:
        shards = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        stop(f"--model_path {folder}: {index.name} is no index of weight files; download it again.")
    for name in shards:
        file = folder / name
        if not file.exists() and not index.exists() and list(folder.glob("*.bin")):
            stop(f"--model_path {folder} holds pickled weights (.bin), which can run code when they are opened; convert them: "
                 "python -c \"import glob, torch, safetensors.torch as s; s.save_file({k: v.clone() for f in "
                 "glob.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()}, 'model.safetensors', "
                 "{'format': 'pt'})\" in that folder")  # fmt: skip
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (OSError, SafetensorError) as error:
            stop(f"--model_path {folder}: {name} {'is not there' if not file.exists() else f'is broken ({error})'}; "
                 "download it again.")  # fmt: skip


# Copied from llava_orpo_training.read_original
def read_original(model_path: str, original: dict) -> tuple:
    """Return (config, processor, vision tower's name) for a checkpoint in LLaVA's own format, whose config.json is `original`.

    The tokenizer gets `<image>` and `<pad>` as its next two tokens, as in the hub's converted checkpoints.
    """
    from transformers import AutoConfig, LlamaTokenizer, LlavaNextConfig, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    expected = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "vocab_size": 32000}
    for name, value in expected.items():
        if original.get(name) != value:
            stop(f"--model_path {model_path} has {name} {original.get(name)!r}; LLaVA-1.6 has {value!r}.")
    tower = original["mm_vision_tower"]
    vision = LlavaNextConfig().vision_config
    if tower != "openai/clip-vit-large-patch14-336":  # this one, which all published checkpoints name, is the default
        vision = AutoConfig.from_pretrained(tower, trust_remote_code=False)
        vision = getattr(vision, "vision_config", vision)
    llava = ("mm_", "image_", "tokenizer_", "unfreeze_", "tune_", "use_mm_", "freeze_", "architectures", "auto_map")
    text = {name: value for name, value in original.items() if not name.startswith(llava)}
    text["model_type"] = "mistral" if original["model_type"] == "llava_mistral" else "llama"
    grid = original["image_grid_pinpoints"]  # (width, height) pairs, which some checkpoints write as text
    grid = [[height, width] for width, height in (json.loads(grid) if isinstance(grid, str) else grid)]
    tokenizer = LlamaTokenizer.from_pretrained(model_path, add_bos_token=True, legacy=True, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if len(tokenizer) != 32002:
        stop(f"--model_path {model_path} has a tokenizer of {len(tokenizer) - 2:,} tokens; LLaVA-1.6 has 32,000.")
    config = LlavaNextConfig(vision_config=vision.to_dict(), text_config=text, image_grid_pinpoints=grid)
    config.vision_feature_layer = original["mm_vision_select_layer"]
    side = vision.image_size
    images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=side, image_grid_pinpoints=grid)
    before, after = ("[INST] ", " [/INST]") if text["model_type"] == "mistral" else ("USER: ", " ASSISTANT:")
    template = before + "<image>\n{{ messages[0]['content'][-1]['text'] }}" + after
    processor = LlavaNextProcessor(images, tokenizer, vision.patch_size, "default", template)
    processor.num_additional_image_tokens = 1
    return config, processor, tower


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
    dtype = torch.float32
    if device != "cpu":
        has_bf16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bf16 else torch.float16
    quantization = BitsAndBytesConfig(
        load_in_4bit=load_4bit,
        load_in_8bit=load_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", ".*vision_tower.*", ".*multi_modal_projector.*"],
    )
    try:
        model, report = LlavaNextForConditionalGeneration.from_pretrained(
            model_path,
            config=config,
            key_mapping=ORIGINAL_KEYS if tower else None,
            dtype=dtype,
            quantization_config=quantization if load_4bit or load_8bit else None,
            device_map="auto" if device == "all" else {"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
        if tower:
            complete_original(model, tower, report["missing_keys"])
    except Exception as error:
        stop(f"--model_path {model_path} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}).")
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        found = f"missing: {', '.join(missing[:3]) or 'none'}; unexpected: {', '.join(unexpected[:3]) or 'none'}"
        stop(f"--model_path {model_path}: the weights do not fit config.json ({found}).")
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    if load_4bit and device == "cpu":
        # bitsandbytes would repack the weights at a forward in eval mode, and then silently compute no gradients
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if adapter:
        model = load_adapter(model, processor, *adapter)
    return allow_cache_position(model.eval()), processor


# Copied from llava_orpo_training.load_tower
def load_tower(model, tower: str) -> None:
    """Take the vision weights from the CLIP checkpoint that the config names, where the checkpoint itself has none."""
    from transformers import CLIPVisionModel

    weights = CLIPVisionModel.from_pretrained(tower, dtype=model.dtype, use_safetensors=True).state_dict()
    model.model.vision_tower.load_state_dict(
        {key.removeprefix("vision_model."): weight for key, weight in weights.items()}
    )


# Copied from llava_orpo_training.allow_cache_position
def allow_cache_position(model):
    """Let callers pass `cache_position`, as transformers 4.38 to 4.57 do, to a model whose forward does not know it."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.name == "cache_position" or p.kind is p.VAR_KEYWORD for p in parameters):
        model.forward = wraps(forward)(lambda *args, cache_position=None, **kwargs: forward(*args, **kwargs))
    return model


# Copied from llava_orpo_training.ADAPTER_KEYS
ADAPTER_KEYS = {
    r"^(base_model\.model\.)+": "",
    **ORIGINAL_KEYS,
    r"^language_model\.model\.": "model.language_model.",
    r"^language_model\.lm_head": "lm_head",
    r"^(vision_tower|multi_modal_projector|language_model)\.": r"model.\1.",
    r"^model\.vision_tower\.vision_model\.": "model.vision_tower.",
}


# Copied from llava_orpo_training.read_adapter
def read_adapter(lora_path: str) -> tuple[Path, "LoraConfig"]:
    """Return a LoRA adapter's folder, which is fetched first if `lora_path` is a hub id, and its configuration."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    folder = Path(lora_path)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(lora_path, allow_patterns=["*.json", "adapter_model.safetensors"]))
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        stop(f"--lora_path {lora_path} is no adapter: {str(error).splitlines()[0]} Give a hub id or a folder.")
    if config.peft_type != "LORA":
        stop(f"--lora_path {lora_path} is a {config.peft_type} adapter; this script reads LoRA.")
    if (folder / "non_lora_trainables.bin").exists():
        stop(f"--lora_path {lora_path} has more weights in non_lora_trainables.bin; merge it with LLaVA's own code.")
    if not (folder / "adapter_model.safetensors").exists():
        stop(f"--lora_path {lora_path} has no adapter_model.safetensors; convert its adapter_model.bin, if it has one.")
    config.rank_pattern = {rename_key(name): rank for name, rank in config.rank_pattern.items()}
    config.alpha_pattern = {rename_key(name): alpha for name, alpha in config.alpha_pattern.items()}
    return folder, config


# Copied from llava_orpo_training.load_adapter
def load_adapter(model, processor, folder: Path, config, trainable: bool = False):
    """Put a LoRA adapter on the model and return the PeftModel.

    Stops unless every weight is finite and has its layer, every layer that the configuration names has its weights, and the
    adapter moves the logits of a prompt with a picture.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    try:
        saved = load_file(folder / "adapter_model.safetensors")
        weights = {f"base_model.model.{rename_key(key)}": weight for key, weight in saved.items()}
        if not config.exclude_modules and not any("vision_tower" in key for key in weights):
            config.exclude_modules = r".*vision_tower.*"  # its layers have the same names
        config.inference_mode, config.base_model_name_or_path = not trainable, None
        adapted = get_peft_model(model, config)
        report = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # weights of another base or rank, a broken file
        stop(f"--lora_path {folder} does not fit this base: {' '.join(str(error).split())[:300]}")
    faults = [f"the model has no layer for {key}" for key in report.unexpected_keys]
    faults += [f"it lacks {key}" for key in report.missing_keys if "lora_" in key or "modules_to_save" in key]
    faults += [f"{key} is not finite" for key, weight in weights.items() if not weight.isfinite().all()]
    if not faults and torch.equal(probe_logits(adapted, processor), probe_logits(adapted, processor, adapter=False)):
        faults = ["the logits of a prompt are the same with it and without it"]
    if faults:
        stop(f"--lora_path {folder} cannot be used on this base: {faults[0]}.")
    return adapted.eval()


# Copied from llava_orpo_training.adapter_folder
def adapter_folder(lora_path: str) -> Path:
    """Where an adapter's files lie; from the hub, they are fetched first."""
    if Path(lora_path).is_dir():
        return Path(lora_path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", lora_path):
        stop(f"--lora_path {lora_path} is no folder, and no hub id, which is owner/name.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(lora_path, allow_patterns=["*.json", "adapter_model.safetensors"]))
    except Exception as error:
        stop(f"--lora_path {lora_path} is no folder, and no adapter on the hub ({str(error).splitlines()[0]}).")


# Copied from llava_orpo_training.probe_logits
@torch.no_grad()
def probe_logits(model, processor, adapter: bool = True) -> torch.Tensor:
    """Return the logits of a fixed prompt with a picture, (its last 16 tokens, vocabulary), with the adapter on or off."""
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    pixels = processor.image_processor(image, return_tensors="pt")
    with nullcontext() if adapter else model.disable_adapter():
        output = model.eval()(
            input_ids=torch.tensor([build_prompt(processor, "Is there a cup?", image.size)], device=model.device),
            pixel_values=pixels["pixel_values"].to(model.device, model.dtype),
            image_sizes=pixels["image_sizes"].to(model.device),
            logits_to_keep=16,
        )
    return output.logits[0].float()


# Copied from llava_orpo_training.trained_on_nf4
def trained_on_nf4(lora_path: str) -> bool | None:
    """Whether an adapter was trained by QLoRA, on a base in NF4; None if nothing beside it says so."""
    folder = adapter_folder(lora_path)
    for file in (folder / "arguments.json", folder / "training_summary.json", folder.parent / "arguments.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(file.read_text())
            return str(content.get("arguments", content)["load_4bit"]) == "True"
    return None


# Copied from llava_orpo_training.round_to_nf4
def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """A weight as QLoRA's training saw it: to NF4 with double quantization, and back."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


# Copied from llava_orpo_training.merge_adapter
def merge_adapter(model, processor, lora_path: str, weights: str):
    """Merge the adapter into the base; `weights` says into which: `trained` (what it was trained on), `nf4` or `base`.

    An adapter trained by QLoRA has learned to correct NF4's rounding, so there `trained` rounds the linear layers as NF4
    does (dequantized, with double quantization) before it adds the update. Whether it was is noted in the run's
    arguments.json, beside the adapter or its checkpoint. Prints how far apart the two choices are, in logits.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        stop("an adapter is merged into whole weights; load the base without --load_4bit and --load_8bit.")
    noted = trained_on_nf4(lora_path)
    if not noted and weights != "nf4":
        why = (
            "on which it was trained"
            if noted is False
            else f"as nothing beside {lora_path} says what it was trained on"
        )
        console.print(f"merged into the base's own weights, {why}")
        return model.merge_and_unload()

    def exchange(module, *_) -> None:  # a layer's rounded weights for the time of its own forward
        module.whole, module.weight.data = module.weight.data, round_to_nf4(module.weight.data)

    def give_back(module, *_) -> None:
        module.weight.data = module.__dict__.pop("whole")

    linear = [module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
              and ".language_model." in name and ".lora_" not in name and ".modules_to_save." not in name]  # fmt: skip
    on_base = probe_logits(model, processor)
    hooks = [hook for module in linear for hook in
             (module.register_forward_pre_hook(exchange), module.register_forward_hook(give_back))]  # fmt: skip
    on_trained = probe_logits(model, processor)
    for hook in hooks:
        hook.remove()
    if weights != "base":
        for module in linear:
            module.weight.data = round_to_nf4(module.weight.data)
    console.print(f"merged into the {'base weights' if weights == 'base' else 'NF4-rounded weights'}; the other "
                  f"choice differs by up to {(on_base - on_trained).abs().max():.4f} in a prompt's logits")  # fmt: skip
    return model.merge_and_unload()


# Copied from llava_amber_validation_benchmark_with_lora.digest_checkpoint
def digest_checkpoint(path: str) -> str:
    """Return a checkpoint's identity: SHA-256 over its JSON files, tokenizer and 64 slices of each weight file, or a hub
    id's commit."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        with suppress(Exception):  # a wrong id is reported where the model is loaded
            return Path(hf_hub_download(path, "config.json")).parent.name
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors":
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for part in range(64):
                    stream.seek(part * max(size - 65_536, 0) // 63)
                    digest.update(stream.read(65_536))
        elif file.suffix in (".json", ".model") and "training" not in file.name:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


# Copied from llava_gradio_lora_host.build_chat
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


# ---------------------------------------------------------------------------- merging, a shard at a time

# any layout's key names -> transformers' module names
MODULE_KEYS = [*ADAPTER_KEYS, (r"^image_newline$", "model.image_newline")]
# transformers' module names -> the hub's key layout, the only one that vLLM reads
HUB_KEYS = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(multi_modal_projector\.|image_newline)", r"\1"),
]
# LLaVA's prompt, with BOS, for whoever sends messages: `[INST] <image>\nquestion [/INST] answer</s>[INST] …`. The picture
# stands first, wherever it comes in the message.
TEMPLATE = (
    "{{ bos_token }}GAPHEAD{% for message in messages %}{% if message['role'] == 'user' %}BEFORE"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>GAP\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}AFTER"
    "{% elif message['role'] == 'assistant' %} {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}GAP"
    "{% else %}{{ raise_exception('LLaVA-1.6 knows the roles user and assistant only.') }}{% endif %}{% endfor %}"
)


def rename_key(key: str, patterns: list[tuple[str, str]]) -> str:
    for pattern, replacement in patterns:
        key = re.sub(pattern, replacement, key)
    return key


def list_weights(folder: Path) -> dict[str, str]:
    """A checkpoint's tensor names, each with the file it is in."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return json.loads(index.read_text())["weight_map"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def add_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """A vocabulary's weight with as many rows more as it lacks, each the mean of all, as load_llava adds them."""
    mean = weight.float().mean(0).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def stage_checkpoint(model_path: str, folder: Path):
    """Put the checkpoint's weights, as links, and the files that go with the new one into `folder`; returns its processor.

    From LLaVA's own format, configuration and processor become transformers'; the prompt template is TEMPLATE.
    """
    config, processor, tower = read_checkpoint(model_path)
    source = Path(model_path)
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(model_path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))
        check_weights(source)
    weights = list_weights(source)
    for name in set(weights.values()):
        (folder / name).symlink_to((source / name).resolve())
    if tower:
        config.text_config.vocab_size += 64
        config.architectures = ["LlavaNextForConditionalGeneration"]
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        if not any("vision_tower" in key for key in weights):
            from transformers import CLIPVisionModel

            vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.bfloat16, use_safetensors=True).state_dict()
            vision = {f"model.vision_tower.{key.removeprefix('vision_model.')}": value for key, value in vision.items()}
            save_file(vision, folder / "vision_tower.safetensors")
            weights |= dict.fromkeys(vision, "vision_tower.safetensors")
    else:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and file.name != "quantization_report.json":
                shutil.copyfile(file, folder / file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    found = json.loads((folder / "config.json").read_text())
    if "quantization_config" in found:
        stop(f"--model_path {model_path} is quantized already; give the checkpoint that it was made of.")
    found.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(found | {"dtype": "bfloat16"}, indent=2))
    (folder / "chat_template.json").unlink(missing_ok=True)  # of an older layout
    (folder / "chat_template.jinja").write_text(fill_template(processor))
    return processor


def fill_template(processor) -> str:
    """TEMPLATE with the words of build_prompt: Mistral's, or Vicuna's where the processor's template is Vicuna's.

    Some tokenizers put a space after a special token by themselves and some do not: taken is what gives, for a question, an
    answer and a question more, exactly the tokens that the model was trained and measured with.
    """
    before, after, head = "[INST] ", " [/INST]", ""
    if "[INST]" not in (processor.chat_template or before):
        head = (
            "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the human's questions. "
        )
        before, after = "USER: ", " ASSISTANT:"
    tokenizer, image = processor.tokenizer, processor.image_token_id
    said = tokenizer(" It is.", add_special_tokens=False).input_ids
    wanted = build_chat(processor, (64, 64), "And now?", [("Is it?", said)])
    wanted = [token for place, token in enumerate(wanted) if token != image or wanted[place - 1] != image]
    asked = [{"type": "text", "text": "Is it?"}, {"type": "image"}]
    talk = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "It is."},
        {"role": "user", "content": "And now?"},
    ]
    for gap in ("", " "):
        template = TEMPLATE.replace("GAP", gap).replace("HEAD", head).replace("BEFORE", before).replace("AFTER", after)
        text = processor.apply_chat_template(talk, chat_template=template)
        if tokenizer(text, add_special_tokens=False).input_ids == wanted:
            return template
    stop(
        "no prompt template gives this tokenizer's prompts; its version of transformers differs from the tested 5.17.0."
    )


def merges_into_nf4(lora_path: str | None, choice: str) -> bool:
    """Whether --merge_lora, `choice`, has the base rounded to NF4 before this adapter is merged into it."""
    return bool(lora_path) and (choice == "nf4" or (choice == "trained" and bool(trained_on_nf4(lora_path))))


class Merge:
    """A compressed-tensors converter that turns a shard of the base into one of base and adapter, in the hub's key layout
    and in bfloat16. It sees a shard at a time, so that no more than that is in memory.

    Each layer is merged by PEFT, in float32. Raises SystemExit, with the sentence, if weights and configuration differ.
    """

    def __init__(self, model_path: str, folder: Path, processor, lora_path: str | None, choice: str):
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            self.model = LlavaNextForConditionalGeneration(config)
        self.rows = config.text_config.vocab_size
        self.vocabulary = ("model.language_model.embed_tokens", "lm_head")
        self.lora_path, self.config, self.updates, self.whole = lora_path, None, {}, {}
        self.nf4 = merges_into_nf4(lora_path, choice)
        self.modules = dict(self.model.named_modules())
        self.merged, self.changed = set(), set()
        places, wrong = self.model.state_dict(), []
        weights = list_weights(folder)
        for key, file in weights.items():
            name = rename_key(key, MODULE_KEYS)
            with safe_open(folder / file, "pt") as opened:
                shape = list(opened.get_slice(key).get_shape())
                if name.removesuffix(".weight") in self.vocabulary and name in places:
                    weight = opened.get_tensor(key)
                    shape[0] = max(shape[0], self.rows if self.rows - shape[0] == 64 else 0)
                    self.model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(
                        add_rows(weight, shape[0]), requires_grad=False
                    )
            if name in places and shape != list(places[name].shape):
                wrong.append(f"{key} is {tuple(shape)} in place of {tuple(places[name].shape)}")
            if name not in places and not self.is_spare(name):
                wrong.append(f"{key} has no place")
        wrong += [f"{name} is missing" for name in places.keys() - {rename_key(key, MODULE_KEYS) for key in weights}]
        if wrong:
            stop(f"--model_path {model_path}: its weights do not fit its config.json: {min(wrong)}"
                 f"{f' and {len(wrong) - 1} more' if wrong[1:] else ''}.")  # fmt: skip
        if lora_path:
            self.config, weights = read_adapter(self.model, processor, model_path, lora_path)
            for key, weight in weights.items():
                module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
                if rest:
                    self.updates.setdefault(module, {})[f"lora_{rest}"] = weight
                else:
                    self.whole[module] = weight

    def is_spare(self, name: str) -> bool:
        """Whether a tensor is one that older versions saved and none needs, such as positions that are counted anyway."""
        return name.endswith((".position_ids", ".rotary_emb.inv_freq"))

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shard = {}
        for key in list(tensors):
            tensor, name = tensors.pop(key), rename_key(key, MODULE_KEYS)
            if self.is_spare(name):
                continue
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor = self.merge(name, tensor).to(torch.bfloat16)
            shard[rename_key(name, HUB_KEYS)] = tensor.contiguous()
        return shard

    validate = process  # on the meta device, names only

    def update_config(self, config):
        return config

    def update_model_config(self, config: dict) -> dict:
        return config

    def get_dependencies(self, name: str) -> set[str]:
        return set()

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor with its update, or what was trained in its place, if there is either."""
        module = name.removesuffix(".weight")
        if module in self.vocabulary:
            weight = add_rows(weight, self.rows)
        before, layer = weight.to(torch.bfloat16), self.modules.get(module)
        if self.nf4 and isinstance(layer, torch.nn.Linear) and ".language_model." in module:
            weight = round_to_nf4(weight.float())
        if name in self.whole:
            weight = self.whole[name].to(weight.device)
        elif module in self.updates:
            weight = self.merge_layer(module, layer, weight)
        else:
            return weight
        self.merged.add(name if name in self.whole else module)
        if not torch.equal(weight.to(torch.bfloat16), before):
            self.changed.add(module)
        return weight

    def merge_layer(self, module: str, layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """PEFT's merge of one layer by itself, in float32."""
        from peft import get_peft_model, set_peft_model_state_dict

        layer.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
        config = replace(
            self.config, task_type=None, target_modules={"layer"}, modules_to_save=None,  # one layer is no language model
            r=self.config.rank_pattern.get(re.escape(module), self.config.r), rank_pattern={},
            lora_alpha=self.config.alpha_pattern.get(re.escape(module), self.config.lora_alpha), alpha_pattern={},
        )  # fmt: skip
        try:
            adapted = get_peft_model(torch.nn.ModuleDict({"layer": layer}), config)
            update = {f"base_model.model.layer.{key}": value for key, value in self.updates[module].items()}
            report = set_peft_model_state_dict(adapted, update)
            lost = [key for key in report.missing_keys if "lora_" in key] + report.unexpected_keys
            if lost:
                raise ValueError(f"{lost[0]} did not find its place")
            weight = adapted.merge_and_unload(safe_merge=True)["layer"].weight.data
        except Exception as error:  # sizes of another base, values that are no numbers
            stop(f"--lora_path {self.lora_path} cannot be merged into {module} ({type(error).__name__}: "
                 f"{' '.join(str(error).split())[:200]}).")  # fmt: skip
        layer.weight = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        return weight

    def prove(self) -> dict:
        """What was merged, for the report. Stops if a layer of the adapter was not met, or if none changed."""
        lost = (self.updates.keys() | self.whole.keys()) - self.merged
        if lost:
            stop(f"--lora_path {self.lora_path}: {min(lost)} was not merged.")
        if self.lora_path and not self.changed:
            stop(f"--lora_path {self.lora_path} changes no weight by as much as bfloat16 can show.")
        return {"layers": len(self.merged), "changed": len(self.changed),
                "into": "NF4-rounded weights" if self.nf4 else "the base's own weights"}  # fmt: skip


# ---------------------------------------------------------------------------- quantizing


def list_ignored(names: list[str]) -> list[str]:
    """--ignore as regular expressions that match in transformers' key layout as well as in vLLM's; with embeddings and norms,
    as model_free_ptq tells layers by their names alone, and the head, which vLLM wants whole."""
    patterns = [name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}.*" for name in names]
    return ["re:.*(embed|norm|lm_head).*", *(f"re:{'' if name.startswith('.*') else '.*'}{name}" for name in patterns)]


def check_layers(args, model) -> None:
    """Stop if vLLM or transformers would not load what --scheme and --ignore make of the model's layers."""
    patterns = [pattern.removeprefix("re:") for pattern in list_ignored(args.ignore)]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    spellings = {name: (name, rename_key(f"{name}.weight", HUB_KEYS).removesuffix(".weight")) for name in layers}
    quantized = set()
    for given, pattern in zip([None, *args.ignore], patterns, strict=True):
        try:
            if not any(re.match(pattern, spelling) for both in spellings.values() for spelling in both):
                stop(f"--ignore {given} matches no layer; names look like {spellings[min(layers)][1]}.")
        except re.error as error:
            stop(f"--ignore {given} is no regular expression ({error}).")
    for name, both in spellings.items():
        ignored = {any(re.match(pattern, spelling) for pattern in patterns) for spelling in both}
        if len(ignored) == 2:
            stop(f"--ignore matches {' or '.join(both)} by one of its names only; give a part that both have.")
        if ignored == {False}:
            quantized.add(name)
    for name in quantized:
        size = (layers[name].out_features, layers[name].in_features)
        if args.scheme == "FP8_BLOCK" and any(side % 128 for side in size):
            stop(f"--scheme FP8_BLOCK needs sizes that 128 divides, and {name} is {size[0]} x {size[1]}; use FP8_DYNAMIC, or "
                 "--ignore these layers.")  # fmt: skip
        parent, _, last = name.rpartition(".")
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            others = {f"{parent}.{other}" for other in fused if last in fused} & layers.keys()
            if others - quantized:
                stop(f"--ignore has {min(others - quantized)} and not {name}; vLLM computes {', '.join(fused)} as one, so ignore "
                     "all of them or none.")  # fmt: skip
    if not quantized:
        stop("--ignore leaves no layer to quantize.")


def read_samples(source: str, count: int, start: int = 0, held_out: bool = True) -> list[tuple[Image.Image, str, str]]:
    """Up to `count` (picture, question, answer) of a dataset's held-out split, or of train, in which those that the gate takes
    from it, `start`, are passed over. Rows without a readable picture or a question are left out."""
    path = Path(source)
    builder = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix)
    if path.is_file() and not builder:
        stop(f"--dataset {source} ends in {path.suffix or 'nothing'}; a file must be .parquet or .jsonl.")
    samples, root = [], path.parent if path.is_file() else path
    try:
        if path.is_file():
            splits = datasets.load_dataset(builder, data_files=str(path), streaming=True)
        else:
            splits = datasets.load_dataset(source, streaming=True)
        own = next((name for name in ("test", "validation") if name in splits), None)
        rows = splits[own if held_out and own else "train"]
        if rows.features and "image" in rows.features:
            rows = rows.cast_column("image", datasets.Image(decode=False))
        for row in rows:
            picture = row["image"] if isinstance(row["image"], dict) else {"path": row["image"]}
            with suppress(OSError, TypeError):  # a broken picture
                image = load_image(picture.get("bytes") or root / picture["path"])
                if isinstance(row["question"], str) and row["question"].strip():
                    samples.append((image, row["question"], str(row.get("chosen") or "")))
            if len(samples) == count + (0 if own else start):
                break
    except KeyError as error:
        stop(f"--dataset {source} has no column or split {error}; it must have RLAIF-V's columns image and question.")
    except Exception as error:  # files can be broken in more ways than libraries foresee
        stop(f"--dataset {source} cannot be read ({type(error).__name__}: {(str(error) or 'it is empty').splitlines()[0]}); "
             "give a hub id, or a folder or file of parquet or jsonl.")  # fmt: skip
    if len(samples) <= (0 if own else start):
        stop(f"--dataset {source} has {len(samples)} rows with a picture and a question{'' if own or not start else f', of which the gate takes {start}'}; "
             "more are needed.")  # fmt: skip
    return samples if own else samples[start:]


def calibrate(merged: Path, folder: Path, args, ignored: list[str], samples: list) -> None:
    """Quantize a merged checkpoint by GPTQ (Frantar et al. 2022), a layer of the language model at a time."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model, processor = load_llava(str(merged), device=args.device)
    model = model.to(torch.bfloat16)
    rows = []
    for image, question, answer in samples:
        ids = build_prompt(processor, question, image.size)
        ids += processor.tokenizer(f" {answer}", add_special_tokens=False, split_special_tokens=True).input_ids
        pixels = processor.image_processor(image, return_tensors="pt")
        rows.append({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
                     "pixel_values": pixels["pixel_values"].to(torch.bfloat16), "image_sizes": pixels["image_sizes"]})  # fmt: skip
    layers = type(model.model.language_model.layers[0]).__name__
    oneshot(
        model=model, dataset=torch.utils.data.DataLoader(rows, batch_size=None), sequential_targets=[layers],
        recipe=GPTQModifier(targets="Linear", scheme=args.scheme, ignore=ignored),
        num_calibration_samples=len(rows), pipeline="sequential",
    )  # fmt: skip
    model.save_pretrained(folder, save_compressed=True)
    for file in merged.iterdir():
        if not (folder / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    # llmcompressor writes the ignored layers' names in the hub's layout, which transformers does not find again
    config["quantization_config"]["ignore"] = ignored
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def quantize(args, stage: Path, folder: Path, merge: Merge, samples: list) -> None:
    """Write the merged and quantized checkpoint to `folder`; `samples` are for the schemes that are calibrated."""
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from llmcompressor import model_free_ptq

    for package in ("llmcompressor", "compressed_tensors"):
        logger.disable(package)  # their progress bars say enough
    device = args.device if args.device not in ("auto", "all", "mps") else None if torch.cuda.is_available() else "cpu"
    ignored = list_ignored(args.ignore)
    if args.scheme in CALIBRATED:
        merged = folder / "merged"
        convert_checkpoint(stage, merged, merge, device=device)
        calibrate(merged, folder, args, ignored, samples)
        shutil.rmtree(merged)
    elif args.scheme == "BF16":
        convert_checkpoint(stage, folder, merge, device=device)
    else:
        model_free_ptq(stage, folder, scheme=args.scheme, ignore=ignored, converter=merge, device=device)


# ---------------------------------------------------------------------------- the quality gate


GATE_BATCH = 8  # pictures with questions at a time


def make_batch(model, processor, samples: list[tuple[Image.Image, str]], answers: list[list[int]]) -> dict:
    """The model's input for prompts that go on with `answers`, (samples, longest), padded on the left."""
    rows = [build_prompt(processor, question, image.size) + answer
            for (image, question), answer in zip(samples, answers, strict=True)]  # fmt: skip
    longest, pad = max(map(len, rows)), processor.tokenizer.pad_token_id or 0
    pixels = processor.image_processor([image for image, _ in samples], return_tensors="pt")
    batch = {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels["pixel_values"].to(model.dtype),
        "image_sizes": pixels["image_sizes"],
    }
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def answer_greedily(model, processor, samples: list[tuple[Image.Image, str]], max_new_tokens: int) -> list[list[int]]:
    """Token ids of the greedy answers, with their end tokens."""
    batch = make_batch(model, processor, samples, [[]] * len(samples))
    pad = processor.tokenizer.pad_token_id or 0
    output = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = core.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    answers = []
    for row in output[:, batch["input_ids"].shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[: end + 1])  # after an end comes padding
    return answers


@torch.no_grad()
def score_answers(
    model, processor, samples: list[tuple[Image.Image, str]], answers: list[list[int]]
) -> list[torch.Tensor]:
    """Log-probabilities of all tokens at each place of the answers, (tokens, vocabulary) each, float32, on the CPU."""
    batch = make_batch(model, processor, samples, [answer[:-1] for answer in answers])
    logits = model(**batch, logits_to_keep=max(map(len, answers))).logits
    return [row[-len(answer) :].float().log_softmax(-1).cpu() for row, answer in zip(logits, answers, strict=True)]


def measure_divergence(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> torch.Tensor:
    """KL(wanted || found) in nats at each token of all answers, from log-probabilities."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]).clamp(min=0)


def run_gate(args, folder: Path, samples: list) -> dict:
    """Ask base + adapter and the new checkpoint the same; returns what differs.

    Compared are the distributions over the next token along base + adapter's greedy answers, and both greedy answers.
    """
    merged = merges_into_nf4(args.lora_path, args.merge_lora)
    model, processor = load_llava(
        args.model_path, args.lora_path, args.device, merge_lora=args.merge_lora if merged else None
    )
    dtype = str(model.dtype).removeprefix("torch.")
    asked = [sample[:2] for sample in samples]
    parts = [asked[start : start + GATE_BATCH] for start in range(0, len(asked), GATE_BATCH)]
    answers, wanted, base = [], [], []
    for part in tqdm(parts, desc="asking base + adapter" if args.lora_path else "asking the base"):
        answers.append(answer_greedily(model, processor, part, args.max_new_tokens))
        wanted += score_answers(model, processor, part, answers[-1])
        if args.lora_path and not merged:
            with model.disable_adapter():
                base += score_answers(model, processor, part, answers[-1])
    del model
    model, processor = load_llava(str(folder), device=args.device)
    changed, found = 0, []
    for part, old in zip(tqdm(parts, desc="asking the new checkpoint"), answers, strict=True):
        changed += sum(
            a != b for a, b in zip(old, answer_greedily(model, processor, part, args.max_new_tokens), strict=True)
        )
        found += score_answers(model, processor, part, old)
    divergence = measure_divergence(wanted, found)
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(wanted, found, strict=True)])
    return {
        "samples": len(samples), "tokens": len(divergence), "precision": dtype,
        "kl": divergence.mean().item(), "kl_max": divergence.max().item(), "top1_agreement": same.float().mean().item(),
        "answers_changed": changed,
        "kl_base_alone": measure_divergence(base, found).mean().item() if base else None,
        "max_kl": args.max_kl, "passed": divergence.mean().item() <= args.max_kl,
    }  # fmt: skip


# ---------------------------------------------------------------------------- the run


def open_output(output_dir: Path) -> tuple[Path, FileLock]:
    """The folder to work in, beside --output_dir, whose name it gets when all is done, and its lock. Stops if there is no
    place for it."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        stop(f"--output_dir {output_dir} is not empty; name a new folder, or delete it.")
    if output_dir.is_mount():
        stop(f"--output_dir {output_dir} is a mount point; name a folder in it.")
    folder = output_dir.with_name(output_dir.name + ".partial")
    if folder.exists() and not (folder / ".lock").exists():
        stop(f"{folder} is there, and this script did not make it; move it away, or name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        stop(f"another run is writing {output_dir}; wait for it, or name another --output_dir.")
    for path in folder.iterdir():  # of a run that was killed
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()
    return folder, lock


def check_room(args, size: int) -> None:
    """Stop if the disk has too little room for what will be written; `size` is the base's, in bytes."""
    share = {"BF16": 1, "FP8_DYNAMIC": 0.6, "FP8_BLOCK": 0.6, "W8A8": 1.6, "W4A16": 1.4}[
        args.scheme
    ]  # the merged one too
    free = shutil.disk_usage(args.output_dir.absolute().parent).free
    if free < share * size:
        stop(f"--output_dir {args.output_dir} has {free / 1e9:.1f} GB of free disk, {args.scheme} of this base takes about "
             f"{share * size / 1e9:.1f} GB; make room, or name a folder on another disk.")  # fmt: skip


def warn_of_gpu(scheme: str) -> None:
    """Say it if this machine's GPU has no arithmetic for the scheme; the checkpoint may be for another."""
    if scheme.startswith("FP8") and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        found = ".".join(map(str, torch.cuda.get_device_capability()))
        console.print(f"{torch.cuda.get_device_name()} has compute capability {found}, FP8 arithmetic needs 8.9: on it, vLLM "
                      "will take the weights alone in FP8 (Marlin), which saves memory, not time; W8A8 computes in 8 bits "
                      "from 7.5 on.", soft_wrap=True)  # fmt: skip


def peak_memory() -> int:
    """The most memory that this process has had, in bytes: the GPU's since the last start, else its own."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def print_report(report: dict, output_dir: Path) -> None:
    sizes, quality = report["size_bytes"], report["quality"]
    table = Table("", "before", "after", title=f"{output_dir.name}")
    table.add_row(
        "weights", f"{sizes['base'] / 1e6:,.1f} MB", f"{sizes['quantized'] / 1e6:,.1f} MB ({sizes['ratio']:.0%})"
    )
    if quality:
        table.add_row("top-1 agreement", "", f"{quality['top1_agreement']:.2%} of {quality['tokens']:,} tokens")
        table.add_row("KL divergence, nats a token", "", f"{quality['kl']:.5f} (worst {quality['kl_max']:.3f})")
        if quality["kl_base_alone"] is not None:
            table.add_row("of the base without adapter from it", "", f"{quality['kl_base_alone']:.5f}")
        table.add_row("greedy answers that changed", "", f"{quality['answers_changed']} of {quality['samples']}")
    console.print(table)


def make_checkpoint(args, folder: Path, samples: list) -> dict:
    """Merge and quantize into `folder`; returns what the report says of it."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llava_stage_") as stage:
        stage = Path(stage)
        processor = stage_checkpoint(args.model_path, stage)
        sizes = [file.stat().st_size for file in stage.glob("*.safetensors")]
        check_room(args, sum(sizes))
        merge = Merge(args.model_path, stage, processor, args.lora_path, args.merge_lora)
        if args.scheme != "BF16":
            check_layers(args, merge.model)
        before = peak_memory()
        try:
            quantize(args, stage, folder, merge, samples)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:  # of llmcompressor
            if isinstance(error, torch.OutOfMemoryError):
                raise
            stop(f"--scheme {args.scheme} cannot be applied to {args.model_path} ({type(error).__name__}: "
                 f"{(str(error) or '?').splitlines()[0][:200]}).")  # fmt: skip
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # so that a server under another user can read it
    quantized = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    found = {
        "size_bytes": {"base": sum(sizes), "largest_shard": max(sizes), "quantized": quantized, "ratio": quantized / sum(sizes)},
        "calibration_samples": len(samples),
        "seconds": {"checkpoint": round(time.monotonic() - started, 1)},
        "peak_memory_bytes": {"before": before, "checkpoint": peak_memory()},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {name: importlib.metadata.version(name) for name in
                     ("torch", "transformers", "peft", "llmcompressor", "compressed-tensors")},
    }  # fmt: skip
    if args.lora_path:
        digest = digest_checkpoint(str(adapter_folder(args.lora_path)))
        found["adapter"] = {"path": args.lora_path, "digest": digest, **merge.prove()}
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warn_of_gpu(args.scheme)
    if not args.lora_path:
        console.print("no --lora_path: the base alone is used")
    args.output_dir = args.output_dir.resolve()
    (folder, lock), started = open_output(args.output_dir), time.monotonic()
    try:
        asked = read_samples(args.dataset, args.gate_samples) if args.gate_samples else []
        samples = []
        if args.scheme in CALIBRATED:
            samples = read_samples(args.dataset, args.calibration_samples, start=len(asked), held_out=False)
            if len(samples) < args.calibration_samples:
                console.print(f"--dataset has {len(samples)} rows to calibrate on, --calibration_samples asks for "
                              f"{args.calibration_samples}: all of them are used")  # fmt: skip
        report = {
            "scheme": args.scheme,
            "ignored": list_ignored(args.ignore) if args.scheme != "BF16" else None,
            "adapter": None,
            **make_checkpoint(args, folder, samples),
            "base": {"path": args.model_path, "digest": digest_checkpoint(args.model_path)},
            "dataset": args.dataset if asked or samples else None,
            "quality": run_gate(args, folder, asked) if asked else None,
        }
        report["seconds"]["gate"] = round(time.monotonic() - started - report["seconds"]["checkpoint"], 1)
        report["peak_memory_bytes"]["gate"] = peak_memory()
        (folder / "quantization_report.json").write_text(json.dumps(report, indent=1))
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            args.output_dir.rmdir()  # an empty one
        os.replace(folder, args.output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(report, args.output_dir)
    quality = report["quality"]
    if quality and not quality["passed"]:
        stop(f"the gate failed: KL divergence is {quality['kl']:.5f}, --max_kl {args.max_kl}; the checkpoint is in "
             f"{args.output_dir} all the same. A scheme with more bits, or more --ignore, comes closer.", code=4)  # fmt: skip
    verdict = f"the gate passed: KL divergence {quality['kl']:.5f}, --max_kl {args.max_kl}; " if quality else ""
    console.print(f"{verdict}in vLLM's environment, serve it: python llava_gradio_lora_host_quantized.py --model_path "
                  f"{args.output_dir}, or vllm serve {args.output_dir}", soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing unfinished stays
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; nothing was written.", code=130)
    except torch.OutOfMemoryError:
        stop(
            "the GPU's memory is full; use --device cpu, or --gate_samples 0 and measure the result with the AMBER script."
        )
    except (OSError, SafetensorError) as error:  # a full disk, a folder that cannot be written
        stop(f"{error}; nothing was written to --output_dir.")
