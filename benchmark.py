"""What training costs.

    python train.py --benchmark 20        # seconds an iteration, with any other flags; under torchrun also what sharing it costs
    python benchmark.py                   # memory of parameters, gradients and optimizers of Stable Diffusion 1.5 and XL, computed
"""

import copy
import os
import sys
import time

import torch
from tqdm import tqdm

import data
import fsdp
import models

# The UNets' configurations, as the hub has them.
FULL_SIZE = {
    "SD1.5 512": dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
    "SDXL 1024": dict(sample_size=128, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                      up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(320, 640, 1280),
                      transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048, use_linear_projection=True,
                      addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816),
}


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
    events = [event for event in profile.key_averages() if event.key.startswith(("gloo:", "ncclDevKernel"))]
    return sum(event.device_time_total or event.cpu_time_total for event in events) / 1e6 / (2 * args.fake_updates)


def run(args, prepare, iterate):
    """Time N iterations, and in turn the network calls that those same iterations cannot avoid. Under torchrun also what one process
    takes that is alone and unsharded, for as many samples as each has of the batch."""
    if fsdp.launched() and fsdp.first():  # while the others wait to begin
        one = copy.copy(args)
        one.batch_size = max(1, args.batch_size // int(os.environ["WORLD_SIZE"]))
        try:
            networks, sources = prepare(one)
            alone = seconds_each(lambda iteration: iterate(networks, sources, iteration, one), "one process", networks, one)
        except torch.OutOfMemoryError:
            alone = None
        networks = sources = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
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
            print(f"one process alone, unsharded, with {one.batch_size} samples: "
                  + (f"{alone:.4f} s an iteration, so the efficiency is {alone / whole:.3f}" if alone else "does not fit into memory"))


# ---------------------------------------------------------------------------------------------------- memory, computed

def lora_parameters(unet, rank):
    """How many parameters LoRAs of this rank add to the layers that DMD2 adapts: two matrices for each."""
    count = 0
    for name, module in unet.named_modules():
        if name.endswith(models.LORA_LAYERS) and hasattr(module, "weight"):
            outputs, inputs, *kernel = module.weight.shape
            count += rank * (inputs * (kernel[0] * kernel[1] if kernel else 1) + outputs)
    return count


def memory(parameters, student_lora, fake_lora, gpus, average):
    """GiB that a GPU holds of parameters, gradients and optimizer state with --shard full and --dtype bf16. Trained parameters have
    float32 weight, gradient and two moments, 16 bytes; an average 4; what is frozen 2. One GPU's LoRAs share the teacher's parameters;
    under torchrun each network has its own shards of them."""
    frozen_copies = (student_lora > 0) * (1 + average) + (fake_lora > 0) if gpus > 1 else 0
    trained = [lora or parameters for lora in (student_lora, fake_lora)]
    total = 2 * parameters * (1 + frozen_copies) + 16 * sum(trained) + 4 * trained[0] * average
    return total / gpus / 2 ** 30


def print_memory():
    from diffusers import UNet2DConditionModel
    print("| | 1 GPU | 2 GPUs | 4 GPUs | 8 GPUs |\n|---|---|---|---|---|")
    for name, config in FULL_SIZE.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**config)
        count, lora = sum(p.numel() for p in unet.parameters()), lora_parameters(unet, 64)
        for title, student_lora, fake_lora, average in (("whole, averaged", 0, 0, True), ("whole", 0, 0, False), ("LoRA student, whole fake score", lora, 0, False),
                                                        ("LoRA student and fake score", lora, lora, False)):
            cells = (f"{memory(count, student_lora, fake_lora, gpus, average):.1f}" for gpus in (1, 2, 4, 8))
            print(f"| {name}, {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    print_memory()
