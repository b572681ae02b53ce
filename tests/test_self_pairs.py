"""Pairs of the model's own answers: --write_pairs, by an independent computation, and training on them."""

import io
import json
import math
import sys
from itertools import permutations

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from conftest import MINIATURE, ROOT
from PIL import Image
from safetensors.torch import load_file

import llava_amber_validation_benchmark_with_lora as amber
import llava_orpo_training as training
from miniature import scenes

QUESTIONS = ["Describe this image.", "What is in this image?"]
COLUMNS = {"ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of nine pictures, one of them in a folder of its own, a file that is none, and questions beside it."""
    folder = tmp_path_factory.mktemp("self") / "photos"
    (folder / "more").mkdir(parents=True)
    for seed in range(9):
        name = f"more/{seed}.webp" if seed == 4 else f"{seed}.png"
        scenes.draw_scene(scenes.sample_scene(7_000_000 + seed))[0].save(folder / name, lossless=True)
    (folder / "notes.txt").write_text("no picture")
    (folder.parent / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    return folder


def write(photos, path, *flags) -> list[dict]:
    settings = "--test_mode --nouns vocabulary --max_new_tokens 96 --verify 5 --batch_size 4"
    settings += f" --image_dir {photos} --questions {photos.parent / 'questions.txt'} --write_pairs {path}"
    amber.main([*settings.split(), *flags])
    return parquet.read_table(path).to_pylist()


@pytest.fixture(scope="module")
def made(photos):
    path = photos.parent / "out" / "pairs.parquet"
    return path, write(photos, path)


def test_pairs_have_the_columns_of_rlaif_v_and_the_pictures_inside(photos, made):
    path, rows = made
    names = [*(f"{seed}.png" for seed in (0, 1, 2, 3, 5, 6, 7, 8)), "more/4.webp"]
    assert 4 <= len(rows) <= 9 and set(rows[0]) == COLUMNS | {"checks"}
    for row in rows:
        assert row["image"]["bytes"] == (photos / row["image_path"]).read_bytes()
        assert row["question"] == QUESTIONS[names.index(row["image_path"]) % 2]
        assert row["idx"] == str(names.index(row["image_path"])) and row["chosen"] != row["rejected"]
    page = path.with_suffix(".html").read_text()
    assert page.count("<section>") == len(rows) and page.count("chosen:") == len(rows) and "<mark>" in page


def test_best_and_worst_are_those_of_an_independent_computation(made):
    """One picture at a time, a forward pass for every question, and sums written out anew."""
    model, processor = training.load_llava(str(MINIATURE / "model"), device="cpu")
    yes, no = (processor.tokenizer(word, add_special_tokens=False).input_ids[-1] for word in ("Yes", "No"))
    for row in made[1][:4]:
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        pixels = processor.image_processor([image], return_tensors="pt")
        drawn = amber.answer_questions(model, processor, [image], pixels, [[row["question"]] * 5], 96, 0.9)
        texts = [text for _, text in sorted((place, text) for _, place, text, complete in drawn if complete)]
        named = [scenes.mentioned(text) for text in texts]
        belief = {}
        for word in {word for part in named for word in part}:
            question = f"Is there {'an' if word[0] in 'aeiou' else 'a'} {word} in this image?"
            ids = torch.tensor([training.build_prompt(processor, question, image.size)])
            with torch.no_grad():
                logits = model(input_ids=ids, **pixels).logits[0, -1]
            asked = (logits[yes] - logits[no]).item()
            share = (sum(word in part for part in named) + 0.5) / (len(texts) + 1)
            belief[word] = 1 / (1 + math.exp(-asked) * (1 - share) / share)
            found = json.loads(row["checks"])["objects"][word]
            assert found["named_by"] == sum(word in part for part in named)
            assert found["yes"] == pytest.approx(1 / (1 + math.exp(-asked)), abs=1e-3)
            assert found["belief"] == pytest.approx(belief[word], abs=1e-3)
        worth = [sum(3 * belief[word] - 2 for word in set(part)) for part in named]
        gain, best, worst = max(
            (worth[i] - worth[j] - 0.15 * abs(len(named[i]) - len(named[j])), i, j)
            for i, j in permutations(range(len(texts)), 2)
        )
        assert (row["chosen"], row["rejected"]) == (texts[best], texts[worst])
        assert worth[best] - worth[worst] >= 1


def test_of_two_pairs_the_one_whose_answers_are_equally_long_is_taken():
    find = amber.find_nouns("vocabulary", {"cup", "car", "bus", "tree"})
    texts = ["a cup", "a cup, a cup and a cup", "a car, a car and a car", "a cup"]
    settings = {"find": find, "denied_costs": 2.0}
    pair, _ = amber.make_pair(None, [[text, True] for text in texts], {"cup": 0.99, "car": 0.01}, **settings)
    assert (pair["chosen"], pair["rejected"]) == (texts[1], texts[2])
    assert pair["doubted"] == {"chosen": [], "rejected": ["car"] * 3} and pair["objects"]["cup"]["named_by"] == 3
    for texts in (["a cup", "a cup and a cup"], ["a cup"], []):  # nothing differs
        assert amber.make_pair(None, [[text, True] for text in texts], {"cup": 0.99}, **settings) == (None, True)


@pytest.mark.parametrize(("costs", "chosen"), [(0.5, "a cup, a tree and a bus"), (2.0, "a cup")])
def test_the_higher_the_costs_the_less_is_risked(costs, chosen):
    find = amber.find_nouns("vocabulary", {"cup", "bus", "tree"})
    answers = [[text, True] for text in ("a cup", "a cup, a tree and a bus", "a bus")]
    confirmed = {"cup": 0.999, "tree": 0.999, "bus": 0.001}
    pair, _ = amber.make_pair(None, answers, confirmed, find=find, denied_costs=costs)
    assert (pair["chosen"], pair["rejected"]) == (chosen, "a bus")


def test_a_run_goes_on_where_it_was_broken_off_and_lists_broken_pictures(photos, made, tmp_path, capsys):
    path = tmp_path / "pairs.parquet"
    assert len(write(photos, path, "--limit", "3")) < len(made[1])
    journal = path.with_name("pairs.parquet.journal-0.jsonl")
    journal.write_text(journal.read_text()[:-30])  # its last line was cut short
    assert write(photos, path) == made[1]
    for flags, message in (
        (["--verify", "6"], "verify was 5, is 6"),
        (["--denied_costs", "4"], "denied_costs was 2.0, is 4.0"),
    ):
        with pytest.raises(SystemExit):
            write(photos, path, *flags)
        assert message in capsys.readouterr().err
    (photos.parent / "broken").mkdir()
    (photos.parent / "broken" / "a.png").write_bytes(b"no picture")
    (photos.parent / "broken" / "b.png").write_bytes((photos / "0.png").read_bytes())
    with pytest.raises(SystemExit) as ended:
        write(photos.parent / "broken", tmp_path / "other.parquet")
    assert ended.value.code == 3
    assert [row["image"] for row in json.loads((tmp_path / "other_failures.json").read_text())] == ["a.png"]
    assert parquet.read_table(tmp_path / "other.parquet").num_rows <= 1


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_with_the_pairs(made, tmp_path):
    flags = f"--test_mode --dataset {made[0]} --lora_path {MINIATURE / 'adapter'} --output_dir {tmp_path / 'round2'}"
    flags += " --batch_size 2 --gradient_accumulation_steps 1 --eval_fraction 0 --num_workers 0 --report_to none"
    training.main(flags.split())
    folders = (MINIATURE / "adapter", tmp_path / "round2")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert before.keys() == after.keys() and 0 < max(moved) < 0.1  # it moved from there, and not far
    assert not (tmp_path / "round2" / "dropped_rows.jsonl").read_text()


def test_the_benchmark_counts_the_errors_of_the_check_by_what_was_drawn(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_self_alignment

    there = sorted(scenes.sample_scene(7_000_000).names())
    absent = sorted(set(scenes.CLASSES) - set(there))
    belief = {there[0]: 0.9, there[1]: 0.2, absent[0]: 0.7, absent[1]: 0.1, absent[2]: 0.4}
    checks = json.dumps({"objects": {word: {"belief": chance} for word, chance in belief.items()}})
    parquet.write_table(pa.table({"image_path": ["7000000.png"], "checks": [checks]}), tmp_path / "pairs.parquet")
    found = bench_self_alignment.judge_pairs(tmp_path / "pairs.parquet")
    assert found == {"pairs": 1, "check_wrong": 40, "check_precision": 50, "check_recall": 50}
