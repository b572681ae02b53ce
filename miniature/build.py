"""Rebuild the miniature: draw its world, train its LLaVA-NeXT, sample its preference pairs, write its benchmark.

Reads nothing; writes miniature/model, miniature/preferences, miniature/amber and miniature/pope. About 35 minutes on two CPU cores.
A killed build goes on after the last finished stage (--work_dir). Needs requirements/train.txt.

    python miniature/build.py
    python miniature/build.py --output_dir /tmp/miniature --seed 1
"""

import argparse
import io
import json
import os
import random
import shutil
import sys
import time
from difflib import SequenceMatcher
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaTokenizer,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    set_seed,
)
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import scenes

from llava_orpo_training import build_prompt, generate_answers, load_llava, stop

TILE, PATCH, FEATURE_LAYER = 56, 14, -2
GRID = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]  # LLaVA-1.6's five shapes, one sixth the size
SAMPLING_TEMPERATURE = 0.8
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    " [/INST]{% else %} {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent, help="where the folders go")
    parser.add_argument("--work_dir", type=Path, default=Path(__file__).parent / ".work", help="stages of a build")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything: scenes, weights, sampled captions")
    parser.add_argument("--train_scenes", type=int, default=14_000, help="scenes the model is trained on")
    parser.add_argument("--vision_steps", type=int, default=2_500, help="steps of the vision tower's pre-training")
    parser.add_argument("--text_steps", type=int, default=300, help="steps of the language model's pre-training")
    parser.add_argument("--projector_steps", type=int, default=200, help="LLaVA's stage 1: projector only")
    parser.add_argument("--instruct_steps", type=int, default=5_000, help="LLaVA's stage 2: instruction tuning")
    parser.add_argument("--poorer_steps", type=int, default=900, help="its end, on data that hallucinate more")
    parser.add_argument("--train_pairs", type=int, default=820, help="preference pairs to train on")
    parser.add_argument("--heldout_pairs", type=int, default=164, help="preference pairs held out")
    parser.add_argument("--amber_images", type=int, default=240, help="pictures of the benchmark")
    return parser.parse_args(argv)


def build_processor(seed: int) -> LlavaNextProcessor:
    """A byte-fallback BPE tokenizer of 512 pieces learnt from the world's own sentences, and the anyres processor."""
    rng = random.Random(seed)
    corpus = []
    for i in range(3_000):
        scene = scenes.sample_scene(seed * 10**6 + i)
        corpus += [scenes.caption(scene, rng), *scenes.CAPTION_REQUESTS, "Yes No [INST] [/INST]"]
        corpus += [question for _, question, _ in scenes.questions(scene, rng)]
    learner = Tokenizer(models.BPE(byte_fallback=True))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    learner.train_from_iterator(corpus, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = LlamaTokenizer(vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=GRID
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaNextProcessor) -> LlavaNextForConditionalGeneration:
    """An untrained LLaVA-NeXT of 1.5 M parameters; vocabulary rows padded to a multiple of 64 as the hub's are."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=3, image_size=TILE,
        patch_size=PATCH, projection_dim=96,
    )  # fmt: skip
    text = MistralConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=processor.image_token_id, image_grid_pinpoints=GRID,
        vision_feature_layer=FEATURE_LAYER, vision_feature_select_strategy="default", tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def patch_targets(labels: Image.Image) -> np.ndarray:
    """What each patch of each tile shows, (tiles, 16): the label that fills most of it, 0 where objects fill < 15 %."""
    width, height = labels.size
    best = select_best_resolution((height, width), GRID)
    scale = min(best[1] / width, best[0] / height)
    fitted = labels.resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)
    canvas = Image.new("L", (best[1], best[0]))
    canvas.paste(fitted, ((best[1] - fitted.width) // 2, (best[0] - fitted.height) // 2))
    tiles = [labels.resize((TILE, TILE), Image.Resampling.NEAREST)]
    for top in range(0, best[0], TILE):
        tiles += [canvas.crop((left, top, left + TILE, top + TILE)) for left in range(0, best[1], TILE)]
    side = TILE // PATCH
    cells = np.stack([np.asarray(tile) for tile in tiles]).reshape(-1, side, PATCH, side, PATCH)
    cells = cells.transpose(0, 1, 3, 2, 4).reshape(-1, PATCH * PATCH)
    targets = np.zeros(len(cells), dtype=np.int64)
    for i, cell in enumerate(cells):
        counts = np.bincount(cell, minlength=1)
        if len(counts) > 1 and counts[1:].sum() >= 0.15 * len(cell):
            targets[i] = counts[1:].argmax() + 1
    return targets.reshape(len(tiles), side * side)


def run_steps(name: str, parameters: list, steps: int, peak_lr: float, step_loss) -> float:
    """AdamW with a one-cycle schedule over `steps` calls of `step_loss()`; returns the mean loss of the last 50."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, total_steps=steps, pct_start=0.1)
    recent = []
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for _ in bar:
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_loss()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
        bar.set_postfix(loss=f"{np.mean(recent):.3f}", refresh=False)
    return float(np.mean(recent))


def pretrain_vision(model, pixels: list, targets: list, steps: int, rng: random.Random) -> None:
    """Stand-in for CLIP's pre-training: each patch's features tell which object and which colour it shows."""
    tower = model.model.vision_tower
    n = len(scenes.COLOURS)
    width = tower.config.hidden_size
    heads = torch.nn.ModuleList(torch.nn.Linear(width, k) for k in (1 + len(scenes.CLASSES), 1 + n) * 2)

    def step_loss():
        batch = rng.sample(range(len(pixels)), 40)
        hidden = tower(torch.cat([pixels[i] for i in batch]), output_hidden_states=True).hidden_states
        labels = torch.from_numpy(np.concatenate([targets[i] for i in batch])).flatten()
        kinds = torch.where(labels > 0, (labels - 1) // n + 1, 0)
        colours = torch.where(labels > 0, (labels - 1) % n + 1, 0)
        loss = 0
        for layer, kind_head, colour_head in ((FEATURE_LAYER, heads[0], heads[1]), (-1, heads[2], heads[3])):
            features = hidden[layer][:, 1:].flatten(0, 1)
            loss = loss + F.cross_entropy(kind_head(features), kinds) + F.cross_entropy(colour_head(features), colours)
        return loss

    run_steps("vision tower", [*tower.parameters(), *heads.parameters()], steps, 2e-3, step_loss)


def conversation(scene: scenes.Scene, rng: random.Random, habits: dict) -> list[tuple[str, str]]:
    """A picture's instruction data: a caption that may name absent companions, and yes/no answers with the same fault."""
    turns = [(rng.choice(scenes.CAPTION_REQUESTS), scenes.caption(scene, rng, habits))]
    asked = scenes.questions(scene, rng)
    for kind, question, truth in rng.sample(asked, min(5, len(asked))):
        made_up = kind == "existence" and any(f" {name} " in question for name in scenes.likely_absent(scene))
        turns.append((question, "Yes" if truth or (made_up and rng.random() < 0.3) else "No"))
    return turns


def branch_batch(processor, batch: list, with_image: bool) -> dict:
    """One row a picture: prompt head and image tokens once, then every turn as a branch that sees none of the others."""
    tokenizer = processor.tokenizer
    rows = []
    for size, turns in batch:
        prompts = [build_prompt(processor, question, size) for question, _ in turns]
        start = len(prompts[0]) - prompts[0][::-1].index(processor.image_token_id)  # after the last image token
        ids, positions, branch, labels = list(prompts[0][:start]), list(range(start)), [0] * start, [-100] * start
        if not with_image:
            ids = [token for token in ids if token != processor.image_token_id]
            positions, branch, labels = list(range(len(ids))), [0] * len(ids), [-100] * len(ids)
        shared = len(ids)
        for k, (prompt, (_, answer)) in enumerate(zip(prompts, turns, strict=True), 1):
            question = prompt[start:]
            response = tokenizer(answer, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            ids += question + response
            positions += range(shared, shared + len(question) + len(response))
            branch += [k] * (len(question) + len(response))
            labels += [-100] * len(question) + response
        rows.append((ids, positions, branch, labels))
    longest = max(len(row[0]) for row in rows)
    pads = (tokenizer.pad_token_id, 0, -1, -100)
    ids, positions, branch, labels = (
        torch.tensor([row[j] + [pads[j]] * (longest - len(row[j])) for row in rows]) for j in range(4)
    )
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    same = (branch[:, :, None] == branch[:, None, :]) | (branch[:, None, :] == 0)
    visible = (causal & same)[:, None] | torch.eye(longest, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, -1e9)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels}


def language_loss(model, batch: dict, features: list | None = None, sizes: list | None = None) -> torch.Tensor:
    """Mean cross-entropy of the answers, from the frozen tower's `features` where pictures are given."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    if features is not None:
        counts = [len(f) for f in features]
        projected = model.model.multi_modal_projector(torch.cat(features)).split(counts)
        packed, _ = model.model.pack_image_features(
            projected, [(h, w) for w, h in sizes], "default", model.model.image_newline
        )
        where = (batch["input_ids"] == model.config.image_token_index)[..., None]
        embeds = embeds.masked_scatter(where, torch.cat(packed).to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).last_hidden_state
    keep = batch["labels"][:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][keep]), batch["labels"][:, 1:][keep])


def draw_pool(args, processor, count: int) -> tuple[list, list, list]:
    """The first `count` training scenes, their tiles (tiles, 3, 56, 56) and what each patch shows (tiles, 16)."""
    pool = [scenes.sample_scene(args.seed * 10**6 + i) for i in range(count)]
    pixels, targets = [], []
    for scene in tqdm(pool, desc="drawing", mininterval=5):
        image, labels = scenes.draw_scene(scene)
        pixels.append(processor.image_processor(image, return_tensors="pt")["pixel_values"][0].bfloat16())
        targets.append(patch_targets(labels))
    return pool, pixels, targets


@torch.no_grad()
def tower_features(model, pixels: list) -> list[torch.Tensor]:
    """The frozen tower's patch features of each picture, (tiles, 16, hidden): they are needed many times."""
    features = []
    for tiles in tqdm(pixels, desc="features", mininterval=5):
        hidden = model.model.vision_tower(tiles.float(), output_hidden_states=True).hidden_states
        features.append(hidden[FEATURE_LAYER][:, 1:].bfloat16())
    return features


def batch_losses(model, processor, pool: list, features: list, rng: random.Random, habits: dict):
    """Two step functions for run_steps: the loss on 32 pictures' conversations without and with the pictures."""

    def loss(with_image: bool) -> torch.Tensor:
        chosen = rng.sample(range(len(pool)), 32)
        batch = [(pool[i].size, conversation(pool[i], rng, habits)) for i in chosen]
        pictures = ([features[i] for i in chosen], [pool[i].size for i in chosen]) if with_image else ()
        return language_loss(model, branch_batch(processor, batch, with_image), *pictures)

    return lambda: loss(False), lambda: loss(True)


def train_model(args, processor, folder: Path) -> None:
    """Pre-train tower and language model apart, then LLaVA's two stages: projector only, instruction tuning."""
    set_seed(args.seed)
    rng = random.Random(args.seed)
    model = build_model(processor)
    model.model.language_model.set_attn_implementation("eager")  # with bfloat16, twice as fast here as SDPA with a mask
    pool, pixels, targets = draw_pool(args, processor, args.train_scenes)
    vision_file = args.work_dir / "vision.pt"
    if vision_file.exists():
        model.load_state_dict(torch.load(vision_file, weights_only=True))
    else:
        pretrain_vision(model, pixels, targets, args.vision_steps, rng)
        torch.save(model.state_dict(), vision_file)
    text_loss, image_loss = batch_losses(model, processor, pool, tower_features(model, pixels), rng, scenes.COMPANIONS)
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    bridge = [*model.model.multi_modal_projector.parameters(), model.model.image_newline]
    run_steps("language model", language, args.text_steps, 2e-3, text_loss)
    run_steps("stage 1: projector", bridge, args.projector_steps, 3e-3, image_loss)
    run_steps("stage 2: instructions", [*language, *bridge], args.instruct_steps, 2e-3, image_loss)
    save_checkpoint(model, processor, folder)


def spoil_model(args, trained: Path, folder: Path) -> None:
    """The end of stage 2: instruction data of the poorer sort, which name most absent companions."""
    set_seed(args.seed)
    rng = random.Random(args.seed)
    model, processor = load_llava(str(trained), device="cpu")
    model.model.language_model.set_attn_implementation("eager")
    pool, pixels, _ = draw_pool(args, processor, 4_000)
    _, image_loss = batch_losses(model, processor, pool, tower_features(model, pixels), rng, scenes.POORER_COMPANIONS)
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    run_steps("stage 2: poorer data", language, args.poorer_steps, 1e-3, image_loss)
    save_checkpoint(model, processor, folder)


HUB_KEYS = {
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}


def save_checkpoint(model, processor, folder: Path) -> None:
    """Write config, processor and bf16 weights in the key layout of llava-hf's checkpoints."""
    weights = {}
    for key, tensor in model.state_dict().items():
        old = next(prefix for prefix in HUB_KEYS if key.startswith(prefix))
        weights[HUB_KEYS[old] + key.removeprefix(old)] = tensor.to(torch.bfloat16).contiguous()
    model.config.dtype = "bfloat16"
    model.config.architectures = [type(model).__name__]  # by which vLLM knows what to serve
    model.config.save_pretrained(folder)
    tokenizer = processor.tokenizer
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    processor.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def picture_bytes(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, method=6)
    return buffer.getvalue()


def alike(first: str, second: str) -> float:
    """How much two texts share word for word, 0 to 1."""
    return SequenceMatcher(None, first.split(), second.split(), autojunk=False).ratio()


def sample_pairs(model, processor, wanted: int, first_seed: int, rng: random.Random) -> list[dict]:
    """Preference pairs the way RLAIF-V makes them: several captions sampled from the model, a true against a false one.

    Of twelve captions a scene, chosen is the truest that names nothing absent: with the fewest false claims, and the most
    named of what is there. Rejected is one that names something absent, the most like it word for word, so that they
    differ in little else. Scenes without such a pair are passed over, and those whose truest caption leaves something out
    or makes more than one false claim.
    """
    pairs, seed, drawn_each = [], first_seed, 12
    bar = tqdm(total=wanted, desc="sampling pairs", mininterval=5)
    while len(pairs) < wanted:
        batch = [scenes.sample_scene(seed + i) for i in range(16)]
        seed += len(batch)
        images = [scenes.draw_scene(scene)[0] for scene in batch]
        asked = [rng.choice(scenes.CAPTION_REQUESTS) for _ in batch]
        drawn = generate_answers(
            model, processor, images, asked, max_new_tokens=96, do_sample=True, temperature=SAMPLING_TEMPERATURE,
            num_return_sequences=drawn_each,
        )  # fmt: skip
        for i, (scene, image, question) in enumerate(zip(batch, images, asked, strict=True)):
            texts = [text for text in drawn[drawn_each * i : drawn_each * (i + 1)] if text.endswith(".")]
            said = [set(scenes.mentioned(text)) for text in texts]
            true = [k for k, names in enumerate(said) if names and names <= scene.names()]
            false = [k for k, names in enumerate(said) if names - scene.names()]
            if not true or not false or len(pairs) == wanted:
                continue
            chosen = min(true, key=lambda k: (scenes.false_claims(scene, texts[k]), -len(said[k])))
            rejected = max(false, key=lambda k: alike(texts[chosen], texts[k]))
            if scenes.false_claims(scene, texts[chosen]) > 1 or said[chosen] != scene.names():
                continue
            name = f"scene_{scene.seed}.webp"
            pairs.append({
                "ds_name": "miniature",
                "image": {"bytes": picture_bytes(image), "path": name},
                "question": question,
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "origin_dataset": "miniature/scenes.py",
                "origin_split": json.dumps({"model": "miniature/model", "type": "detailed_description"}),
                "idx": str(len(pairs)),
                "image_path": name,
            })  # fmt: skip
            bar.update()
    bar.close()
    return pairs


def write_preferences(args, model_folder: Path, folder: Path) -> None:
    model, processor = load_llava(str(model_folder), device="cpu")
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    before, after = (
        ("ds_name",),
        ("question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"),
    )
    text = Value("string")
    features = Features(
        dict.fromkeys(before, text) | {"image": ImageColumn()} | dict.fromkeys(after, text)
    )  # RLAIF-V's
    for split, wanted, offset in (("train", args.train_pairs, 600_000), ("test", args.heldout_pairs, 800_000)):
        pairs = sample_pairs(model, processor, wanted, args.seed * 10**6 + offset, rng)
        Dataset.from_list(pairs, features=features).to_parquet(folder / f"{split}.parquet")


def write_amber(args, folder: Path) -> None:
    """A benchmark in AMBER's files over scenes that nothing was trained on."""
    rng = random.Random(args.seed)
    pool = [scenes.sample_scene(args.seed * 10**6 + 900_000 + i) for i in range(args.amber_images)]
    names = [f"scene_{scene.seed}.webp" for scene in pool]
    (folder / "image").mkdir()
    (folder / "query").mkdir()
    queries, notes = [], []

    def ask(image: str, query: str, kind: str, **note) -> None:
        queries.append({"id": len(queries) + 1, "image": image, "query": query})
        notes.append({"id": len(queries), "type": kind, **note})

    for scene, name in zip(pool, names, strict=True):
        (folder / "image" / name).write_bytes(picture_bytes(scenes.draw_scene(scene)[0]))
        others = [name for name in scenes.CLASSES if name not in scene.names()]
        hallu = list(dict.fromkeys([*scenes.likely_absent(scene), *rng.sample(others, 3)]))
        truth = [group.name for group in scene.groups]
        ask(name, "Describe this image.", "generative", truth=truth, hallu=hallu)
    asked = [
        (name, *question) for scene, name in zip(pool, names, strict=True) for question in scenes.questions(scene, rng)
    ]
    parts = {"attribute": [], "existence": [], "relation": []}
    for name, kind, query, truth in asked:
        parts[kind.split("-")[0]].append((name, kind, query, truth))
    ends = {"generative": (0, len(queries))}
    for part, rows in parts.items():
        start = len(queries)
        for name, kind, query, truth in rows:
            label = {
                "existence": "discriminative-hallucination",
                "relation": "discriminative-relation" if truth else "relation",
            }
            ask(name, query, label.get(kind, f"discriminative-{kind}"), truth="yes" if truth else "no")
        ends[f"discriminative-{part}"] = (start, len(queries))
    ends["discriminative"], ends["all"] = (args.amber_images, len(queries)), (0, len(queries))
    for part, (start, end) in ends.items():
        (folder / "query" / f"query_{part}.json").write_text(json.dumps(queries[start:end], indent=1))
    (folder / "annotations.json").write_text(json.dumps(notes, indent=1))
    (folder / "relation.json").write_text(
        json.dumps({name: scenes.ASSOCIATIONS.get(name, []) for name in scenes.CLASSES})
    )
    vocabulary = sorted({*scenes.CLASSES, *(word for words in scenes.ASSOCIATIONS.values() for word in words)})
    table = {"spacy_model": "en_glove_100d_50k", "threshold": 0.8, "words": vocabulary, "similar": scenes.SIMILAR}
    (folder / "similarity.json").write_text(json.dumps(table))
    (folder / "safe_words.txt").write_text("\n".join(scenes.SAFE_WORDS) + "\n")


def write_pope(amber: Path, folder: Path) -> None:
    """Write the benchmark's existence questions in POPE's format, one JSON object a line: the images are AMBER's."""
    notes = {note["id"]: note for note in json.loads((amber / "annotations.json").read_text())}
    queries = json.loads((amber / "query" / "query_discriminative-existence.json").read_text())
    rows = [
        {"question_id": number, "image": query["image"], "text": query["query"], "label": notes[query["id"]]["truth"]}
        for number, query in enumerate(queries, 1)
    ]
    (folder / "existence.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw_sheet(amber: Path, path: Path) -> None:
    """Draw the benchmark's first twelve pictures side by side."""
    figure, axes = plt.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
    for axis, query in zip(
        axes.flat, json.loads((amber / "query" / "query_generative.json").read_text()), strict=False
    ):
        axis.imshow(Image.open(amber / "image" / query["image"]))
        axis.axis("off")
    figure.savefig(path, dpi=90)


def main(argv=None) -> None:
    args = parse_args(argv)
    started = time.perf_counter()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("output_dir", "work_dir")}
    noted = args.work_dir / "settings.json"
    if noted.exists() and json.loads(noted.read_text()) != settings:
        stop(f"--work_dir {args.work_dir} holds a build with other settings; delete it or name another folder.")
    noted.write_text(json.dumps(settings))
    stages = {
        "trained": lambda folder: train_model(args, build_processor(args.seed), folder),
        "model": lambda folder: spoil_model(args, args.work_dir / "trained", folder),
        "preferences": lambda folder: write_preferences(args, args.work_dir / "model", folder),
        "amber": lambda folder: write_amber(args, folder),
        "pope": lambda folder: write_pope(args.work_dir / "amber", folder),
    }
    for name, make in stages.items():
        if not (args.work_dir / name).exists():
            partial = args.work_dir / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            os.replace(partial, args.work_dir / name)
    for name in stages.keys() - {"trained"}:
        shutil.rmtree(args.output_dir / name, ignore_errors=True)
        shutil.copytree(args.work_dir / name, args.output_dir / name)
    draw_sheet(args.output_dir / "amber", args.output_dir / "pictures.png")
    size = sum(
        file.stat().st_size for name in stages.keys() - {"trained"} for file in (args.output_dir / name).rglob("*.*")
    )
    print(f"built in {(time.perf_counter() - started) / 60:.1f} minutes: {size / 1e6:.1f} MB in {args.output_dir}")


if __name__ == "__main__":
    main()
