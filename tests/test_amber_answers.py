"""Answering AMBER: equal to one question at a time, whatever happens to the process, the pictures or the settings."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import MINIATURE, ROOT, SHARED
from PIL import Image
from transformers import AutoProcessor

import llava_amber_validation_benchmark_with_lora as amber
from llava_orpo_training import generate_answers

SCRIPT = ROOT / "llava_amber_validation_benchmark_with_lora.py"
MINI = ["--test_mode", "--nouns", "vocabulary"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def read(path):
    return json.loads(path.read_text())


def mini_queries(limit: int) -> list[dict]:
    queries = read(MINIATURE / "amber" / "query" / "query_all.json")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[:limit])
    return [query for query in queries if query["image"] in images]


@pytest.fixture(scope="module")
def llava():
    return amber.load_llava(str(MINIATURE / "model"), device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, llava):
    """An adapter of random weights, strong enough that answers differ."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = amber.load_llava(str(MINIATURE / "model"), device="cpu")[0]
    target = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=target, init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The first 60 pictures, answered in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    amber.main([*MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(folder / "results.json")])
    return folder / "results.json"


def copy_benchmark(folder, pictures: int):
    """A benchmark of the miniature's first pictures that a test may damage; returns the script's flags for it."""
    shutil.copytree(MINIATURE / "amber", folder)
    (folder / "query" / "query_all.json").write_text(json.dumps(mini_queries(pictures)))
    return ["--query_file", str(folder / "query" / "query_all.json"), "--image_dir", str(folder / "image"), "--similarity_table",
            str(folder / "similarity.json"), "--model_path", str(MINIATURE / "model"), "--nouns", "vocabulary"]  # fmt: skip


# ---------------------------------------------------------------------------- equality


def test_shared_prefill_equals_one_question_at_a_time(llava, unbroken):
    model, processor = llava
    answers = {row["id"]: row["response"] for row in read(unbroken)}
    queries = mini_queries(60)
    assert list(answers) == [query["id"] for query in queries] and len(queries) > 500
    for query in queries:
        image = amber.load_image(MINIATURE / "amber" / "image" / query["image"])
        assert generate_answers(model, processor, [image], [query["query"]], 1024) == [answers[query["id"]]]


@pytest.mark.parametrize("max_new_tokens", [1, 24])
def test_equal_at_llavas_own_geometry(photo_llava, max_new_tokens):
    """Pictures of five shapes, from one question to four, answers that never end by themselves."""
    model, processor = amber.load_llava(str(photo_llava), device="cpu")
    rng = random.Random(0)
    sizes = [(640, 480), (480, 640), (400, 400), (900, 200), (40, 30)]
    images = [Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in sizes]
    asked = [
        "Describe this image.",
        "Is there a cup?",
        "Are there two very long benches in this image?",
        "</s> <image> What?",
    ]
    questions = [asked, asked[:1], asked[1:3], asked[2:], asked]
    pixels = processor.image_processor(images, return_tensors="pt")
    found = list(amber.answer_questions(model, processor, images, pixels, questions, max_new_tokens))
    assert {(picture, question) for picture, question, _, _ in found} == {(i, j) for i, part in enumerate(questions) for j in range(len(part))}  # fmt: skip
    for picture, question, text, complete in found:
        expected = generate_answers(model, processor, [images[picture]], [questions[picture][question]], max_new_tokens)
        assert [text] == expected and not complete
    assert len({text for *_, text, _ in found}) > 3 or max_new_tokens == 1


def test_answers_depend_on_the_picture_and_come_whole(unbroken):
    captions = {row["response"] for row in read(unbroken)[:60]}
    assert len(captions) > 40 and all(text.startswith("The image shows") and text.endswith(".") for text in captions)


def test_adapter_off_is_the_base_and_on_is_not(tmp_path, adapter, unbroken, llava):
    flags = [*MINI, "--limit", "12", "--lora_path", str(adapter), "--compare_base", "--output_file"]
    amber.main([*flags, str(tmp_path / "results.json")])
    base = {row["id"]: row["response"] for row in read(unbroken)}
    off, on = read(tmp_path / "results_base.json"), read(tmp_path / "results.json")
    assert off == [{"id": row["id"], "response": base[row["id"]]} for row in off] and len(off) == len(mini_queries(12))
    assert sum(a != b for a, b in zip(off, on, strict=True)) > 12
    model, processor = amber.load_llava(str(MINIATURE / "model"), str(adapter), device="cpu")
    for query, row in list(zip(mini_queries(12), on, strict=True))[::9]:
        image = amber.load_image(MINIATURE / "amber" / "image" / query["image"])
        assert generate_answers(model, processor, [image], [query["query"]], 1024) == [row["response"]]
    comparison = read(tmp_path / "scores.json")["comparison"]
    assert comparison["labels"] == ["base", "adapter"]
    assert comparison["base"]["strict"] != comparison["this"]["strict"]


def test_four_bits(tmp_path):
    amber.main(
        [*MINI, "--limit", "4", "--load_4bit", "--skip_evaluation", "--output_file", str(tmp_path / "results.json")]
    )
    assert all(row["response"] for row in read(tmp_path / "results.json"))


def test_two_processes_give_the_answers_of_one(tmp_path, unbroken):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631"]
    flags = [*MINI, "--limit", "60", "--output_file", str(tmp_path / "results.json")]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()
    shares = [len(path.read_text().splitlines()) - 1 for path in sorted(tmp_path.glob("*.journal-*.jsonl"))]
    assert len(shares) == 2 and min(shares) > 150 and sum(shares) == len(read(unbroken))
    assert done.stderr.count("AMBER:") == 1 and read(tmp_path / "scores.json")["answers"]["generative"] == 60


# ---------------------------------------------------------------------------- kill and resume


def test_ten_kills_lose_nothing(tmp_path, unbroken):
    output = tmp_path / "results.json"
    journal = tmp_path / "results.json.journal-0.jsonl"
    command = [sys.executable, str(SCRIPT), *MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(output)]
    total, rng = len(read(unbroken)), random.Random(0)
    stops = sorted(rng.sample(range(2, total - 5), 10))
    for stop in stops:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        lines = 0
        while lines < stop and process.poll() is None:
            lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
        if stop == stops[4]:  # what a machine that loses its power leaves: half a line
            journal.write_bytes(journal.read_bytes()[:-7])
        if lines > 1 and stop != stops[4]:  # an answer that was shown is in the file at once
            assert len(journal.read_text().splitlines()) >= stop
    before = journal.read_text().splitlines()[1:-1]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and output.read_bytes() == unbroken.read_bytes()
    assert journal.read_text().splitlines()[1 : len(before) + 1] == before and len(before) > total / 3


def test_a_finished_run_does_not_load_the_model_again(tmp_path, unbroken, monkeypatch):
    for path in unbroken.parent.iterdir():
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(amber, "load_llava", lambda *_: pytest.fail("there is nothing to answer"))
    amber.main([*MINI, "--limit", "60", "--output_file", str(tmp_path / "results.json")])
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()


def test_more_pictures_go_on_from_fewer(tmp_path, unbroken):
    flags = [*MINI, "--skip_evaluation", "--output_file", str(tmp_path / "results.json"), "--limit"]
    amber.main([*flags, "16"])
    first = (tmp_path / "results.json.journal-0.jsonl").read_text()
    amber.main([*flags, "60"])
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()
    assert (tmp_path / "results.json.journal-0.jsonl").read_text().startswith(first)


def test_a_smaller_run_loses_nothing(tmp_path, unbroken):
    for path in unbroken.parent.iterdir():
        shutil.copy(path, tmp_path)
    for flags in (["--limit", "2"], ["--limit", "60", "--evaluation_type", "g"]):
        amber.main([*MINI, "--skip_evaluation", *flags, "--output_file", str(tmp_path / "results.json")])
        assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()


def test_two_runs_on_one_file_are_refused(tmp_path, capsys):
    from filelock import FileLock

    with FileLock(tmp_path / ".results.json.lock"), pytest.raises(SystemExit) as stopped:
        amber.main([*MINI, "--limit", "2", "--output_file", str(tmp_path / "results.json")])
    assert stopped.value.code == 2 and "another run is writing" in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_a_name_with_brackets(tmp_path):
    flags = [*MINI, "--limit", "2", "--output_file", str(tmp_path / "a[1]" / "[red]res*.json")]
    amber.main(flags)
    first = (tmp_path / "a[1]" / "[red]res*.json").read_bytes()
    amber.main(flags)
    assert (
        len(json.loads(first)) == len(mini_queries(2)) and (tmp_path / "a[1]" / "[red]res*.json").read_bytes() == first
    )


def test_what_scoring_lacks_shows_before_anything_is_answered(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(amber, "answer_benchmark", lambda *_: pytest.fail("hours were spent first"))
    for flags in (
        ["--baseline_file", "nowhere.json"],
        ["--relation_file", "nowhere.json"],
        ["--spacy_model", "xx_not_there"],
    ):
        with pytest.raises(SystemExit) as stopped:
            amber.main([*MINI, *flags, "--output_file", str(tmp_path / "results.json")])
        assert stopped.value.code == 2 and flags[1] in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    command = [sys.executable, str(SCRIPT), *MINI, "--limit", "1", "--output_file", "/proc/nowhere/results.json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change", ["adapter", "max_new_tokens", "model", "queries", "prompt", "precision", "processor", "backend", "verify"]
)
def test_other_settings_are_refused(change, tmp_path, adapter, capsys, monkeypatch):
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 2), "--skip_evaluation", "--output_file", str(tmp_path / "results.json")]
    amber.main(flags)
    before = (tmp_path / "results.json").read_bytes()
    if change == "adapter":
        flags += ["--lora_path", str(adapter)]
    elif change == "max_new_tokens":
        flags += ["--max_new_tokens", "7"]
    elif change == "precision":
        flags += ["--load_8bit"]
    elif change == "queries":
        queries = mini_queries(2)
        queries[0]["query"] = "What is this?"
        (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    elif change == "verify":
        flags += ["--verify", "3"]
    elif change == "backend":
        flags += ["--backend", "vllm"]
    elif change == "processor":
        shutil.copytree(MINIATURE / "model", tmp_path / "model")
        file = tmp_path / "model" / "processor_config.json"
        file.write_text(file.read_text().replace("0.48145466", "0.5"))
        flags[flags.index("--model_path") + 1] = str(tmp_path / "model")
        change = "model"
    elif change == "prompt":
        original = amber.build_prompt
        monkeypatch.setattr(amber, "build_prompt", lambda *a: original(*a)[1:])
    else:  # one weight's last bit
        shutil.copytree(MINIATURE / "model", tmp_path / "model")
        content = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (tmp_path / "model" / "model.safetensors").write_bytes(content)
        flags[flags.index("--model_path") + 1] = str(tmp_path / "model")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2 and error.startswith("error: ") and f"{change} was" in error and error.count("\n") == 1
    )
    assert (tmp_path / "results.json").read_bytes() == before


def test_answers_from_elsewhere_are_not_written_over(tmp_path, capsys):
    (tmp_path / "results.json").write_text('[{"id": 1, "response": "mine"}]')
    with pytest.raises(SystemExit) as stopped:
        amber.main([*MINI, "--limit", "2", "--output_file", str(tmp_path / "results.json")])
    assert stopped.value.code == 2 and "--skip_inference" in capsys.readouterr().err
    assert "mine" in (tmp_path / "results.json").read_text()


def test_a_damaged_line_loses_one_answer(tmp_path, unbroken):
    """A byte that is not UTF-8 in the middle of the journal: its answer is given again, and all others are kept."""
    for path in unbroken.parent.iterdir():
        shutil.copy(path, tmp_path)
    journal = tmp_path / "results.json.journal-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:100], lines[100].replace(b"response", b"resp\xffnse"), *lines[101:]]))
    amber.main([*MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(tmp_path / "results.json")])
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()
    assert journal.read_bytes().splitlines(keepends=True) == [*lines[:100], *lines[101:], lines[100]]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_rank_left_in_the_environment_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        amber.main([*MINI, "--limit", "1", "--output_file", str(tmp_path / "results.json")])
    assert stopped.value.code == 2 and "RANK is 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_popes_questions_are_answered_and_scored(tmp_path, unbroken):
    """The existence questions of the miniature in POPE's format get the answers that they get in AMBER's."""
    pope = MINIATURE / "pope" / "existence.jsonl"
    flags = ["--test_mode", "--query_file", str(pope), "--limit", "60", "--output_file", str(tmp_path / "results.json")]
    amber.main(flags)
    texts = {(query["image"], query["query"]): query["id"] for query in mini_queries(60)}
    expected = {row["id"]: row["response"] for row in read(unbroken)}
    asked = {row["question_id"]: row for row in map(json.loads, pope.read_text().splitlines())}
    rows = read(tmp_path / "results.json")
    for row in rows:
        question = asked[row["id"]]
        assert row["response"] == expected[texts[question["image"], question["text"]]]
    scores = read(tmp_path / "scores.json")
    right = sum(row["response"].lower() == asked[row["id"]]["label"] for row in rows)
    assert scores["strict"]["pope"]["accuracy"] == round(100 * right / len(rows), 2)
    assert scores["answers"] == {"pope": len(rows)} and not (tmp_path / "gallery.html").exists()


# ---------------------------------------------------------------------------- pictures that cannot be used


def test_questions_that_cannot_be_asked_are_failures(tmp_path):
    """A lone surrogate, and more words than the model's context has room for; all others are answered."""
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 3), "--output_file", str(tmp_path / "results.json")]
    queries = mini_queries(3)
    queries[0]["query"], queries[4]["query"] = "What is \ud83d?", "word " * 40_000
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    failures = {row["id"]: row["reason"] for row in read(tmp_path / "results_failures.json")}
    assert stopped.value.code == 3 and failures.keys() == {queries[0]["id"], queries[4]["id"]}
    assert "Unicode" in failures[queries[0]["id"]] and "context has 1,024" in failures[queries[4]["id"]]
    assert {row["id"] for row in read(tmp_path / "results.json")} == {
        query["id"] for query in queries
    } - failures.keys()


def test_bad_pictures_are_failures_and_never_answers(tmp_path, unbroken, capsys):
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 20), "--output_file", str(tmp_path / "results.json")]
    queries = mini_queries(20)
    names = list(dict.fromkeys(query["image"] for query in queries))
    missing, broken, cut, outside, absolute = names[:5]
    (folder / "image" / missing).unlink()
    (folder / "image" / broken).write_text("no picture")
    content = (folder / "image" / cut).read_bytes()
    (folder / "image" / cut).write_bytes(content[: len(content) // 2])
    shutil.copy(MINIATURE / "amber" / "image" / outside, folder / "secret.webp")
    renamed = {outside: "../secret.webp", absolute: str(MINIATURE / "amber" / "image" / absolute)}
    for query in queries:
        query["image"] = renamed.get(query["image"], query["image"])
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    assert stopped.value.code == 3
    bad = {missing, broken, cut, *renamed.values()}
    failures = read(tmp_path / "scores.json")["failures"]
    assert failures == read(tmp_path / "results_failures.json")
    assert {failure["id"] for failure in failures} == {query["id"] for query in queries if query["image"] in bad}
    reasons = {failure["image"]: failure["reason"] for failure in failures}
    assert "is not there" in reasons[missing] and all("outside" in reasons[name] for name in renamed.values())
    answers = {row["id"]: row["response"] for row in read(tmp_path / "results.json")}
    assert set(answers) == {query["id"] for query in queries} - {failure["id"] for failure in failures}
    expected = {row["id"]: row["response"] for row in read(unbroken)}
    assert all(expected[number] == text for number, text in answers.items())
    assert read(tmp_path / "scores.json")["answers"]["generative"] == 15
    assert f"{len(failures)} queries could not be answered" in capsys.readouterr().err

    with pytest.raises(SystemExit) as stopped:  # scored again, the failures are still said
        amber.main([*flags, "--skip_inference"])
    assert stopped.value.code == 3 and read(tmp_path / "scores.json")["failures"] == failures

    for name in names[:3]:  # mended, the same command answers what was left; the rest is still a failure
        shutil.copy(MINIATURE / "amber" / "image" / name, folder / "image" / name)
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    assert stopped.value.code == 3 and {row["image"] for row in read(tmp_path / "results_failures.json")} == set(
        renamed.values()
    )
    answers = {row["id"]: row["response"] for row in read(tmp_path / "results.json")}
    assert all(expected[number] == text for number, text in answers.items()) and len(answers) > len(queries) * 0.8


def test_a_picture_outside_is_refused_from_within_the_folder_too(tmp_path, monkeypatch):
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 2), "--output_file", str(tmp_path / "results.json")]
    queries = mini_queries(2)
    shutil.copy(folder / "image" / queries[0]["image"], folder / "secret.webp")
    queries[0]["image"] = "../secret.webp"
    (folder / "query" / "query_all.json").write_text(json.dumps(queries))
    monkeypatch.chdir(folder / "image")
    flags[flags.index("--image_dir") + 1] = "."
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    assert stopped.value.code == 3 and read(tmp_path / "results_failures.json")[0]["id"] == queries[0]["id"]
    (tmp_path / "results.json").write_text(json.dumps([{"id": queries[0]["id"], "response": "A tree."}]))
    with pytest.raises(SystemExit):
        amber.main([*flags, "--skip_inference"])
    assert "data:image" not in (tmp_path / "gallery.html").read_text()


def test_two_processes_and_a_missing_picture(tmp_path):
    """The scores are there although the run fails; torchrun turns the 3 into its own 1."""
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 8), "--batch_size", "2", "--output_file", str(tmp_path / "results.json")]
    (folder / "image" / mini_queries(1)[0]["image"]).unlink()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29633"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *flags], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr
    assert read(tmp_path / "scores.json")["failures"] and (tmp_path / "gallery.html").exists()


def test_no_picture_at_all(tmp_path, capsys):
    folder = tmp_path / "benchmark"
    flags = [*copy_benchmark(folder, 3), "--output_file", str(tmp_path / "results.json")]
    for path in (folder / "image").iterdir():
        path.unlink()
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    assert stopped.value.code == 3 and read(tmp_path / "results.json") == [] and not (tmp_path / "scores.json").exists()


def test_cut_off_answers_are_counted(tmp_path, capsys):
    amber.main(
        [*MINI, "--limit", "3", "--max_new_tokens", "3", "--skip_evaluation", "--output_file", str(tmp_path / "r.json")]
    )
    assert "3 cut off at --max_new_tokens" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------- vLLM, real photos, flags


def test_vllm_is_given_bos_and_one_image_token(tmp_path, monkeypatch, capsys):
    """What vLLM is asked, with an engine that only listens; its answers go the same way as all others."""
    asked = {}

    class Engine:
        def __init__(self, **options):
            asked["options"] = options

        def generate(self, prompts, parameters, use_tqdm):
            asked.setdefault("prompts", []).extend(prompts)
            asked["parameters"] = parameters
            reasons = ["length"] + ["stop"] * (len(prompts) - 1)
            return [
                types.SimpleNamespace(outputs=[types.SimpleNamespace(text=" Yes ", finish_reason=reason)])
                for reason in reasons
            ]

    stand_in = types.SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    flags = [
        *MINI,
        "--limit",
        "5",
        "--backend",
        "vllm",
        "--skip_evaluation",
        "--output_file",
        str(tmp_path / "results.json"),
    ]
    amber.main(flags)
    assert "1 cut off" in " ".join(capsys.readouterr().err.split())
    queries = mini_queries(5)
    assert asked["options"]["enable_prefix_caching"] and asked["options"]["limit_mm_per_prompt"] == {"image": 1}
    assert asked["parameters"] == {"temperature": 0, "max_tokens": 1024}
    assert len(asked["prompts"]) == len(queries)
    processor = AutoProcessor.from_pretrained(MINIATURE / "model", backend="pil")
    by_picture = [
        query for group in amber.group_queries(queries, 5) for picture in group for query in picture["queries"]
    ]
    for query, prompt in zip(by_picture, asked["prompts"], strict=True):
        image = amber.load_image(MINIATURE / "amber" / "image" / query["image"])
        assert prompt["multi_modal_data"]["image"] == image
        ids, whole = prompt["prompt_token_ids"], amber.build_prompt(processor, query["query"], image.size)
        place = ids.index(512)
        assert ids[0] == processor.tokenizer.bos_token_id and ids.count(512) == 1
        assert ids[:place] + [512] * whole.count(512) + ids[place + 1 :] == whole
    assert read(tmp_path / "results.json") == [{"id": query["id"], "response": "Yes"} for query in queries]


@pytest.mark.skipif(not (SHARED / "photo_amber").is_dir(), reason="the photos are not here")
def test_real_photos(tmp_path, photo_llava):
    flags = ["--query_file", SHARED / "photo_amber" / "query_all.json", "--image_dir", SHARED / "coco_by_sa", "--limit", "6",
             "--relation_file", SHARED / "amber" / "relation.json", "--safe_words_file", SHARED / "amber" / "safe_words.txt",
             "--nouns", "vocabulary", "--spacy_model", SHARED / "spacy_en_glove_100d_50k", "--similarity_table", tmp_path / "t.json",
             "--model_path", photo_llava, "--batch_size", "3", "--max_new_tokens", "8", "--output_file", tmp_path / "results.json"]  # fmt: skip
    amber.main([str(flag) for flag in flags])
    scores = read(tmp_path / "scores.json")
    assert scores["answers"]["generative"] == 6 and scores["answers"]["discriminative"] >= 6
    assert scores["spacy_model"] == "spacy_en_glove_100d_50k-0.0.0" and not scores["failures"]


def test_help_lists_every_flag():
    text = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True).stdout
    for flag in ["model_path", "lora_path", "query_file", "image_dir", "output_file", "skip_inference", "skip_evaluation", "annotation_file", "relation_file", "safe_words_file", "spacy_model", "evaluation_type", "batch_size", "max_new_tokens", "limit", "baseline_file", "backend", "test_mode", "compare_base", "similarity_table", "nouns"]:  # fmt: skip
        assert f"--{flag}" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "--query_file and --image_dir"), (["--skip_inference"], "--query_file or --annotation_file"),
     ([*MINI, "--compare_base"], "--lora_path"), ([*MINI, "--limit", "0"], "above 0"),
     ([*MINI, "--image_dir", "nowhere"], "no folder"), ([*MINI, "--output_file", "/"], "is a folder"),
     ([*MINI, "--backend", "vllm", "--lora_path", "x"], "merge"), ([*MINI, "--backend", "vllm", "--load_4bit"], "quantized"),
     ([*MINI, "--lora_path", "x", "--compare_base", "--baseline_file", "y"], "give one"),
     ([*MINI, "--model_path", "nowhere"], "--model_path nowhere"), ([*MINI, "--lora_path", "nowhere"], "--lora_path nowhere"),
     ([*MINI, "--skip_inference", "--limit", "3"], "--skip_inference"), ([*MINI, "--output_file", "scores.json"], "another name"),
     ([*MINI, "--verify", "0"], "above 0"), ([*MINI, "--clip_model", "x"], "--verify"),
     ([*MINI, "--backend", "vllm", "--verify", "2"], "transformers"),
     (["--model_path", "x", "--query_file", "nowhere.json", "--image_dir", "."], "nowhere.json")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flags, words, tmp_path, capsys):
    if "--output_file" not in flags:
        flags = [*flags, "--output_file", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit) as stopped:
        amber.main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and "error: " in error and words in error
    assert not list(tmp_path.iterdir()) or "lora_path" in words


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}", "[1]", '[{"id": 1, "image": "a"}]', '[{"id": "1", "image": "a", "query": "b"}]',
                '[{"id": 1, "image": "a", "query": "b"}, {"id": 1, "image": "a", "query": "b"}]',
                '[{"id": 99999, "image": "a", "query": "b"}]'],
)  # fmt: skip
def test_bad_queries_are_one_sentence(content, tmp_path, capsys):
    folder = tmp_path / "benchmark"
    flags = copy_benchmark(folder, 1)
    (folder / "query" / "query_all.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        amber.main([*flags, "--output_file", str(tmp_path / "results.json")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
