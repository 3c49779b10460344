"""Distil a diffusion teacher into a few-step student by distribution matching.

    python train.py                                  # DMD2 on the embedded teacher, 4 steps, minutes on two CPU cores
    python train.py --resume                         # go on where an interrupted run was
    python train.py --variant decoupled              # another paper's method: a preset of the switches below
    python train.py --variant dmd2 --gan-weight 0    # the same with one switch changed
    python train.py @recipes/gmm.args                # the plane, whose scores are known exactly: seconds
    python train.py @recipes/sd15_decoupled_4step.args --model PATH --prompts captions.txt     # Stable Diffusion 1.5; recipes/ has more
    python train.py --benchmark 20                   # seconds an iteration, and what of them the networks take
    torchrun --standalone --nproc_per_node=2 train.py          # the same run on two processes (fsdp.py)

The run directory holds config.json, metrics.jsonl, curves.png, pictures/, checkpoints/ (for --resume) and student/, the averaged
student as a diffusers network or LoRA.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

import checkpoint
import data
import errors
import export
import fsdp
import gmm
import losses
import models
import sample

# Each paper's method as a preset of the switches; a flag on the command line overrides it.
VARIANTS = {
    "dmd": dict(student_steps=1, fake_updates=1, regression_weight=0.25),                          # 2311.18828
    "dmd2": dict(gan_weight=5e-3),                                                                 # 2405.14867
    "fdistill": dict(gan_weight=5e-3, divergence="js"),                                            # 2502.15681
    "decoupled": dict(schedule="hybrid", normaliser="conditional"),                                # 2511.22677
}
DEFAULT_VARIANT = "dmd2"
LOG_EVERY = 10
# Flags that a run may go on with otherwise than it began, and flags that are no part of what it is.
MAY_DIFFER = ("iterations", "device", "dtype", "picture_every", "save_every", "keep", "shard", "timeout", "micro_batch", "activation_checkpointing",
              "vae", "vae_device", "text_device", "track")
UNSAVED = ("out", "checkpoint", "resume", "allow_changes", "reset_optimizer", "overwrite", "benchmark")
# Where the health figures of a run that goes well stay; see losses.health. std is relative to the teacher's samples.
HEALTHY = {
    "std": (0.7, 1.4, "below: the student goes grey or blurred; above: it over-saturates. Try a lower --guidance or learning rate"),
    "gap": (0.0, 2.5, "the fake score does not keep up with the student. Try a higher --fake-updates or --fake-learning-rate, "
                      "or a lower --learning-rate"),
}


def add_method_flags(parser):
    method = parser.add_argument_group("method")
    method.add_argument("--model", metavar="PATH", help="Stable Diffusion 1.5, 2 or XL as a diffusers directory, hub id or .safetensors file; EDM's .pkl or its "
                                                        "UNet2DModel directory; emoji-classes, the embedded one of that kind; gmm or gmm-imperfect (default: emoji, the embedded text teacher)")
    method.add_argument("--prompts", metavar="FILE", help="training prompts: .txt, one a line, or a pickled list of them (default: the embedded set's captions)")
    method.add_argument("--real", "--real-images", metavar="PATH", help="real data, for the GAN and --student-input data: latents made by `python data.py latents`, a folder of "
                                                       "pictures with captions, or DMD2's LMDB (default: the embedded set)")
    method.add_argument("--variant", choices=VARIANTS, help=f"preset of the switches below (default {DEFAULT_VARIANT})")
    method.add_argument("--student-steps", type=errors.positive, default=4, help="of the few-step sampler it is trained for")
    method.add_argument("--first-timestep", type=errors.natural, metavar="T", help="of the student's sampler (default: the noisiest, 999 of 1000)")
    method.add_argument("--student-input", choices=("backward", "data"), default="backward",
                        help="what the student is trained on: its own earlier steps, or noised real data")
    method.add_argument("--guidance", type=errors.positive_number, default=sample.DEFAULT_GUIDANCE, help="of the teacher; 1 is none")
    method.add_argument("--fake-updates", type=errors.positive, default=5, metavar="K", help="fake-score updates for each of the student's")
    method.add_argument("--dm-weight", type=errors.weight, default=1.0, help="of distribution matching")
    method.add_argument("--ca-weight", type=errors.weight, default=1.0, help="of CFG augmentation")
    method.add_argument("--schedule", choices=("coupled", "full", "constrained", "hybrid"), default="coupled",
                        help="timesteps at which the two are read")
    method.add_argument("--normaliser", choices=("guided", "conditional", "none"), default="guided", help="x0 of the teacher that both are normalised by")
    method.add_argument("--normaliser-floor", type=errors.positive_number, default=1e-3)
    method.add_argument("--divergence", choices=losses.DIVERGENCES, default="reverse-kl", help="all but reverse-kl need the GAN")
    method.add_argument("--gan-weight", type=errors.weight, default=0.0, help="of the student's GAN loss; 0 is no GAN")
    method.add_argument("--critic-weight", type=errors.positive_number, default=1e-2, help="of the critic's loss beside the denoising loss")
    method.add_argument("--regression-weight", type=errors.weight, default=0.0)
    method.add_argument("--regression", choices=("mse", "lpips"), default="mse")
    method.add_argument("--pairs", metavar="DIR", help="for the regression: noise-image pairs made by `python data.py pairs`")
    method.add_argument("--lora", type=errors.natural, default=0, metavar="RANK", help="train a LoRA of this rank for a student; 0 is the whole network")
    method.add_argument("--fake-lora", type=errors.natural, metavar="RANK", help="the same for the fake score (default: as --lora)")
    method.add_argument("--lora-alpha", type=errors.positive_number, default=8.0, help="a LoRA counts alpha / rank times")
    method.add_argument("--mean-variance-weight", type=errors.weight, default=0.0)
    method.add_argument("--mean-variance-target", type=float, nargs=2, metavar=("MEAN", "VARIANCE"), help="(default: that of 64 of the teacher's samples)")


def add_run_flags(parser):
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--iterations", type=errors.positive, default=600, help="fake-score updates in all")
    optimisation.add_argument("--batch-size", type=errors.positive, default=32, help="over all processes")
    optimisation.add_argument("--learning-rate", type=errors.positive_number, default=2e-4, help="of the student")
    optimisation.add_argument("--fake-learning-rate", type=errors.positive_number, default=2e-4, help="of the fake score")
    optimisation.add_argument("--warmup", type=errors.natural, default=50, help="iterations until the learning rates are reached")
    optimisation.add_argument("--clip", type=errors.positive_number, default=10.0, help="largest norm of a gradient")
    optimisation.add_argument("--ema", type=float, default=0.95, help="decay of the averaged student at each of its updates; 0 is none")
    memory = parser.add_argument_group("memory")
    memory.add_argument("--micro-batch", type=errors.positive, metavar="N", help="samples that a process passes through a network at once; the rest of its share "
                                                                                 "of the batch follows in turn, which is gradient accumulation (default: all)")
    memory.add_argument("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False,
                        help="compute activations again in the backward pass rather than keep them")
    memory.add_argument("--vae", metavar="PATH", help="another decoder, such as madebyollin/taesd; none leaves it and the pictures out")
    memory.add_argument("--vae-device", metavar="DEVICE", help="such as cpu (default: --device)")
    memory.add_argument("--text-device", metavar="DEVICE", help="of the text encoders (default: --device)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="DIR", help="run directory (default: runs/VARIANT)")
    run.add_argument("--resume", nargs="?", const="", metavar="DIR",
                     help="go on with the run in DIR, or in --out, from its newest checkpoint and with the flags that it had; "
                          "DIR may also be a checkpoint, RUN/checkpoints/NUMBER: later ones are then renamed NUMBER.aside-1 (2, ...)")
    run.add_argument("--allow-changes", action="store_true", help="with --resume: go on although flags or the teacher are not what they were, with a new head for a GAN "
                          "that was not there")
    run.add_argument("--reset-optimizer", action="store_true", help="with --resume: forget the moments and step counts of both optimizers")
    run.add_argument("--overwrite", action="store_true", help="replace the run that is in --out")
    run.add_argument("--seed", type=errors.natural, default=0, help="everything random follows from it")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--dtype", type=errors.dtype("float32", "bfloat16"), default="bfloat16" if torch.cuda.is_available() else "float32", metavar="DTYPE",
                     help="float32 or bfloat16 (bf16): of matrix products and of what is frozen; trained weights and optimizers are float32")
    run.add_argument("--track", choices=("wandb", "trackio"), help="send figures and pictures there too (pip install wandb, or trackio)")
    run.add_argument("--picture-every", type=errors.positive, default=100, metavar="N", help="iterations between pictures")
    run.add_argument("--save-every", type=errors.positive, default=100, metavar="N", help="iterations between saves")
    run.add_argument("--keep", type=errors.positive, default=2, metavar="N", help="newest checkpoints that are kept")
    run.add_argument("--shard", choices=("full", "hybrid", "none"), default="full",
                     help="under torchrun: what each process holds of the networks, 1/N, 1/N of its node's copy, or all")
    run.add_argument("--timeout", type=errors.positive, default=600, metavar="SECONDS", help="under torchrun: longest wait for another process")
    run.add_argument("--benchmark", type=errors.positive, metavar="N", help="time N iterations and write nothing")


def parse_arguments(arguments=None):
    """From the weakest: what stands above, the variant's preset, what a run that is gone on with had, what is said now."""
    parser = errors.Parser(__doc__)
    add_method_flags(parser)
    add_run_flags(parser)
    said = parser.parse_args(arguments)
    out, named = checkpoint.locate(said.resume or said.out or f"runs/{said.variant or DEFAULT_VARIANT}")
    restarted = checkpoint.begun_by_this_launch(out)  # by torchrun: goes on by itself
    if restarted:
        named = None
    saved, allowed = checkpoint.saved_flags(out, named) if restarted or said.resume is not None else ({}, {})
    variant = said.variant or saved.get("variant", DEFAULT_VARIANT)
    parser.set_defaults(**saved | (VARIANTS[variant] if variant != saved.get("variant") else {}) | {"variant": variant})
    args = parser.parse_args(arguments)
    check_arguments(args, parser)
    args.out, args.checkpoint = out, named
    fields = checkpoint.differing(saved, configuration(args), MAY_DIFFER) if saved else []
    if fields and not args.allow_changes:
        raise errors.UserError(f"{named or out} is of another configuration: {'; '.join(fields)}. Leave these flags out to go on with it as it was; "
                               "--allow-changes goes on with it as it is now")
    if restarted:  # what was said of the optimizers was said of the first beginning
        args.resume, args.reset_optimizer = "", False
    # A beginning that came to no save is begun again as it was meant.
    args.allow_changes |= allowed.get("allow_changes", False)
    args.reset_optimizer |= allowed.get("reset_optimizer", False)
    return args


def configuration(args):
    """The flags that make a run what it is, as they are kept with it."""
    return {name: value for name, value in vars(args).items() if name not in UNSAVED}


def check_arguments(args, parser):
    if not 0 <= args.ema < 1:
        parser.error(f"argument --ema: {args.ema} is not in [0, 1)")
    if args.out and args.resume:
        parser.error("--out and --resume DIR both name a run directory: use one")
    if args.resume is None and (args.allow_changes or args.reset_optimizer):
        parser.error(f"{'--allow-changes' if args.allow_changes else '--reset-optimizer'} says how to go on with a run: it needs --resume")
    if args.lora or args.fake_lora:
        models.check_peft("--lora" if args.lora else "--fake-lora")
    if args.divergence != "reverse-kl" and args.gan_weight == 0:
        parser.error(f"--divergence {args.divergence} reads the density ratio off the GAN's head: it needs a --gan-weight above 0")
    if args.regression_weight > 0 and not args.pairs:
        parser.error(f"--regression-weight needs noise-image pairs: make them with `python data.py pairs --out DIR{f' --model {args.model}' if args.model else ''} "
                     f"--guidance {args.guidance:g}`, then name them with --pairs DIR, or leave the regression out with --regression-weight 0")
    if not any((args.dm_weight, args.ca_weight, args.gan_weight, args.regression_weight, args.mean_variance_weight)):
        parser.error("nothing moves the student: --dm-weight, --ca-weight, --gan-weight, --regression-weight and --mean-variance-weight are all 0")
    mean, variance = args.mean_variance_target or (0.0, 1.0)
    if not (math.isfinite(mean) and 0 < variance < math.inf):
        parser.error(f"argument --mean-variance-target: {mean} and {variance} are not a mean and a variance above 0")


@dataclass
class Sources:
    """What a run draws from; real data and pairs only where a switch needs them."""
    prompts: object
    real: object = None
    pairs: object = None

    def about(self):
        """What a run that is gone on with has to have again."""
        digest = hashlib.sha256("\n".join(self.prompts.texts).encode()).hexdigest()[:16]
        return {"prompts": f"{len(self.prompts.texts)} ({digest})", "real data": getattr(self.real, "count", None),
                "pairs": getattr(self.pairs, "count", None)}


def open_sources(model, args):
    prompts = data.training_prompts(args.prompts, model)
    real = data.real_data(model, args.real) if args.gan_weight > 0 or args.student_input == "data" else None
    if real is not None:
        data.check_labels(model, real)
    return Sources(prompts, real, data.Pairs(args.pairs, model, args.guidance) if args.regression_weight > 0 else None)


class Networks:
    """Teacher, student and fake score, the latter two the same at the start, and what moves them."""

    def __init__(self, model, args, mesh=None):
        self.model, self.schedule, self.uncond = model, model.schedule, model.uncond
        self.timesteps = model.schedule.timesteps(args.student_steps, args.first_timestep)
        self.at_once = args.micro_batch or args.batch_size
        self.fresh_since = 0  # the iteration at which the optimizers began, from which warm-up counts
        self.teacher_print = models.fingerprint(model.teacher) if fsdp.first() else None
        place = lambda module: fsdp.shard(module, mesh, model.device, model.dtype)
        make = lambda rank: models.trainable_copy(model.origin, rank, args.lora_alpha, args.seed)
        fake_rank = args.lora if args.fake_lora is None else args.fake_lora
        # Copies are made before what they are copies of is sharded, and each is sharded before the next is made; but for a whole fake
        # score beside a LoRA, which lets the rest of its network lie in a shorter dtype.
        fake_score = make(0) if fake_rank == 0 and args.lora else None
        self.student = place(make(args.lora))
        self.averaged_student = place(make(args.lora).requires_grad_(False)) if args.ema > 0 else self.student
        fake_score = fake_score or make(fake_rank)
        head = models.gan_head(self.student, self.uncond, model.sample_shape, args.seed).requires_grad_(True) if args.gan_weight > 0 else None
        self.fake_score = place(models.FakeScore(fake_score, head))
        self.teacher = place(model.teacher.to(model.frozen_dtype))
        if args.activation_checkpointing:
            for denoiser in (self.student, self.fake_score.denoiser):
                models.checkpoint_activations(denoiser)
        self.student_optimizer = adamw(self.student, args.learning_rate)
        self.fake_optimizer = adamw(self.fake_score, args.fake_learning_rate)
        lpips = args.regression == "lpips" and args.regression_weight > 0
        self.regression_loss = models.lpips_loss(model) if lpips else losses.regression_loss

    def tensors(self):
        """{name: tensor} of all that changes, which is what a checkpoint holds."""
        named = self.network_tensors()
        for part, module, optimizer in (("student", self.student, self.student_optimizer), ("fake_score", self.fake_score, self.fake_optimizer)):
            for name, parameter in trained(module).items():
                named |= {f"{part}_optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        return named

    def network_tensors(self):
        frozen = lambda module: module.state_dict().keys() - trained(module).keys() - dict(module.named_buffers()).keys()
        modules = {"student": (self.student, frozen(self.student)), "averaged_student": (self.averaged_student, frozen(self.student)),
                   "fake_score": (self.fake_score, frozen(self.fake_score))}
        if self.averaged_student is self.student:
            del modules["averaged_student"]
        return {f"{part}.{name}": tensor for part, (module, without) in modules.items()
                for name, tensor in module.state_dict().items() if name not in without}

    @torch.no_grad()
    def move_average(self, decay):
        """decay: how much of the averaged student stays."""
        if self.averaged_student is not self.student:
            average, latest = dict(self.averaged_student.named_parameters()), trained(self.student)
            torch._foreach_lerp_([average[name] for name in latest], list(latest.values()), 1 - decay)


def trained(module):
    """{name: parameter}, without what a LoRA leaves as it is."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adamw(module, learning_rate):
    """AdamW whose state is there from the start, as AdamW itself would make it at its first step: so it can be loaded into."""
    parameters = list(trained(module).values())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, fused=True)
    for parameter in parameters:
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device),
                                      "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def teacher_statistics(model, prompts, seed, at_once, count=64):
    """[mean, variance] over all elements of the teacher's samples without guidance."""
    noise = sample.column_noise(model, count, 1, seed)
    texts = prompts.draw(data.Draws(seed, 0, count))
    teacher = sample.teacher_row(model, sample.default_teacher_steps(model), 1.0)
    x = sample.draw_in_batches(teacher, noise, model.encode(texts), at_once)
    return [x.mean().item(), x.var().item()]


# ---------------------------------------------------------------------------------------------------- the two steps

def draw_levels(kind, t_student, T, draws):
    """Timesteps at which distribution matching and CFG augmentation are read, tau_DM and tau_CA (B,), for a student that was given
    x_t at timestep t_student: over all levels but the outermost 2 %, or only cleaner ones than the student's input. 2511.22677"""
    everywhere = (int(0.02 * T), int(0.98 * T) + 1)
    cleaner = (min(everywhere[0], t_student // 2), max(min(everywhere[1], t_student), 1))
    t_dm = draws.integers(*(cleaner if kind == "constrained" else everywhere))
    if kind == "coupled":
        return t_dm, t_dm
    return t_dm, draws.integers(*(everywhere if kind == "full" else cleaner))


def divergence_weight(fake_score, logit, t, T, divergence):
    """h(r) of f-distill (2502.15681) with both its normalisations: r by its running mean in its time bin, h by its mean over the
    global batch. logit, t (B,) -> (B,)."""
    r = losses.density_ratio(logit)
    time_bin = losses.time_bin(t, T, len(fake_score.ratio_means))
    empty = torch.zeros_like(fake_score.ratio_means)
    total, count = fsdp.sum_over_processes(torch.stack([empty.index_add(0, time_bin, r), empty.index_add(0, time_bin, torch.ones_like(r))]))
    fake_score.ratio_means.copy_(losses.update_bin_means(fake_score.ratio_means, total, count))
    h = losses.DIVERGENCES[divergence](r / fake_score.ratio_means[time_bin])
    return h / (fsdp.sum_over_processes(h.sum()) / count.sum())


def read_fake_score(networks, x, eps, t, cond, args):
    """x0_fake (B, C, H, W) and logit (B,) at x diffused to t and, with a GAN, the gradient (B, C, H, W) of the samples' student losses,
    summed, with respect to x. It reaches no network's parameters, and no graph is left."""
    free_x = x.detach().requires_grad_()
    with torch.set_grad_enabled(args.gan_weight > 0):
        x0_fake, logit = networks.fake_score(networks.schedule.add_noise(free_x, eps, t), t, cond)
    if args.gan_weight == 0:
        return x0_fake, None, None
    return x0_fake.detach(), logit.detach(), torch.autograd.grad(losses.gan_student_loss(logit), free_x)[0] * len(x)


def pull_back(networks, x, x_t, t_student, cond, gradient):
    """x.backward(gradient), where x is what the student made of x_t. A batch that goes through it in parts came without a graph: each
    part is made once more."""
    if x.requires_grad:
        return x.backward(gradient)
    again = lambda x_t, cond, gradient: networks.student(x_t, t_student, cond).backward(gradient)
    models.in_parts(networks.at_once, again, x_t, cond, gradient)


def student_step(networks, x, x_t, t_student, cond, sources, draws, args):
    """Move the student so that its samples x (B, C, H, W), which it made of x_t at timestep t_student, become likelier under the teacher
    and less likely under the fake score. Returns health figures."""
    schedule, T = networks.schedule, len(networks.schedule)
    in_parts = functools.partial(models.in_parts, networks.at_once)

    # Diffuse x, and ask the fake score and the teacher what it was.
    t_dm, t_ca = draw_levels(args.schedule, t_student, T, draws)                                  # (B,), (B,)
    eps_dm, free_x = draws.normal(*x.shape[1:]), x.detach()
    x0_fake, logit, gan_gradient = in_parts(lambda *batch: read_fake_score(networks, *batch, args), free_x, eps_dm, t_dm, cond)
    with torch.no_grad():
        ask = lambda scale: lambda x_t, t, cond: models.cond_and_uncond_x0(networks.teacher, x_t, t, cond, networks.uncond, scale)
        needed = args.guidance if args.schedule == "coupled" or args.normaliser == "guided" else 1  # else DM needs no x0_uncond
        x0_cond, x0_uncond = in_parts(ask(needed), schedule.add_noise(free_x, eps_dm, t_dm), t_dm, cond)          # (B, C, H, W) each
        x0_cond_ca, x0_uncond_ca = x0_cond, x0_uncond
        if args.schedule != "coupled":
            x_ca = schedule.add_noise(free_x, draws.normal(*x.shape[1:]), t_ca)
            x0_cond_ca, x0_uncond_ca = in_parts(ask(args.guidance), x_ca, t_ca, cond)

    # The direction: distribution matching and CFG augmentation. Coupled, they add up to DMD2's x0_fake - x0_guided.
    dm = args.dm_weight * losses.dm_direction(x0_cond, x0_fake)
    ca = args.ca_weight * losses.ca_direction(x0_cond_ca, x0_uncond_ca, args.guidance)
    if args.normaliser != "none":
        scale = args.guidance if args.normaliser == "guided" else 1
        dm = dm / losses.normaliser(free_x, models.guide(x0_cond, x0_uncond, scale), args.normaliser_floor)
        ca = ca / losses.normaliser(free_x, models.guide(x0_cond_ca, x0_uncond_ca, scale), args.normaliser_floor)
    if args.divergence != "reverse-kl":  # f-distill: weigh what was read at the very x_t and t whose ratio it is
        h = divergence_weight(networks.fake_score, logit, t_dm, T, args.divergence).view(-1, 1, 1, 1)
        dm = h * dm
        ca = h * ca if args.schedule == "coupled" else ca

    # The student's update, as a gradient with respect to x: that of losses.surrogate_loss(x, dm + ca), and of what is added.
    gradient = (dm + ca) / x.numel()
    if args.gan_weight > 0:
        gradient += args.gan_weight * gan_gradient / len(x)
    if args.mean_variance_weight > 0:
        leaf = free_x.clone().requires_grad_()
        loss = losses.mean_variance_loss(leaf, *args.mean_variance_target)
        gradient += args.mean_variance_weight * torch.autograd.grad(loss, leaf)[0]
    pull_back(networks, x, x_t, t_student, cond, gradient)
    if args.regression_weight > 0:  # on samples of its own: pairs have their own noise and prompts
        noise, x0_pair, prompts = sources.pairs.draw(draws)

        def regress(noise, x0_pair, cond):
            x_pair = networks.student(schedule.noise_scale * noise, networks.timesteps[0], cond)
            (args.regression_weight * len(noise) / len(x) * networks.regression_loss(x_pair, x0_pair)).backward()

        in_parts(regress, noise, x0_pair, networks.model.encode(prompts))

    norm = fsdp.clip_gradients(networks.student, args.clip, "student")
    networks.student_optimizer.step()
    networks.student_optimizer.zero_grad()
    networks.move_average(args.ema)
    return {"student_grad_norm": norm, "dm": dm.abs().mean(), "ca": ca.abs().mean(),
            **losses.health(free_x, models.guide(x0_cond, x0_uncond, args.guidance), x0_fake)}


def fake_score_step(networks, x, cond, sources, draws, args):
    """Keep the fake score a denoiser of the student's present samples x (B, C, H, W), without their graph, and its head, where it
    has one, a judge between them and real data."""
    schedule = networks.schedule
    t, eps = draws.integers(0, len(schedule)), draws.normal(*x.shape[1:])                        # (B,), (B, C, H, W)
    x_real = eps_real = cond_real = None
    if args.gan_weight > 0:
        x_real, prompts = sources.real.draw(draws)                                               # (B, C, H, W)
        eps_real, cond_real = draws.normal(*x.shape[1:]), networks.model.encode(prompts)

    def learn(x, eps, t, cond, x_real, eps_real, cond_real):
        """The gradient of a part of the batch, and its part of the figures."""
        x0_fake, logit_fake = networks.fake_score(schedule.add_noise(x, eps, t), t, cond)            # (B, C, H, W), (B,)
        weight = losses.denoising_weight(networks.model.prediction, *schedule.at(t, x))
        loss = denoising_loss = losses.denoising_loss(x0_fake, x, weight)
        told = None
        if args.gan_weight > 0:
            _, logit_real = networks.fake_score(schedule.add_noise(x_real, eps_real, t), t, cond_real)
            loss = loss + args.critic_weight * losses.gan_critic_loss(logit_real, logit_fake)
            told = ((logit_real > 0).float() + (logit_fake < 0).float()) / 2                         # (B,)
        (loss * len(x) / len(draws)).backward()
        return denoising_loss.detach()[None] * len(x) / len(draws), told

    fake_loss, told = models.in_parts(networks.at_once, learn, x, eps, t, cond, x_real, eps_real, cond_real)
    figures = {"fake_loss": fake_loss.sum()} | ({} if told is None else {"logit_accuracy": told.mean()})
    figures["fake_grad_norm"] = fsdp.clip_gradients(networks.fake_score, args.clip, "fake score")
    networks.fake_optimizer.step()
    networks.fake_optimizer.zero_grad()
    return figures


def iterate(networks, sources, iteration, args):
    """One iteration: samples of the student, every K-th time a student step on them, and always a fake-score step."""
    draws = data.Draws(args.seed, iteration, args.batch_size, fsdp.share(args.batch_size), networks.model.device)
    student_turn = iteration % args.fake_updates == 0
    for optimizer, lr in ((networks.student_optimizer, args.learning_rate), (networks.fake_optimizer, args.fake_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (iteration - networks.fresh_since + 1) / (args.warmup + 1))

    # What the student is given at a step of its sampler that this iteration's draw chooses.
    in_parts = functools.partial(models.in_parts, networks.at_once)
    step = draws.below(len(networks.timesteps))
    t_student = networks.timesteps[step]
    if args.student_input == "backward":  # backward simulation: its own earlier steps
        cond = networks.model.encode(sources.prompts.draw(draws))
        noise = draws.normal(step + 1, *networks.model.sample_shape)                               # (B, steps, C, H, W)
        to_last = lambda noise, cond: models.last_input(networks.student, noise.transpose(0, 1), cond, networks.timesteps[:step + 1])
        x_t = in_parts(to_last, noise, cond)                                                       # (B, C, H, W)
    else:
        x_real, prompts = sources.real.draw(draws)
        cond = networks.model.encode(prompts)
        x_t = networks.schedule.add_noise(x_real, draws.normal(*x_real.shape[1:]), torch.full((len(x_real),), t_student, device=x_real.device))

    # Its samples; the graph of a whole batch is kept if it goes through at once.
    with torch.set_grad_enabled(student_turn and len(draws) <= networks.at_once):
        x = in_parts(networks.student, x_t, t_student, cond)                                       # (B, C, H, W)
    figures = student_step(networks, x, x_t, t_student, cond, sources, draws, args) if student_turn else {}
    return figures | fake_score_step(networks, x.detach(), cond, sources, draws, args)


# ---------------------------------------------------------------------------------------------------- what a run leaves behind

class Log:
    """metrics.jsonl, the curves, and one warning a health figure when it leaves its range. Every process keeps the rows; the first
    one writes them. saved: what save() gave after `iteration`."""

    def __init__(self, out, teacher_std, iteration, saved):
        self.path, self.teacher_std, self.warned = out / "metrics.jsonl", teacher_std, set()
        self.waiting, self.figures = {}, saved.get("figures", {})  # tensors of this process; their means over all, since the last row
        self.began = time.perf_counter() - saved.get("seconds", 0)
        self.rows = fsdp.from_first(lambda: [row for row in self.read() if row["iteration"] <= iteration])  # what the checkpoint knows of
        if fsdp.first():
            checkpoint.replace_file(self.path, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in self.rows)))

    def read(self):
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # a run that is killed may leave its last line unfinished
                yield json.loads(line)

    def save(self):
        """What a checkpoint has to know: the time so far, and the figures since the last row, {name: [value, ...]}. Only this waits for
        the accelerator and the other processes."""
        if self.waiting:
            means = fsdp.mean_over_processes(torch.stack([value for values in self.waiting.values() for value in values])).tolist()
            for name, values in self.waiting.items():
                self.figures[name] = self.figures.get(name, []) + [means.pop(0) for _ in values]
            self.waiting = {}
        return {"seconds": time.perf_counter() - self.began, "figures": dict(self.figures)}

    def add(self, iteration, figures):
        """Keep an iteration's figures; write their means every LOG_EVERY iterations."""
        for name, value in figures.items():
            self.waiting.setdefault(name, []).append(value)
        if iteration % LOG_EVERY:
            return None
        row = {"iteration": iteration, "seconds": round(self.save()["seconds"], 2)}
        row |= {name: sum(values) / len(values) for name, values in self.figures.items()}
        if not all(math.isfinite(value) for value in row.values()):
            raise fsdp.NotFinite(f"a figure of iteration {iteration} is not finite: {row}")
        self.figures = {}
        self.rows.append(row)
        if fsdp.first():
            with checkpoint.explain_failed_write(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def check_health(self):
        """Means over the last 50 rows, so that one odd batch raises no alarm."""
        for name, (low, high, meaning) in HEALTHY.items():
            values = [row[name] for row in self.rows[-50:] if name in row]
            value = sum(values) / len(values) / (self.teacher_std if name == "std" else 1) if values else low
            if not low <= value <= high and name not in self.warned:
                self.warned.add(name)
                fsdp.say(f"warning: the health figure {name} is {value:.2f}, outside [{low}, {high}]: {meaning}")

    def draw_curves(self):
        if not fsdp.first():
            return
        names = ("fake_loss", "dm", "ca", "std", "gap", "cosine", "student_grad_norm", "logit_accuracy")
        curves = {name: [(row["iteration"], row[name]) for row in self.rows if name in row] for name in names}
        sample.draw_curves({name: points for name, points in curves.items() if points or not self.rows}, self.path.parent / "curves.png")


class Gallery:
    """A picture of the run every so often, from the same prompts and the same noise each time."""

    def __init__(self, out, networks, prompts, args):
        self.out, self.networks, self.args = out / "pictures", networks, args
        self.prompts = [prompts.texts[i * len(prompts.texts) // 8] for i in range(min(8, len(prompts.texts)))]
        self.cond = networks.model.encode(self.prompts)
        self.noise = sample.column_noise(networks.model, len(self.prompts), args.student_steps + 1, args.seed)
        row = sample.teacher_row(networks.model, sample.default_teacher_steps(networks.model), args.guidance)
        self.x_teacher = sample.draw_in_batches(row, self.noise, self.cond, networks.at_once)
        self.decode = lambda x: networks.model.decode(x, networks.at_once)
        self.teacher = (row.label, self.decode(self.x_teacher)) if networks.model.decodes and fsdp.first() else None

    def draw(self, iteration):
        """The picture's path; None without a decoder."""
        networks = self.networks
        if not networks.model.decodes:
            return None
        row = sample.student_row(networks.averaged_student, networks.timesteps)
        x = sample.draw_in_batches(row, self.noise, self.cond, networks.at_once)
        t = len(networks.schedule) // 2
        guided = lambda x_t, cond: models.guided_x0(networks.teacher, x_t, t, cond, networks.uncond, self.args.guidance)
        with torch.no_grad():
            x_t = networks.schedule.add_noise(x, self.noise[-1], torch.full((len(x),), t, device=x.device))
            x0_real = models.in_parts(networks.at_once, guided, x_t, self.cond)
            x0_fake, _ = models.in_parts(networks.at_once, networks.fake_score, x_t, t, self.cond)
        decode, path = self.decode, self.out / f"{iteration:06d}.png"
        if fsdp.first():
            sample.draw_grid([self.teacher, (row.label, decode(x)), (f"teacher's x0 of it\ndiffused to t = {t}", decode(x0_real)),
                              ("fake score's x0\nof the same", decode(x0_fake))],
                             sample.captions(networks.model, self.prompts), path)
        return path


class Tracker:
    """wandb or trackio, which are called alike; nothing without a name."""

    def __init__(self, name, out, config):
        self.package = None
        if name and fsdp.first():
            self.package = import_tracker(name)
            self.package.init(project="dmd", name=out.name, config=config)

    def log(self, iteration, figures, picture=None):
        if self.package:
            figures = {key: value for key, value in figures.items() if key != "iteration"}
            figures |= {"picture": self.package.Image(str(picture))} if picture else {}
            self.package.log(figures, step=iteration)

    def finish(self):
        if self.package:
            self.package.finish()


def import_tracker(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise errors.UserError(f"--track {name} needs a package that is not installed: pip install {name}") from None


def student_writer(out, networks, config):
    """A function that writes the averaged student, as it is now, to out/student, in the first process."""
    network, own = networks.averaged_student.network, trained(networks.student.network) if config["lora"] else None
    state = fsdp.whole_state(network, own)

    def write(folder):
        folder.mkdir(parents=True)
        if config["lora"]:
            models.save_lora(network, state, folder, networks.model)
        else:
            network.save_config(folder)
            save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        (folder / "README.md").write_text(export.model_card(networks.model, networks.timesteps, config))

    return lambda: checkpoint.replace_folder(out / "student", write)


def manifest_of(networks, sources, config, iteration, log):
    network = networks.model.origin.network
    return {"iteration": iteration, "processes": fsdp.world(), "teacher": networks.teacher_print, "config": config, "log": log,
            "fresh_since": networks.fresh_since, "data": sources.about(),
            "network": {"class": networks.model.network_class.__name__} | {k: v for k, v in network.config.items() if not k.startswith("_")}}


def restore(networks, sources, config, args):
    """Put a checkpoint back. Returns it with its manifest, (None, None) if there is none yet."""
    folder, manifest = checkpoint.choose(args.out, args.checkpoint)
    if not folder:
        fsdp.say(f"{args.out} has no checkpoint yet: from the beginning")
        return None, None
    if not args.allow_changes:
        present = fsdp.from_first(lambda: manifest_of(networks, sources, config, 0, {}))  # the teacher's print is the first process's
        fields = checkpoint.differing(manifest["network"], present["network"])
        fields += ["the teacher's weights are others"] * (manifest["teacher"] != present["teacher"])
        fields += checkpoint.differing(manifest.get("data", present["data"]), present["data"])
        if fields:
            raise errors.UserError(f"{folder} is of another model or of other data: {'; '.join(fields)}. If you mean it: --allow-changes")
    tensors = networks.network_tensors() if args.reset_optimizer else networks.tensors()
    new = checkpoint.load(folder, tensors, ("fake_score.head.", "fake_score_optimizer.head.") if args.allow_changes else ())
    fsdp.say(f"going on from {folder}" + (", with a new GAN head" if new else "") + (", with new optimizers" if args.reset_optimizer else ""))
    networks.fresh_since = manifest["iteration"] if args.reset_optimizer else manifest.get("fresh_since", 0)
    write_student = student_writer(args.out, networks, config)  # a kill may have come between a checkpoint and its student
    fsdp.from_first(write_student)
    return folder, manifest


# ---------------------------------------------------------------------------------------------------- the loop

def train(networks, sources, config, args):
    # Where to write, and where to start.
    out, resume = args.out, args.resume is not None
    size = sum(tensor.numel() * tensor.element_size() for tensor in networks.tensors().values())
    fsdp.from_first(lambda: checkpoint.prepare_run_directory(out, resume, args.overwrite, bytes_needed=(args.keep + 1) * size))
    folder, manifest = restore(networks, sources, config, args) if resume else (None, None)
    start, saved_log = (manifest["iteration"], manifest.get("log", {})) if manifest else (0, {})

    with StopAtSignal() as stop:
        allowed = {"allow_changes": args.allow_changes, "reset_optimizer": args.reset_optimizer}
        fsdp.from_first(lambda: checkpoint.write_beginning(out, config, folder, allowed))

        # What the run is watched by.
        kind = gmm.Gallery if isinstance(networks.model, gmm.Model) else Gallery
        gallery = kind(out, networks, sources.prompts, args)
        log = Log(out, gallery.x_teacher.flatten(1).std(dim=1).mean().item(), start, saved_log)
        if start == 0:
            gallery.draw(0)
        elif start >= args.iterations:
            fsdp.say(f"this run has had its {start} iterations already; --iterations asks for more")
        tracker = Tracker(args.track, out, config)
        loop(networks, sources, config, args, gallery, log, tracker, start, stop)
        tracker.finish()
    fsdp.say(f"pictures: {out}/pictures, curves: {out}/curves.png, student: {out}/student\n"
             f"sample it: python sample.py --student {out}")


def loop(networks, sources, config, args, gallery, log, tracker, start, stop):
    out, writer = args.out, checkpoint.Writer(args.out, args.keep)
    progress = tqdm(range(start, args.iterations), initial=start, total=args.iterations, desc=args.variant, unit="it", disable=not fsdp.first())

    for iteration in progress:
        # Student step and fake-score step.
        try:
            figures = iterate(networks, sources, iteration, args)
            row = log.add(iteration + 1, figures)
        except fsdp.NotFinite as error:
            progress.close()
            writer.wait()
            write_student = student_writer(out, networks, config)
            fsdp.from_first(write_student)
            raise errors.UserError(f"stopped at iteration {iteration + 1}: {error}. The last good student is in {out / 'student'}; to go on from the "
                                   f"last checkpoint, more slowly: --resume {out} --allow-changes --learning-rate LOWER (or --clip)", status=1) from None

        # Log, picture, save.
        done = iteration + 1
        if row:
            log.check_health()
            tracker.log(done, row)
            progress.set_postfix({name: f"{row[name]:.3f}" for name in ("fake_loss", "std", "gap") if name in row})
        if done % args.picture_every == 0 or done == args.iterations:
            tracker.log(done, {}, gallery.draw(done))
            log.draw_curves()
        asked = fsdp.largest_over_processes(stop.asked)
        if done % args.save_every == 0 or done == args.iterations or asked:
            writer.save(networks.tensors(), manifest_of(networks, sources, config, done, log.save()), student_writer(out, networks, config))
        writer.check()
        if asked and done < args.iterations:
            progress.close()
            writer.wait()
            fsdp.say(f"interrupted after {done} of {args.iterations} iterations; go on with --resume {out}")
            sys.exit(128 + asked)
    writer.wait()


class StopAtSignal:
    """Ctrl-C and SIGTERM are noted and obeyed between two iterations; a second one stops at once. `asked` is the signal's number."""

    def __enter__(self):
        self.asked = 0
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.asked = number
        if fsdp.first():  # not by print, which the signal may have interrupted
            os.write(2, b"\nstopping after this iteration and a save; once more stops at once\n")
        for handled in self.before:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------- from flags to a run

def prepare(args, mesh=None):
    """The networks and what they are trained on."""
    model = models.load_model(args.model or data.EMOJI_TEACHER, fsdp.own_device(args.device), getattr(torch, args.dtype),
                              vae=args.vae, teacher_device="cpu" if mesh else None, text_device=args.text_device, vae_device=args.vae_device)
    levels = len(model.schedule) if args.first_timestep is None else args.first_timestep + 1
    if not args.student_steps <= levels <= len(model.schedule):
        raise errors.UserError(f"--student-steps {args.student_steps} and --first-timestep {levels - 1} do not fit the model's "
                               f"{len(model.schedule)} noise levels")
    if model.prediction == "edm" and args.guidance != 1:
        fsdp.say(f"warning: --guidance {args.guidance:g}: EDM's networks learnt every picture with its label, and what they say without one "
                 "guides nowhere; --guidance 1 is none")
    fsdp.share(args.batch_size)
    if args.track:
        import_tracker(args.track)
    sources = open_sources(model, args)
    networks = Networks(model, args, mesh)
    if args.mean_variance_weight > 0 and not args.mean_variance_target:
        args.mean_variance_target = teacher_statistics(model, sources.prompts, args.seed, networks.at_once)
    return networks, sources


def main():
    args = parse_arguments()
    if args.benchmark:
        import benchmark
        return benchmark.run(args, prepare, iterate)
    mesh = fsdp.start(args.shard, fsdp.own_device(args.device), args.timeout)
    args = fsdp.from_first(lambda: args)  # what a run had is read from a disk, and another node's view of it may be older
    networks, sources = prepare(args, mesh)
    train(networks, sources, configuration(args), args)


if __name__ == "__main__":
    fsdp.run(main)
