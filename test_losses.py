"""Every formula against closed form or against diffusers."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

import losses
import models
from lab import plane
from support.families import Family

torch.set_num_threads(1)


def call(network, x, time, cond):
    return network(sample=x, timestep=time, return_dict=False)[0]


FAMILY = Family(call, None)

T_VALUES = (60, 300, 600, 900)
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sd_alphas_cumprod():
    return DDIMScheduler(**SD_BETAS).alphas_cumprod


SCHEDULES = {
    "vp": models.vp_schedule(sd_alphas_cumprod()),
    "edm": models.edm_schedule(),
    "flow": models.flow_schedule(shift=3.0),
}
PREDICTIONS = [("vp", "epsilon"), ("vp", "v_prediction"), ("flow", "flow"), ("edm", "edm")]


class Mixture:
    """A mixture of 1-D Gaussians, diffused exactly. One component makes it a Gaussian."""

    def __init__(self, weights, means, deviations):
        parts = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, deviations))
        self.weights, self.means, self.deviations = parts

    def parts(self, x_t, alpha, sigma):
        """Of each component: log of its weight times its density, its distance and variance."""
        variance = alpha**2 * self.deviations**2 + sigma**2
        z = x_t[..., None] - alpha * self.means
        log_normal = -0.5 * (z**2 / variance + (2 * math.pi * variance).log())
        return self.weights.log() + log_normal, z, variance

    def log_density(self, x_t, alpha, sigma):
        return self.parts(x_t, alpha, sigma)[0].logsumexp(-1)

    def x0(self, x_t, alpha, sigma):
        """E[x0 | x_t]: the components' posterior means, weighted by their responsibilities."""
        log_parts, z, variance = self.parts(x_t, alpha, sigma)
        x0 = self.means + alpha * self.deviations**2 / variance * z
        return (log_parts.softmax(-1) * x0).sum(-1)


TEACHER = Mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])


def levels(schedule, t):
    return schedule.alpha[t].double(), schedule.sigma[t].double()


# ----------------------------------------------------------------------------- schedules


def test_schedules_are_what_diffusers_uses():
    vp, edm = SCHEDULES["vp"], SCHEDULES["edm"]
    torch.testing.assert_close(vp.alpha**2, sd_alphas_cumprod())
    torch.testing.assert_close(vp.alpha**2 + vp.sigma**2, torch.ones(1000))
    assert 1 / vp.alpha[999].item() == pytest.approx(14.6, abs=0.1)
    assert edm.sigma[[0, 999]].tolist() == pytest.approx([0.002, 80])
    torch.testing.assert_close(edm.network_time, edm.sigma.log() / 4)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(SCHEDULES["flow"].sigma, flow.sigmas.flip(0))
    torch.testing.assert_close(SCHEDULES["flow"].network_time, flow.timesteps.flip(0))


def test_timesteps():
    assert SCHEDULES["vp"].timesteps(4) == [999, 749, 499, 249]
    assert SCHEDULES["vp"].timesteps(1) == [999]
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(50)
    assert SCHEDULES["vp"].timesteps(50) == scheduler.timesteps.tolist()


# ----------------------------------------------------------------------------- x0 prediction


def output_of(prediction, x0, x_t, alpha, sigma):
    """What a perfect network of each kind outputs, from the definitions in 2006.11239, 2202.00512,
    2209.03003, 2206.00364."""
    eps = (x_t - alpha * x0) / sigma
    if prediction == "edm":
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        return (x0 - c_skip * x_t) / c_out
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]


@pytest.mark.parametrize("family, prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "density", [Mixture([1.0], [0.4], [0.6]), TEACHER], ids=["gaussian", "mixture"]
)
def test_denoiser_reads_x0_from_every_kind_of_network(family, prediction, density):
    schedule = SCHEDULES[family]

    class PerfectNetwork(torch.nn.Module):
        """Knows the density, sees what a network sees: its scaled input and its time."""

        def forward(self, sample, timestep, return_dict):
            t = (schedule.network_time[None] - timestep[:, None]).abs().argmin(1)
            alpha, sigma = (level.double() for level in schedule.at(t, sample))
            x_t = sample.double()
            if prediction == "edm":
                x_t = x_t * (sigma**2 + 0.25).sqrt()
            x0 = density.x0(x_t, alpha[..., None], sigma[..., None])
            return (output_of(prediction, x0, x_t, alpha, sigma),)

    t = torch.tensor(T_VALUES)
    x, eps = torch.linspace(-1, 1, 4).view(4, 1), torch.linspace(-2, 2, 5).expand(4, 5)
    x_t = schedule.add_noise(x, eps, t)
    alpha, sigma = (level.double()[..., None] for level in schedule.at(t, x_t))
    x0 = models.Denoiser(PerfectNetwork(), schedule, prediction, FAMILY)(x_t, t, {})
    expected = density.x0(x_t.double(), alpha, sigma)
    torch.testing.assert_close(x0.double(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", T_VALUES)
def test_score_identity(family, t):
    alpha, sigma = levels(SCHEDULES[family], t)
    x_t = (alpha * torch.linspace(-3, 3, 41, dtype=torch.float64)).requires_grad_()
    (true_score,) = torch.autograd.grad(TEACHER.log_density(x_t, alpha, sigma).sum(), x_t)
    score = losses.score(TEACHER.x0(x_t, alpha, sigma), x_t, alpha, sigma)
    torch.testing.assert_close(score, true_score)


@pytest.mark.parametrize("family, prediction", PREDICTIONS)
def test_denoising_loss_is_the_error_of_the_networks_own_output(family, prediction):
    torch.manual_seed(0)
    schedule, t = SCHEDULES[family], torch.tensor(T_VALUES)
    x, eps, error = torch.randn(3, 4, 7, dtype=torch.float64)
    alpha, sigma = (level.double() for level in schedule.at(t, x))
    x_t = alpha * x + sigma * eps
    output = output_of(prediction, x, x_t, alpha, sigma) + error
    x0_pred = models.x0_from_output(prediction, output, x_t, alpha, sigma)
    weight = losses.denoising_weight(prediction, alpha, sigma)
    loss = losses.denoising_loss(x0_pred, x, weight).mean()
    torch.testing.assert_close(loss, error.square().mean())


# ------------------------------------------------------------------ f-divergences and the direction

F = {  # table of 2502.15681, D_f(p || q) = E_q[f(p / q)], of r and log r
    "reverse-kl": lambda r, log_r: -log_r,
    "softened-reverse-kl": lambda r, log_r: (r + 1) * (0.5 + 0.5 / r).log(),
    "js": lambda r, log_r: r * log_r - (r + 1) * ((r + 1) / 2).log(),
    "hellinger": lambda r, log_r: 1 - r.sqrt(),
    "forward-kl": lambda r, log_r: r * log_r,
    "jeffreys": lambda r, log_r: (r - 1) * log_r,
}


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_weight_is_r_squared_times_the_second_derivative(divergence):
    r = torch.linspace(0.1, 20, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F[divergence](r, r.log()).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(losses.DIVERGENCES[divergence](r.detach()), r.detach() ** 2 * second)


def students(alpha, sigma):
    """Two students of 1-D samples: a Gaussian with shift and scale, and a mixture with two shifts.
    For each: its parameters, its density as a function of them, and the pieces (weight, mean,
    variance of x_t, E[dx_t / dtheta | x_t]) it is made of."""

    def gaussian(theta):
        return Mixture([1.0], theta[:1], theta[1:])

    def mixture(theta):
        return Mixture([0.4, 0.6], theta, [0.4, 0.2])

    shift, scale = theta = torch.tensor([0.3, 0.7], dtype=torch.float64)
    variance = alpha**2 * scale**2 + sigma**2
    along = lambda x_t: torch.stack(
        [alpha.expand_as(x_t), alpha * alpha * scale * (x_t - alpha * shift) / variance]
    )
    yield gaussian, theta, [(1.0, alpha * shift, variance, along)]
    theta, parts = torch.tensor([-0.7, 0.4], dtype=torch.float64), []
    for k, (weight, deviation) in enumerate(((0.4, 0.4), (0.6, 0.2))):
        along = lambda x_t, k=k: torch.stack([alpha.expand_as(x_t) * (i == k) for i in range(2)])
        parts.append((weight, alpha * theta[k], alpha**2 * deviation**2 + sigma**2, along))
    yield mixture, theta, parts


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", T_VALUES)
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_f_divergence_gradient_by_quadrature(divergence, family, t):
    """E_q[-h(p/q) (s_p - s_q) dx_t / dtheta] is the derivative of D_f(p_t || q_t), automatic
    differentiation of a quadrature."""
    alpha, sigma = levels(SCHEDULES[family], t)
    for student, theta, parts in students(alpha, sigma):
        reach = 9 * (alpha**2 * 1.0 + sigma**2).sqrt()
        x_t = torch.linspace(-float(reach), float(reach), 20001, dtype=torch.float64)
        width = x_t[1] - x_t[0]
        theta = theta.clone().requires_grad_()
        log_p = TEACHER.log_density(x_t, alpha, sigma)
        log_q = student(theta).log_density(x_t, alpha, sigma)
        log_r = log_p - log_q
        distance = (log_q.exp() * F[divergence](log_r.exp(), log_r)).sum() * width
        (true_gradient,) = torch.autograd.grad(distance, theta)

        q = student(theta.detach())
        s_p = losses.score(TEACHER.x0(x_t, alpha, sigma), x_t, alpha, sigma)
        s_q = losses.score(q.x0(x_t, alpha, sigma), x_t, alpha, sigma)
        weighted = -losses.DIVERGENCES[divergence](log_r.detach().exp()) * (s_p - s_q)
        gradient = torch.zeros(2, dtype=torch.float64)
        for weight, mean, variance, along in parts:
            density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(x_t).exp()
            gradient += (weight * density * weighted * along(x_t)).sum(1) * width
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
@pytest.mark.parametrize("family, t", [("vp", 300), ("edm", 600), ("flow", 600)])
def test_f_divergence_gradient_in_the_plane(divergence, family, t):
    """The same for the labelled mixture of plane.py and a student that is a Gaussian in the plane
    with a shift of its own."""
    alpha, sigma = levels(SCHEDULES[family], t)
    teacher = plane.plane()
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    for name in ("means", "deviations", "log_weights"):
        setattr(teacher, name, getattr(teacher, name).double())
    variance = alpha**2 * 0.8**2 + sigma**2
    line = torch.linspace(-8, 8, 251, dtype=torch.float64) * variance.sqrt()
    x_t = torch.cartesian_prod(line, line)
    label, area = torch.full((len(x_t),), 1), (line[1] - line[0]) ** 2
    at = (alpha.view(1, 1), sigma.view(1, 1))
    log_p = teacher.log_density(x_t, *at, label)
    log_q = -0.5 * (x_t - alpha * theta).square().sum(1) / variance - (2 * math.pi * variance).log()
    log_r = log_p - log_q
    distance = (log_q.exp() * F[divergence](log_r.exp(), log_r)).sum() * area
    (true_gradient,) = torch.autograd.grad(distance, theta)

    x0_fake = theta.detach() + alpha * 0.8**2 / variance * (x_t - alpha * theta.detach())
    direction = losses.dm_direction(teacher.x0(x_t, *at, label), x0_fake)
    direction = direction * alpha / sigma**2  # s_fake - s_real
    weight = log_q.detach().exp() * losses.DIVERGENCES[divergence](log_r.detach().exp())
    gradient = (weight[:, None] * direction * alpha).sum(0) * area
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("name", ["row", "token"])
def test_the_guided_output_keeps_the_norm(name):
    """Of v = (x_t - x0) / sigma, whose rows or tokens are only made longer or shorter."""
    torch.manual_seed(0)
    x_t, x0_cond, x0_guided = torch.randn(3, 2, 4, 6, 6)
    norm = models.GUIDANCE_NORMS[name]
    v = (x_t - models.keep_norm(x0_guided, x0_cond, x_t, norm)) / 0.3
    v_cond, v_guided = (x_t - x0_cond) / 0.3, (x_t - x0_guided) / 0.3
    torch.testing.assert_close(norm(v).expand_as(v), norm(v_cond).expand_as(v))
    torch.testing.assert_close(v * norm(v_guided), v_guided * norm(v_cond))
    one = {"row": v[1, 2, 3], "token": v[1, :, 2:4, 4:6]}[name]
    assert norm(v)[1, 2 if name == "row" else 0, 3, 0 if name == "row" else 5] == one.norm()
    assert models.keep_norm(x_t, x_t, x_t, norm).isfinite().all()


def test_directions_add_up_to_dmd2_s_numerator():
    torch.manual_seed(0)
    x0_cond, x0_uncond, x0_fake = torch.randn(3, 5, 3, 4, 4)
    guided = models.guide(x0_cond, x0_uncond, 3.0)
    ca = losses.ca_direction(x0_cond, guided)
    torch.testing.assert_close(ca, -(3.0 - 1) * (x0_cond - x0_uncond))
    total = losses.dm_direction(x0_cond, x0_fake) + ca
    torch.testing.assert_close(total, x0_fake - guided)
    assert losses.dm_direction(x0_cond, x0_cond).abs().max() == 0
    with pytest.raises(ValueError, match=r"x0_cond \(5, 3, 4, 4\).*x0_fake \(1, 3, 4, 4\)"):
        losses.dm_direction(x0_cond, x0_fake[:1])


def test_normaliser_is_one_number_a_sample_and_has_a_floor():
    x = torch.zeros(2, 1, 2, 2)
    x0_real = torch.stack([torch.tensor([[[4.0, -4.0], [2.0, 6.0]]]), torch.zeros(1, 2, 2)])
    scale = losses.normaliser(x, x0_real, 0.5)
    assert scale.shape == (2, 1, 1, 1) and scale.flatten().tolist() == [4.0, 0.5]
    with pytest.raises(ValueError, match="shapes differ"):
        losses.normaliser(x, x0_real[:1], 0.5)


def test_normalised_variance_of_the_weight_between_two_unit_gaussians():
    """2502.15681, figure 4a: Var_q[h] / E_q[h]^2 for p = N(d, 1), q = N(0, 1), where log r = d x -
    d^2 / 2. In closed form it is exp(d^2) - 1 for forward KL and exp(d^2 / 4) - 1 for Hellinger."""
    x, weights = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(200))
    weights = weights / weights.sum()
    variance = {}
    for d in (0.5, 1.0, 2.0, 3.0):
        r = (d * x - d**2 / 2).exp()
        for name, h_of in losses.DIVERGENCES.items():
            h = h_of(r)
            mean = (weights * h).sum()
            variance[name, d] = ((weights * (h - mean) ** 2).sum() / mean**2).item()
        assert variance["forward-kl", d] == pytest.approx(math.exp(d**2) - 1, rel=1e-6)
        assert variance["hellinger", d] == pytest.approx(math.exp(d**2 / 4) - 1, rel=1e-6)
        # h = r + 1, whose mean is 2
        assert variance["jeffreys", d] == pytest.approx((math.exp(d**2) - 1) / 4, rel=1e-6)
        assert variance["reverse-kl", d] == pytest.approx(0, abs=1e-9)
        assert variance["js", d] < variance["hellinger", d] * 1.5
        assert variance["js", d] < variance["jeffreys", d] < variance["forward-kl", d]
    assert variance["forward-kl", 3.0] > 1000 and variance["jeffreys", 3.0] > 1000
    assert variance["js", 3.0] < 10 and variance["hellinger", 3.0] < 10


# ------------------------------------------------------------------------ ratio, GAN, mean-variance


def test_density_ratio_is_cut_off_on_both_sides():
    logit = torch.tensor([-1000.0, -1.0, 0.0, 2.0, 1000.0])
    expected = torch.tensor([0.1, math.exp(-1), 1.0, math.exp(2), 20.0])
    torch.testing.assert_close(losses.density_ratio(logit), expected)


def test_bin_means_move_where_something_fell_in():
    bins = losses.time_bin(torch.tensor([0, 99, 100, 550, 999]), 1000, 10)
    assert bins.tolist() == [0, 0, 1, 5, 9]
    means, sums, counts = torch.tensor([[1.0, 1.0, 3.0], [4.0, 0.0, 6.0], [2.0, 0.0, 2.0]])
    means = losses.update_bin_means(means, sums, counts, decay=0.9)
    torch.testing.assert_close(means, torch.tensor([1.1, 1.0, 3.0]))


def test_gan_losses_are_binary_cross_entropy():
    real, fake = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    expected = entropy(real, torch.ones(9)) + entropy(fake, torch.zeros(9))
    torch.testing.assert_close(losses.gan_critic_loss(real, fake).mean(), expected)
    torch.testing.assert_close(losses.gan_student_loss(fake).mean(), entropy(fake, torch.ones(9)))


def test_r1_penalty_is_the_square_of_a_critic_s_gradient():
    """Of a linear critic, over many small steps aside."""
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(6, generator=generator)
    x, eps = torch.randn(2, 100_000, 6, generator=generator)
    penalty = losses.r1_penalty(x @ slope, (x + 0.1 * eps) @ slope)
    torch.testing.assert_close(penalty.mean() / 0.1**2, slope.square().sum(), rtol=0.02, atol=0)


def test_mean_variance_loss_is_the_kl_between_gaussians():
    torch.manual_seed(0)
    x = 2 + 3 * torch.randn(5, 4, 8, 8, dtype=torch.float64)
    flat = x.flatten(1)
    own = torch.distributions.Normal(flat.mean(1), flat.std(1, correction=0))
    target = torch.distributions.Normal(*torch.tensor([0.075, 0.9], dtype=torch.float64))
    expected = torch.distributions.kl_divergence(own, target).mean()
    torch.testing.assert_close(losses.mean_variance_loss(x, 0.075, 0.81).mean(), expected)


def test_regression_loss_is_the_mean_square():
    a, b = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.mse_loss(a, b)
    torch.testing.assert_close(losses.regression_loss(a, b).mean(), expected)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.regression_loss(a, b[:1])


@pytest.mark.parametrize("channels", [8, 32, 48, 64, 192])
def test_gan_head_judges_by_the_features_of_narrow_networks_too(channels):
    """A normaliser over one value has no gradient, over two one of rounding: where its inputs
    differ by much, it is a step."""
    torch.manual_seed(0)
    head, features = (
        models.GanHead(channels, 4).double(),
        3 * torch.randn(16, channels, 4, 4, dtype=torch.float64),
    )

    def gradient():
        inputs = features.to(next(head.parameters()).dtype).requires_grad_()
        return torch.autograd.grad(head(inputs).sum(), inputs)[0].double()

    exact, size = gradient(), head(features).abs().mean()
    assert exact.norm() * features.norm() / len(features) > 0.1 * size
    head.float()
    assert (gradient() - exact).norm() < 2e-5 * exact.norm()


def test_gan_head_learns_the_log_ratio_of_two_gaussians(monkeypatch):
    """The head on a network of the plane's kind, trained by the critic's loss alone, against
    log p_t / q_t of the diffused Gaussians."""
    torch.manual_seed(0)
    monkeypatch.setattr(plane, "fitted_weights", lambda name: plane.PointNetwork().state_dict())
    model = plane.PlaneModel("gmm")
    head = models.make_gan_head(model.origin, model.encode([""]), model.sample_shape, 0)
    fake_score = models.FakeScore(copy.deepcopy(model.origin), head).requires_grad_(True)
    optimizer = torch.optim.AdamW(fake_score.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    generator = torch.Generator().manual_seed(0)
    mean_p, mean_q, deviation = torch.tensor([0.5, 0.0]), torch.tensor([-0.3, 0.4]), 0.6
    cond = model.encode(["0"] * 256)

    def diffused(mean, t):
        x, eps = torch.randn(2, 256, 2, 1, 1, generator=generator)
        return model.schedule.add_noise(mean[:, None, None] + deviation * x, eps, t)

    for _ in range(300):
        t = torch.randint(1000, (256,), generator=generator)
        _, logit_real = fake_score(diffused(mean_p, t), t, cond)
        _, logit_fake = fake_score(diffused(mean_q, t), t, cond)
        losses.gan_critic_loss(logit_real, logit_fake).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    for level in (50, 300, 600):
        t = torch.full((256,), level)
        alpha, sigma = model.schedule.alpha[level], model.schedule.sigma[level]
        # Half of each: where both have density.
        x_t = torch.cat([diffused(mean_p, t)[:128], diffused(mean_q, t)[:128]])
        with torch.no_grad():
            _, logit = fake_score(x_t, t, cond)
        to_p = (x_t[..., 0, 0] - alpha * mean_p).square().sum(1)
        to_q = (x_t[..., 0, 0] - alpha * mean_q).square().sum(1)
        exact = (to_q - to_p) / (2 * (alpha**2 * deviation**2 + sigma**2))
        assert (logit - exact).square().mean().sqrt() < 0.25 * exact.std()


def test_surrogate_loss_has_the_direction_as_its_gradient():
    torch.manual_seed(0)
    x, direction = torch.randn(2, 3, 4, 5, 5)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(losses.surrogate_loss(x, direction).mean(), x)
    torch.testing.assert_close(gradient, direction / x.numel())


def test_health_metrics_on_known_tensors():
    x = torch.tensor([[0.0, 2.0, 0.0, 2.0]])
    x0_real, x0_fake = x + torch.tensor([[3.0, 0, 0, 0]]), x + torch.tensor([[0, 4.0, 0, 0]])
    metrics = losses.health(x, x0_real, x0_fake)
    assert metrics["mean"].item() == pytest.approx(x.mean().item())
    assert metrics["std"].item() == pytest.approx(math.sqrt(4 / 3))
    assert metrics["gap"].item() == pytest.approx(5 / 3)
    assert metrics["cosine"].item() == pytest.approx(0)


# ----------------------------------------------------------------------------- samplers


def exact_x0(schedule):
    """x0_of(x_t, t) of the mixture, and the noise to start from."""
    x0_of = lambda x_t, t: TEACHER.x0(x_t.double(), *levels(schedule, int(t))).float()
    return x0_of, torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [50, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_deterministic_sampler_agrees_with_ddim(steps, prediction):
    schedule = SCHEDULES["vp"]
    x0_of, noise = exact_x0(schedule)
    scheduler = DDIMScheduler(
        **SD_BETAS,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    scheduler.set_timesteps(steps)
    x_t = noise
    for t in scheduler.timesteps:
        output = output_of(prediction, x0_of(x_t, t), x_t, schedule.alpha[t], schedule.sigma[t])
        x_t = scheduler.step(output, t, x_t).prev_sample
    ours = models.deterministic_sample(x0_of, noise, schedule.timesteps(steps), schedule)
    torch.testing.assert_close(ours, x_t, atol=2e-5, rtol=1e-5)


def test_jump_target_is_the_x0_that_leads_there():
    """Any x0 is found again from the step that it makes, on a flow's levels and on SD's."""
    for schedule in (
        models.flow_schedule(shift=3.0),
        models.vp_schedule(torch.linspace(0.99, 0.01, 1000)),
    ):
        x_t, x0 = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
        for t, s in ((999, 749), (500, 20)):
            x_s = models.deterministic_step(x0, x_t, t, s, schedule)
            levels = [*schedule.at(t, x_t), *schedule.at(s, x_t)]
            found = losses.jump_target(x_t, x_s, *levels)
            torch.testing.assert_close(found, x0, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="shapes differ"):
        losses.jump_target(x_t, x_t[:1], *levels)


def test_deterministic_sampler_agrees_with_flow_matching_euler():
    schedule = SCHEDULES["flow"]
    x0_of, noise = exact_x0(schedule)
    timesteps = schedule.timesteps(20)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # what we hand over is shifted already
    scheduler.set_timesteps(sigmas=schedule.sigma[timesteps].tolist())
    x_t = noise
    for t, time in zip(timesteps, scheduler.timesteps):
        velocity = output_of("flow", x0_of(x_t, t), x_t, schedule.alpha[t], schedule.sigma[t])
        x_t = scheduler.step(velocity, time, x_t).prev_sample
    ours = models.deterministic_sample(x0_of, noise, timesteps, schedule)
    torch.testing.assert_close(ours, x_t, atol=1e-5, rtol=1e-5)


def test_deterministic_sampler_agrees_with_euler_on_edm_levels():
    schedule = SCHEDULES["edm"]
    x0_of, noise = exact_x0(schedule)
    timesteps = schedule.timesteps(20)
    scheduler = EulerDiscreteScheduler(prediction_type="sample", timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    # The same Euler step at EDM's noise levels.
    scheduler.sigmas = torch.cat([schedule.sigma[timesteps], torch.zeros(1)])
    x_t = 80.0 * noise
    for t, time in zip(timesteps, scheduler.timesteps):
        x_t = scheduler.step(x0_of(x_t, t), time, x_t).prev_sample
    ours = models.deterministic_sample(x0_of, noise, timesteps, schedule)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-5)


def test_few_step_sampler_agrees_with_lcm():
    schedule = SCHEDULES["vp"]
    x0_of, _ = exact_x0(schedule)
    timesteps = [999, 749, 499, 249]
    generator = torch.Generator().manual_seed(1)
    noise = torch.stack([torch.randn(6, 1, 3, 3, generator=generator) for _ in timesteps])

    class EpsNetwork(torch.nn.Module):
        def forward(self, sample, timestep, return_dict):
            x0, at = x0_of(sample, timestep[0]), schedule.at(timestep.long(), sample)
            return (output_of("epsilon", x0, sample, *at),)

    scheduler = LCMScheduler(**SD_BETAS, clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    generator.manual_seed(1)
    x_t = torch.randn(6, 1, 3, 3, generator=generator)  # noise[0]; LCM itself then draws noise[1:]
    for t in scheduler.timesteps:
        eps = output_of("epsilon", x0_of(x_t, t), x_t, schedule.alpha[t], schedule.sigma[t])
        x_t = scheduler.step(eps, t, x_t, generator=generator).prev_sample
    denoiser = models.Denoiser(EpsNetwork(), schedule, "epsilon", FAMILY)
    ours = models.few_step_sample(denoiser, noise, {}, timesteps)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)
