"""One ORPO training step in its forms: seconds a pair, share of the device's matrix-product rate, peak memory.

The model is randomly initialised with LLaVA-1.6's picture geometry and vocabulary (32,064); pictures have the sizes of
real photos (1,464 to 2,928 image tokens), responses 60 to 160 tokens. The forms, each in a process of its own:

    trl     ORPOTrainer's own forward and loss given the pictures: two rows a pair, vision tower twice, logits and
            log-probabilities for every position
    plain   llava_orpo_training.py --no_prefix_sharing: two rows, full logits, log-probabilities for the responses only,
            the tower without a graph
    shared  one row a pair, logits for the responses only
    packed  --packing: the rows of shared, one after the other in a single row without padding

On a GPU, shared and packed use FlexAttention's block mask. Every form recomputes as many layers as its own memory asks
for (--gradient_checkpointing auto), trains with the script's dropout, and gets the same batch in each step; the fastest
step counts. The share is what a pair needs at least (no padding, nothing
computed twice or recomputed) by the second, over the rate of one large matrix product, the greatest of those measured
in each form's process.

    python benchmarks/bench_orpo_step.py                                            # narrow model (hidden 512, 4 layers)
    python benchmarks/bench_orpo_step.py --size 7b --batch_size 1 2 4 8 16          # on a GPU: LoRA in bfloat16
    python benchmarks/bench_orpo_step.py --size 7b --batch_size 1 2 4 8 16 --load_4bit                        # QLoRA
"""

import argparse
import functools
import gc
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FORMS = ["trl", "plain", "shared", "packed"]
# (height, width) of a photo, its image tokens; the model itself refuses a wrong number
PHOTOS = [((480, 640), 2340), ((640, 427), 2160), ((333, 500), 1464), ((640, 480), 2352), ((600, 600), 2928)]
RESPONSES = [(130, 120), (90, 100), (160, 140), (60, 70)]  # chosen and rejected, tokens


def count(text: str) -> int:
    """A whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["narrow", "7b"], default="narrow", help="language model (default: narrow)")
    parser.add_argument("--batch_size", type=count, nargs="+", default=[1], help="pairs a step (default: 1)")
    parser.add_argument(
        "--steps", type=count, default=3, help="timed steps, after one to warm up; the fastest counts (default: 3)"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="which to run (default: all)")
    parser.add_argument("--load_4bit", action="store_true", help="QLoRA: the language model in NF4")
    parser.add_argument("--gradient_checkpointing", choices=["auto", "on", "off"], default="auto",
                        help="layers that recompute, in every form: what its memory asks for, all or none (default: auto)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the decoder layers, in every form")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)  # a child process runs one form
    args = parser.parse_args(argv)
    args.batch_size.sort()  # so that the peak of a process is that of its latest
    return args


def build_model(size: str, device: str, load_4bit: bool = False, dtype=None):
    """A random LLaVA-NeXT on `device`; the vision tower is CLIP ViT-L/14-336 in both sizes' geometry, narrow in one."""
    import torch
    from accelerate import init_empty_weights
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    narrow = size == "narrow"
    vision = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4) if narrow else (
        dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    )  # fmt: skip
    text = dict(hidden_size=512, intermediate_size=1792, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2) if narrow else (
        dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **vision),
        text_config=MistralConfig(vocab_size=32064, max_position_embeddings=8192, sliding_window=None, **text),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
    torch.set_default_dtype(dtype)
    with init_empty_weights(include_buffers=False):
        model = LlavaNextForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    if device == "meta":
        return model

    def fill(weight):
        """Random values on the device, one weight at a time, so that QLoRA needs no more than it keeps."""
        value = torch.empty(weight.shape, device=device, dtype=dtype)
        return value.normal_(std=0.02) if value.dim() > 1 else value.fill_(1)

    quantized = list(model.model.language_model.layers.modules()) if load_4bit else []
    for module in list(model.modules()):
        for name, buffer in module._buffers.items():
            module._buffers[name] = buffer if buffer is None else buffer.to(device)
        for name, weight in module._parameters.items():
            if weight is not None and not (isinstance(module, torch.nn.Linear) and module in quantized):
                module._parameters[name] = torch.nn.Parameter(fill(weight), requires_grad=False)
        for name, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear) and linear in quantized:
                with torch.device("meta"):
                    packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype)
                packed.weight = Params4bit(fill(linear.weight), requires_grad=False, quant_type="nf4", compress_statistics=True,
                                           module=packed).to(device)  # fmt: skip
                packed.support_avx512bf16_for_cpu = False  # see load_llava
                setattr(module, name, packed)
    model.is_loaded_in_4bit = load_4bit
    return model


def make_batch(n: int, device: str) -> dict:
    """n pairs as collate_pairs gives them; text and pixels are random."""
    import torch

    import llava_orpo_training as training

    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(100, 32000, (count,), generator=generator).tolist()

    features = []
    for i in range(n):
        (height, width), image_tokens = PHOTOS[i % len(PHOTOS)]
        tiles = 3 if image_tokens < 2000 else 5
        features.append({
            "prompt": [1, 733, 16289, 28793, 28705] + [32000] * image_tokens + words(20),
            **{name: words(RESPONSES[i % len(RESPONSES)][k]) for k, name in enumerate(("chosen", "rejected"))},
            "pixel_values": torch.randn(tiles, 3, 336, 336, generator=generator),
            "image_sizes": torch.tensor([height, width]),
        })  # fmt: skip
    return {name: tensor.to(device) for name, tensor in training.collate_pairs(features, 32001).items()}


def make_trainer(form: str, device: str, autocast: bool):
    """The trainer's loss, without a data set around it."""
    import torch

    import llava_orpo_training as training

    trainer = training.LlavaORPOTrainer.__new__(training.LlavaORPOTrainer)
    trainer.beta, trainer.padding_value = 0.1, 32001
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.accelerator = SimpleNamespace(
        device=torch.device(device), autocast=lambda: torch.autocast(device, torch.bfloat16, enabled=autocast)
    )
    trainer.prefix_sharing, trainer.packing = form in ("shared", "packed"), form == "packed"
    trainer.block_mask = trainer.prefix_sharing and device == "cuda"
    return trainer


def count_flops(model, batch: dict) -> tuple[float, float]:
    """Floating-point operations that a step on this batch needs: the matrix products of each real token's forward (and of
    every tile's), the gradients of its input, and the adapter's own; nothing for padding, and no score that is masked.
    Returns (those of linear layers, those of attention).
    """
    import torch

    config, base = model.config.text_config, model.get_base_model()
    names = ("prompt_input_ids", "chosen_labels", "rejected_labels")
    real = [(batch["prompt_attention_mask"] == 1) if "prompt" in name else (batch[name] != -100) for name in names]
    prompt, chosen, rejected = (part.sum(1).double() for part in real)
    tokens = (prompt + chosen + rejected).sum().item()
    seen = (prompt**2 / 2 + (chosen + rejected) * prompt + (chosen**2 + rejected**2) / 2).sum().item()
    frozen = adapter = 0
    for name, module in base.model.language_model.named_modules():
        if hasattr(module, "in_features") and not hasattr(module, "base_layer"):
            size = module.in_features * module.out_features
            frozen, adapter = (frozen, adapter + size) if ".lora_" in name else (frozen + size, adapter)
    head_size = config.head_dim or config.hidden_size // config.num_attention_heads
    language = tokens * (4 * frozen + 6 * adapter)
    attention = 12 * seen * config.num_hidden_layers * config.num_attention_heads * head_size
    head = 4 * (chosen + rejected).sum().item() * base.lm_head.weight.numel()
    vision = base.config.vision_config
    tiles = sum(3 if size == list(PHOTOS[2][0]) else 5 for size in batch["image_sizes"].tolist())
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    linear = [
        module.weight.numel() for module in base.model.vision_tower.modules() if isinstance(module, torch.nn.Linear)
    ]
    tower = tiles * 2 * patches * sum(linear)
    attention += tiles * 4 * patches**2 * vision.hidden_size * vision.num_hidden_layers
    projector = (
        tiles * (patches - 1) * 2 * sum(weight.numel() for weight in base.model.multi_modal_projector.parameters())
    )
    return language + head + tower + projector, attention


def measure_matmul(device: str) -> float:
    """The device's rate in one large matrix product (bfloat16 on a GPU, float32 on a CPU), operations a second."""
    import torch

    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def run_form(args: argparse.Namespace) -> list[dict]:
    """Train `steps` steps in one form at each batch size; a batch that does not fit the GPU ends the list."""
    import torch

    import llava_orpo_training as training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    rate = measure_matmul(device)
    model = training.add_adapter(build_model(args.size, device, args.load_4bit), training.parse_args([])).train()
    trainer = make_trainer(args.form, device, autocast=on_gpu)
    trainer.model = model
    if args.form != "trl":
        training.freeze_tower(model)
        training.speed_up(model, trainer.block_mask, autocast=on_gpu)
    decoder = model.get_base_model().model.language_model
    if args.compile:
        for layer in decoder.layers:
            layer.compile()
    start_weights = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-4, fused=True
    )

    def run_forward(batch, show_pictures, rows) -> tuple:
        if args.form == "trl":
            return training.ORPOTrainer.concatenated_forward(trainer, show_pictures, rows)
        return trainer.concatenated_forward(model, batch)

    def train_steps(batch, show_pictures, rows) -> list[float]:
        seconds = []
        for step in range(args.steps + 1):
            if step == 1 and on_gpu:  # the first warms up
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            with trainer.accelerator.autocast():
                forward = run_forward(batch, show_pictures, rows)
            loss = forward[4] - trainer.odds_ratio_loss(*forward[:2])[0].mean()
            del forward
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return seconds

    results = []
    for n in args.batch_size:
        batch = make_batch(n, device)
        rows = {}  # the same pairs in the form that TRL's own collator gives
        for name in ("chosen", "rejected"):
            labels, prompt = batch[f"{name}_labels"], batch["prompt_input_ids"]
            rows[f"{name}_input_ids"] = torch.cat([prompt, labels.masked_fill(labels == -100, 32001)], dim=1)
            rows[f"{name}_attention_mask"] = torch.cat([batch["prompt_attention_mask"], (labels != -100).long()], dim=1)
            rows[f"{name}_labels"] = torch.cat([torch.full_like(prompt, -100), labels], dim=1)
        show_pictures = functools.partial(model, **{name: torch.cat([batch[name]] * 2) for name in ("pixel_values", "image_sizes")})  # fmt: skip
        for name, weight in model.named_parameters():
            if name in start_weights:
                weight.data.copy_(start_weights[name])
        layers = len(decoder.layers)
        logps, planned = {}, {"on": layers, "off": 0}.get(args.gradient_checkpointing)
        try:
            if planned is None:
                planned = training.plan_checkpointing(trainer, batch)
            with torch.no_grad(), trainer.accelerator.autocast():  # every form starts from the same weights
                model.eval()
                forward = run_forward(batch, show_pictures, rows)
                logps = {"chosen_logp": forward[0][0].item(), "rejected_logp": forward[1][0].item()}
                model.train()
        except torch.OutOfMemoryError:
            planned = layers
        for recomputed in sorted({planned, layers if args.gradient_checkpointing == "auto" else planned}):
            try:
                training.checkpoint_layers(model, recomputed)
                seconds = train_steps(batch, show_pictures, rows)
                break
            except torch.OutOfMemoryError:
                seconds = None
            optimizer.zero_grad()
            gc.collect()
        if seconds is None:
            print(f"{args.form}: a batch of {n} does not fit", file=sys.stderr)
            break
        fastest = min(seconds[1:])
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results.append({
            "form": args.form, "batch_size": n, "seconds_per_pair": fastest / n, "recomputed_layers": recomputed,
            "share_of_matmul": sum(count_flops(model, batch)) / fastest / rate, "matmul_flops": rate,
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else host, **logps,
            "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads",
        })  # fmt: skip
    return results


def main(argv=None):
    args = parse_args(argv)
    if args.form:
        print(json.dumps(run_form(args)))
        return
    from rich.console import Console
    from rich.table import Table

    results = []
    console = Console(width=120)
    for form in args.forms:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--form", form]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results += json.loads(child.stdout.splitlines()[-1])
    if not results:
        sys.exit("error: no form fits the memory at any batch size; try --load_4bit or a smaller --batch_size.")
    rate = max(result["matmul_flops"] for result in results)
    for result in results:
        result["share_of_matmul"] *= result["matmul_flops"] / rate
    found = {(result["form"], result["batch_size"]): result for result in results}
    kind = "QLoRA (NF4)" if args.load_4bit else "LoRA"
    table = Table("form", "pairs a step", "s a pair", "share of matmul", "peak", "layers recomputed", "times trl", "times plain",
                  title=f"{args.size}, {kind}, {results[0]['device']}")  # fmt: skip
    for (form, n), result in found.items():
        for other in ("trl", "plain"):
            if (other, n) in found:
                result[f"speedup_over_{other}"] = found[other, n]["seconds_per_pair"] / result["seconds_per_pair"]
                result[f"memory_of_{other}"] = result["peak_bytes"] / found[other, n]["peak_bytes"]
        ratios = (f"{result[key]:.2f}" if key in result else "" for key in ("speedup_over_trl", "speedup_over_plain"))
        table.add_row(form, str(n), f"{result['seconds_per_pair']:.3f}", f"{result['share_of_matmul']:.1%}",
                      f"{result['peak_bytes'] / 1e9:.2f} GB", str(result["recomputed_layers"]), *ratios)  # fmt: skip
    console.print(table)
    print(json.dumps({"benchmark": "orpo_step", "size": args.size, "load_4bit": args.load_4bit, "results": results}))


if __name__ == "__main__":
    main()
