"""Tensors with prompts in shards of 256 samples: safetensors with prompts and a checksum."""

import functools
import hashlib
import json
import math
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import fsdp
from support.checkpoint import differing, make_writable, replace_file, replace_text
from support.cli import UserError
from support.weights import fingerprint, in_one_line, read_json

SHARD = 256


# ----------------------------------------------------------------------------- one shard


def about_shard(archive):
    """{"prompts": [...], "left_out": {file: why}, "sha256": ...}, one entry of the header: the
    order of several entries would be left to chance."""
    about = json.loads(archive.metadata()["about"])
    texts = [*about["prompts"], *about["left_out"], *about["left_out"].values(), about["sha256"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("its header holds something that is no text")
    return about


def shard_digest(tensors, prompts):
    sha = hashlib.sha256(json.dumps(prompts).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write_shard(file, tensors, prompts, left_out):
    digest = shard_digest(tensors, prompts)
    about = json.dumps({"prompts": prompts, "left_out": left_out, "sha256": digest})
    replace_file(file, functools.partial(save_file, tensors, metadata={"about": about}))


def read_shard(file, names=None):
    """{name: tensor} of these names or of all, list of str, {file that was left out: why}"""
    what = " and ".join(names or ["tensors"])
    with in_one_line(f"{file} is damaged or holds no {what}"), safe_open(file, "pt") as archive:
        tensors = {name: archive.get_tensor(name) for name in names or archive.keys()}
        about = about_shard(archive)
        good = about["sha256"] == shard_digest(tensors, about["prompts"])
    if not good or any(len(tensor) != len(about["prompts"]) for tensor in tensors.values()):
        raise UserError(f"{file} is damaged: it is not what was written")
    return tensors, about["prompts"], about["left_out"]


# ----------------------------------------------------------------------------- reading many


class Shards:
    """A folder that data.py wrote. Checksums are verified at once, each rank taking a part; samples
    are read when they are drawn."""

    def __init__(self, folder, names, what, model, made_by, command):
        """made_by: fingerprint of the weights they must be made by; None where that is open."""
        self.model, self.names = model, names
        file = Path(folder) / "config.json"
        self.config = read_json(file) if file.is_file() else {}
        count = self.config.get("count")
        if type(count) is not int or not 0 < count <= 10**9:
            raise UserError(f"there are no {what} in {folder}: make them with {command}")
        if made_by and self.config.get("made_by") != made_by:
            raise UserError(
                f"the {what} in {folder} were made by the weights of "
                f"{self.config.get('model') or 'another model'}, which are not those of "
                f"{model.name}: make others with {command}"
            )
        files = [Path(folder) / f"{i:05d}.safetensors" for i in range(math.ceil(count / SHARD))]
        missing = sum(not file.is_file() for file in files)
        if missing:
            raise UserError(
                f"{folder} lacks {missing} of {len(files)} files of {count} {what}: finish them "
                "with the command that began them"
            )
        own = [self.problem(file) for file in files[fsdp.rank() :: fsdp.world_size()]]
        problems = [problem for part in fsdp.gather_objects(own) for problem in part if problem]
        if problems:
            raise UserError(problems[0])
        self.archives = [safe_open(file, "pt") for file in files]
        self.prompts, self.places, self.digests = [], [], []
        for k, archive in enumerate(self.archives):
            about = about_shard(archive)
            self.prompts += about["prompts"]
            self.places += [(k, i) for i in range(len(about["prompts"]))]
            self.digests.append(about["sha256"])
        self.count = len(self.prompts)

    def captions_in_all(self):
        return set(self.prompts)

    def problem(self, file):
        """What is wrong with a shard for this model, or None."""
        try:
            tensors, _, _ = read_shard(file, self.names)
        except UserError as error:
            return str(error)
        wanted = self.model.sample_shape
        for name in self.names or ():
            shape = tuple(tensors[name].shape[1:])
            if shape != wanted:
                return f"{file} holds samples of shape {shape}; {self.model.name} has {wanted}"
        return None

    def draw(self, draws):
        """The tensors (B, C, H, W) in the order of their names, and B prompts."""
        return self.read((draws.uniform() * self.count).long().tolist())

    def read(self, index):
        device = self.model.device
        tensors = [as_sample(self.rows(name, index)).to(device) for name in self.names]
        return *tensors, [self.prompts[i] for i in index]

    def rows(self, name, index):
        """(B, ...) of one tensor."""
        places = [self.places[i] for i in index]
        return torch.cat([self.archives[k].get_slice(name)[row : row + 1] for k, row in places])


class Conditions(Shards):
    """Prompts that were encoded beforehand. Called with prompts it gives cond, batch first, whose
    tensors have shapes of their own."""

    def __init__(self, folder, model):
        command = f"python data.py prompts --prompts FILE --out {folder} --model {model.name}"
        made_by = fingerprint(model.origin)
        super().__init__(folder, None, "encoded prompts", model, made_by, command)
        if self.config.get("what") != "prompts":
            raise UserError(f"there are no encoded prompts in {folder}: make them with {command}")
        self.folder = folder
        self.names = sorted(self.archives[0].keys())
        self.index_of = {prompt: i for i, prompt in enumerate(self.prompts)}
        self.texts = [prompt for prompt in self.index_of if prompt]

    def __call__(self, prompts):
        unknown = [prompt for prompt in prompts if prompt not in self.index_of]
        if unknown:
            raise UserError(
                f"--prompts {self.folder} does not hold the prompt {unknown[0]!r} of the real data "
                "or pairs: encode their captions too"
            )
        index = [self.index_of[prompt] for prompt in prompts]
        return {name: self.rows(name, index) for name in self.names}


def as_sample(x):
    """Stored latents as float32; stored pixels as -1 to 1."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


# ----------------------------------------------------------------------------- writing many


def make_shards(out, config, make):
    """Write what make(shard, size, bar) gives for every shard, each rank its part: tensors,
    prompts, {file that was left out: why}. What is there already, whole, is not made again. Returns
    all that was left out."""
    out, count = Path(out), config["count"]
    check_same_config(out, config)
    make_writable(out)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if rank == 0:
        replace_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    exact = config["what"] in ("pairs", "prompts")  # of images, bad ones may be missing
    files = {i: out / f"{i:05d}.safetensors" for i in range(rank, math.ceil(count / SHARD), ranks)}
    sizes = {i: min(SHARD, count - i * SHARD) for i in files}
    todo = [i for i in files if not is_whole(files[i], sizes[i] if exact else None)]
    total = sum(sizes.values())
    done = total - sum(sizes[i] for i in todo)
    unit = config["what"][:-1]
    with tqdm(total=total, initial=done, unit=unit, disable=rank > 0) as bar:
        for i in todo:
            write_shard(files[i], *make(i, sizes[i], bar))
    left_out = {}
    for file in files.values():
        with safe_open(file, "pt") as archive:
            left_out |= about_shard(archive)["left_out"]
    return left_out


def check_same_config(out, config):
    """What is gone on with must be the same thing; of pairs there may be more."""
    if not (out / "config.json").is_file():
        return
    saved = read_json(out / "config.json")
    compared = {name: value for name, value in config.items() if name != "count"}
    fields = differing(saved, compared if config["what"] == "pairs" else config)
    if fields:
        raise UserError(f"{out} is of another configuration: " + "; ".join(fields))


def is_whole(file, count=None):
    """Whether that is a shard as it was written and, where a count is given, of so many samples."""
    try:
        prompts = read_shard(file)[1]
    except UserError:
        return False
    return count in (None, len(prompts))
