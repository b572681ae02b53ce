"""Measure one ORPO training step in three forms: seconds a pair, share of the matrix-product rate, peak memory.

The model is randomly initialised with LLaVA-1.6's picture geometry and vocabulary (32,064). Pictures have the sizes of
real photos (1,464 to 2,928 image tokens), responses have 60 to 160 tokens. Each form runs in a process of its own:

    trl     ORPOTrainer's own forward, given the pictures: two rows a pair, logits and log-probabilities for every token
    plain   two rows a pair, logits for every token, log-probabilities for the responses only
    shared  what llava_orpo_training.py does: one row a pair, logits for the responses only; on a GPU, all pairs stand in
            a single row without padding, under FlexAttention's block mask

Every form recomputes as many layers as its own memory asks for (--gradient_checkpointing auto) and gets the same batch in
each step. One run warms up, and of the timed steps the fastest counts. The share is the arithmetic that a pair needs at least (no padding, nothing computed
twice) in a second, over the rate of one large matrix product, the greatest measured in any form's process.

    python benchmarks/bench_orpo_step.py                                            # narrow model (hidden 512, 4 layers)
    python benchmarks/bench_orpo_step.py --size 7b --batch_size 1 2 4 8 16          # on a GPU: LoRA in bfloat16
    python benchmarks/bench_orpo_step.py --size 7b --batch_size 1 2 4 8 16 --load_4bit                        # QLoRA
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ["trl", "plain", "shared"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["narrow", "7b"], default="narrow", help="language model (default: narrow)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1], help="pairs a step (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps; the fastest counts (default: 3)")
    parser.add_argument("--forms", nargs="+", choices=NAMES, default=NAMES, help="which to run (default: all)")
    parser.add_argument("--load_4bit", action="store_true", help="QLoRA: the language model in NF4")
    parser.add_argument("--gradient_checkpointing", choices=["auto", "on", "off"], default="auto",
                        help="layers that recompute: as few as fit the memory, all or none (default: auto)")  # fmt: skip
    parser.add_argument("--form", help=argparse.SUPPRESS)  # a child process runs one form
    args = parser.parse_args(argv)
    args.batch_size.sort()  # the peak memory of a process is that of its latest batch
    return args


if __name__ == "__main__":
    parse_args()  # answers --help before the heavy imports

import torch
from torch.utils.benchmark import Timer
from trl.experimental.orpo import ORPOTrainer

import llava_orpo_training as training

PAD, IMAGE = 32001, 32000
PHOTOS = [  # (height, width), image tokens and tiles; the model itself refuses a wrong number of tokens
    ((480, 640), 2340, 5), ((640, 427), 2160, 5), ((333, 500), 1464, 3), ((640, 480), 2352, 5), ((600, 600), 2928, 5),
]  # fmt: skip
RESPONSES = [(130, 120), (90, 100), (160, 140), (60, 70)]  # tokens of chosen and rejected


def lay_out_two_rows(batch: dict, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels of a batch of B pairs as 2B rows, all chosen ones first."""
    prompt, real = batch["prompt_input_ids"].repeat(2, 1), batch["prompt_attention_mask"].repeat(2, 1)
    longest = max(batch[f"{name}_labels"].shape[1] for name in ("chosen", "rejected"))
    padded = [torch.nn.functional.pad(batch[f"{name}_labels"], (0, longest - batch[f"{name}_labels"].shape[1]), value=-100)
              for name in ("chosen", "rejected")]  # fmt: skip
    labels = torch.cat(padded)
    return {
        "input_ids": torch.cat([prompt, labels.masked_fill(labels == -100, pad_token_id)], dim=1),
        "attention_mask": torch.cat([real, (labels != -100).long()], dim=1),
        "labels": torch.cat([torch.full_like(prompt, -100), labels], dim=1),
    }


def repeat_pictures(batch: dict) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name]] * 2) for name in ("pixel_values", "image_sizes")}


class TrlTrainer(training.LlavaORPOTrainer):
    """The forward of TRL's own trainer, given the pictures."""

    def concatenated_forward(self, model, batch: dict) -> tuple[torch.Tensor, ...]:
        both = {name: rows.chunk(2) for name, rows in lay_out_two_rows(batch, self.padding_value).items()}
        rows = {f"{part}_{name}": both[name][i] for i, part in enumerate(("chosen", "rejected")) for name in both}
        show_pictures = partial(model, **repeat_pictures(batch))
        chosen, rejected, _, _, nll = ORPOTrainer.concatenated_forward(self, show_pictures, rows)
        return chosen, rejected, None, None, nll  # all logits, which TRL averages, are not kept for the backward pass


class PlainTrainer(training.LlavaORPOTrainer):
    """The training script's loss in its plain form: prompt and picture stand in two rows, and every token has logits."""

    def concatenated_forward(self, model, batch: dict) -> tuple[torch.Tensor, ...]:
        rows, start = lay_out_two_rows(batch, self.padding_value), batch["prompt_input_ids"].shape[1]
        labels = rows.pop("labels")[:, start:]
        rows["position_ids"] = (rows["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**rows, **repeat_pictures(batch), use_cache=False).logits.float()[:, start - 1 : -1]
        logps = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        real = labels != -100
        logps, logits = logps.view_as(labels), logits.detach().mean(-1) * real
        means = [part for values in (logps, logits) for part in (values.sum(1) / real.sum(1)).chunk(2)]
        return *means, -means[0].mean()


FORMS = dict(zip(NAMES, (TrlTrainer, PlainTrainer, training.LlavaORPOTrainer), strict=True))


def make_trainer(form: str, device: str) -> training.LlavaORPOTrainer:
    """Return the trainer's loss in one form, without a data set around it. On a GPU it runs in bfloat16."""
    trainer = FORMS[form].__new__(FORMS[form])
    trainer.beta, trainer.padding_value = 0.1, PAD
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=device == "cuda")
    trainer.accelerator = SimpleNamespace(device=torch.device(device), autocast=autocast)
    trainer.packed = form == "shared" and device == "cuda"
    return trainer


def build_model(size: str, device: str, load_4bit: bool = False, dtype: torch.dtype | None = None):
    """Return a random LLaVA-NeXT. The vision tower has CLIP ViT-L/14-336's geometry in both sizes."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaNextConfig, MistralConfig

    if size == "narrow":
        vision = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4)
        text = dict(hidden_size=512, intermediate_size=1792, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)  # fmt: skip
    else:
        vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
        text = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **vision),
        text_config=MistralConfig(vocab_size=32064, max_position_embeddings=8192, sliding_window=None, **text),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        tie_word_embeddings=False,
    )
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in [name for name in layers if load_4bit and ".language_model.layers." in name]:
        linear = model.get_submodule(name)
        packed = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, device="meta")
        packed.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
                                   module=packed).to(device)  # fmt: skip
        packed.support_avx512bf16_for_cpu = False  # see load_llava
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = load_4bit
    return model


def add_adapter(model):
    """Put the training script's adapter on the model, with random weights in place of zeros."""
    model = training.add_adapter(model, training.parse_args([])).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return model


def make_batch(n: int, device: str) -> dict:
    """Return n pairs as collate_pairs gives them; text and pixels are random."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(100, IMAGE, (count,), generator=generator).tolist()

    pairs = []
    for i in range(n):
        size, image_tokens, tiles = PHOTOS[i % len(PHOTOS)]
        chosen, rejected = RESPONSES[i % len(RESPONSES)]
        pixels = torch.randn(tiles, 3, 336, 336, generator=generator)
        pairs.append({"prompt": [*words(5), *[IMAGE] * image_tokens, *words(20)], "chosen": words(chosen),
                      "rejected": words(rejected), "pixel_values": pixels, "image_sizes": torch.tensor(size)})  # fmt: skip
    return {name: tensor.to(device) for name, tensor in training.collate_pairs(pairs, PAD).items()}


def count_flops(model, batch: dict) -> tuple[float, float]:
    """Return the floating-point operations that a step needs, as (those of linear layers, those of attention).

    These are the matrix products of each real token's and every tile's forward, the gradients of its input, and the
    adapter's own; nothing for padding or for masked scores.
    """

    def size(part, adapter: bool = False) -> int:
        linear = [(name, module) for name, module in part.named_modules() if isinstance(module, torch.nn.Linear)]
        return sum(each.in_features * each.out_features for name, each in linear if (".lora_" in name) == adapter)

    base = model.get_base_model()
    text, vision = base.config.text_config, base.config.vision_config
    prompt = batch["prompt_attention_mask"].sum(1).double()
    chosen, rejected = ((batch[f"{name}_labels"] != -100).sum(1).double() for name in ("chosen", "rejected"))
    responses = chosen + rejected
    seen = prompt**2 / 2 + responses * prompt + (chosen**2 + rejected**2) / 2
    tiles = sum(PHOTOS[i % len(PHOTOS)][2] for i in range(len(prompt)))
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    language = 4 * size(base.model.language_model) + 6 * size(base.model.language_model, adapter=True)
    linear = (prompt + responses).sum().item() * language + 4 * responses.sum().item() * size(base.lm_head)
    linear += 2 * tiles * patches * size(base.model.vision_tower)
    linear += 2 * tiles * (patches - 1) * size(base.model.multi_modal_projector)
    attention = 12 * seen.sum().item() * text.num_hidden_layers * text.hidden_size
    return linear, attention + 4 * tiles * patches**2 * vision.hidden_size * vision.num_hidden_layers


def measure_matmul(device: str) -> float:
    """Return the device's rate in one large matrix product (bfloat16 on a GPU, float32 on a CPU), operations a second."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    factors = {name: torch.randn(size, size, device=device, dtype=dtype) for name in ("left", "right")}
    timer = Timer("left @ right", globals=factors, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def time_steps(trainer, optimizer, batch: dict, steps: int) -> tuple[float, float, float]:
    """Return the fastest of `steps` steps in seconds, and the first pair's log-probability of chosen and rejected."""
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        with trainer.accelerator.autocast():
            chosen, rejected, *_, nll = trainer.concatenated_forward(trainer.model, batch)
        (nll - trainer.odds_ratio_loss(chosen, rejected)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        logps = chosen[0].item(), rejected[0].item()  # this also waits for the GPU's forward
        if batch["image_sizes"].is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds), *logps


def run_form(args: argparse.Namespace) -> list[dict]:
    """Train some steps in one form at each batch size. The first batch that does not fit the GPU ends the list."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rate = measure_matmul(device)
    trainer = make_trainer(args.form, device)
    trainer.model = model = add_adapter(build_model(args.size, device, args.load_4bit))
    if args.form != "trl":
        training.speed_up(model, trainer.packed, autocast=device == "cuda")
    # the learning rate is 0, so that every form and every batch starts from the same weights
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.0, fused=True)
    results = []
    for n in args.batch_size:
        batch = make_batch(n, device)
        try:
            model.get_base_model().model.language_model.gradient_checkpointing_disable()
            recomputed = training.fit_memory(trainer, batch, args.gradient_checkpointing)
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, chosen, rejected = time_steps(trainer, optimizer, batch, args.steps)
        except torch.OutOfMemoryError:
            print(f"{args.form}: a batch of {n} does not fit", file=sys.stderr)
            break
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        results.append({
            "form": args.form, "batch_size": n, "seconds_per_pair": seconds / n, "recomputed_every": recomputed,
            "share_of_matmul": sum(count_flops(model, batch)) / seconds / rate, "matmul_flops": rate,
            "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else host,
            "chosen_logp": chosen, "rejected_logp": rejected,
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads",
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
    for form in args.forms:
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--form", form]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results += json.loads(child.stdout.splitlines()[-1])
    if not results:
        sys.exit("error: no form fits the memory at any batch size; try --load_4bit or a smaller --batch_size.")
    rate = max(result["matmul_flops"] for result in results)
    found = {(result["form"], result["batch_size"]): result for result in results}
    columns = [
        "form",
        "pairs a step",
        "s a pair",
        "share of matmul",
        "peak",
        "times trl",
        "times plain",
        "peak of plain",
    ]
    table = Table(*columns, title=f"{args.size}, {'QLoRA' if args.load_4bit else 'LoRA'}, {results[0]['device']}")
    for (form, n), result in found.items():
        result["share_of_matmul"] *= result["matmul_flops"] / rate
        for other in ("trl", "plain"):
            if (other, n) in found:
                result[f"speedup_over_{other}"] = found[other, n]["seconds_per_pair"] / result["seconds_per_pair"]
                result[f"memory_of_{other}"] = result["peak_bytes"] / found[other, n]["peak_bytes"]
        ratios = ("speedup_over_trl", "speedup_over_plain", "memory_of_plain")
        table.add_row(form, str(n), f"{result['seconds_per_pair']:.3f}", f"{result['share_of_matmul']:.1%}",
                      f"{result['peak_bytes'] / 1e9:.2f} GB", *(f"{result[key]:.2f}" if key in result else "" for key in ratios))  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"benchmark": "orpo_step", "size": args.size, "load_4bit": args.load_4bit, "results": results}))


if __name__ == "__main__":
    main()
