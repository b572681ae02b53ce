"""Several processes: the configurations of accelerate_configs, the README's commands, weights split by FSDP2, and a run
that another number of processes goes on with."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import MINIATURE, ROOT
from safetensors.torch import load_file
from test_training import losses, write_pairs
from torch.distributed.run import get_args_parser

import llava_amber_validation_benchmark_with_lora as amber
import llava_orpo_training as training

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "accelerate_configs"
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}
FLAGS = ["--model_path", str(MINIATURE / "model"), *"--report_to none --batch_size 4 --learning_rate 1e-3".split()]
FLAGS += "--num_workers 0 --save_steps 2".split()


def launch(command: str):
    """`accelerate launch`'s arguments, filled up from the configuration file."""
    return _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)[2:]))[0]


def start(*command, **variables):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    options = {"env": variables, "timeout": 240, "cwd": ROOT, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", *map(str, command)], **options)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_loads_and_says_what_it_means(name):
    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert config.distributed_type == KINDS[name] and config.mixed_precision == "bf16" and config.num_machines == 1
    command = f"accelerate launch --config_file {file} --num_processes 2 llava_orpo_training.py"
    variables = {key: value for key, value in prepare_multi_gpu_env(launch(command)).items() if key not in os.environ}
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    with patch_environment(**variables):
        if name == "fsdp2":
            plugin = FullyShardedDataParallelPlugin()
            assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
            assert plugin.transformer_cls_names_to_wrap == ["MistralDecoderLayer"]
            assert plugin.state_dict_type.name == "FULL_STATE_DICT"  # save_model() writes nothing with another
            assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading


def test_the_readmes_commands_parse():
    """What the READMEs start the training and AMBER with on several GPUs or machines."""
    text = "".join(path.read_text() for path in (ROOT / "README.md", CONFIGS / "README.md")).replace("\\\n", " ")
    found = re.findall(r"(?:accelerate launch|torchrun)[^\n`|]*llava_\w+\.py[^\n`|]*", text)
    for name in KINDS:
        assert any(f"accelerate_configs/{name}.yaml" in command for command in found), name
    for part in ("amber", "--num_machines 2", "--nnodes"):
        assert any(part in command for command in found), part
    for command in found:
        command = command.replace("…", "--test_mode")
        if command.startswith("torchrun"):
            args = get_args_parser().parse_args(shlex.split(command, comments=True)[1:])
            assert args.nproc_per_node.isdigit()
        else:
            args = launch(command)
            assert args.num_processes % args.num_machines == 0
            if args.num_machines > 1:
                assert prepare_multi_gpu_env(args) and int(args.nproc_per_node) * int(args.nnodes) == args.num_processes
                assert args.rdzv_endpoint == f"{args.main_process_ip}:{args.main_process_port}"
        scripts = {"llava_orpo_training.py": training, "llava_amber_validation_benchmark_with_lora.py": amber}
        scripts[args.training_script].parse_args(args.training_script_args)


def test_another_number_of_processes_goes_on_with_a_run(tmp_path, monkeypatch, capsys):
    """One process begins, two go on, one ends: the curve is that of one process from begin to end."""
    data = write_pairs(tmp_path / "pairs", train=24)
    flags = [*FLAGS, "--dataset", str(data), *"--epochs 2 --eval_fraction 0 --gradient_checkpointing off".split()]
    one, two = ["--gradient_accumulation_steps", "2"], ["--gradient_accumulation_steps", "1"]
    training.main([*flags, "--output_dir", str(tmp_path / "unbroken"), *one])
    folder = tmp_path / "run"
    flags += ["--output_dir", str(folder)]

    def break_off(self, args, state, *_, **__):
        if state.global_step == 2:
            raise ConnectionError("the machine is gone")

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(training.RunRecorder, "on_step_begin", break_off)
        training.main([*flags, *one])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="2"):
        patch.setenv("WORLD_SIZE", "2")
        training.main([*flags, *one, "--resume"])
    error = " ".join(capsys.readouterr().err.split())
    assert "pairs_a_step was 8, is 16" in error and "2 processes" in error
    start("torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541", "llava_orpo_training.py",
          *flags, *two, "--resume")  # fmt: skip
    assert {file.name for file in (folder / "checkpoint-4").glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    assert losses(folder) == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-4)
    for file in ("training_summary.json", "adapter_model.safetensors"):
        (folder / file).unlink()
    shutil.rmtree(folder / "checkpoint-6")
    training.main([*flags, *one, "--resume"])
    assert losses(folder) == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-4)
    assert list(losses(folder)) == list(range(1, 7))
    expected = load_file(tmp_path / "unbroken" / "adapter_model.safetensors")
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        assert (weight - expected[name]).abs().max() < 1e-3, name


def test_weights_split_by_fsdp2_give_the_loss_of_whole_ones(tmp_path):
    """The script over two processes by accelerate_configs/fsdp2.yaml: losses, answers and adapter of one process."""
    data = write_pairs(tmp_path / "pairs", train=24, test=2)
    flags = [*FLAGS, "--dataset", str(data), "--gradient_checkpointing", "on"]
    training.main([*flags, "--output_dir", str(tmp_path / "whole"), "--gradient_accumulation_steps", "2"])
    start("accelerate.commands.launch", "--config_file", CONFIGS / "fsdp2.yaml", "--num_processes", "2",
          "--mixed_precision", "no", "--main_process_port", "29542", ROOT / "tests" / "fsdp_on_cpu.py",
          *flags, "--output_dir", tmp_path / "split", "--gradient_accumulation_steps", "1",
          SPLIT_FILE=str(tmp_path / "facts.json"))  # fmt: skip
    facts = json.loads((tmp_path / "facts.json").read_text())
    units = ["FSDPEmbedding", *["FSDPMistralDecoderLayer"] * 4, "FSDPLinear", "FSDPPeftModelForCausalLM"]
    assert sorted(facts["units"]) == sorted(units) and facts["whole"] == []
    assert facts["share"] == pytest.approx(0.5, abs=0.01)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)
    answers = [(tmp_path / name / "samples.jsonl").read_text() for name in ("split", "whole")]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) == 2
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    found = load_file(tmp_path / "split" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all((weight - expected[name]).abs().max() < 1e-3 for name, weight in found.items())
