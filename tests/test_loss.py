"""The loss is ORPO's, and the fast form of the forward is equal to the plain one."""

import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import MINIATURE, ROOT
from PIL import Image

import llava_orpo_training as training

sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_orpo_step

BETA = 0.1
RED, FISH = "The image shows a red ball", "The image shows three purple fish"
PAIRS = [  # (canvas size, question, chosen, rejected): every length differs, so that all paddings occur
    ((112, 112), "Describe this image.", f"{RED}.", f"{RED} and two blue cups."),
    ((160, 64), "What is in this image?", "The image shows a car, a green tree and an orange bus.", "A cup."),
    ((64, 160), "Name it.", f"{FISH}.", f"{FISH} and a yellow boat."),
]


@pytest.fixture(scope="module")
def llava():
    return training.load_llava(str(MINIATURE / "model"), device="cpu")


def encode(processor, pair, seed=0) -> dict:
    size, question, chosen, rejected = pair
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    pairs = training.PreferencePairs(None, [], None, processor, 512, None)
    return pairs.encode(Image.fromarray(noise), question, chosen, rejected)


def make_trainer(prefix_sharing: bool) -> training.LlavaORPOTrainer:
    """The trainer's loss without a data set around it, in the script's form or in the plain one of two rows a pair."""
    trainer = bench_orpo_step.make_trainer("shared" if prefix_sharing else "plain", "cpu")
    trainer.padding_value, trainer.accelerator.gather_for_metrics = 513, lambda tensor: tensor
    return trainer


def with_adapter(model, **overrides):
    args = training.parse_args([])
    vars(args).update(overrides)
    torch.manual_seed(1)
    adapted = training.add_adapter(model, args)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    return adapted


def loss_and_gradients(trainer, model, batch) -> tuple[float, dict, dict]:
    model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(model, batch)
    loss.backward()
    return loss.item(), metrics, {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}


@torch.no_grad()
def orpo_by_hand(model, processor, features: dict) -> float:
    """One pair's loss in float64 from two separate forwards: Hong et al. 2024, Eq. 3 to 7, written out."""
    mean_logps = []
    for name in ("chosen", "rejected"):
        ids = torch.tensor([features["prompt"] + features[name]])
        pictures = {key: features[key][None] for key in ("pixel_values", "image_sizes")}
        logits = model(input_ids=ids, **pictures).logits[0].double().numpy()
        start, logps = len(features["prompt"]), []
        for i, token in enumerate(features[name]):
            row = logits[start + i - 1]
            logps.append(row[token] - row.max() - math.log(np.exp(row - row.max()).sum()))
        mean_logps.append(sum(logps) / len(logps))
    odds = [math.exp(logp) / (1 - math.exp(logp)) for logp in mean_logps]
    return -mean_logps[0] - BETA * math.log(1 / (1 + odds[1] / odds[0]))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_a_pairs_loss_is_orpos(llava, pair, prefix_sharing):
    model, processor = llava
    features = encode(processor, pair)
    batch = training.collate_pairs([features], processor.tokenizer.pad_token_id)
    loss, _ = make_trainer(prefix_sharing).get_batch_loss_metrics(model, batch)
    assert loss.item() == pytest.approx(orpo_by_hand(model, processor, features), abs=2e-5)


def test_rejected_cannot_see_chosen(llava):
    model, processor = llava
    trainer = make_trainer(True)
    size, question, chosen, rejected = PAIRS[0]
    logps = []
    for other in (chosen, "Something else altogether, and longer than what stood here before it was changed."):
        features = encode(processor, (size, question, other, rejected))
        logps.append(trainer.concatenated_forward(model, training.collate_pairs([features], 513))[1].item())
    assert logps[0] == pytest.approx(logps[1], abs=1e-5)


def test_a_batch_is_the_mean_of_its_pairs(llava):
    """So that the loss does not depend on how pairs fall into batches, accumulation steps and processes."""
    model, processor = llava
    features = [encode(processor, pair) for pair in PAIRS]
    collate = partial(training.collate_pairs, pad_token_id=513)
    whole = make_trainer(True).get_batch_loss_metrics(model, collate(features))[0].item()
    single = [make_trainer(True).get_batch_loss_metrics(model, collate([one]))[0].item() for one in features]
    assert whole == pytest.approx(np.mean(single), abs=1e-5)


def test_the_picture_matters(llava):
    model, processor = llava
    trainer = make_trainer(True)
    batches = [training.collate_pairs([encode(processor, PAIRS[0], seed)], 513) for seed in (0, 1)]
    first, second = (trainer.concatenated_forward(model, batch)[0].item() for batch in batches)
    assert abs(first - second) > 1e-3


def test_the_loss_is_trls_on_a_text_only_pair(llava):
    """TRL's trainer runs its own tokenization, forward and loss on a pair without a picture; ours gets the same ids.

    TRL's NLL covers the prompt too; a prompt of one token has no target in it, so there the two must agree in full.
    """
    from trl.experimental.orpo import ORPOTrainer

    model, processor = llava
    tokenizer = processor.tokenizer
    chosen, rejected = (tokenizer(text, add_special_tokens=False).input_ids + [2] for text in PAIRS[0][2:])
    rows = {}
    for name, ids in (("chosen", chosen), ("rejected", rejected)):
        row = {"input_ids": [1, *ids], "attention_mask": [1] * (len(ids) + 1), "labels": [-100, *ids]}
        rows |= {f"{name}_{key}": torch.tensor([value]) for key, value in row.items()}
    theirs = ORPOTrainer.__new__(ORPOTrainer)
    vars(theirs).update(vars(make_trainer(True)), is_encoder_decoder=False)
    expected, expected_metrics = ORPOTrainer.get_batch_loss_metrics(theirs, model, rows)
    ours = make_trainer(True)
    batch = {"prompt_input_ids": torch.tensor([[1]]), "prompt_attention_mask": torch.tensor([[1]]),
             "chosen_labels": torch.tensor([chosen]), "rejected_labels": torch.tensor([rejected]),
             "pixel_values": None, "image_sizes": None}  # fmt: skip
    loss, metrics = ours.get_batch_loss_metrics(model, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name in "rewards/chosen rewards/accuracies logps/rejected nll_loss log_odds_ratio log_odds_chosen".split():
        assert metrics[name] == pytest.approx(expected_metrics[name], abs=1e-5), name
