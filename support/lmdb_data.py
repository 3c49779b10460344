"""DMD2's data bases: latents_{i}_data, raw float16 that is scaled already, with prompts_{i}_data;
or images_{i}_data, uint8, with labels_{i}_data, int64. latents_shape or images_shape is text."""

import math

import numpy as np
import torch

import fsdp
from support.cli import UserError, import_package
from support.shards import as_sample
from support.weights import in_one_line


class Lmdb:
    def __init__(self, folder, model):
        lmdb = import_package("lmdb", f"--real {folder} is an LMDB, which")
        self.folder, self.model = folder, model
        with in_one_line(f"--real {folder} cannot be read"):
            environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
            self.check_length(environment)
            self.reader = environment.begin(buffers=True)
            self.pixels = self.reader.get(b"images_shape") is not None
            self.values = "images" if self.pixels else "latents"
            self.captions = "labels" if self.pixels else "prompts"
            self.dtype = np.uint8 if self.pixels else np.float16
            shape = bytes(self.get(f"{self.values}_shape")).decode()
            self.count, *shape = map(int, shape.split())
        if tuple(shape) != model.sample_shape or self.count < 1:
            raise UserError(
                f"--real {folder} holds {self.count} {self.values} of shape {tuple(shape)}; "
                f"{model.name} has {model.sample_shape}"
            )
        size = math.prod(shape) * np.dtype(self.dtype).itemsize
        for i in range(fsdp.rank(), self.count, fsdp.world_size()):  # looked up, but not read
            held = len(self.get(f"{self.values}_{i}_data"))
            if held != size or not self.get(f"{self.captions}_{i}_data"):
                raise UserError(
                    f"--real {folder}: entry {i} of {self.count} has {held} bytes of "
                    f"{self.values}, not {size}, or no caption"
                )

    def check_length(self, environment):
        """Reading beyond the end of a file that was cut off would kill the process."""
        used = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        present = (self.folder / "data.mdb").stat().st_size
        if present < used:
            raise UserError(
                f"--real {self.folder}: data.mdb is cut off: it has {present} bytes of {used}"
            )

    def get(self, name):
        value = self.reader.get(name.encode())
        if value is None:
            raise UserError(f"--real {self.folder}: the LMDB has no {name}")
        return value

    def caption(self, i):
        stored = bytes(self.get(f"{self.captions}_{i}_data"))
        return str(int.from_bytes(stored, "little")) if self.pixels else stored.decode()

    def captions_in_all(self):
        return {self.caption(i) for i in range(self.count)} if self.pixels else set()

    @property
    def digests(self):
        """Enough of it to notice another data base of the same size: sixteen entries."""
        some = range(0, self.count, math.ceil(self.count / 16))
        found = [self.read(i) for i in some]
        return [[x.sum().item(), caption] for x, caption in found]

    def read(self, i):
        stored = np.frombuffer(self.get(f"{self.values}_{i}_data"), self.dtype)
        x = torch.from_numpy(stored.reshape(self.model.sample_shape).copy())
        return as_sample(x), self.caption(i)

    def draw(self, draws):
        """Samples (B, C, H, W) and B prompts."""
        index = (draws.uniform() * self.count).long().tolist()
        x, prompts = zip(*(self.read(i) for i in index))
        return torch.stack(x).to(self.model.device), list(prompts)
