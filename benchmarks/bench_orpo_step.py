"""Seconds a pair and peak memory of one ORPO training step: one shared-prefix row a pair against two full rows.

The model is randomly initialised with LLaVA-1.6's picture geometry and vocabulary (32,064): a 640x480 photo is 2,340
image tokens, chosen and rejected have 130 and 120. Three forms, each in a process of its own, so that its peak memory is
its own: trl, ORPOTrainer's own forward and loss given the pictures (two rows a pair, vision tower twice, logits and
log-probabilities for every position); plain, llava_orpo_training.py --no_prefix_sharing (the same, but log-probabilities
for the responses only); shared, what llava_orpo_training.py does. The ratios are to trl.

    python benchmarks/bench_orpo_step.py                      # narrow model (hidden 512, 4 layers)
    python benchmarks/bench_orpo_step.py --size 7b --batch_size 4 --steps 10        # on a GPU
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["narrow", "7b"], default="narrow", help="language model (default: narrow)")
    parser.add_argument("--batch_size", type=int, default=1, help="pairs a step (default: 1)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one to warm up (default: 3)")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="in both forms")
    parser.add_argument(
        "--form", choices=["trl", "plain", "shared"], help=argparse.SUPPRESS
    )  # a child process runs one form
    return parser.parse_args(argv)


def build_model(size: str, device: str):
    """A random LLaVA-NeXT on `device`; the vision tower is CLIP ViT-L/14-336 in both sizes' geometry, narrow in one."""
    import torch
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig

    narrow = size == "narrow"
    vision = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4) if narrow else (
        dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    )  # fmt: skip
    text = dict(
        hidden_size=512, intermediate_size=1792, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2
    )
    text = (
        text if narrow else dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)
    )
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **vision),
        text_config=MistralConfig(vocab_size=32064, max_position_embeddings=8192, sliding_window=None, **text),
        image_token_index=32000,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
        model = LlavaNextForConditionalGeneration(config)
        torch.set_default_dtype(torch.float32)
    return model


def run_form(args: argparse.Namespace) -> dict:
    """Train `steps` steps in one form; returns seconds a pair, peak memory in bytes and the last loss."""
    import torch

    import llava_orpo_training as training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(args.size, device)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    defaults = training.parse_args([])
    defaults.lora_dropout = 0.0
    model = training.add_adapter(model, defaults).train()
    trainer = training.LlavaORPOTrainer.__new__(training.LlavaORPOTrainer)  # the loss alone, without a data set
    trainer.beta, trainer.padding_value = 0.1, 32001
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.accelerator = SimpleNamespace(device=device)
    trainer.prefix_sharing = args.form == "shared"
    generator = torch.Generator().manual_seed(0)
    n = args.batch_size
    prompt = torch.cat(
        [torch.tensor([1, 733, 16289, 28793, 28705]), torch.full((2340,), 32000), torch.arange(100, 120)]
    )
    batch = {
        "prompt_input_ids": prompt.repeat(n, 1),
        "prompt_attention_mask": torch.ones(n, len(prompt), dtype=torch.long),
        "chosen_labels": torch.randint(100, 32000, (n, 130), generator=generator),
        "rejected_labels": torch.randint(100, 32000, (n, 120), generator=generator),
        "pixel_values": torch.randn(n, 5, 3, 336, 336, generator=generator),
        "image_sizes": torch.tensor([[480, 640]] * n),
    }
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = {}  # the same pairs in the form that TRL's own collator gives
    for name in ("chosen", "rejected"):
        labels = batch[f"{name}_labels"]
        rows[f"{name}_input_ids"] = torch.cat([batch["prompt_input_ids"], labels], dim=1)
        rows[f"{name}_attention_mask"] = torch.ones_like(rows[f"{name}_input_ids"])
        rows[f"{name}_labels"] = torch.cat([torch.full_like(batch["prompt_input_ids"], -100), labels], dim=1)
    pictures = {name: torch.cat([batch[name]] * 2) for name in ("pixel_values", "image_sizes")}
    show_pictures = functools.partial(model, **pictures)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    for step in range(args.steps + 1):
        if step == 1:  # the first warms up
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
        if args.form == "trl":
            chosen, rejected, _, _, nll = training.ORPOTrainer.concatenated_forward(trainer, show_pictures, rows)
        else:
            chosen, rejected, _, _, nll = trainer.concatenated_forward(model, batch)
        loss = nll - trainer.odds_ratio_loss(chosen, rejected)[0].mean()
        if step == 0:  # every form starts from the same weights
            logps = {"chosen_logp": chosen[0].item(), "rejected_logp": rejected[0].item()}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / (args.steps * n)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else host
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return {"seconds_per_pair": seconds, "peak_bytes": peak, **logps, "device": name}


def main(argv=None):
    args = parse_args(argv)
    if args.form:
        print(json.dumps(run_form(args)))
        return
    results = {}
    for form in ("trl", "plain", "shared"):
        command = [sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--form", form]
        child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[form] = json.loads(child.stdout.splitlines()[-1])
        print(f"{form:>6}: {results[form]['seconds_per_pair']:.3f} s a pair, "
              f"{results[form]['peak_bytes'] / 1e9:.2f} GB at the peak, chosen log-probability {results[form]['chosen_logp']:.6f}")  # fmt: skip
    shared = results["shared"]
    ratios = {}
    for form in ("trl", "plain"):
        ratios[f"speedup_over_{form}"] = results[form]["seconds_per_pair"] / shared["seconds_per_pair"]
        ratios[f"memory_of_{form}"] = shared["peak_bytes"] / results[form]["peak_bytes"]
        print(f"against {form}, shared is {ratios[f'speedup_over_{form}']:.2f} times as fast "
              f"and takes {100 * ratios[f'memory_of_{form}']:.0f} % of the memory")  # fmt: skip
    print(json.dumps({"benchmark": "orpo_step", "size": args.size, "batch_size": args.batch_size, **ratios, **results}))  # fmt: skip


if __name__ == "__main__":
    main()
