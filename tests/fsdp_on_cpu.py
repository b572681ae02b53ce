"""llava_orpo_training.py with its weights split by FSDP2 on the CPU, where accelerate takes FSDP's settings for GPUs only.

    accelerate launch --config_file accelerate_configs/fsdp2.yaml --num_processes 2 --mixed_precision no tests/fsdp_on_cpu.py ...

Writes to $SPLIT_FILE what was split, and how.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

start, prepare = AcceleratorState.__init__, accelerator.fsdp2_prepare_model


def start_with_fsdp(self, *args, fsdp_plugin=None, **options):
    start(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
    if self.__dict__.get("fsdp_plugin") is not None:
        self.distributed_type = DistributedType.FSDP


def prepare_and_note(accelerator, model):
    model = prepare(accelerator, model)
    weights = list(model.parameters())
    whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
    here = sum(weight.to_local().numel() for weight in weights if isinstance(weight, DTensor))
    units = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    if os.environ["RANK"] == "0":
        facts = {"units": units, "whole": whole, "share": here / sum(weight.numel() for weight in weights)}
        Path(os.environ["SPLIT_FILE"]).write_text(json.dumps(facts))
    return model


AcceleratorState.__init__, accelerator.fsdp2_prepare_model = start_with_fsdp, prepare_and_note

import llava_orpo_training as training

if __name__ == "__main__":
    training.main(sys.argv[1:])
