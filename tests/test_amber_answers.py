"""Answering AMBER: equal to one question at a time, whatever happens to the process, the pictures or the settings."""

import fcntl
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

import llava_amber_validation_benchmark_with_lora as amber
from llava_orpo_training import generate_answers

SCRIPT = ROOT / "llava_amber_validation_benchmark_with_lora.py"
MINI = ["--test_mode", "--nouns", "vocabulary"]
IMAGES = MINIATURE / "amber" / "image"


def read(path):
    return json.loads(path.read_text())


def mini_queries(limit: int) -> list[dict]:
    queries = read(MINIATURE / "amber" / "query" / "query_all.json")
    images = set(list(dict.fromkeys(query["image"] for query in queries))[:limit])
    return [query for query in queries if query["image"] in images]


def stopped(flags: list, code: int = 2) -> None:
    with pytest.raises(SystemExit) as found:
        amber.main([str(flag) for flag in flags])
    assert found.value.code == code


def run_script(flags: list, processes: int = 1):
    """Run the script in processes of its own."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29631"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(SCRIPT), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def llava():
    return amber.load_llava(str(MINIATURE / "model"), device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of random weights, strong enough that answers differ."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = amber.load_llava(str(MINIATURE / "model"), device="cpu")[0]
    target = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    config = LoraConfig(r=8, lora_alpha=32, target_modules=target, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The first 60 pictures, answered in one go."""
    folder = tmp_path_factory.mktemp("unbroken")
    amber.main([*MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(folder / "results.json")])
    return folder / "results.json"


@pytest.fixture
def answered(tmp_path, unbroken):
    """A copy of `unbroken` with its journal, and the flags that made it."""
    for path in unbroken.parent.iterdir():
        shutil.copy(path, tmp_path)
    return [*MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(tmp_path / "results.json")]


class Benchmark:
    """A benchmark of the miniature's first pictures that a test may damage, and the script's `flags` for it."""

    def __init__(self, folder, pictures: int):
        self.images, self.queries = folder / "amber" / "image", mini_queries(pictures)
        shutil.copytree(MINIATURE / "amber", folder / "amber")
        self.write(self.queries)
        self.flags = ["--query_file", str(folder / "amber" / "query" / "query_all.json"), "--image_dir", str(self.images),
                      "--similarity_table", str(folder / "amber" / "similarity.json"), "--nouns", "vocabulary",
                      "--model_path", str(MINIATURE / "model"), "--output_file", str(folder / "results.json")]  # fmt: skip

    def write(self, queries) -> None:
        (self.images.parent / "query" / "query_all.json").write_text(json.dumps(queries))


# ---------------------------------------------------------------------------- equality


@pytest.mark.slow
def test_shared_prefill_equals_one_question_at_a_time(llava, unbroken):
    answers = {row["id"]: row["response"] for row in read(unbroken)}
    queries = mini_queries(60)
    assert list(answers) == [query["id"] for query in queries] and len(queries) > 500
    for query in queries:
        image = amber.load_image(IMAGES / query["image"])
        assert generate_answers(*llava, [image], [query["query"]], 1024) == [answers[query["id"]]]
    captions = {text for text in answers.values() if text.startswith("The image shows") and text.endswith(".")}
    assert len(captions) > 40


@pytest.mark.slow
@pytest.mark.parametrize("max_new_tokens", [1, pytest.param(24, marks=pytest.mark.slow)])
def test_equal_at_llavas_own_geometry(photo_llava, max_new_tokens):
    """Pictures of five shapes, from one question to four, answers that never end by themselves."""
    model, processor = amber.load_llava(str(photo_llava), device="cpu")
    rng = random.Random(0)
    sizes = [(640, 480), (480, 640), (400, 400), (900, 200), (40, 30)]
    images = [Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1])) for size in sizes]
    asked = ["Describe this image.", "Is there a cup?", "Are there two very long benches?", "</s> <image> What?"]
    questions = [asked, asked[:1], asked[1:3], asked[2:], asked]
    pixels = processor.image_processor(images, return_tensors="pt")
    found = list(amber.answer_questions(model, processor, images, pixels, questions, max_new_tokens))
    assert {place[:2] for place in found} == {(i, j) for i, part in enumerate(questions) for j in range(len(part))}
    for picture, question, text, complete in found:
        expected = generate_answers(model, processor, [images[picture]], [questions[picture][question]], max_new_tokens)
        assert [text] == expected and not complete
    assert len({text for *_, text, _ in found}) > 3 or max_new_tokens == 1


@pytest.mark.slow
def test_adapter_off_is_the_base_and_on_is_not(tmp_path, adapter, unbroken):
    flags = [*MINI, "--limit", "12", "--lora_path", str(adapter), "--compare_base", "--output_file"]
    amber.main([*flags, str(tmp_path / "results.json")])
    base = {row["id"]: row["response"] for row in read(unbroken)}
    off, on = read(tmp_path / "results_base.json"), read(tmp_path / "results.json")
    assert off == [{"id": row["id"], "response": base[row["id"]]} for row in off] and len(off) == len(mini_queries(12))
    assert sum(a != b for a, b in zip(off, on, strict=True)) > 12
    llava = amber.load_llava(str(MINIATURE / "model"), str(adapter), device="cpu")
    for query, row in list(zip(mini_queries(12), on, strict=True))[::9]:
        image = amber.load_image(IMAGES / query["image"])
        assert generate_answers(*llava, [image], [query["query"]], 1024) == [row["response"]]
    comparison = read(tmp_path / "scores.json")["comparison"]
    assert comparison["labels"] == ["base", "adapter"]
    assert comparison["base"]["strict"] != comparison["this"]["strict"]


def test_four_bits(tmp_path):
    file = tmp_path / "results.json"
    amber.main([*MINI, "--limit", "4", "--load_4bit", "--skip_evaluation", "--output_file", str(file)])
    assert all(row["response"] for row in read(file))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(tmp_path, unbroken):
    """With a missing picture: the scores are there although the run fails; torchrun turns the 3 into its own 1."""
    benchmark = Benchmark(tmp_path, 60)
    missing = benchmark.queries[0]["image"]
    (benchmark.images / missing).unlink()
    done = run_script(benchmark.flags, processes=2)
    assert done.returncode == 1 and "exitcode  : 3" in done.stderr and done.stderr.count("AMBER:") == 1
    failed = {query["id"] for query in benchmark.queries if query["image"] == missing}
    assert {failure["id"] for failure in read(tmp_path / "scores.json")["failures"]} == failed
    expected = [row for row in read(unbroken) if row["id"] not in failed]
    assert read(tmp_path / "results.json") == expected and (tmp_path / "gallery.html").exists()
    shares = [path.read_text().count('"response"') for path in sorted(tmp_path.glob("*.journal-*.jsonl"))]
    assert len(shares) == 2 and min(shares) > 150 and sum(shares) == len(expected)
    assert read(tmp_path / "scores.json")["answers"]["generative"] == 59


# ---------------------------------------------------------------------------- kill and resume


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path, unbroken):
    output = tmp_path / "results.json"
    journal = tmp_path / "results.json.journal-0.jsonl"
    flags = [*MINI, "--skip_evaluation", "--limit", "60", "--output_file", str(output)]
    total, rng = len(read(unbroken)), random.Random(0)
    stops = sorted(rng.sample(range(2, total - 5), 10))
    for stop in stops:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], env=environment, stderr=subprocess.DEVNULL)
        lines = 0
        while lines < stop and process.poll() is None:
            lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not output.exists()
        if stop == stops[4]:  # what a machine that loses its power leaves: half a line
            journal.write_bytes(journal.read_bytes()[:-7])
        elif lines > 1:  # an answer that was shown is in the file at once
            assert len(journal.read_text().splitlines()) >= stop
    before = journal.read_text().splitlines()[1:-1]
    done = run_script(flags)
    assert done.returncode == 0 and output.read_bytes() == unbroken.read_bytes()
    assert journal.read_text().splitlines()[1 : len(before) + 1] == before and len(before) > total / 3


@pytest.mark.parametrize("fewer", [[], ["--limit", "2"], ["--evaluation_type", "g"]])
def test_a_finished_or_smaller_run_answers_nothing_and_loses_nothing(fewer, tmp_path, answered, unbroken, monkeypatch):
    monkeypatch.setattr(amber, "load_llava", lambda *_: pytest.fail("there is nothing to answer"))
    amber.main([*answered, *fewer])
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()


def test_more_pictures_go_on_from_fewer(tmp_path, unbroken):
    file = tmp_path / "a[1]" / "[red]res*.json"
    flags = [*MINI, "--skip_evaluation", "--output_file", str(file), "--limit"]
    amber.main([*flags, "16"])
    journal = file.with_name(f"{file.name}.journal-0.jsonl")
    first = journal.read_text()
    amber.main([*flags, "60"])
    assert file.read_bytes() == unbroken.read_bytes() and journal.read_text().startswith(first)


def test_a_damaged_line_loses_one_answer(tmp_path, answered, unbroken):
    """A byte that is not UTF-8 in the middle of the journal: its answer is given again, and all others are kept."""
    journal = tmp_path / "results.json.journal-0.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    damaged = [*lines[:100], lines[100].replace(b"response", b"resp\xffnse"), *lines[101:]]
    journal.write_bytes(b"".join(damaged))
    amber.main(answered)
    assert (tmp_path / "results.json").read_bytes() == unbroken.read_bytes()
    now = journal.read_bytes().splitlines(keepends=True)
    assert now[: len(damaged)] == damaged and [line for line in now[len(damaged) :] if b"id" in line] == [lines[100]]
    journal.write_bytes(b"".join(lines[1:]))  # without the line that says with which settings they were given
    stopped(answered)
    assert not list(tmp_path.glob("*.lock"))


def test_two_runs_on_one_file_are_refused(tmp_path, capsys):
    with (tmp_path / "results.json.journal-0.jsonl").open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        stopped([*MINI, "--limit", "2", "--output_file", tmp_path / "results.json"])
    assert "another run is writing" in capsys.readouterr().err and not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("flag", ["--baseline_file", "--annotation_file", "--relation_file", "--spacy_model"])
def test_what_scoring_lacks_shows_before_anything_is_answered(flag, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(amber, "answer_benchmark", lambda *_: pytest.fail("hours were spent first"))
    stopped([*MINI, flag, "xx_nowhere", "--output_file", tmp_path / "results.json"])
    assert "xx_nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_one_sentence():
    done = run_script([*MINI, "--limit", "1", "--output_file", "/proc/nowhere/results.json"])
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr


CHANGES = {
    "adapter": ["--lora_path", MINIATURE / "adapter"],
    "max_new_tokens": ["--max_new_tokens", "7"],
    "load_8bit": ["--load_8bit"],
    "backend": ["--backend", "vllm"],
    "verify": ["--verify", "3"],
}


@pytest.mark.parametrize("change", [*CHANGES, "queries", "prompt", "processor", "weight"])
def test_other_settings_are_refused(change, tmp_path, capsys, monkeypatch):
    benchmark = Benchmark(tmp_path, 1)
    amber.main([*benchmark.flags, "--skip_evaluation"])
    flags = [*benchmark.flags, "--skip_evaluation", *CHANGES.get(change, [])]
    before = (tmp_path / "results.json").read_bytes()
    if change == "queries":
        benchmark.write([{**benchmark.queries[0], "query": "What is this?"}, *benchmark.queries[1:]])
    elif change == "prompt":
        original = amber.build_prompt
        monkeypatch.setattr(amber, "build_prompt", lambda *a: original(*a)[1:])
    elif change in ("processor", "weight"):
        shutil.copytree(MINIATURE / "model", tmp_path / "model")
        flags += ["--model_path", tmp_path / "model"]
        file = tmp_path / "model" / {"processor": "processor_config.json", "weight": "model.safetensors"}[change]
        content = bytearray(file.read_bytes())
        if change == "weight":
            content[len(content) // 2] ^= 1  # one weight's last bit
        file.write_bytes(content.replace(b"0.48145466", b"0.5"))
        change = "model"
    capsys.readouterr()
    stopped(flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"{change} was" in error and error.count("\n") == 1
    assert (tmp_path / "results.json").read_bytes() == before


def test_answers_from_elsewhere_are_not_written_over(tmp_path, capsys):
    (tmp_path / "results.json").write_text('[{"id": 1, "response": "mine"}]')
    stopped([*MINI, "--limit", "2", "--output_file", tmp_path / "results.json"])
    assert "--skip_inference" in capsys.readouterr().err and "mine" in (tmp_path / "results.json").read_text()


def test_a_rank_left_in_the_environment_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    stopped([*MINI, "--limit", "1", "--output_file", tmp_path / "results.json"])
    assert "RANK is 1" in capsys.readouterr().err and not list(tmp_path.iterdir())


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


def test_bad_pictures_are_failures_and_never_answers(tmp_path, unbroken, capsys, monkeypatch):
    """Pictures of five sorts of fault, a question with a lone surrogate, and one of more words than the model's context."""
    benchmark = Benchmark(tmp_path, 20)
    folder, queries, flags = benchmark.images, benchmark.queries, [*benchmark.flags, "--image_dir", "."]
    monkeypatch.chdir(folder)
    names = list(dict.fromkeys(query["image"] for query in queries))
    missing, broken, cut, outside, absolute = names[:5]
    (folder / missing).unlink()
    (folder / broken).write_text("no picture")
    content = (folder / cut).read_bytes()
    (folder / cut).write_bytes(content[: len(content) // 2])
    shutil.copy(IMAGES / outside, folder.parent / "secret.webp")
    renamed = {outside: "../secret.webp", absolute: str(IMAGES / absolute)}
    for query in queries:
        query["image"] = renamed.get(query["image"], query["image"])
    asked = [query for query in queries if query["image"] == names[6]]
    asked[0]["query"], asked[3]["query"] = "What is \ud83d?", "word " * 40_000
    benchmark.write(queries)
    stopped(flags, 3)
    bad = {missing, broken, cut, *renamed.values()}
    failures = read(tmp_path / "scores.json")["failures"]
    assert failures == read(tmp_path / "results_failures.json")
    failed = {query["id"] for query in queries if query["image"] in bad} | {asked[0]["id"], asked[3]["id"]}
    assert {failure["id"] for failure in failures} == failed
    reasons = {failure["image"]: failure["reason"] for failure in failures}
    assert "No such file" in reasons[missing] and all("outside" in reasons[name] for name in renamed.values())
    reasons = {failure["id"]: failure["reason"] for failure in failures}
    assert "surrogate" in reasons[asked[0]["id"]] and "context has 1,024" in reasons[asked[3]["id"]]
    answers = {row["id"]: row["response"] for row in read(tmp_path / "results.json")}
    assert set(answers) == {query["id"] for query in queries} - failed
    expected = {row["id"]: row["response"] for row in read(unbroken)}
    assert all(expected[number] == text for number, text in answers.items())
    assert read(tmp_path / "scores.json")["answers"]["generative"] == 14
    assert f"{len(failures)} queries could not be answered" in capsys.readouterr().err

    stopped([*flags, "--skip_inference"], 3)  # scored again, the failures are still said
    assert read(tmp_path / "scores.json")["failures"] == failures

    for name in names[:3]:  # mended, the same command answers what was left; the rest is still a failure
        shutil.copy(IMAGES / name, folder / name)
    stopped(flags, 3)
    assert {row["image"] for row in read(tmp_path / "results_failures.json")} == {*renamed.values(), names[6]}
    rows = read(tmp_path / "results.json")
    assert all(expected[row["id"]] == row["response"] for row in rows) and len(rows) > len(queries) * 0.8
    first = next(query["id"] for query in queries if query["image"] == renamed[outside])
    (tmp_path / "results.json").write_text(json.dumps([{"id": first, "response": "A tree."}]))
    stopped([*flags, "--skip_inference"], 3)  # an answer about a picture outside shows no picture
    assert "data:image" not in (tmp_path / "gallery.html").read_text()


def test_no_picture_at_all(tmp_path):
    benchmark = Benchmark(tmp_path, 3)
    shutil.rmtree(benchmark.images)
    benchmark.images.mkdir()
    stopped(benchmark.flags, 3)
    assert read(tmp_path / "results.json") == [] and not (tmp_path / "scores.json").exists()


def test_cut_off_answers_are_counted(tmp_path, capsys):
    flags = [*MINI, "--limit", "3", "--max_new_tokens", "3", "--skip_evaluation", "--output_file"]
    amber.main([*flags, str(tmp_path / "results.json")])
    assert "3 cut off at --max_new_tokens" in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------- vLLM, real photos, flags


def test_vllm_is_given_bos_and_one_image_token(tmp_path, monkeypatch, capsys, llava):
    """What vLLM is asked, with an engine that only listens; its answers go the same way as all others."""
    asked = {}

    class Engine:
        def __init__(self, **options):
            asked["options"] = options

        def generate(self, prompts, parameters, use_tqdm):
            asked.setdefault("prompts", []).extend(prompts)
            asked["parameters"] = parameters
            reasons = ["length"] + ["stop"] * (len(prompts) - 1)
            texts = [types.SimpleNamespace(text=" Yes ", finish_reason=reason) for reason in reasons]
            return [types.SimpleNamespace(outputs=[text]) for text in texts]

    stand_in = types.SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    flags = [*MINI, "--limit", "5", "--backend", "vllm", "--skip_evaluation", "--output_file"]
    amber.main([*flags, str(tmp_path / "results.json")])
    assert "1 cut off" in " ".join(capsys.readouterr().err.split())
    queries = mini_queries(5)
    assert asked["options"]["enable_prefix_caching"] and asked["options"]["limit_mm_per_prompt"] == {"image": 1}
    assert asked["parameters"] == {"temperature": 0, "max_tokens": 1024}
    by_picture = [query for group in amber.group_queries(queries, 5) for part in group for query in part]
    for query, prompt in zip(by_picture, asked["prompts"], strict=True):
        image = amber.load_image(IMAGES / query["image"])
        assert prompt["multi_modal_data"]["image"] == image
        ids, whole = prompt["prompt_token_ids"], amber.build_prompt(llava[1], query["query"], image.size)
        place = ids.index(512)
        assert ids[0] == llava[1].tokenizer.bos_token_id and ids.count(512) == 1
        assert ids[:place] + [512] * whole.count(512) + ids[place + 1 :] == whole
    assert read(tmp_path / "results.json") == [{"id": query["id"], "response": "Yes"} for query in queries]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("flags", "words"),
    [([], "--query_file is needed"), (["--skip_inference"], "--query_file is needed"),
     (["--query_file", SCRIPT], "--image_dir is needed"),
     ([*MINI, "--compare_base"], "--lora_path"), ([*MINI, "--limit", "0"], "above 0"),
     ([*MINI, "--image_dir", "nowhere"], "nowhere does not exist"), ([*MINI, "--output_file", ROOT], "exists"),
     ([*MINI, "--backend", "vllm", "--lora_path", "x"], "merge"), ([*MINI, "--backend", "vllm", "--load_4bit"], "quantized"),
     ([*MINI, "--lora_path", "x", "--compare_base", "--baseline_file", SCRIPT], "not allowed with"),
     ([*MINI, "--model_path", "nowhere"], "--model_path nowhere"), ([*MINI, "--lora_path", "nowhere"], "--lora_path nowhere"),
     ([*MINI, "--skip_inference", "--limit", "3"], "--limit"), ([*MINI, "--output_file", "scores.json"], "another name"),
     ([*MINI, "--verify", "0"], "above 0"), ([*MINI, "--clip_model", "x"], "--verify"),
     ([*MINI, "--backend", "vllm", "--verify", "2"], "--verify"), (["--write_pairs", "x", "--image_dir", "."], "--verify 12 too"),
     (["--write_pairs", "x", "--verify", "8"], "--image_dir is needed"),
     ([*MINI, "--write_pairs", "x", "--image_dir", ".", "--verify", "8", "--clip_model", "x"], "--clip_model"),
     (["--write_pairs", "x", "--image_dir", ".", "--verify", "8", "--nouns", "vocabulary"], "give --relation_file"),
     (["--model_path", "x", "--query_file", "nowhere.json", "--image_dir", "."], "nowhere.json")],
)  # fmt: skip
def test_bad_flags_are_one_sentence(flags, words, tmp_path, capsys):
    stopped(["--output_file", tmp_path / "results.json", *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and words in error
    assert not list(tmp_path.iterdir()) or "lora_path" in words


@pytest.mark.parametrize(
    "content", ["[", "[]", "{}", "[1]", '[{"id": 1, "image": "a"}]', '[{"id": "1", "image": "a", "query": "b"}]',
                '[{"id": 1, "image": "a", "query": "b"}, {"id": 1, "image": "a", "query": "b"}]',
                '[{"id": 99999, "image": "a", "query": "b"}]'],
)  # fmt: skip
def test_bad_queries_are_one_sentence(content, tmp_path, capsys):
    benchmark = Benchmark(tmp_path, 1)
    (benchmark.images.parent / "query" / "query_all.json").write_text(content)
    stopped(benchmark.flags)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
