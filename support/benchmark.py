"""What training costs, in seconds and in memory.

    python -m support.benchmark 20                   # seconds an iteration of the default run
    python -m support.benchmark 20 --gan-weight 0 --batch-size 8        # with any flags of train.py
    torchrun --standalone --nproc_per_node=2 -m support.benchmark 20   # also: what sharing it costs

Each iteration is timed in turn with what it cannot avoid: passes through networks, and AdamW. Its
batch is drawn before the clock starts, as a run draws it in the background; then as many iterations
show how long they wait for that.
"""

import copy
import gc
import os
import resource
import sys
import time

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.benchmark_parser, __doc__)

import torch
from tqdm import tqdm

import fsdp
import train
from support.ahead import Ahead
from support.cli import UserError
from support.costs import bare_iteration
from support.precision import keep_casts

# ----------------------------------------------------------------------------- seconds


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@keep_casts()
def unavoidable(nets, batch, iteration, args):
    """The passes through networks, and AdamW."""
    for part in batch.split(args.micro_batch):
        bare_iteration(nets, part, iteration, args)
    optimizers = [nets.fake_optimizer]
    if train.is_student_turn(iteration, args):
        optimizers.append(nets.student_optimizer)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def seconds_each(steps, nets, sources, args, count, title):
    """[mean seconds of each of these steps], which take turns; 2 K iterations to warm up. The last
    is of drawing the batches."""
    device, warm = nets.model.device, 2 * args.fake_updates
    seconds = [0.0] * (len(steps) + 1)
    for iteration in tqdm(range(warm + count), desc=title, disable=not fsdp.is_main()):
        start = clock(device)
        batch = train.draw_batch(nets, sources, iteration, args)
        times = [clock(device) - start]
        for step in steps:
            start = clock(device)
            step(nets, batch, iteration, args)
            times.insert(-1, clock(device) - start)
        if iteration >= warm:
            seconds = [total + more for total, more in zip(seconds, times)]
    return [total / count for total in seconds]


def share_waiting(nets, sources, args, count, slower):
    """How much of its time the main thread waits for batches, each of which takes so many seconds
    longer to draw. The first, before which there is nothing to compute, does not count."""

    def draw(iteration):
        time.sleep(slower)
        return train.draw_batch(nets, sources, iteration, args)

    ahead = Ahead(draw, 0, count + 1, nets.model.device)
    waited = began = 0.0
    for iteration, batch in tqdm(ahead, desc="waiting", disable=not fsdp.is_main()):
        if iteration == 1:
            waited, began = ahead.waited, clock(nets.model.device)
        train.iterate(nets, batch, iteration, args)
    return (ahead.waited - waited) / (clock(nets.model.device) - began)


def seconds_in_communication(nets, sources, args):
    """An iteration, by torch's profiler. Some of them may be hidden behind computation."""
    count = 2 * args.fake_updates
    with torch.profiler.profile() as profile:
        for iteration in range(count):
            batch = train.draw_batch(nets, sources, iteration, args)
            train.iterate(nets, batch, iteration, args)
    total = 0.0
    for event in profile.key_averages():
        if event.key.startswith(("gloo:", "ncclDevKernel")):
            total += event.device_time_total or event.cpu_time_total
    return total / 1e6 / count


def seconds_alone(args, count):
    """What one rank takes that is alone and unsharded, for as many samples as each rank has; None
    if that does not fit into memory."""
    args = copy.copy(args)
    args.batch_size = max(1, args.batch_size // int(os.environ["WORLD_SIZE"]))
    try:
        nets, sources = train.prepare(args)
        return seconds_each([train.iterate], nets, sources, args, count, "one rank alone")[0]
    except torch.OutOfMemoryError:
        return None


def peak_memory(device):
    """GiB of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def measure(args, count):
    alone = None
    if fsdp.launched() and fsdp.is_main():  # the others wait to begin
        alone = seconds_alone(args, count)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    mesh = fsdp.start(args.shard, fsdp.own_device(args.device))
    nets, sources = train.prepare(args, mesh=mesh)
    steps = [train.iterate, unavoidable]
    whole, bare, drawing = seconds_each(steps, nets, sources, args, count, "iterations")
    rate = args.batch_size / whole
    fsdp.print_main(
        f"{whole:.4f} s an iteration, {whole / bare:.3f} times the bare network calls and AdamW "
        f"({bare:.4f} s); {rate:.1f} samples a second; peak memory "
        f"{peak_memory(nets.model.device):.2f} GiB; drawing its batch {drawing:.4f} s"
    )
    slower = whole / 2
    shares = [100 * share_waiting(nets, sources, args, count, more) for more in (0, slower)]
    fsdp.print_main(
        f"waiting for data: {shares[0]:.2f} % of the time; {shares[1]:.2f} % with batches that "
        f"take {slower:.3f} s longer to draw"
    )
    if not fsdp.launched():
        return
    talk = seconds_in_communication(nets, sources, args)
    alone_text = "it does not fit into memory"
    if alone:
        alone_text = f"{alone:.4f} s, so the efficiency is {alone / whole:.3f}"
    fsdp.print_main(
        f"ranks: {fsdp.world_size()}, --shard {args.shard}; {talk:.4f} s an iteration in "
        f"communication; one rank alone, unsharded, with a rank's samples: {alone_text}"
    )


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    count = flags.benchmark_parser(__doc__).parse_args(arguments).count
    if arguments[0] != str(count):
        raise UserError("begin with the number of iterations to time")
    return measure(train.parse_arguments(arguments[1:]), count)


if __name__ == "__main__":
    fsdp.run(main)
