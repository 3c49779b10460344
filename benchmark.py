"""What an iteration of train.py costs: `python train.py --benchmark 20`, with any other flags; under torchrun also what sharing it costs."""

import copy
import os
import sys
import time

import torch
from tqdm import tqdm

import data
import fsdp


def network_calls(networks, args, iteration):
    """The passes through the networks that this iteration cannot avoid, and nothing else."""
    count, device = len(fsdp.share(args.batch_size)), networks.model.device
    x = torch.randn(count, *networks.model.sample_shape, device=device)
    free_x, cond = x.clone().requires_grad_(), networks.model.encode([""] * count)
    twice = {name: torch.cat([tensor, tensor]) for name, tensor in cond.items()}
    step = data.Draws(args.seed, iteration, args.batch_size).below(len(networks.timesteps)) if args.student_input == "backward" else 0
    student_turn, gan = iteration % args.fake_updates == 0, args.gan_weight > 0
    with torch.no_grad():
        for _ in range(step + (not student_turn)):
            networks.student(x, 500, cond)
        if student_turn:
            networks.teacher(torch.cat([x, x]) if args.guidance != 1 else x, 500, twice if args.guidance != 1 else cond)
            if args.schedule != "coupled":
                for _ in range(2 if args.normaliser == "guided" and args.guidance != 1 else 1):
                    networks.teacher(x, 500, cond)
    if student_turn:
        with torch.set_grad_enabled(gan):
            _, logit = networks.fake_score(free_x, 500, cond)
        if gan:
            torch.autograd.grad(logit.sum(), free_x)
        for _ in range(1 + (args.regression_weight > 0)):
            networks.student(x, 500, cond).backward(x)
    x0, logit = networks.fake_score(x, 500, cond)
    loss = x0.sum()
    if gan:
        _, logit_real = networks.fake_score(x, 500, cond)
        loss = loss + logit.sum() + logit_real.sum()
    loss.backward()
    networks.student.zero_grad()
    networks.fake_score.zero_grad()


def seconds_each(call, title, networks, args):
    """Of --benchmark calls call(iteration), after some to warm up."""
    def wait():
        if networks.model.device.type == "cuda":
            torch.cuda.synchronize()

    warm = 2 * args.fake_updates
    for iteration in range(warm):
        call(iteration)
    wait()
    start = time.perf_counter()
    for iteration in tqdm(range(warm, warm + args.benchmark), desc=title, disable=not fsdp.first()):
        call(iteration)
    wait()
    return (time.perf_counter() - start) / args.benchmark


def seconds_in_communication(call, args):
    """An iteration, by torch's profiler; some of them may be hidden behind computation."""
    with torch.profiler.profile() as profile:
        for iteration in range(2 * args.fake_updates):
            call(iteration)
    events = [event for event in profile.key_averages() if event.key.startswith(("gloo:", "nccl"))]
    return sum(event.device_time_total or event.cpu_time_total for event in events) / 1e6 / (2 * args.fake_updates)


def run(args, prepare, iterate):
    """Time N iterations, and in turn the network calls that those same iterations cannot avoid. Under torchrun also what one process
    takes that is alone and unsharded, for as many samples as each has of the batch."""
    if fsdp.launched() and fsdp.first():  # while the others wait to begin
        one = copy.copy(args)
        one.batch_size = max(1, args.batch_size // int(os.environ["WORLD_SIZE"]))
        networks, sources = prepare(one)
        alone = seconds_each(lambda iteration: iterate(networks, sources, iteration, one), "one process", networks, one)
        del networks, sources
    networks, sources = prepare(args, fsdp.start(args.shard, fsdp.own_device(args.device), args.timeout))
    step = lambda iteration: iterate(networks, sources, iteration, args)
    whole = seconds_each(step, "whole iterations", networks, args)
    calls = seconds_each(lambda iteration: network_calls(networks, args, iteration), "network calls", networks, args)
    if networks.model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fsdp.say(f"{whole:.4f} s an iteration, {whole / calls:.3f} times the bare network calls ({calls:.4f} s), "
             f"{args.batch_size / whole:.1f} samples a second, peak memory {peak / 2 ** 30:.2f} GiB")
    if fsdp.launched():
        talk = seconds_in_communication(step, args)
        fsdp.say(f"{fsdp.world()} processes, --shard {args.shard}: {args.batch_size / whole / fsdp.world():.1f} samples a second each, "
                 f"{talk:.4f} s an iteration in communication")
        if fsdp.first():
            print(f"one process alone, unsharded, with {one.batch_size} samples: {alone:.4f} s an iteration, so the efficiency is {alone / whole:.3f}")
