"""Merge a LoRA adapter into LLaVA-1.6, quantize the result for vLLM, and measure what that changed in its answers.

Reads   a LLaVA-NeXT checkpoint (--model_path), an adapter (--lora_path), and pictures with questions (--dataset).
Writes  to --output_dir: a checkpoint that vLLM and transformers load, and quantization_report.json. The exit code is 4
        if it answers too differently from the original (--max_kl).
Needs   pip install -r requirements/train.txt -r requirements/quantize.txt

    python llava_quantize_vllm.py --model_path liuhaotian/llava-v1.6-mistral-7b --lora_path checkpoints/llava-orpo-prod
    python llava_quantize_vllm.py --lora_path checkpoints/llava-orpo-prod --scheme BF16    # merge only
    python llava_quantize_vllm.py --test_mode    # the embedded miniature, without a GPU and without downloads
"""

import argparse
import importlib.util
import math
import sys
from pathlib import Path

# Copied from llava_orpo_training.MINIATURE
MINIATURE = Path(__file__).resolve().parent / "miniature"

SCHEMES = {"FP8_DYNAMIC": "FP8-Dynamic", "FP8_BLOCK": "FP8-Block", "W8A8": "W8A8", "W4A16": "W4A16", "BF16": "BF16"}
CALIBRATED = ("W8A8", "W4A16")  # rounded by GPTQ, which needs data and the whole model in memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--flag value ...] (--help lists the flags)",
    )

    def add(group, flag, help, **options):
        shown = options.get("default")
        group.add_argument(flag, help=help + (f" (default: {shown})" if shown is not None else ""), **options)

    def number(kind: type, allowed, wanted: str):
        def convert(text: str):
            if not allowed(kind(text)):
                raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
            return kind(text)

        convert.__name__ = kind.__name__
        return convert

    count, natural = number(int, lambda n: n > 0, "above 0"), number(int, lambda n: n >= 0, "at least 0")
    positive = number(float, lambda x: 0 < x < math.inf, "above 0")
    model = parser.add_argument_group("model")
    add(model, "--model_path", "base model: hub id or folder", default="llava-hf/llava-v1.6-mistral-7b-hf")
    add(model, "--lora_path", "adapter: hub id or folder; without one, the base alone is quantized")
    kinds = ["trained", "nf4", "base"]
    add(model, "--merge_lora", "into which weights: NF4 after QLoRA, NF4, the base's", choices=kinds, default="trained")
    add(model, "--device", "auto (cuda, then mps, then cpu), all (spread over the GPUs), cuda:1, cpu", default="auto")
    add(model, "--test_mode", "use the embedded miniature and its adapter, if not given", action="store_true")

    to = parser.add_argument_group("quantization")
    add(to, "--output_dir", "new folder for the checkpoint (default: quantized_models/<model>-<scheme>)", type=Path)
    add(to, "--scheme", "format of the weights; BF16 merges only", choices=list(SCHEMES), default="FP8_DYNAMIC")
    ignored = {"nargs": "*", "default": ["lm_head", "vision_tower", "multi_modal_projector"]}
    add(to, "--ignore", "layers left as they are: parts of names, or re:... for a regular expression", **ignored)
    add(to, "--calibration_samples", "pictures that W8A8 and W4A16 are fitted to", type=count, default=256)

    gate = parser.add_argument_group("quality gate")
    add(gate, "--dataset", "pictures and questions: hub id, folder or file", default="openbmb/RLAIF-V-Dataset")
    add(gate, "--gate_samples", "how many are asked before and after; 0 skips the gate", type=natural, default=64)
    add(gate, "--max_new_tokens", "longest answer in the gate, in tokens", type=count, default=128)
    add(gate, "--max_kl", "mean KL divergence per token, in nats, that fails the gate", type=positive, default=0.02)
    args = parser.parse_args(argv)
    name = Path(args.model_path).name
    if args.test_mode:
        if args.model_path == parser.get_default("model_path"):
            args.model_path, name = str(MINIATURE / "model"), "miniature"
            args.lora_path = args.lora_path or str(MINIATURE / "adapter")
        if args.dataset == parser.get_default("dataset"):
            args.dataset = str(MINIATURE / "preferences")
    args.output_dir = (args.output_dir or Path("quantized_models") / f"{name}-{SCHEMES[args.scheme]}").resolve()
    return args


if __name__ == "__main__":
    parse_args()  # answers --help and refuses wrong flags before the heavy imports
    if importlib.util.find_spec("llmcompressor") is None:
        sys.exit("error: llmcompressor is not installed; run pip install -r requirements/quantize.txt")

import hashlib
import importlib.metadata
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
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NoReturn

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "ERROR")  # its progress bars say enough
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it asks for a kernel that nothing here needs

import bitsandbytes.functional as bnb
import datasets
import torch
from compressed_tensors.entrypoints.convert import Converter, convert_checkpoint
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from PIL import Image, ImageOps
from rich.console import Console
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoConfig, CLIPVisionModel, LlavaNextForConditionalGeneration

# Copied from llava_orpo_training.MAIN_PROCESS
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # of several processes, the one that prints and writes
# Copied from llava_orpo_training.console
console = Console(stderr=True, quiet=not MAIN_PROCESS)


# ---------------------------------------------------------------------------- blocks copied from earlier scripts


# Copied from llava_orpo_training.stop
def stop(message: str, code: int = 2) -> NoReturn:
    """End the program with one sentence on stderr."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


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


# ---------------------------------------------------------------------------- the checkpoint to start from

# transformers' module names -> the hub's key layout, the only one that vLLM reads
HUB_KEYS = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^model\.vision_tower\.": "vision_tower.vision_model.",
    r"^model\.(multi_modal_projector\.|image_newline)": r"\1",
}
SPARE = (".position_ids", ".rotary_emb.inv_freq")  # tensors that older versions saved and that none needs
# LLaVA's prompt for chat messages, with BOS. The picture comes first, wherever it stands in the message.
TEMPLATE = (
    "{{ bos_token }}GAPHEAD{% for message in messages %}{% if message['role'] == 'user' %}BEFORE"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>GAP\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}AFTER"
    "{% elif message['role'] == 'assistant' %} {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}GAP"
    "{% else %}{{ raise_exception('LLaVA-1.6 knows the roles user and assistant only.') }}{% endif %}{% endfor %}"
)


def name_in_hub(name: str) -> str:
    """Return the hub layout's name for a tensor that has transformers' name."""
    for pattern, replacement in HUB_KEYS.items():
        name = re.sub(pattern, replacement, name)
    return name


def fill_template(processor) -> str:
    """Return TEMPLATE with build_prompt's words, and with a space after special tokens unless the tokenizer puts one there,
    so that two questions and an answer become exactly the tokens that the model was trained and measured with."""
    before, after, head = "[INST] ", " [/INST]", ""
    if "[INST]" not in (processor.chat_template or before):
        head = "A chat between a curious human and an artificial intelligence assistant. "
        head += "The assistant gives helpful, detailed, and polite answers to the human's questions. "
        before, after = "USER: ", " ASSISTANT:"
    image, encode = processor.image_token_id, partial(processor.tokenizer.encode, add_special_tokens=False)
    wanted = build_prompt(processor, "Is it?", (64, 64)) + encode(" It is.") + [processor.tokenizer.eos_token_id]
    wanted += encode(f"{before}And now?{after}")
    wanted = [token for place, token in enumerate(wanted) if token != image or wanted[place - 1] != image]
    said = {"user": [{"type": "text", "text": "Is it?"}, {"type": "image"}], "assistant": "It is."}
    talk = [{"role": role, "content": content} for role, content in [*said.items(), ("user", "And now?")]]
    for gap in ("", " "):
        template = TEMPLATE.replace("GAP", gap).replace("HEAD", head).replace("BEFORE", before).replace("AFTER", after)
        if encode(processor.apply_chat_template(talk, chat_template=template)) == wanted:
            return template
    stop("no prompt template gives this tokenizer's prompts; use the transformers version of requirements/train.txt.")


def stage_checkpoint(model_path: str, folder: Path):
    """Fill `folder` with links to the checkpoint's weights and with the other files that the new checkpoint needs, in
    the hub's form and with BOS in the prompt template. Returns the processor."""
    config, processor, tower = read_checkpoint(model_path)
    source = Path(model_path)
    if not source.is_dir():
        source = Path(snapshot_download(model_path, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))
    weights = list_weights(source)
    if tower:
        config.text_config.vocab_size += 64
        config.architectures = ["LlavaNextForConditionalGeneration"]
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        added = complete_tensors(source, weights, tower)
        # transformers reads no file beside a model.safetensors, and takes the last where two shards have a tensor
        save_file(added, folder / "z_added.safetensors")
        weights = {key: f"base-{name}" for key, name in weights.items()} | dict.fromkeys(added, "z_added.safetensors")
    else:
        for file in source.iterdir():
            if file.suffix in (".json", ".jinja", ".model"):
                shutil.copyfile(file, folder / file.name)
    for name in set(weights.values()) - {"z_added.safetensors"}:
        (folder / name).symlink_to((source / name.removeprefix("base-")).resolve())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    found = json.loads((folder / "config.json").read_text())
    if "quantization_config" in found:
        stop(f"--model_path {model_path} is quantized already; give the checkpoint that it was made from.")
    found.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(found | {"dtype": "bfloat16"}, indent=2))
    (folder / "chat_template.json").unlink(missing_ok=True)  # an older form of the template
    (folder / "chat_template.jinja").write_text(fill_template(processor))
    return processor


def complete_tensors(folder: Path, weights: dict[str, str], tower: str) -> dict[str, torch.Tensor]:
    """Return what a checkpoint in LLaVA's own format lacks: 64 rows of vocabulary, each the mean of the others, so that
    its logit is never the greatest, and the vision weights from the tower's own checkpoint, if `weights` has none."""
    added = {}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        with safe_open(folder / weights[key], "pt") as file:
            rows = file.get_tensor(key)
        added[key] = torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype).expand(64, -1)])
    if not any("vision_tower" in key for key in weights):
        vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.bfloat16, use_safetensors=True).state_dict()
        added |= {f"model.vision_tower.{key}": value for key, value in vision.items()}
    return added


def list_weights(folder: Path) -> dict[str, str]:
    """Return a checkpoint's tensor names, each with the file it is in."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return json.loads(index.read_text())["weight_map"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def load_model(folder: Path, device: str) -> LlavaNextForConditionalGeneration:
    """Load a staged or a new checkpoint, in bfloat16 on a GPU that has it, otherwise in float16, and float32 on the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    has_bf16 = device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16 if has_bf16 else torch.float16
    settings = {"dtype": dtype, "device_map": "auto" if device == "all" else {"": device}, "use_safetensors": True}
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, key_mapping=ORIGINAL_KEYS, **settings)
    if hasattr(model, "ct_decompress_hook"):  # compressed-tensors would wait for a forward of the whole model
        model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


def build_skeleton(model_path: str, folder: Path) -> LlavaNextForConditionalGeneration:
    """Return the staged checkpoint's model without memory for its weights. Stops if the weights do not fit config.json."""
    with torch.device("meta"):
        model = LlavaNextForConditionalGeneration(AutoConfig.from_pretrained(folder))
    places, wrong = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}, []
    for key, file in list_weights(folder).items():
        with safe_open(folder / file, "pt") as opened:
            shape, wanted = list(opened.get_slice(key).get_shape()), places.pop(rename_key(key), None)
        if shape != wanted and not key.endswith(SPARE):
            wrong.append(f"{key} has shape {shape} in place of {wanted}")
    wrong += [f"{name} is missing" for name in places]
    if wrong:
        stop(f"--model_path {model_path}: its weights do not fit its config.json, {len(wrong)} in all: {min(wrong)}.")
    for module in model.modules():  # one zero stands for a whole matrix, since PEFT does not merge on the meta device
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    return model


def list_linear(model, part: str = "") -> dict[str, torch.nn.Linear]:
    """Return the linear layers that have `part` in their names, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and part in name}


# ---------------------------------------------------------------------------- merging, a shard at a time


def merges_into_nf4(lora_path: str | None, choice: str) -> bool:
    """Return whether --merge_lora, `choice`, means that the base is rounded to NF4 before this adapter is merged into it. One
    that QLoRA trained has learned to correct the rounding. Its run notes this beside it or its checkpoint."""
    if not lora_path or choice != "trained":
        return bool(lora_path) and choice == "nf4"
    folder = read_adapter(lora_path)[0]
    for file in (folder / "arguments.json", folder.parent / "arguments.json"):
        with suppress(OSError, ValueError, KeyError):
            return str(json.loads(file.read_text())["load_4bit"]) == "True"
    console.print(f"no file beside {lora_path} says that it was trained on NF4; the base's own weights are used")
    return False


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as QLoRA's training saw it: rounded to NF4 with double quantization (Dettmers et al. 2023)."""
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


class Merge(Converter):
    """A compressed-tensors converter that turns a shard of the base into one of base and adapter, in the hub's layout and
    in bfloat16. Only one shard is in memory at a time. PEFT merges each layer, in float32. `model` is build_skeleton's."""

    def __init__(self, model: LlavaNextForConditionalGeneration, lora_path: str | None, nf4: bool):
        self.rounded = list_linear(model, ".language_model.") if nf4 else {}  # what QLoRA keeps in NF4
        self.layers, self.whole = {}, {}  # PEFT's layers, and tensors that were trained as a whole
        self.changed = set()
        if lora_path:
            folder, config, weights = read_adapter(lora_path)
            if config.bias != "none":
                stop(f"--lora_path {lora_path} has trained biases (bias={config.bias!r}), which are not merged.")
            # beside an update of the embedding or the head, PEFT saves that of the base
            weights = {key: weight for key, weight in weights.items() if ".base_layer." not in key}
            for name, module in load_adapter(model, folder, config, weights).base_model.model.named_modules():
                if isinstance(module, BaseTunerLayer):
                    self.layers[name] = module
                elif isinstance(module, ModulesToSaveWrapper):
                    trained = module.modules_to_save["default"].named_parameters()
                    self.whole |= {f"{name}.{part}": weight.data for part, weight in trained}

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a shard's tensors merged, under the hub's names. Empties `tensors` on the way, to save memory."""
        shard = {}
        for key in list(tensors):
            tensor, name = tensors.pop(key), rename_key(key)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor = self.merge(name, tensor).to(torch.bfloat16)
            if not key.endswith(SPARE):
                shard[name_in_hub(name)] = tensor.contiguous()
        return shard

    def update_config(self, config):
        return config

    def get_dependencies(self, name: str) -> set[str]:
        return set()

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return a tensor with its update, or what was trained in its place, if there is either."""
        module = name.removesuffix(".weight")
        before = weight.to(torch.bfloat16)
        if module in self.rounded:
            weight = round_to_nf4(weight.float())
        if name in self.whole:
            weight = self.whole[name].to(weight.device)
        elif module in self.layers:
            layer = self.layers[module]
            layer.base_layer.weight.data = weight.float()
            layer.to(weight.device).merge(safe_merge=True)
            weight, layer.base_layer.weight.data = layer.base_layer.weight.data, torch.zeros(())
        else:
            return weight
        if not torch.equal(weight.to(torch.bfloat16), before):
            self.changed.add(module)
        return weight


# ---------------------------------------------------------------------------- pictures with questions, and quantizing


def iterate_samples(rows, root: Path):
    """Yield (picture, question, answer). Rows without a readable picture or a question are left out."""
    if rows.features and "image" in rows.features:
        rows = rows.cast_column("image", datasets.Image(decode=False))
    for row in rows:
        picture = row["image"] if isinstance(row["image"], dict) else {"path": row["image"]}
        question, answer, image = row["question"], str(row.get("chosen") or ""), None
        # a path may be no text, and of a broken picture Pillow raises almost anything
        with suppress(Exception):
            file = io.BytesIO(picture["bytes"]) if picture.get("bytes") else root / picture["path"]
            image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
        if image and isinstance(question, str) and question.strip():
            yield image, question, answer


def read_samples(source: str, gate: int, calibration: int) -> tuple[list, list]:
    """Return up to `gate` samples for the gate, from the test split if there is one, and up to `calibration` others from the
    train split to calibrate on, as iterate_samples yields them."""
    if not gate and not calibration:
        return [], []
    kind = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(Path(source).suffix)
    root, files = (Path(source).parent, {"data_files": source}) if kind else (Path(source), {})
    try:
        splits = datasets.load_dataset(kind or source, streaming=True, **files)
        held_out = next((name for name in ("test", "validation") if name in splits), "train")
        asked = list(islice(iterate_samples(splits[held_out], root), gate))
        passed = len(asked) if held_out == "train" else 0
        seen = list(islice(iterate_samples(splits["train"], root), passed, passed + calibration)) if calibration else []
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error) or 'it is empty').splitlines()[0]}"
        stop(f"--dataset {source} cannot be read ({reason}). It needs the columns image and question, as RLAIF-V has.")
    if (gate and not asked) or (calibration and not seen):
        stop(f"--dataset {source} has {len(asked)} rows with picture and question to ask, {len(seen)} to calibrate on.")
    if len(seen) < calibration:
        console.print(f"--dataset has {len(seen)} rows to calibrate on instead of {calibration}; all of them are used")
    return asked, seen


def make_batch(model, processor, samples: list, answers: list[list[int]]) -> dict:
    """Return the model's input for prompts followed by `answers`: (samples, longest), padded on the left."""
    rows = zip(samples, answers, strict=True)
    rows = [build_prompt(processor, question, image.size) + answer for (image, question, _), answer in rows]
    batch = processor.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    pixels = processor.image_processor([image for image, _, _ in samples], return_tensors="pt")
    return {**batch, **pixels.to(model.device, model.dtype)}


def list_ignored(names: list[str]) -> list[str]:
    """Return --ignore as regular expressions for both key layouts. The head stays whole because vLLM wants it so, embeddings
    and norms because model_free_ptq knows layers by name only."""
    patterns = [name.removeprefix("re:") if name.startswith("re:") else f"{re.escape(name)}.*" for name in names]
    return ["re:.*(embed|norm|lm_head).*", *(f"re:{'' if name.startswith('.*') else '.*'}{name}" for name in patterns)]


def check_layers(model, scheme: str, ignore: list[str]) -> None:
    """Stop if vLLM or transformers could not load what `scheme` and `ignore` make of the model's linear layers."""
    layers = list_linear(model)
    spellings = {name: (name, name_in_hub(f"{name}.weight").removesuffix(".weight")) for name in layers}
    patterns = [pattern.removeprefix("re:") for pattern in list_ignored(ignore)]
    for given, pattern in zip(ignore, patterns[1:], strict=True):
        if not any(re.match(pattern, spelling) for both in spellings.values() for spelling in both):
            stop(f"--ignore {given} matches no layer; names look like {spellings[min(layers)][1]}.")
    quantized = set()
    for name, both in spellings.items():
        matched = [any(re.match(pattern, spelling) for pattern in patterns) for spelling in both]
        if matched[0] != matched[1]:
            stop(f"--ignore matches only one of a layer's two names, {' and '.join(both)}; give a part that both have.")
        if not matched[0]:
            quantized.add(name)
    for name in quantized:
        if scheme == "FP8_BLOCK" and any(side % 128 for side in layers[name].weight.shape):
            stop(f"--scheme FP8_BLOCK needs sizes that 128 divides, but {name} has others; --ignore such layers.")
        parent, _, last = name.rpartition(".")
        for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            kept = {f"{parent}.{other}" for other in fused if last in fused} & (layers.keys() - quantized)
            if kept:
                stop(f"--ignore has {min(kept)} but not {name}, which vLLM fuses; ignore all of them or none.")


def quantize(args: argparse.Namespace, stage: Path, folder: Path, merge: Merge, samples: list, processor) -> None:
    """Write the merged and quantized checkpoint to `folder`. `samples` are for the calibrated schemes."""
    from llmcompressor import model_free_ptq

    device, ignored = args.device, list_ignored(args.ignore)
    if device in ("auto", "all", "mps"):
        device = None if torch.cuda.is_available() else "cpu"
    if args.scheme in CALIBRATED:
        convert_checkpoint(stage, folder / "merged", merge, device=device)
        calibrate(folder / "merged", folder, args.scheme, ignored, args.device, samples, processor)
        shutil.rmtree(folder / "merged")
    elif args.scheme == "BF16":
        convert_checkpoint(stage, folder, merge, device=device)
    else:
        model_free_ptq(stage, folder, scheme=args.scheme, ignore=ignored, converter=merge, device=device)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors lets nobody but the owner read it


def calibrate(merged: Path, folder: Path, scheme: str, ignored: list, device: str, samples: list, processor) -> None:
    """Quantize a merged checkpoint by GPTQ (Frantar et al. 2022), a layer of the language model at a time."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    model, rows = load_model(merged, device).to(torch.bfloat16), []
    for sample in samples:
        answer = processor.tokenizer(f" {sample[2]}", add_special_tokens=False, split_special_tokens=True).input_ids
        rows.append({name: value.cpu() for name, value in make_batch(model, processor, [sample], [answer]).items()})
    settings = {"pipeline": "sequential", "sequential_targets": [type(model.model.language_model.layers[0]).__name__]}
    settings |= {"recipe": GPTQModifier(targets="Linear", scheme=scheme, ignore=ignored)}
    loader = torch.utils.data.DataLoader(rows, batch_size=None)
    oneshot(model=model, dataset=loader, num_calibration_samples=len(rows), **settings)
    model.save_pretrained(folder, save_compressed=True)
    for file in merged.iterdir():
        if not (folder / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text())
    # llm-compressor writes the names of the ignored layers in the hub's layout, which transformers does not match
    config["quantization_config"]["ignore"] = ignored
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# ---------------------------------------------------------------------------- the quality gate


@torch.no_grad()
def answer_greedily(model, processor, samples: list, max_new_tokens: int) -> list[list[int]]:
    """Return the token ids of the greedy answers, with their end tokens."""
    batch, tokenizer = make_batch(model, processor, samples, [[]] * len(samples)), processor.tokenizer
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    rows = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    return [row[: row.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in row else row for row in rows]


@torch.no_grad()
def score_answers(model, processor, samples: list, answers: list[list[int]]) -> list[torch.Tensor]:
    """Return the log-probabilities of all tokens at each place of each answer, (tokens, vocabulary), float32, on the CPU."""
    batch = make_batch(model, processor, samples, [answer[:-1] for answer in answers])
    logits = model(**batch, logits_to_keep=max(map(len, answers))).logits
    return [row[-len(answer) :].float().log_softmax(-1).cpu() for row, answer in zip(logits, answers, strict=True)]


def measure_divergence(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> torch.Tensor:
    """Return KL(wanted || found) in nats at each token of all answers, from log-probabilities."""
    return torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(wanted, found, strict=True)]).clamp(min=0)


def load_reference(stage: Path, lora_path: str | None, nf4: bool, device: str):
    """Return the staged base with its adapter, not merged; `nf4` rounds the language model's linear layers first."""
    model = load_model(stage, device)
    for layer in list_linear(model, ".language_model.").values() if nf4 else []:
        layer.weight.data = round_to_nf4(layer.weight.data)
    return load_adapter(model, *read_adapter(lora_path)) if lora_path else model


def run_gate(reference: tuple, folder: Path, processor, samples: list, max_new_tokens: int, max_kl: float) -> dict:
    """Ask load_reference's model and the new checkpoint the same questions; return how their greedy answers differ, and their
    distributions over the next token along the first one's. A figure that is not finite is None and fails the gate."""
    model = load_reference(*reference)
    dtype, adapted = str(model.dtype).removeprefix("torch."), hasattr(model, "disable_adapter")
    parts = [samples[start : start + 8] for start in range(0, len(samples), 8)]
    answers, wanted, base, changed, found = [], [], [], 0, []
    for part in tqdm(parts, desc="asking base + adapter" if adapted else "asking the base"):
        answers.append(answer_greedily(model, processor, part, max_new_tokens))
        wanted += score_answers(model, processor, part, answers[-1])
        if adapted:
            with model.disable_adapter():
                base += score_answers(model, processor, part, answers[-1])
    del model  # both would be too much for many a GPU
    model = load_model(folder, device=reference[-1])
    for part, old in zip(tqdm(parts, desc="asking the new checkpoint"), answers, strict=True):
        new = answer_greedily(model, processor, part, max_new_tokens)
        changed += sum(a != b for a, b in zip(old, new, strict=True))
        found += score_answers(model, processor, part, old)
    divergence = measure_divergence(wanted, found)
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in zip(wanted, found, strict=True)])
    figures = {"kl": divergence.mean(), "kl_max": divergence.max(), "top1_agreement": same.float().mean()}
    figures["kl_base_alone"] = measure_divergence(base, found).mean() if base else torch.tensor(torch.nan)
    figures = {name: value.item() if value.isfinite() else None for name, value in figures.items()}
    passed = figures["kl"] is not None and figures["kl"] <= max_kl
    counts = {"samples": len(samples), "tokens": len(divergence), "precision": dtype, "answers_changed": changed}
    return counts | figures | {"max_kl": max_kl, "passed": passed}


# ---------------------------------------------------------------------------- the run


def open_output(output_dir: Path) -> tuple[Path, FileLock]:
    """Return the folder to work in and its lock. It stands beside --output_dir and gets its name when all is done."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        stop(f"--output_dir {output_dir} is not empty; name a new folder, or delete it.")
    if output_dir.is_mount():
        stop(f"--output_dir {output_dir} is a mount point; name a folder in it.")
    folder = output_dir.with_name(output_dir.name + ".partial")
    if folder.exists() and not (folder / ".lock").exists():
        stop(f"{folder} exists, and this script did not make it; move it away, or name another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        stop(f"--output_dir {output_dir} is being written by another run; name another folder.")
    for path in [path for path in folder.iterdir() if path.name != ".lock"]:  # left by a run that was killed
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder, lock


def check_room(output_dir: Path, scheme: str, size: int) -> None:
    """Stop if the disk has too little room to quantize a base of `size` bytes."""
    share = {"BF16": 1, "W8A8": 1.6, "W4A16": 1.4}.get(scheme, 0.6)  # two of them hold the merged checkpoint, too
    free = shutil.disk_usage(output_dir.parent).free
    if free < share * size:
        stop(f"--output_dir {output_dir} has {free / 1e9:.1f} GB of free disk; it takes {share * size / 1e9:.1f} GB.")


def peak_memory() -> int:
    """Return the most memory that this process has had so far, in bytes: the GPU's if there is one, otherwise its own."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_checkpoint(args: argparse.Namespace, nf4: bool, stage: Path, folder: Path, samples: list, processor) -> dict:
    """Merge and quantize the staged base into `folder`; return what the report says of it."""
    started, ignored = time.monotonic(), list_ignored(args.ignore)
    sizes = [file.stat().st_size for file in stage.glob("*.safetensors")]
    check_room(args.output_dir, args.scheme, sum(sizes))
    model = build_skeleton(args.model_path, stage)
    if args.scheme != "BF16":
        check_layers(model, args.scheme, args.ignore)
    merge, before = Merge(model, args.lora_path, nf4), peak_memory()
    quantize(args, stage, folder, merge, samples, processor)
    quantized, adapter = sum(file.stat().st_size for file in folder.glob("*.safetensors")), None
    if args.lora_path:
        if not merge.changed:
            stop(f"--lora_path {args.lora_path} changes no weight by as much as bfloat16 can show.")
        file = read_adapter(args.lora_path)[0] / "adapter_model.safetensors"
        adapter = {"path": args.lora_path, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        adapter |= {"layers": len(merge.layers) + len(merge.whole), "changed": len(merge.changed)}
        adapter["into"] = "NF4-rounded weights" if nf4 else "the base's own weights"
    sizes = {"base": sum(sizes), "largest_shard": max(sizes), "quantized": quantized, "ratio": quantized / sum(sizes)}
    packages = ("torch", "transformers", "peft", "llmcompressor", "compressed-tensors")
    return {
        "scheme": args.scheme,
        "ignored": ignored if args.scheme != "BF16" else None,
        "base": {"path": args.model_path},
        "adapter": adapter,
        "size_bytes": sizes,
        "calibration_samples": len(samples),
        "seconds": {"checkpoint": round(time.monotonic() - started, 1)},
        "peak_memory_bytes": {"before": before, "checkpoint": peak_memory()},
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def print_report(report: dict, output_dir: Path) -> None:
    """Print what came out, and end with exit code 4 if the gate failed."""
    sizes, quality = report["size_bytes"], report["quality"]
    console.print(f"{output_dir}: {sizes['quantized'] / 1e6:,.1f} MB, and the base has {sizes['base'] / 1e6:,.1f} MB")
    if quality:
        kl = "not finite" if quality["kl"] is None else f"{quality['kl']:.5f}"
        verdict = f"KL divergence is {kl} nats per token, and --max_kl {quality['max_kl']}"
        console.print(f"{quality['top1_agreement']:.2%} of {quality['tokens']:,} tokens are still the most likely ones")
        console.print(f"{quality['answers_changed']} of {quality['samples']} greedy answers changed")
        if not quality["passed"]:
            stop(f"the gate failed: {verdict}. Use a scheme with more bits, or --ignore more layers.", code=4)
        console.print(f"the gate passed: {verdict}")
    serve = f"python llava_gradio_lora_host_quantized.py --model_path {output_dir}"
    console.print(f"to serve it, in vLLM's environment: {serve}", soft_wrap=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    nf4 = merges_into_nf4(args.lora_path, args.merge_lora)
    folder, lock = open_output(args.output_dir)
    try:
        calibration = args.calibration_samples if args.scheme in CALIBRATED else 0
        asked, seen = read_samples(args.dataset, args.gate_samples, calibration)
        with tempfile.TemporaryDirectory(prefix="llava_stage_") as stage:
            processor = stage_checkpoint(args.model_path, Path(stage))
            report = make_checkpoint(args, nf4, Path(stage), folder, seen, processor)
            report |= {"dataset": args.dataset if asked or seen else None, "quality": None}
            started = time.monotonic()
            if asked:
                reference = (Path(stage), args.lora_path, nf4, args.device)
                report["quality"] = run_gate(reference, folder, processor, asked, args.max_new_tokens, args.max_kl)
        report["seconds"]["gate"] = round(time.monotonic() - started, 1)
        report["peak_memory_bytes"]["gate"] = peak_memory()
        (folder / "quantization_report.json").write_text(json.dumps(report, indent=1, allow_nan=False))
        lock.release()
        (folder / ".lock").unlink(missing_ok=True)
        os.replace(folder, args.output_dir)  # which may be there, but empty
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_report(report, args.output_dir)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing unfinished stays
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; nothing was written.", code=130)
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full; use --device cpu, or --gate_samples 0 and the AMBER script on the result.")
    except (OSError, SafetensorError) as error:  # a full disk, a file of weights that is missing or broken
        stop(f"{error}; nothing was written to --output_dir.")
