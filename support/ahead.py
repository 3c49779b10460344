"""Prepare the next batch in a background thread while the present one is computed."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch


class Ahead:
    """Iterates over (i, make(i)) for i from start to stop - 1, one step ahead of who asks.

    make(i) must depend on i alone, so that nothing changes but when it runs. waited: seconds that
    the asking thread has spent waiting for it.
    """

    def __init__(self, make, start, stop, device):
        self.make, self.start, self.stop = make, start, stop
        self.device, self.waited = device, 0.0

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        with ThreadPoolExecutor(1, initializer=yield_cores) as pool:
            coming = pool.submit(self.prepare, self.start)
            for i in range(self.start, self.stop):
                began = time.perf_counter()
                made = coming.result()
                self.waited += time.perf_counter() - began
                if i + 1 < self.stop:
                    coming = pool.submit(self.prepare, i + 1)
                yield i, made

    def prepare(self, i):
        """On a GPU in a stream of its own, or copies would wait for what is being computed."""
        if self.device.type != "cuda":
            return self.make(i)
        main = torch.cuda.current_stream(self.device)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            made = self.make(i)
            stream.synchronize()  # this thread waits, and nobody else
        for tensor in tensors_in(vars(made)):
            tensor.record_stream(main)
        return made


def yield_cores():
    """On the CPU this thread takes what those that compute the iteration leave."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def tensors_in(values):
    """All tensors of a dict, and of the dicts in it."""
    found = []
    for value in values.values():
        if isinstance(value, dict):
            found += tensors_in(value)
        elif isinstance(value, torch.Tensor) and value.is_cuda:
            found.append(value)
    return found
