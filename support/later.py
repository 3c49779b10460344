"""Later methods, of which train.py's loop has a line each: docs/methods.md."""

import functools

import torch

import losses
import models

FIRST_STEP_PASSES = 8  # steps of the teacher to the student's second timestep. 2602.03139: 5 to 10


def draw_timesteps(first, most, T, draws):
    """The student's timesteps of one iteration, up to `most` of them: the first, and any others
    from .25 T to .95 T. 2605.06376, values of its released code."""
    count = draws.below(most)
    others = [int(0.25 * T) + draws.below(int(0.7 * T)) for _ in range(count)]
    return [first, *sorted(set(others), reverse=True)]


def first_step_loss(nets, noise, cond, guidance):
    """DP-DMD (2602.03139): the student's first step leads where several of the guided teacher's
    lead from the same noise (B, C, H, W), which keeps the variety that DM loses. Mean square error
    of v, (B,)."""
    schedule, (first, second) = nets.schedule, nets.timesteps[:2]
    passes = range(FIRST_STEP_PASSES + 1)
    timesteps = [first - i * (first - second) // FIRST_STEP_PASSES for i in passes]
    x0_of = functools.partial(
        models.guided_x0, nets.teacher, cond=cond, uncond=nets.uncond, guidance=guidance
    )
    with torch.no_grad():
        x_t = models.deterministic_input(x0_of, noise, timesteps, schedule)
    z = schedule.noise_scale * noise
    levels = [*schedule.at(first, z), *schedule.at(second, z)]
    x0_target = losses.jump_target(z, x_t, *levels)
    x0 = nets.student(z, first, cond)
    return losses.denoising_loss(x0, x0_target, 1 / schedule.sigma[first] ** 2)
