"""Prompts that were encoded beforehand, so that text encoders need not be loaded in training."""

import torch

from support.cli import UserError
from support.shards import Shards
from support.weights import fingerprint


class Conditions(Shards):
    """What `python data.py prompts` wrote: called with prompts it gives cond, batch first."""

    def __init__(self, folder, model):
        command = f"python data.py prompts --prompts FILE --out {folder} --model {model.name}"
        made_by = fingerprint(model.origin)
        super().__init__(folder, None, "encoded prompts", model, made_by, command)
        if self.config.get("what") != "prompts":
            raise UserError(f"there are no encoded prompts in {folder}: make them with {command}")
        self.folder = folder
        self.names = sorted(self.archives[0].keys())
        self.place_of = dict(zip(self.prompts, self.places))
        self.texts = [prompt for prompt in self.place_of if prompt]

    def misfit(self, file, tensors):
        """Conditions have a shape for each name."""

    def __call__(self, prompts):
        unknown = [prompt for prompt in prompts if prompt not in self.place_of]
        if unknown:
            raise UserError(
                f"--prompts {self.folder} does not hold the prompt {unknown[0]!r} of the real data "
                "or pairs: encode their captions too"
            )
        cond = {}
        for name in self.names:
            cond[name] = torch.cat(self.rows(name, [self.place_of[prompt] for prompt in prompts]))
        return cond
