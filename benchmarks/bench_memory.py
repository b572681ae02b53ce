"""Peak memory of one ORPO training step of the 7B model, and the longest pair that fits a GPU of 8, 16, 24, 48 or 80 GB.

On a GPU the steps are run, random weights, with the allocator limited to each size. Without one they are accounted
for: the decoder runs on tensors that have a size but no content (torch's FakeTensorMode), forward, backward and
AdamW, and every storage is counted from its first use to its release. All weights count; of the activations, the
decoder's, the head's and the loss's do: the tower runs before, keeps nothing, and needs less. "Two rows" has the full
logits of TRL's form, "one row" is what the script does. No mask is counted, since FlexAttention's takes next to
nothing. What a real GPU adds (CUDA's context, about 0.5 GB, and the allocator's fragments) is in neither. In NF4, the
accounted weights are a stand-in of NF4's size that is unpacked for each product, forward and backward. All layers
recompute their activations, so this is the least that a step needs.

    python benchmarks/bench_memory.py
"""

import argparse
import gc
import json
import math
import sys
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

GB = 1e9
SHORTEST, CONTEXT = 1800, 32768  # of the pairs tried: the smallest picture's, and Mistral's context
PROMPT, CHOSEN, REJECTED = 2340 + 25, 130, 120  # of the pair in the table: a 640x480 photo


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["narrow", "7b"], default="7b", help="language model (default: 7b)")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 4, 16], help="pairs a step (default: 1 4 16)")
    parser.add_argument("--memory_gb", type=float, nargs="+", default=[8, 16, 24, 48, 80], help="sizes of GPU (default: 8 16 24 48 80)")  # fmt: skip
    return parser.parse_args(argv)


def fake_model(size: str, load_4bit: bool, dtype):
    """The model with its adapter and optimizer, in tensors without content. To be called in FakeTensorMode."""
    import bench_orpo_step
    import torch

    import llava_orpo_training as training

    class Unpack(torch.autograd.Function):
        """A product with weights in NF4: unpacked forward and backward, kept packed in between."""

        @staticmethod
        def forward(ctx, inputs, packed, shape):
            ctx.save_for_backward(packed)
            ctx.shape = shape
            return torch.nn.functional.linear(inputs, torch.empty(shape, dtype=inputs.dtype))

        @staticmethod
        def backward(ctx, gradient):
            return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None, None

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.shape = linear.weight.shape
            size = linear.weight.numel()  # 4 bits, a byte for the scale of 64, four for the scale of 256 scales
            self.packed = torch.nn.Parameter(
                torch.empty(size // 2 + size // 64 + 4 * (size // 64 // 256), dtype=torch.uint8), requires_grad=False
            )

        def forward(self, inputs):
            return Unpack.apply(
                inputs.bfloat16() if torch.is_autocast_enabled("cpu") else inputs, self.packed, self.shape
            )

    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        model = bench_orpo_step.build_model(size, "meta", dtype=dtype)
        model = training.add_adapter(model, training.parse_args([])).train()
    for module in list(model.modules()):
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if isinstance(tensor, torch.nn.Parameter):
                    kind[name] = torch.nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)
                elif tensor is not None:
                    kind[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        if load_4bit and hasattr(module, "base_layer"):
            module.base_layer = Packed(module.base_layer)
    training.speed_up(model, packed=False, autocast=dtype == torch.bfloat16)
    model.get_base_model().model.language_model.gradient_checkpointing_enable()
    return model


def account(size: str, load_4bit: bool, rows: int, length: int, kept: int, on_cpu: bool = False) -> int:
    """Bytes at the peak of a step of `rows` rows of `length` tokens, of each of which `kept` get logits. What is not packed
    is in bfloat16, or in float32 in the narrow model and, as the training script has it there, `on_cpu`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Ledger(TorchDispatchMode):
        """Sums the storages that are alive, and the greatest sum there was."""

        def __init__(self):
            super().__init__()
            self.alive, self.peak, self.known = 0, 0, set()

        def enter(self, tensor):
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self.leave, id(storage), storage.nbytes())

        def leave(self, key, size):
            self.known.discard(key)
            self.alive -= size

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.enter(leaf)
            return result

    dtype = torch.float32 if on_cpu or size == "narrow" else torch.bfloat16
    with FakeTensorMode():
        model = fake_model(size, load_4bit, dtype)
        base = model.get_base_model()
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], foreach=False)
        ledger = Ledger()
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.enter(tensor)
        with ledger:
            for weight in optimizer.param_groups[0]["params"]:
                weight.grad = torch.zeros_like(weight)
            optimizer.step()  # its moments are there from the first step on
            optimizer.zero_grad()
            inputs = torch.empty(rows, length, base.config.text_config.hidden_size, dtype=base.lm_head.weight.dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                hidden = base.model.language_model(
                    inputs_embeds=inputs, position_ids=torch.arange(length)[None], use_cache=False,
                    attention_mask=torch.zeros(1, 1, 1, 1, dtype=inputs.dtype).expand(rows, 1, length, length),
                ).last_hidden_state  # fmt: skip
                logits = base.lm_head(hidden[:, -kept:]).float()
            del inputs, hidden
            targets = torch.zeros(rows * kept, dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
            del logits
            loss.backward()
            optimizer.step()
    return ledger.peak


def step_on_gpu(model, trainer, optimizer, length: int) -> int | None:
    """Bytes at the peak of a step on one pair of `length` tokens; None if it does not fit."""
    import bench_orpo_step as bench
    import torch

    import llava_orpo_training as training

    answers = {"chosen": [200] * CHOSEN, "rejected": [201] * REJECTED}
    size, image_tokens, tiles = max((photo for photo in bench.PHOTOS if photo[1] + CHOSEN + REJECTED + 20 < length), key=lambda photo: photo[1])  # fmt: skip
    words = length - image_tokens - CHOSEN - REJECTED - 5  # as in the accounting, the question is what grows
    pair = {"prompt": [1] * 5 + [32000] * image_tokens + [100] * words, **answers,
            "pixel_values": torch.zeros(tiles, 3, 336, 336), "image_sizes": torch.tensor(size)}  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        batch = {name: tensor.cuda() for name, tensor in training.collate_pairs([pair], 32001).items()}
        with trainer.accelerator.autocast():
            chosen, rejected, _, _, nll = trainer.concatenated_forward(model, batch)
        (nll - trainer.odds_ratio_loss(chosen, rejected)[0].mean()).backward()
        optimizer.step()
    except torch.OutOfMemoryError:
        return None
    finally:
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def measure(size: str, load_4bit: bool, limits: list[float]) -> dict[float, int]:
    """The longest pair that trains within each limit of the GPU's allocator, to 64 tokens."""
    import bench_orpo_step as bench
    import torch

    import llava_orpo_training as training

    model = training.add_adapter(bench.build_model(size, "cuda", load_4bit), training.parse_args([])).train()
    trainer = bench.make_trainer("shared", "cuda")
    training.speed_up(model, packed=True, autocast=True)
    model.get_base_model().model.language_model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    longest = {}
    for limit in limits:
        torch.cuda.set_per_process_memory_fraction(
            min(limit * GB / torch.cuda.get_device_properties(0).total_memory, 1.0)
        )
        fits, too_long = 0, CONTEXT
        while too_long - fits > 64:
            middle = max((fits + too_long) // 2, SHORTEST)
            if step_on_gpu(model, trainer, optimizer, middle):
                fits = middle
            elif middle == SHORTEST:
                break
            else:
                too_long = middle
        longest[limit] = fits
    torch.cuda.set_per_process_memory_fraction(1.0)
    return longest


def main(argv=None):
    args = parse_args(argv)
    import torch
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    on_gpu = torch.cuda.is_available()
    found = {
        "benchmark": "memory",
        "size": args.size,
        "device": torch.cuda.get_device_name() if on_gpu else "accounted",
    }
    shared, plain = PROMPT + CHOSEN + REJECTED, PROMPT + max(CHOSEN, REJECTED)
    with tqdm(total=2 * (2 * len(args.batch_size) + 2), desc="accounting", disable=on_gpu) as bar:

        def peak(*case) -> int:
            bar.update()
            return account(args.size, *case)

        for kind, load_4bit in (("LoRA", False), ("QLoRA", True)):
            if on_gpu:
                found[kind] = {"longest_pair": measure(args.size, load_4bit, args.memory_gb)}
                gc.collect()  # the tower's forward refers to itself
                torch.cuda.empty_cache()
                continue
            short, long = peak(load_4bit, 1, 2000, CHOSEN + REJECTED), peak(load_4bit, 1, 6000, CHOSEN + REJECTED)
            a_token = (long - short) / 4000
            found[kind] = {
                "peak_bytes": {n: {"two_rows": peak(load_4bit, 2 * n, plain, plain),
                                   "shared": peak(load_4bit, n, shared, CHOSEN + REJECTED)} for n in args.batch_size},
                "bytes_a_token": a_token,
                "longest_pair": {gb: min(max(math.floor(2000 + (gb * GB - short) / a_token), 0), CONTEXT) for gb in args.memory_gb},
            }  # fmt: skip
    console = Console(width=110)
    if not on_gpu:
        table = Table("pairs a step", *(f"{kind}, {form}" for kind in ("LoRA", "QLoRA") for form in ("two rows", "one row")),
                      title=f"peak GB of {args.size}: {shared:,} tokens a pair in one row")  # fmt: skip
        for n in args.batch_size:
            sizes = (found[kind]["peak_bytes"][n] for kind in ("LoRA", "QLoRA"))
            table.add_row(str(n), *(f"{size / GB:.1f}" for pair in sizes for size in pair.values()))
        console.print(table)
    table = Table("GPU", "LoRA", "QLoRA", title="longest pair that fits, tokens in one row")
    for gb in args.memory_gb:
        longest = (found[kind]["longest_pair"][gb] for kind in ("LoRA", "QLoRA"))
        table.add_row(
            f"{gb:g} GB",
            *(
                ("at least " if tokens >= CONTEXT - 64 else "") + f"{tokens:,}" if tokens else "none"
                for tokens in longest
            ),
        )
    console.print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
