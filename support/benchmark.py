"""What training costs, in seconds and in memory.

    python -m support.benchmark 20                   # seconds an iteration of the default run
    python -m support.benchmark 20 --gan-weight 0 --batch-size 8        # with any flags of train.py
    torchrun --standalone --nproc_per_node=2 -m support.benchmark 20   # also: what sharing it costs
    python -m support.benchmark memory         # Stable Diffusion's weights and optimizers, computed

Each iteration is timed in turn with the passes through networks that it cannot avoid.
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
from diffusers import UNet2DConditionModel
from tqdm import tqdm

import data
import fsdp
import models
import train
from support.cli import UserError

# The UNets' configurations, as the hub has them.
FULL_SIZE = {
    "SD1.5 512": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "SDXL 1024": dict(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


# ----------------------------------------------------------------------------- seconds


def bare_iteration(nets, sources, iteration, args):
    """The passes through networks that train.iterate cannot avoid, and nothing else."""
    count, device = len(fsdp.local_slice(args.batch_size)), nets.model.device
    x = torch.randn(count, *nets.model.sample_shape, device=device)
    cond = nets.model.encode([""] * count)
    has_gan, student_turn = args.gan_weight > 0, train.is_student_turn(iteration, args)

    # The student's samples.
    earlier = 0
    if args.student_input == "backward":
        draws = data.Draws(args.seed, iteration, args.batch_size)
        earlier = draws.below(len(nets.timesteps))
    with torch.no_grad():
        for _ in range(earlier + (not student_turn)):
            nets.student(x, 500, cond)

    # The student's step.
    if student_turn:
        coupled = args.schedule == "coupled"
        scale = args.guidance if coupled or args.normaliser == "guided" else 1
        with torch.no_grad():
            models.cond_and_uncond_x0(nets.teacher, x, 500, cond, nets.uncond, scale)
            if not coupled:
                models.cond_and_uncond_x0(nets.teacher, x, 500, cond, nets.uncond, args.guidance)
        x_t = x.clone().requires_grad_()
        with torch.set_grad_enabled(has_gan):
            _, logit = nets.fake_score(x_t, 500, cond)
        if has_gan:
            torch.autograd.grad(logit.sum(), x_t)
        for _ in range(1 + (args.regression_weight > 0)):
            nets.student(x, 500, cond).backward(x)
        nets.student.zero_grad()

    # The fake score's step.
    x0_fake, logit = nets.fake_score(x, 500, cond)
    loss = x0_fake.sum()
    if has_gan:
        _, logit_real = nets.fake_score(x, 500, cond)
        loss = loss + logit.sum() + logit_real.sum()
    loss.backward()
    nets.fake_score.zero_grad()


def clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_each(steps, nets, sources, args, count, title):
    """[mean seconds of each of these steps], which take turns; 2 K iterations to warm up."""
    device, warm = nets.model.device, 2 * args.fake_updates
    seconds = [0.0] * len(steps)
    for iteration in tqdm(range(warm + count), desc=title, disable=not fsdp.is_main()):
        for i, step in enumerate(steps):
            start = clock(device)
            step(nets, sources, iteration, args)
            if iteration >= warm:
                seconds[i] += clock(device) - start
    return [total / count for total in seconds]


def seconds_in_communication(nets, sources, args):
    """An iteration, by torch's profiler. Some of them may be hidden behind computation."""
    count = 2 * args.fake_updates
    with torch.profiler.profile() as profile:
        for iteration in range(count):
            train.iterate(nets, sources, iteration, args)
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
    steps = [train.iterate, bare_iteration]
    whole, bare = seconds_each(steps, nets, sources, args, count, "iterations")
    rate = args.batch_size / whole
    fsdp.print_main(
        f"{whole:.4f} s an iteration, {whole / bare:.3f} times the bare network calls "
        f"({bare:.4f} s); {rate:.1f} samples a second; peak memory "
        f"{peak_memory(nets.model.device):.2f} GiB"
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


# ----------------------------------------------------------------------------- memory, computed


def lora_parameters(unet, rank):
    """How many parameters LoRAs of this rank add to the layers that DMD2 adapts."""
    count = 0
    for name, module in unet.named_modules():
        if name.endswith(models.UNET_LORA_LAYERS) and hasattr(module, "weight"):
            outputs, *inputs = module.weight.shape
            count += rank * (outputs + torch.Size(inputs).numel())
    return count


def memory(parameters, student_lora, fake_lora, gpus, average):
    """GiB of parameters, gradients and optimizer state on each GPU with --shard full and bf16.

    What is trained has a float32 weight, gradient and two moments, 16 bytes; the average has 4;
    what is frozen 2. The LoRAs of one GPU share the teacher's parameters; under torchrun each
    network has shards of its own of them. student_lora, fake_lora: their parameters, 0 for none.
    """
    frozen = 1
    if gpus > 1 and student_lora:
        frozen += 1 + average
    if gpus > 1 and fake_lora:
        frozen += 1
    student, fake_score = student_lora or parameters, fake_lora or parameters
    total = 2 * parameters * frozen + 16 * (student + fake_score) + 4 * student * average
    return total / gpus / 2**30


def print_memory():
    print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
    for name, config in FULL_SIZE.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        count = sum(parameter.numel() for parameter in unet.parameters())
        lora = lora_parameters(unet, 64)
        for title, student_lora, fake_lora, average in (
            ("whole, averaged", 0, 0, True),
            ("whole", 0, 0, False),
            ("LoRA student, whole fake score", lora, 0, False),
            ("LoRA student and fake score", lora, lora, False),
        ):
            row = [memory(count, student_lora, fake_lora, n, average) for n in (1, 2, 4, 8)]
            cells = " | ".join(f"{gib:.1f}" for gib in row)
            print(f"| {name}, {title} | {cells} |")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    what = flags.benchmark_parser(__doc__).parse_args(arguments).what
    if what == "memory":
        return print_memory()
    if not what.isdecimal() or int(what) == 0 or arguments[0] != what:
        raise UserError("begin with the number of iterations to time, or with `memory`")
    return measure(train.parse_arguments(arguments[1:]), int(what))


if __name__ == "__main__":
    fsdp.run(main)
