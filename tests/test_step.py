"""The training step: what moves, by which gradient, and that micro-batches change nothing."""

import copy
import functools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import data
import fsdp
import losses
import models
import train
from lab import plane
from support import later, runlog
from support.ahead import Ahead
from support.precision import keep_casts
from tests.tiny import keep_gradients, one_line

BASE = [f"@{plane.RECIPE}", "--batch-size", "4", "--student-steps", "4", "--guidance", "1.5"]


def setup(*flags):
    args = train.parse_arguments([*BASE, *flags])
    nets, sources = train.prepare(args, plane.load_model)
    return nets, sources, args


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_fake_scores_first_loss(micro_batch):
    """Of one that is wrong by 2: 4 w(t) at any sample, w = 1 / sigma^2, since it predicts v."""
    nets, _, args = setup()
    noise = torch.randn(5, 8, *nets.model.sample_shape)
    cond = nets.model.encode(["0"] * 8)
    noise[-1] = 0.5  # the same for all, so that x0 can be read off x_t

    def wrong_by_2(x_t, t, cond):
        alpha, sigma = nets.schedule.at(t, x_t)
        return (x_t - 0.5 * sigma) / alpha + 2, None

    nets.fake_score = wrong_by_2
    args.micro_batch = micro_batch
    levels = torch.tensor([62, 187, 312, 437, 562, 687, 812, 937])
    loss = runlog.fake_loss(nets, SimpleNamespace(noise=noise, cond=cond), args)
    torch.testing.assert_close(
        loss, (4 / nets.schedule.sigma[levels] ** 2).mean(), rtol=1e-3, atol=0
    )


def gradients(monkeypatch, *flags, iterations=1):
    """[{parameter: gradient}, ...] of student and fake score, in the order of their steps."""
    with monkeypatch.context() as patch:
        found = keep_gradients(patch)
        nets, sources, args = setup(*flags)
        for iteration in range(iterations):
            train.iterate(nets, train.draw_batch(nets, sources, iteration, args), iteration, args)
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
    "random steps": "--random-steps 6 --seed 2",
    "off trajectory": "--off-trajectory 1",
    "first step": "--first-step-weight 0.5",
    "R1": "--gan-weight 1 --r1-weight 50",
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


@pytest.mark.parametrize("steps", ["", "--random-steps 6 --seed 2"])
@pytest.mark.parametrize("schedule", ["coupled", "full", "constrained", "hybrid"])
def test_the_student_follows_dm_and_ca(schedule, steps, monkeypatch):
    """The gradient, written down anew from the papers' formulas and the same batch."""
    flags = ["--variant", "decoupled", "--schedule", schedule, "--normaliser", "conditional"]
    flags += steps.split()
    found, _ = gradients(monkeypatch, *flags)
    nets, sources, args = setup(*flags)
    batch = train.draw_batch(nets, sources, 0, args)
    timesteps = batch.path[0].tolist()
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
    noise, timesteps = part.noise.transpose(0, 1), part.path[0].tolist()
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
    train.iterate(nets, train.draw_batch(nets, sources, 0, args), 0, args)
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


def test_random_timesteps_are_those_of_the_noise_and_of_the_input():
    nets, sources, args = setup("--random-steps", "6")
    seen, counts = set(), set()
    for iteration in range(200):
        draws = data.Draws(args.seed, iteration, 4)
        timesteps = later.draw_timesteps(999, 6, 1000, draws)
        batch = train.draw_batch(nets, sources, iteration, args)
        steps = batch.path.shape[1]
        assert batch.path.tolist() == [timesteps[:steps]] * 4
        assert batch.t_in.tolist() == [timesteps[steps - 1]] * 4 and batch.noise.shape[1] == steps
        assert timesteps == sorted(timesteps, reverse=True) and timesteps[0] == 999
        seen |= set(timesteps[1:])
        counts.add(len(timesteps))
    assert counts == {1, 2, 3, 4, 5, 6}
    assert 250 <= min(seen) < 280 and 920 < max(seen) < 950


def test_off_the_trajectory_the_input_is_one_deterministic_step_further():
    """In about half of the iterations, by DDIM's step written down anew."""
    nets, sources, args = setup("--off-trajectory", "0.5")
    off = 0
    for iteration in range(1, 41):
        batch = train.draw_batch(nets, sources, iteration, args)
        timesteps, steps = batch.path[0].tolist(), batch.noise.shape[1]
        assert timesteps[:steps] == nets.timesteps[:steps] and steps <= len(timesteps) <= steps + 1
        assert batch.t_in.tolist() == [timesteps[-1]] * 4
        x_in = train.student_input(nets, batch)
        on = models.last_input(
            nets.student, batch.noise.transpose(0, 1), batch.cond, timesteps[:steps]
        )
        if len(timesteps) == steps:
            assert torch.equal(x_in, on)
            continue
        off += 1
        t, s = timesteps[-2:]
        assert s < t
        x0 = nets.student(on, t, batch.cond)
        alpha, sigma = nets.schedule.alpha, nets.schedule.sigma
        eps = (on - alpha[t] * x0) / sigma[t]
        torch.testing.assert_close(x_in, alpha[s] * x0 + sigma[s] * eps)
    assert 10 < off < 30


def test_the_first_step_learns_to_land_where_the_teacher_lands(monkeypatch):
    """DP-DMD: its loss's gradient, from the noise that the teacher's sampler ends at; and no other
    loss moves the first step."""
    flags = ["--dm-weight", "0", "--ca-weight", "0", "--gan-weight", "1e-9", "--clip", "1e9"]
    flags += ["--first-step-weight", "0.05"]
    found, _ = gradients(monkeypatch, *flags)
    nets, sources, args = setup(*flags)
    steps = [train.draw_batch(nets, sources, i, args).path.shape[1] for i in range(40)]
    assert set(steps) == {2, 3, 4}
    batch = train.draw_batch(nets, sources, 0, args)
    z, schedule = batch.noise[:, 0], nets.schedule
    none = nets.model.encode([""] * 4)
    x_t, timesteps = z, [999 - i * 250 // 8 for i in range(9)]
    with torch.no_grad():
        for t, s in zip(timesteps, timesteps[1:]):
            cond, uncond = nets.teacher(x_t, t, batch.cond), nets.teacher(x_t, t, none)
            x0 = uncond + 1.5 * (cond - uncond)
            eps = (x_t - schedule.alpha[t] * x0) / schedule.sigma[t]
            x_t = schedule.alpha[s] * x0 + schedule.sigma[s] * eps
    assert timesteps[-1] == nets.timesteps[1]
    # The student's own step from the same noise would end here; where it does not, it is moved.
    x0 = nets.student(z, 999, batch.cond)
    eps = (z - schedule.alpha[999] * x0) / schedule.sigma[999]
    landed = schedule.alpha[749] * x0 + schedule.sigma[749] * eps
    slope = schedule.alpha[749] - schedule.sigma[749] * schedule.alpha[999] / schedule.sigma[999]
    error = ((landed - x_t) / slope / schedule.sigma[999]).square().mean()
    (0.05 * error).backward()
    largest = max(gradient.abs().max() for gradient in found.values())
    for name, p in nets.student.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5 * largest, rtol=1e-3)


def test_r1_adds_the_gradient_of_the_critic_s_change_beside_real_data(monkeypatch):
    flags = ["--gan-weight", "1", "--clip", "1e9"]
    without, with_r1 = (
        gradients(monkeypatch, *flags, "--r1-weight", weight)[1] for weight in ("0", "50")
    )
    nets, sources, args = setup(*flags, "--r1-weight", "50")
    batch = train.draw_batch(nets, sources, 0, args)
    logits = []
    for x in (batch.x_real, batch.x_real + 0.1 * batch.eps_near):
        x_t = nets.schedule.add_noise(x, batch.eps_real, batch.t_fake)
        logits.append(nets.fake_score(x_t, batch.t_fake, batch.cond_real)[1])
    (50 * args.critic_weight * (logits[0] - logits[1]).square().mean()).backward()
    largest = max(gradient.abs().max() for gradient in with_r1.values())
    for name, p in nets.fake_score.named_parameters():
        if p.grad is not None:
            added = with_r1[name] - without[name]
            torch.testing.assert_close(added, p.grad, atol=1e-5 * largest, rtol=1e-4)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--random-steps 4 --student-input data", "--random-steps draws the timesteps"),
        ("--r1-weight 1 --gan-weight 0", "--r1-weight is of the GAN's critic"),
        ("--off-trajectory 1 --student-input data", "--off-trajectory leaves the trajectory"),
        ("--first-step-weight 1 --student-steps 1", "--first-step-weight is of the first"),
        ("--first-step-weight 1 --random-steps 4", "--first-step-weight is of the first"),
    ],
)
def test_switches_that_do_not_go_together_are_one_line(flags, says):
    assert says in one_line(setup, *flags.split())


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


def test_the_gan_s_share_is_in_units_of_the_directions():
    """The student's gradient is (DM + CA) / elements and the GAN's own."""
    nets, sources, args = setup("--gan-weight", "0.5")
    batch = train.draw_batch(nets, sources, 0, args)
    batch.x = torch.randn(4, *nets.model.sample_shape)
    train.read_scores(nets, batch, args)
    x = batch.x.clone().requires_grad_()
    _, logit = nets.fake_score(
        nets.schedule.add_noise(x, batch.eps_dm, batch.t_dm), batch.t_dm, batch.cond
    )
    (0.5 * losses.gan_student_loss(logit)).sum().backward()
    expected = (x.grad * x[0].numel()).abs().mean()
    torch.testing.assert_close(train.step_metrics([batch])["gan"], expected)


def test_no_clipping_leaves_the_gradient():
    layer = torch.nn.Linear(3, 3)
    layer(torch.ones(2, 3)).sum().mul(100).backward()
    before = copy.deepcopy(layer.weight.grad)
    norm = fsdp.clip_gradients(layer, 0, "layer")
    assert torch.equal(layer.weight.grad, before) and norm > 10
    fsdp.clip_gradients(layer, 1.0, "layer")
    assert layer.weight.grad.norm() < 1


def test_what_does_nothing_is_warned_of(capsys):
    train.parse_arguments(["--variant", "fdistill", "--batch-size", "1"])
    assert "it is DMD2" in capsys.readouterr().out
    for flags in (["--guidance", "1"], ["--model", "emoji-classes"]):  # whose own guidance is 1
        train.prepare(train.parse_arguments(["--variant", "decoupled", *flags]))
        assert "without guidance CA is 0" in capsys.readouterr().out


# With a share of the largest gradient that rounding may make; in float64 world's is 4e-13.
ONE_PASS = [("--model gmm", 5e-6), ("--model world", 3e-5)]
ONE_PASS += [("--model emoji-classes --guidance 1", 5e-6)]


@pytest.mark.parametrize("flags, rounding", ONE_PASS)
def test_samples_and_real_data_in_one_pass_have_the_gradients_of_two(flags, rounding):
    """The blocks above the middle see the samples only: x0, logits and every gradient are those of
    two whole passes."""
    flags += " --variant dmd2 --batch-size 2 --gan-weight 1"
    args = train.parse_arguments(flags.split())
    nets, sources = train.prepare(args, plane.load_model if "gmm" in flags else models.load_model)
    batch = train.draw_batch(nets, sources, 0, args)
    t, x_t, x_t_real = batch.t_fake, batch.eps_fake, batch.x_real + batch.eps_real
    both = (torch.cat([x_t, x_t_real]), torch.cat([t, t]), models.join(batch.cond, batch.cond_real))
    x0, logits = nets.fake_score(*both, count=2)
    one = gradients_of(nets.fake_score, x0, logits)
    x0_alone, logit = nets.fake_score(x_t, t, batch.cond)
    _, logit_real = nets.fake_score(x_t_real, t, batch.cond_real)
    two = gradients_of(nets.fake_score, x0_alone, torch.cat([logit, logit_real]))
    torch.testing.assert_close(x0, x0_alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, torch.cat([logit, logit_real]), rtol=1e-4, atol=1e-4)
    largest = max(gradient.abs().max() for gradient in two.values())
    assert len(one) == len(two) and largest > 0
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=rounding * largest.item(), rtol=0)


def gradients_of(module, x0, logits):
    (x0.square().mean() + logits.sin().sum()).backward()
    found = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    return found


def test_batches_are_drawn_in_the_background_one_ahead():
    made, threads = [], set()

    def make(i):
        made.append(i)
        threads.add(threading.get_ident())
        if i == 5:
            raise ValueError("planted")
        return i * i

    ahead = Ahead(make, 2, 9, torch.device("cpu"))
    with pytest.raises(ValueError, match="planted"):
        for i, item in ahead:
            assert item == i * i and set(made) <= set(range(2, i + 2))
    assert made == [2, 3, 4, 5] and threading.get_ident() not in threads
    assert len(ahead) == 7 and ahead.waited > 0


def test_prompts_are_encoded_by_one_thread_at_a_time(monkeypatch):
    """A tokenizer in two threads may pad for the one as the other asked."""
    model = models.load_model(data.model_path(None))
    inside, most = [], []
    encode = functools.partial(model.family.encode, model)

    def watched(prompts):
        inside.append(1)
        most.append(len(inside))
        cond = encode(prompts)
        inside.pop()
        return cond

    monkeypatch.setattr(model, "conditions", watched)
    threads = [threading.Thread(target=model.encode, args=(["cat"] * 32,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_pass_without_a_graph_for_x0_has_the_logits_and_their_gradient():
    """The blocks above the middle keep nothing, which the student's GAN gradient does not need."""
    nets, sources, args = setup("--gan-weight", "1")
    batch = train.draw_batch(nets, sources, 0, args)
    found = []
    for x0_graph in (True, False):
        x_t = batch.eps_fake.clone().requires_grad_()
        x0, logit = nets.fake_score(x_t, batch.t_fake, batch.cond, x0_graph=x0_graph)
        assert x0.requires_grad == x0_graph and torch.is_grad_enabled()
        (gradient,) = torch.autograd.grad(logit.sum(), x_t)
        found.append((x0.detach(), logit.detach(), gradient))
    for one, two in zip(*found):
        assert torch.equal(one, two)


class Casts(TorchDispatchMode):
    """How many float32 tensors are cast to bfloat16 within it."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        self.count += options.get("dtype") == torch.bfloat16
        return function(*arguments, **options)


@pytest.mark.parametrize("flags", ["--gan-weight 1", "--gan-weight 1 --micro-batch 3"])
def test_weights_are_cast_once_in_a_step_and_nothing_else_changes(monkeypatch, flags):
    """Three iterations in bfloat16: the student's first pass has no graph, the fake score's turn
    and the student's alternate, the optimizers move what is cast."""
    flags = [*flags.split(), "--dtype", "bfloat16", "--fake-updates", "2"]
    with Casts() as kept:
        one = gradients(monkeypatch, *flags, iterations=3)
    monkeypatch.setattr(train, "iterate", train.iterate.__wrapped__)
    with Casts() as anew:
        other = gradients(monkeypatch, *flags, iterations=3)
    assert kept.count < anew.count
    for own, theirs in zip(one, other):
        assert own.keys() == theirs.keys() and any(g.any() for g in own.values())
        for name in own:
            assert torch.equal(own[name], theirs[name]), name


def test_after_an_optimizer_s_step_weights_are_cast_anew():
    nets, sources, args = setup("--dtype", "bfloat16")
    batch = train.draw_batch(nets, sources, 0, args)
    with keep_casts():
        before = nets.student(batch.eps_dm, batch.t_dm, batch.cond)
        before.sum().backward()
        nets.student_optimizer.step()
        after = nets.student(batch.eps_dm, batch.t_dm, batch.cond)
    assert not torch.equal(before, after)
    assert torch.equal(after, nets.student(batch.eps_dm, batch.t_dm, batch.cond))
