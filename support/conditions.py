"""Prompts that were encoded beforehand, so that text encoders need not be loaded in training."""

import math
from pathlib import Path

import torch
from safetensors import safe_open

import fsdp
from support.cli import UserError
from support.shards import SHARD, about_shard, read_shard
from support.weights import read_json


class Conditions:
    """What `python data.py prompts` wrote: called with prompts it gives cond, batch first.
    Checksums are verified at once, each rank taking a part; rows are read when they are asked
    for."""

    def __init__(self, folder):
        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        count = config.get("count")
        if config.get("what") != "prompts" or type(count) is not int or count < 1:
            raise UserError(
                f"--prompts {folder} holds no encoded prompts: make them by "
                "`python data.py prompts`"
            )
        self.made_by = config.get("made_by")
        numbers = range(math.ceil(count / SHARD))
        files = [self.folder / f"{i:05d}.safetensors" for i in numbers]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(
                f"--prompts {folder} lacks {missing} of {len(files)} files: finish them with the "
                "command that began them"
            )
        for file in files[fsdp.rank() :: fsdp.world_size()]:
            read_shard(file)
        self.archives = [safe_open(file, "pt") for file in files]
        self.names = sorted(self.archives[0].keys())
        self.places = {}
        for k, archive in enumerate(self.archives):
            for i, prompt in enumerate(about_shard(archive)["prompts"]):
                self.places[prompt] = (k, i)
        self.texts = [prompt for prompt in self.places if prompt]

    def __call__(self, prompts):
        unknown = [prompt for prompt in prompts if prompt not in self.places]
        if unknown:
            raise UserError(
                f"--prompts {self.folder} does not hold the prompt {unknown[0]!r} of the real data "
                "or pairs: encode their captions too"
            )
        cond = {}
        for name in self.names:
            rows = []
            for k, i in (self.places[prompt] for prompt in prompts):
                rows.append(self.archives[k].get_slice(name)[i : i + 1])
            cond[name] = torch.cat(rows)
        return cond
