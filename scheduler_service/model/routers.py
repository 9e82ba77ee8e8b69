"""The routers inside a model of transformers, made to say which experts they choose.

transformers gives them one form: a module named …TopKRouter that returns (logits, weights, ids of the experts).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from quartet.scheduler_service.model.batch import ExpertShape

ROUTER = re.compile("top_?k_?router$", re.IGNORECASE)
LAYER = re.compile(r"\blayers\.(\d+)\.")

Report = Callable[[int, torch.Tensor], None]


class Routers:
    """Watches every router of a model; `report`, while set, is called with a layer's choices (tokens, top_k)."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.layers = layers
        self.report: Report | None = None
        self.shape: ExpertShape | None = None  # known after the first forward pass
        for name, module in model.named_modules():
            if ROUTER.search(type(module).__name__) and (layer := LAYER.search(name)):
                module.register_forward_hook(partial(self.chosen, int(layer[1])))

    def chosen(self, layer: int, module: nn.Module, arguments: Any, output: Any) -> None:
        """A router has returned: logits (…, experts), weights and ids (…, top_k)."""
        if not (isinstance(output, tuple) and len(output) == 3 and output[2].dtype == torch.int64):
            return  # of another form: its model counts as one without experts
        logits, _, ids = output
        self.shape = self.shape or ExpertShape(self.layers, logits.shape[-1], ids.shape[-1])
        if self.report is not None:
            self.report(layer, ids.flatten(0, -2))
