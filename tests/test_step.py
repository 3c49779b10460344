"""The training step: what moves, by which gradient, and that micro-batches change nothing."""

import copy

import pytest
import torch

import data
import fsdp
import losses
import models
import train
from lab import plane

BASE = [f"@{plane.RECIPE}", "--batch-size", "4", "--student-steps", "4", "--guidance", "1.5"]


def setup(*flags):
    args = train.parse_arguments([*BASE, *flags])
    nets, sources = train.prepare(args, plane.load_model)
    return nets, sources, args


def gradients(monkeypatch, *flags, iterations=1):
    """[{parameter: gradient}, ...] of student and fake score, in the order of their steps."""
    found, clip = [], fsdp.clip_gradients

    def keep(module, *rest):
        named = module.named_parameters()
        found.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return clip(module, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(fsdp, "clip_gradients", keep)
        nets, sources, args = setup(*flags)
        for iteration in range(iterations):
            train.iterate(nets, sources, iteration, args)
    return found


def moved(module, before):
    return [name for name, p in module.named_parameters() if not torch.equal(p, before[name])]


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


CASES = {
    "dmd2 with GAN": "--gan-weight 1",
    "f-distill": "--variant fdistill --gan-weight 0.1",
    "decoupled": "--variant decoupled",
    "mean-variance": "--mean-variance-weight 1",
}


@pytest.mark.parametrize("size", ["1", "3"])
@pytest.mark.parametrize("case", CASES)
def test_micro_batches_have_the_gradients_of_the_whole_batch(case, size, monkeypatch):
    flags = CASES[case].split()
    whole = gradients(monkeypatch, *flags)
    parts = gradients(monkeypatch, *flags, "--micro-batch", size)
    for a, b in zip(whole, parts, strict=True):
        largest = max(gradient.abs().max() for gradient in a.values())
        for name in a:
            torch.testing.assert_close(b[name], a[name], atol=1e-5 * largest, rtol=0)


@pytest.mark.parametrize("schedule", ["coupled", "full", "constrained", "hybrid"])
def test_the_student_follows_dm_and_ca(schedule, monkeypatch):
    """The gradient, written down anew from the papers' formulas and the same batch."""
    flags = ["--variant", "decoupled", "--schedule", schedule, "--normaliser", "conditional"]
    found, _ = gradients(monkeypatch, *flags)
    nets, sources, args = setup(*flags)
    batch = train.draw_batch(nets, sources, 0, args)
    timesteps = nets.timesteps[: batch.noise.shape[1]]
    x_in = models.last_input(nets.student, batch.noise.transpose(0, 1), batch.cond, timesteps)
    x = nets.student(x_in, batch.t_in, batch.cond)
    total = 0
    with torch.no_grad():
        none = nets.model.encode([""] * 4)
        x_dm = nets.schedule.add_noise(x, batch.eps_dm, batch.t_dm)
        x_ca = nets.schedule.add_noise(x, batch.eps_ca, batch.t_ca)
        real = nets.teacher(x_dm, batch.t_dm, batch.cond)
        fake, _ = nets.fake_score(x_dm, batch.t_dm, batch.cond)
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
        total = (fake - real) / scale
        real = nets.teacher(x_ca, batch.t_ca, batch.cond)
        uncond = nets.teacher(x_ca, batch.t_ca, none)
        scale = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
        total = total - 0.5 * (real - uncond) / scale
    losses.surrogate_loss(x, total).mean().backward()
    largest = max(gradient.abs().max() for gradient in found.values())
    for name, p in nets.student.named_parameters():
        torch.testing.assert_close(p.grad, found[name], atol=2e-6 * largest, rtol=0)


def test_each_step_moves_its_own_network_alone():
    nets, sources, args = setup("--gan-weight", "1", "--warmup", "0")
    (part,) = train.draw_batch(nets, sources, 0, args).split(None)
    noise, timesteps = part.noise.transpose(0, 1), nets.timesteps[: part.noise.shape[1]]
    part.x_in = models.last_input(nets.student, noise, part.cond, timesteps)
    part.x = nets.student(part.x_in, part.t_in, part.cond)
    train.set_learning_rates(nets, 0, args)
    student, fake = weights(nets.student), weights(nets.fake_score)
    train.student_step(nets, [part], args)
    assert moved(nets.student, student) and not moved(nets.fake_score, fake)
    student = weights(nets.student)
    train.fake_score_step(nets, [part], args)
    assert not moved(nets.student, student)
    assert len(moved(nets.fake_score, fake)) == len(fake)  # its head too


def test_regression_alone_runs_neither_teacher_nor_fake_score(tmp_path, plane_model, monkeypatch):
    config = {"prompts": None, "count": 8, "steps": 2, "guidance": 1.5, "seed": 0}
    data.make_pairs(tmp_path / "pairs", config, plane_model)
    flags = ["--dm-weight", "0", "--ca-weight", "0", "--regression-weight", "1", "--warmup", "0"]
    nets, sources, args = setup(*flags, "--pairs", str(tmp_path / "pairs"))

    def called(*arguments):
        raise AssertionError("a score was asked")

    nets.teacher.forward = nets.fake_score.forward = called
    before = weights(nets.student)
    train.iterate(nets, sources, 0, args)
    assert moved(nets.student, before)


def test_noised_real_data_as_input_is_noise_at_the_first_step_and_drawn_per_sample():
    nets, sources, args = setup("--student-input", "data", "--batch-size", "64")
    batch = train.draw_batch(nets, sources, 1, args)
    assert set(batch.t_in.tolist()) == set(nets.timesteps)
    first = batch.t_in == 999
    draws = data.Draws(args.seed, 1, 64)
    draws.below(4)
    x_real, _ = sources.real.draw(draws)
    draws.integers(0, 4)
    eps = draws.normal(2, 1, 1)
    assert torch.equal(batch.x_in[first], eps[first])
    noised = nets.schedule.add_noise(x_real, eps, batch.t_in)
    assert torch.equal(batch.x_in[~first], noised[~first])


@pytest.mark.parametrize("levels, low, high", [((0.02, 0.98), 20, 980), ((0.0, 1.0), 0, 999)])
def test_drawn_levels(levels, low, high):
    t_in = torch.tensor([999, 749, 499, 249]).repeat(5000)
    draws = data.Draws(0, 0, len(t_in))
    for schedule, (kind_dm, kind_ca) in train.SCHEDULES.items():
        t_dm, t_ca = train.draw_levels(schedule, levels, t_in, 1000, draws)
        for kind, t in ((kind_dm, t_dm), (kind_ca, t_ca)):
            if kind == "cleaner":
                assert (t < t_in).all() and t.min() == low
                assert t[t_in == 249].max() == 248
            elif kind == "all":
                assert t.min() == low and t.max() == high
            else:
                assert torch.equal(t, t_dm)


def test_f_distill_normalises_both_ways():
    fake_score = models.FakeScore(torch.nn.Identity())
    logit, t = torch.randn(64), torch.randint(0, 1000, (64,))
    before = fake_score.ratio_means.clone()
    h = train.divergence_weight(fake_score, logit, t, 1000, "js")
    torch.testing.assert_close(h.mean(), torch.tensor(1.0))
    r, means = losses.density_ratio(logit), before
    for k in range(10):
        own = r[t // 100 == k]
        if len(own):
            means[k] = 0.9 * means[k] + 0.1 * own.mean()
    torch.testing.assert_close(fake_score.ratio_means, means)
    r = r / means[t // 100]
    torch.testing.assert_close(h, (r / (r + 1)) / (r / (r + 1)).mean())


def test_no_clipping_leaves_the_gradient():
    layer = torch.nn.Linear(3, 3)
    layer(torch.ones(2, 3)).sum().mul(100).backward()
    before = copy.deepcopy(layer.weight.grad)
    norm = fsdp.clip_gradients(layer, 0, "layer")
    assert torch.equal(layer.weight.grad, before) and norm > 10
    fsdp.clip_gradients(layer, 1.0, "layer")
    assert layer.weight.grad.norm() < 1


def test_what_does_nothing_is_warned_of(capsys):
    train.parse_arguments(["--variant", "decoupled", "--guidance", "1"])
    train.parse_arguments(["--variant", "fdistill", "--batch-size", "1"])
    printed = capsys.readouterr().out
    assert "without guidance CA is 0" in printed and "it is DMD2" in printed
