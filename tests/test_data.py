"""Rows become tokens as they should, and rows that cannot are left out, counted and listed."""

import io
import json
import re
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import MINIATURE, ROOT
from PIL import Image

import llava_orpo_training as training


@pytest.fixture(scope="module")
def processor():
    return training.load_llava(str(MINIATURE / "model"), device="cpu")[1]


def picture(size=(120, 90), seed=0, kind="PNG", mode="RGB") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def row(**changes) -> dict:
    chosen = "The image shows a red ball."
    texts = {"question": "Describe this image.", "chosen": chosen, "rejected": f"{chosen[:-1]} and a blue cup."}
    return {"image": {"bytes": picture(), "path": "a.png"}, **texts, **changes}


def split_pairs(source, folder, processor, *flags: str):
    """The pairs to train on and those held out, of a file or of rows that are written into one."""
    if isinstance(source, list):
        rows, source = source, folder / "pairs.parquet"
        datasets.Dataset.from_list(rows).to_parquet(source)
    flags = ["--dataset", str(source), "--output_dir", str(folder), "--max_length", "300", *flags]
    return training.make_pairs(training.parse_args(flags), training.load_rows(str(source)), processor)


def make_pairs(rows, folder, processor, *flags: str):
    return split_pairs(rows, folder, processor, "--eval_fraction", "0", *flags)[0]


def stopped(capsys, function, *inputs) -> str:
    """The one sentence with which a call ends, after lines that say how far it came."""
    with pytest.raises(SystemExit, match="2"):
        function(*inputs)
    error = capsys.readouterr().err
    assert "Traceback" not in error and error.count("error: ") == 1
    return " ".join(error[error.index("error: ") :].split())


def dropped(folder) -> list[dict]:
    return training.read_jsonl(folder / "dropped_rows.jsonl")


LONG = "The image shows a red ball. " * 40
BAD_ROWS = {
    "question is empty": {"question": "  "},
    "chosen is empty": {"chosen": ""},
    "rejected is empty": {"rejected": None},
    "chosen equals rejected": {"rejected": "The image shows a red ball. "},
    "image does not open": {"image": {"bytes": b"this is no picture", "path": None}},
    "image does not open ": {"image": {"bytes": None, "path": "gone.png"}},
    "prompt does not fit --max_length": {"question": "Describe this image, every part of it. " * 60},
    "chosen equals rejected once cut": {"chosen": f"{LONG} A cup.", "rejected": f"{LONG} A bus."},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_is_left_out_and_listed_and_max_samples_are_the_first_good_ones(reason, tmp_path, processor, capsys):
    rows = [row(), row(**BAD_ROWS[reason]), row(), row()]
    assert make_pairs(rows, tmp_path, processor, "--max_samples", "2").indices == [0, 2]
    assert dropped(tmp_path) == [{"split": "train", "row": 1, "reason": reason.strip()}]
    assert f"1 x {reason.strip()}" in " ".join(capsys.readouterr().err.split())


BROKEN = {"bytes": picture((400, 300), seed=3, kind="JPEG")[:-9000], "path": None}


def test_a_picture_that_breaks_off_is_replaced_and_listed(tmp_path, processor):
    pairs = make_pairs([row(image=BROKEN), row()], tmp_path, processor)
    assert pairs[0]["prompt"] == pairs[1]["prompt"]
    assert dropped(tmp_path) == [{"split": "train", "row": 0, "reason": "image breaks off when decoded"}]


def test_truncation_shortens_a_response_and_never_the_prompt(tmp_path, processor):
    features = make_pairs([row(chosen=LONG)], tmp_path, processor)[0]
    prompt = training.build_prompt(processor, "Describe this image.", (120, 90))
    assert features["prompt"] == prompt
    assert len(prompt) + len(features["chosen"]) == 300
    assert features["chosen"][-1] != processor.tokenizer.eos_token_id
    assert features["rejected"][-1] == processor.tokenizer.eos_token_id


def test_every_kind_of_picture_can_be_used(tmp_path, processor):
    rows = [row(image={"bytes": picture(mode=mode), "path": None}) for mode in ("L", "RGBA", "P", "1", "I;16")]
    kinds = {"JPEG": "CMYK", "WEBP": "RGB", "GIF": "P", "BMP": "RGB", "TIFF": "RGB"}
    for seed, (kind, mode) in enumerate(kinds.items()):  # large ones too: their headers are read from a part of them
        rows += [row(image={"bytes": picture((w, 90), seed, kind, mode), "path": None}) for w in (100, 900)]
    pairs = make_pairs(rows, tmp_path, processor)
    assert dropped(tmp_path) == []
    assert [pairs[i]["pixel_values"].shape[1:] for i in range(len(rows))] == [(3, 56, 56)] * 15


def test_a_turned_picture_has_as_many_tokens_as_features(tmp_path, processor):
    image = Image.open(io.BytesIO(picture((160, 64))))
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert training.inspect_picture(pa.py_buffer(buffer.getvalue()))[0] == (64, 160)
    features = make_pairs([row(image={"bytes": buffer.getvalue(), "path": None})], tmp_path, processor)[0]
    assert features["image_sizes"].tolist() == [160, 64]
    assert features["prompt"] == training.build_prompt(processor, "Describe this image.", (64, 160))


@pytest.mark.parametrize("column", ["image", "question", "chosen", "rejected"])
def test_a_column_that_is_missing_or_no_text_or_empty_is_one_sentence(column, tmp_path, processor, capsys):
    if column != "image":
        error = stopped(capsys, make_pairs, [row(**{column: ""})], tmp_path, processor)
        assert f"has no usable pair (1 x {column} is empty)" in error
    for value in ([], [[{"role": "assistant", "content": "A ball."}]] if column != "image" else []):
        rows = [{name: one for name, one in row().items() if name != column} | ({column: value} if value else {})]
        assert f"needs a column {column}" in stopped(capsys, make_pairs, rows, tmp_path, processor)


@pytest.mark.slow
def test_pictures_that_all_break_off_are_one_sentence(tmp_path):
    datasets.Dataset.from_list([row(image=BROKEN)]).to_parquet(tmp_path / "broken.parquet")
    command = [sys.executable, str(ROOT / "llava_orpo_training.py"), "--model_path", str(MINIATURE / "model"), "--dataset",
               str(tmp_path / "broken.parquet"), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200)
    last = ended.stderr.splitlines()[-1]
    assert ended.returncode == 2 and re.match("error: no row of the train pairs can be used; see .*dropped_rows", last)


LINE = '{"image": %s, "question": "q", "chosen": "a", "rejected": "b"}'
BAD_SOURCES = {"missing.parquet": None, "notes.txt": "hello", "broken.parquet": "hello", "empty.jsonl": "",
               "list.jsonl": LINE % '["a.png"]', "number.jsonl": LINE % "3"}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_a_source_that_cannot_be_read_is_one_sentence(name, tmp_path, capsys):
    if BAD_SOURCES[name] is not None:
        (tmp_path / name).write_text(BAD_SOURCES[name])
    assert stopped(capsys, training.load_rows, str(tmp_path / name)).startswith("error: --dataset")


def test_a_set_without_a_train_split_is_one_sentence(tmp_path, capsys):
    datasets.Dataset.from_list([row()]).to_parquet(tmp_path / "test.parquet")
    assert "has no train split (found: test)" in stopped(capsys, training.load_rows, str(tmp_path))


@pytest.mark.parametrize("wrong", ["--eval_fraction 1", "--batch_size 0", "--learning_rate -1", "--beta nan"])
def test_a_value_out_of_range_is_one_sentence(wrong, capsys):
    flag, value = wrong.split()
    with pytest.raises(SystemExit, match="2"):
        training.parse_args([flag, value])
    error = capsys.readouterr().err
    assert f"error: argument {flag}: {value} is not" in error and error.count("\n") == 2


def test_jsonl_with_pictures_beside_it(tmp_path, processor):
    (tmp_path / "a.png").write_bytes(picture())
    line = row(image="a.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({**line, "chosen": ""}) + "\n")
    pairs = make_pairs(tmp_path / "pairs.jsonl", tmp_path, processor)
    assert pairs.indices == [0] and pairs[0]["image_sizes"].tolist() == [90, 120]


@pytest.mark.parametrize("form", ["bytes", "empty image_path", "other paths"])
def test_no_held_out_picture_is_trained_on_and_the_seed_decides(form, tmp_path, processor):
    """20 pictures with 5 questions each, whatever the columns say of them."""
    rows = []
    for i in range(100):
        image = {"bytes": picture(seed=i % 20), "path": f"{i}.png"}
        if form == "other paths":
            (tmp_path / f"{i}.png").write_bytes(image["bytes"])
            image = str(tmp_path / f"{i}.png")
        rows.append(row(image=image, question=f"Question {i}?") | ({"image_path": ""} if "empty" in form else {}))
    source = rows
    if form == "other paths":
        source = tmp_path / "pairs.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    splits = [split_pairs(source, tmp_path, processor, "--seed", seed) for seed in "112"]
    for train, held_out in splits:
        assert (len(train), len(held_out)) == (90, 10)
        assert not {i % 20 for i in train.indices} & {i % 20 for i in held_out.indices}
    assert splits[0][1].indices == splits[1][1].indices != splits[2][1].indices


def test_llavas_marker_of_the_picture_is_left_out(tmp_path, processor, capsys):
    questions = ["Is <image> here?", "<image>\nDescribe this image.", "Describe this image.\n<image>"]
    pairs = make_pairs([row(question=question) for question in questions], tmp_path, processor)
    plain = training.build_prompt(processor, "Describe this image.", (120, 90))
    assert pairs[0]["prompt"] != plain and pairs[1]["prompt"] == pairs[2]["prompt"] == plain
    assert pairs.read_row(1)["question"] == "Describe this image."
    assert "2 questions have <image> on a line of its own" in " ".join(capsys.readouterr().err.split())


def test_a_very_thin_picture_is_shown():
    assert training.embed_picture(Image.new("RGB", (3, 3000))).startswith("data:image/png;base64,")


def test_special_tokens_in_texts_are_plain_text(tmp_path, processor):
    text = "Is <image> </s> [INST] <pad> here?"
    rows = [row(question=text, chosen="No <image> </s>.", rejected="Yes <s> <pad>.")]
    features = make_pairs(rows, tmp_path, processor)[0]
    tokenizer = processor.tokenizer
    plain = training.build_prompt(processor, "", (120, 90)).count(processor.image_token_id)
    assert features["prompt"].count(processor.image_token_id) == plain
    assert features["prompt"].count(tokenizer.bos_token_id) == 1 and tokenizer.eos_token_id not in features["prompt"]
    for name in ("chosen", "rejected"):
        assert features[name].count(tokenizer.eos_token_id) == 1 and features[name][-1] == tokenizer.eos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.pad_token_id, processor.image_token_id} & set(features[name])
    assert text in tokenizer.decode(features["prompt"])


def test_the_prompt_is_the_original_codes(photo_llava):
    """Ids of "[INST] <image>\\nWhat is it? [/INST] A cat.</s>" with Mistral's tokenizer, as LLaVA's own code makes them."""
    processor = training.load_llava(str(photo_llava), device="cpu")[1]
    prompt = training.build_prompt(processor, "What is it?", (640, 480))
    assert prompt[:6] == [1, 733, 16289, 28793, 28705, 32000]
    assert prompt.count(32000) == 2340
    assert prompt[2345:] == [28705, 13, 3195, 349, 378, 28804, 733, 28748, 16289, 28793]
    image = Image.new("RGB", (640, 480))
    pairs = training.PreferencePairs(None, [], None, processor, 4096, None)
    assert pairs.encode(image, "What is it?", "A cat.", "A dog.")["chosen"] == [330, 5255, 28723, 2]


def test_collating_pads_prompts_left_and_responses_right(tmp_path, processor):
    rows = [row(), row(image={"bytes": picture((160, 64)), "path": None}, question="And this?", chosen="A cup.")]
    pairs = make_pairs(rows, tmp_path, processor)
    features = [pairs[0], pairs[1]]
    batch = training.collate_pairs(features, processor.tokenizer.pad_token_id)
    for i, one in enumerate(features):
        real = batch["prompt_attention_mask"][i].bool()
        assert batch["prompt_input_ids"][i][real].tolist() == one["prompt"] and real[-1]
        for name in ("chosen", "rejected"):
            labels = batch[f"{name}_labels"][i].tolist()
            assert labels == one[name] + [-100] * (len(labels) - len(one[name]))
    assert batch["pixel_values"].shape == (2, 5, 3, 56, 56)
