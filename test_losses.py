"""Every formula against closed form or against diffusers. Run with: pytest"""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

import data
import errors
import eval as evaluation
import judges
import gmm
import losses
import models
import sample
import train

T_VALUES = (60, 300, 600, 900)


def sd_alphas_cumprod():
    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod


SCHEDULES = {"vp": models.vp_schedule(sd_alphas_cumprod()), "edm": models.edm_schedule(), "flow": models.flow_schedule(shift=3.0)}
PREDICTIONS = [("vp", "epsilon"), ("vp", "v_prediction"), ("flow", "flow"), ("edm", "edm")]


class Mixture:
    """A mixture of 1-D Gaussians, diffused exactly. One component makes it a Gaussian."""

    def __init__(self, weights, means, deviations):
        self.weights, self.means, self.deviations = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, deviations))

    def log_density(self, x_t, alpha, sigma):
        variance = alpha ** 2 * self.deviations ** 2 + sigma ** 2
        z = x_t[..., None] - alpha * self.means
        return (self.weights.log() - 0.5 * (z ** 2 / variance + (2 * math.pi * variance).log())).logsumexp(-1)

    def x0(self, x_t, alpha, sigma):
        """E[x0 | x_t]: the components' posterior means, weighted by their responsibilities."""
        variance = alpha ** 2 * self.deviations ** 2 + sigma ** 2
        z = x_t[..., None] - alpha * self.means
        responsibility = (self.weights.log() - 0.5 * (z ** 2 / variance + variance.log())).softmax(-1)
        return (responsibility * (self.means + alpha * self.deviations ** 2 / variance * z)).sum(-1)


TEACHER = Mixture([0.3, 0.7], [-1.0, 0.8], [0.3, 0.5])


def levels(schedule, t):
    return schedule.alpha[t].double(), schedule.sigma[t].double()


def gauss_hermite(n=120):
    """Nodes and weights for expectations under N(0, 1)."""
    import numpy as np
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


# ---------------------------------------------------------------------------------------------------- schedules

def test_schedules_are_what_diffusers_uses():
    vp = SCHEDULES["vp"]
    torch.testing.assert_close(vp.alpha ** 2, sd_alphas_cumprod())
    torch.testing.assert_close(vp.alpha ** 2 + vp.sigma ** 2, torch.ones(1000))
    assert 1 / vp.alpha[999].item() == pytest.approx(14.6, abs=0.1)
    edm = SCHEDULES["edm"]
    assert edm.sigma[0].item() == pytest.approx(0.002) and edm.sigma[999].item() == pytest.approx(80)
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


# ---------------------------------------------------------------------------------------------------- x0 prediction

def output_of(prediction, x0, x_t, alpha, sigma):
    """What a perfect network of each kind outputs, from the definitions in 2006.11239, 2202.00512, 2209.03003, 2206.00364."""
    eps = (x_t - alpha * x0) / sigma
    if prediction == "edm":
        c_skip, c_out = 0.25 / (sigma ** 2 + 0.25), sigma * 0.5 / (sigma ** 2 + 0.25).sqrt()
        return (x0 - c_skip * x_t) / c_out
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "flow": eps - x0}[prediction]


@pytest.mark.parametrize("family, prediction", PREDICTIONS)
@pytest.mark.parametrize("density", [Mixture([1.0], [0.4], [0.6]), TEACHER], ids=["gaussian", "mixture"])
def test_denoiser_reads_x0_from_every_kind_of_network(family, prediction, density):
    schedule = SCHEDULES[family]

    class PerfectNetwork(torch.nn.Module):
        """Knows the density, sees what a network sees: its scaled input and its time."""

        def forward(self, scaled, time, return_dict):
            t = (schedule.network_time[None] - time[:, None]).abs().argmin(1)
            alpha, sigma = (level.double() for level in schedule.at(t, scaled))
            x_t = scaled.double() * (sigma ** 2 + 0.25).sqrt() if prediction == "edm" else scaled.double()
            x0 = density.x0(x_t, alpha[..., None], sigma[..., None])
            return (output_of(prediction, x0, x_t, alpha, sigma),)

    t = torch.tensor(T_VALUES)
    x_t = schedule.add_noise(torch.linspace(-1, 1, 4).view(4, 1), torch.linspace(-2, 2, 5).expand(4, 5), t)
    alpha, sigma = (level.double() for level in schedule.at(t, x_t))
    x0 = models.Denoiser(PerfectNetwork(), schedule, prediction)(x_t, t, {})
    torch.testing.assert_close(x0.double(), density.x0(x_t.double(), alpha[..., None], sigma[..., None]), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", T_VALUES)
def test_score_identity(family, t):
    alpha, sigma = levels(SCHEDULES[family], t)
    x_t = (alpha * torch.linspace(-3, 3, 41, dtype=torch.float64)).requires_grad_()
    true_score, = torch.autograd.grad(TEACHER.log_density(x_t, alpha, sigma).sum(), x_t)
    torch.testing.assert_close(losses.score(TEACHER.x0(x_t, alpha, sigma), x_t, alpha, sigma), true_score)


@pytest.mark.parametrize("family, prediction", PREDICTIONS)
def test_denoising_loss_is_the_error_of_the_networks_own_output(family, prediction):
    torch.manual_seed(0)
    schedule, t = SCHEDULES[family], torch.tensor(T_VALUES)
    x, eps, error = torch.randn(3, 4, 7, dtype=torch.float64)
    alpha, sigma = (level.double() for level in schedule.at(t, x))
    x_t = alpha * x + sigma * eps
    output = output_of(prediction, x, x_t, alpha, sigma) + error
    x0_pred = models.x0_from_output(prediction, output, x_t, alpha, sigma)
    loss = losses.denoising_loss(x0_pred, x, losses.denoising_weight(prediction, alpha, sigma))
    torch.testing.assert_close(loss, error.square().mean())


# ---------------------------------------------------------------------------------------------------- f-divergences and the direction

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
    first, = torch.autograd.grad(F[divergence](r, r.log()).sum(), r, create_graph=True)
    second, = torch.autograd.grad(first.sum(), r)
    torch.testing.assert_close(losses.DIVERGENCES[divergence](r.detach()), r.detach() ** 2 * second)


def students(alpha, sigma):
    """Two students of 1-D samples: a Gaussian with shift and scale, and a mixture with two shifts. For each: its parameters, its
    density as a function of them, and the pieces (weight, mean, variance of x_t, E[dx_t / dtheta | x_t]) it is made of."""
    def gaussian(theta):
        return Mixture([1.0], theta[:1], theta[1:])

    def mixture(theta):
        q = Mixture([0.4, 0.6], [0.0, 0.0], [0.4, 0.2])
        q.means = theta
        return q

    shift, scale = 0.3, 0.7
    variance = alpha ** 2 * scale ** 2 + sigma ** 2
    along = lambda x_t: torch.stack([alpha.expand_as(x_t), alpha * alpha * scale * (x_t - alpha * shift) / variance])
    yield gaussian, torch.tensor([shift, scale], dtype=torch.float64), [(1.0, alpha * shift, variance, along)]
    parts = []
    for k, (weight, mean, deviation) in enumerate(((0.4, -0.7, 0.4), (0.6, 0.4, 0.2))):
        along = lambda x_t, k=k: torch.stack([alpha.expand_as(x_t) * (i == k) for i in range(2)])
        parts.append((weight, alpha * mean, alpha ** 2 * deviation ** 2 + sigma ** 2, along))
    yield mixture, torch.tensor([-0.7, 0.4], dtype=torch.float64), parts


@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", T_VALUES)
@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
def test_f_divergence_gradient_by_quadrature(divergence, family, t):
    """E_q[-h(p/q) (s_p - s_q) dx_t / dtheta] is the derivative of D_f(p_t || q_t), automatic differentiation of a quadrature."""
    alpha, sigma = levels(SCHEDULES[family], t)
    for student, theta, parts in students(alpha, sigma):
        reach = 9 * (alpha ** 2 * 1.0 + sigma ** 2).sqrt()
        x_t = torch.linspace(-float(reach), float(reach), 20001, dtype=torch.float64)
        width = x_t[1] - x_t[0]
        theta = theta.clone().requires_grad_()
        log_p, log_q = TEACHER.log_density(x_t, alpha, sigma), student(theta).log_density(x_t, alpha, sigma)
        log_r = log_p - log_q
        true_gradient, = torch.autograd.grad((log_q.exp() * F[divergence](log_r.exp(), log_r)).sum() * width, theta)

        q = student(theta.detach())
        s_p = losses.score(TEACHER.x0(x_t, alpha, sigma), x_t, alpha, sigma)
        s_q = losses.score(q.x0(x_t, alpha, sigma), x_t, alpha, sigma)
        weighted = -losses.DIVERGENCES[divergence](log_r.detach().exp()) * (s_p - s_q)
        gradient = torch.zeros(2, dtype=torch.float64)
        for weight, mean, variance, along in parts:
            density = weight * (-0.5 * (x_t - mean) ** 2 / variance).exp() / (2 * math.pi * variance) ** 0.5
            gradient += (density * weighted * along(x_t)).sum(1) * width
        torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("divergence", losses.DIVERGENCES)
@pytest.mark.parametrize("family, t", [("vp", 300), ("edm", 600), ("flow", 600)])
def test_f_divergence_gradient_in_the_plane(divergence, family, t):
    """The same for the labelled mixture of gmm.py and a student that is a Gaussian in the plane with a shift of its own."""
    alpha, sigma = levels(SCHEDULES[family], t)
    teacher, theta = gmm.plane(), torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    teacher.means, teacher.deviations, teacher.log_weights = teacher.means.double(), teacher.deviations.double(), teacher.log_weights.double()
    variance = alpha ** 2 * 0.8 ** 2 + sigma ** 2
    line = torch.linspace(-8, 8, 501, dtype=torch.float64) * variance.sqrt()
    x_t = torch.cartesian_prod(line, line)
    label, area = torch.full((len(x_t),), 1), (line[1] - line[0]) ** 2
    at = (alpha.view(1, 1), sigma.view(1, 1))
    log_p = teacher.log_density(x_t, *at, label)
    log_q = -0.5 * (x_t - alpha * theta).square().sum(1) / variance - (2 * math.pi * variance).log()
    log_r = log_p - log_q
    true_gradient, = torch.autograd.grad((log_q.exp() * F[divergence](log_r.exp(), log_r)).sum() * area, theta)

    x0_fake = theta.detach() + alpha * 0.8 ** 2 / variance * (x_t - alpha * theta.detach())
    direction = losses.dm_direction(teacher.x0(x_t, *at, label), x0_fake) * alpha / sigma ** 2  # s_fake - s_real
    weight = log_q.detach().exp() * losses.DIVERGENCES[divergence](log_r.detach().exp())
    gradient = (weight[:, None] * direction * alpha).sum(0) * area
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-3, atol=1e-9)


def test_directions_add_up_to_dmd2_s_numerator():
    torch.manual_seed(0)
    x0_cond, x0_uncond, x0_fake = torch.randn(3, 5, 3, 4, 4)
    guided = models.guide(x0_cond, x0_uncond, 3.0)
    total = losses.dm_direction(x0_cond, x0_fake) + losses.ca_direction(x0_cond, x0_uncond, 3.0)
    torch.testing.assert_close(total, x0_fake - guided)
    assert losses.dm_direction(x0_cond, x0_cond).abs().max() == 0 and losses.ca_direction(x0_cond, x0_uncond, 1.0).abs().max() == 0
    with pytest.raises(ValueError, match=r"x0_cond \(5, 3, 4, 4\).*x0_fake \(1, 3, 4, 4\)"):
        losses.dm_direction(x0_cond, x0_fake[:1])


def test_normaliser_is_one_number_a_sample_and_has_a_floor():
    x = torch.zeros(2, 1, 2, 2)
    x0_real = torch.stack([torch.tensor([[[4.0, -4.0], [2.0, 6.0]]]), torch.zeros(1, 2, 2)])
    torch.testing.assert_close(losses.normaliser(x, x0_real, 0.5), torch.tensor([4.0, 0.5]).view(2, 1, 1, 1))
    with pytest.raises(ValueError, match="shapes differ"):
        losses.normaliser(x, x0_real[:1], 0.5)


def test_normalised_variance_of_the_weight_between_two_unit_gaussians():
    """2502.15681, figure 4a: Var_q[h] / E_q[h]^2 for p = N(d, 1), q = N(0, 1), where log r = d x - d^2 / 2. In closed form it is
    exp(d^2) - 1 for forward KL and exp(d^2 / 4) - 1 for Hellinger."""
    x, weights = gauss_hermite(200)
    variance = {}
    for d in (0.5, 1.0, 2.0, 3.0):
        r = (d * x - d ** 2 / 2).exp()
        for name, h_of in losses.DIVERGENCES.items():
            h = h_of(r)
            mean = (weights * h).sum()
            variance[name, d] = ((weights * (h - mean) ** 2).sum() / mean ** 2).item()
        assert variance["forward-kl", d] == pytest.approx(math.exp(d ** 2) - 1, rel=1e-6)
        assert variance["hellinger", d] == pytest.approx(math.exp(d ** 2 / 4) - 1, rel=1e-6)
        assert variance["jeffreys", d] == pytest.approx((math.exp(d ** 2) - 1) / 4, rel=1e-6)  # h = r + 1, whose mean is 2
        assert variance["reverse-kl", d] == pytest.approx(0, abs=1e-9)
        assert variance["js", d] < variance["hellinger", d] * 1.5 and variance["js", d] < variance["jeffreys", d] < variance["forward-kl", d]
    assert variance["forward-kl", 3.0] > 1000 and variance["jeffreys", 3.0] > 1000
    assert variance["js", 3.0] < 10 and variance["hellinger", 3.0] < 10


# ---------------------------------------------------------------------------------------------------- ratio, GAN, mean-variance

def test_density_ratio_is_cut_off_on_both_sides():
    logit = torch.tensor([-1000.0, -1.0, 0.0, 2.0, 1000.0])
    torch.testing.assert_close(losses.density_ratio(logit), torch.tensor([0.1, math.exp(-1), 1.0, math.exp(2), 20.0]))


def test_bin_means_move_where_something_fell_in():
    assert losses.time_bin(torch.tensor([0, 99, 100, 550, 999]), 1000, 10).tolist() == [0, 0, 1, 5, 9]
    means = losses.update_bin_means(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([4.0, 0.0, 6.0]), torch.tensor([2.0, 0.0, 2.0]), decay=0.9)
    torch.testing.assert_close(means, torch.tensor([1.1, 1.0, 3.0]))


def test_gan_losses_are_binary_cross_entropy():
    real, fake = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    torch.testing.assert_close(losses.gan_critic_loss(real, fake), entropy(real, torch.ones(9)) + entropy(fake, torch.zeros(9)))
    torch.testing.assert_close(losses.gan_student_loss(fake), entropy(fake, torch.ones(9)))


def test_mean_variance_loss_is_the_kl_between_gaussians():
    x = 2 + 3 * torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = x.flatten(1)
    own = torch.distributions.Normal(flat.mean(1), flat.std(1, correction=0))
    target = torch.distributions.Normal(torch.tensor(0.075, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    torch.testing.assert_close(losses.mean_variance_loss(x, 0.075, 0.81), torch.distributions.kl_divergence(own, target).mean())


def test_regression_loss_is_the_mean_square():
    a, b = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.regression_loss(a, b), torch.nn.functional.mse_loss(a, b))
    with pytest.raises(ValueError, match="shapes differ"):
        losses.regression_loss(a, b[:1])


@pytest.mark.parametrize("channels", [8, 32, 48, 64, 192])
def test_gan_head_judges_by_the_features_of_narrow_networks_too(channels):
    """A normaliser over one value has no gradient, over two one of rounding: where its inputs differ by much, it is a step."""
    torch.manual_seed(0)
    head, features = models.GanHead(channels, 4).double(), 3 * torch.randn(16, channels, 4, 4, dtype=torch.float64)

    def gradient():
        inputs = features.to(next(head.parameters()).dtype).requires_grad_()
        return torch.autograd.grad(head(inputs).sum(), inputs)[0].double()

    exact, size = gradient(), head(features).abs().mean()
    assert exact.norm() * features.norm() / len(features) > 0.1 * size
    head.float()
    assert (gradient() - exact).norm() < 2e-5 * exact.norm()


def test_gan_head_learns_the_log_ratio_of_two_gaussians():
    """The head on the plane's network, trained by the critic's loss alone, against log p_t / q_t of the diffused Gaussians."""
    model = gmm.Model("gmm")
    fake_score = models.FakeScore(copy.deepcopy(model.origin), models.gan_head(model.origin, model.encode([""]), model.sample_shape, 0)).requires_grad_(True)
    optimizer = torch.optim.AdamW(fake_score.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    generator = torch.Generator().manual_seed(0)
    mean_p, mean_q, deviation = torch.tensor([0.5, 0.0]), torch.tensor([-0.3, 0.4]), 0.6
    cond = model.encode(["0"] * 512)

    def diffused(mean, t):
        x = mean + deviation * torch.randn(512, 2, generator=generator)
        return model.schedule.add_noise(x[..., None, None], torch.randn(512, 2, 1, 1, generator=generator), t)

    for _ in range(800):
        t = torch.randint(1000, (512,), generator=generator)
        _, logit_real = fake_score(diffused(mean_p, t), t, cond)
        _, logit_fake = fake_score(diffused(mean_q, t), t, cond)
        losses.gan_critic_loss(logit_real, logit_fake).backward()
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
    for level in (50, 300, 600):
        t = torch.full((512,), level)
        alpha, sigma = model.schedule.alpha[level], model.schedule.sigma[level]
        x_t = torch.cat([diffused(mean_p, t)[:256], diffused(mean_q, t)[:256]])  # half of each: where both have density
        with torch.no_grad():
            _, logit = fake_score(x_t, t, cond)
        distance = lambda mean: (x_t[..., 0, 0] - alpha * mean).square().sum(1)
        exact = (distance(mean_q) - distance(mean_p)) / (2 * (alpha ** 2 * deviation ** 2 + sigma ** 2))
        assert (logit - exact).square().mean().sqrt() < 0.25
        assert exact.std() < 0.3 or torch.corrcoef(torch.stack([logit, exact]))[0, 1] > 0.97


def test_surrogate_loss_has_the_direction_as_its_gradient():
    torch.manual_seed(0)
    x, direction = torch.randn(2, 3, 4, 5, 5)
    x.requires_grad_()
    gradient, = torch.autograd.grad(losses.surrogate_loss(x, direction), x)
    torch.testing.assert_close(gradient, direction / x.numel())


def test_health_figures_on_known_tensors():
    x = torch.tensor([[0.0, 2.0, 0.0, 2.0]])
    x0_real, x0_fake = x + torch.tensor([[3.0, 0, 0, 0]]), x + torch.tensor([[0, 4.0, 0, 0]])
    figures = losses.health(x, x0_real, x0_fake)
    assert figures["std"].item() == pytest.approx(math.sqrt(4 / 3))
    assert figures["gap"].item() == pytest.approx(5 / 3)
    assert figures["cosine"].item() == pytest.approx(0)


# ---------------------------------------------------------------------------------------------------- samplers

def exact_x0(schedule):
    """x0_of(x_t, t) of the mixture, and the noise to start from."""
    x0_of = lambda x_t, t: TEACHER.x0(x_t.double(), *levels(schedule, int(t))).float()
    return x0_of, torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("steps", [50, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_deterministic_sampler_agrees_with_ddim(steps, prediction):
    schedule = SCHEDULES["vp"]
    x0_of, noise = exact_x0(schedule)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
                              timestep_spacing="trailing", prediction_type=prediction)
    scheduler.set_timesteps(steps)
    x_t = noise
    for t in scheduler.timesteps:
        output = output_of(prediction, x0_of(x_t, t), x_t, schedule.alpha[t], schedule.sigma[t])
        x_t = scheduler.step(output, t, x_t).prev_sample
    ours = models.deterministic_sample(x0_of, noise, schedule.timesteps(steps), schedule)
    torch.testing.assert_close(ours, x_t, atol=2e-5, rtol=1e-5)


def test_deterministic_sampler_agrees_with_flow_matching_euler():
    schedule = SCHEDULES["flow"]
    x0_of, noise = exact_x0(schedule)
    timesteps = schedule.timesteps(20)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # the sigmas we hand over are shifted already
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
    scheduler.sigmas = torch.cat([schedule.sigma[timesteps], torch.zeros(1)])  # the same Euler step at EDM's noise levels
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
        def forward(self, x_t, time, return_dict):
            return (output_of("epsilon", x0_of(x_t, time[0]), x_t, *schedule.at(time.long(), x_t)),)

    scheduler = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler.set_timesteps(timesteps=timesteps)
    generator.manual_seed(1)
    x_t = torch.randn(6, 1, 3, 3, generator=generator)  # noise[0]; LCM itself then draws noise[1:]
    for t in scheduler.timesteps:
        eps = output_of("epsilon", x0_of(x_t, t), x_t, schedule.alpha[t], schedule.sigma[t])
        x_t = scheduler.step(eps, t, x_t, generator=generator).prev_sample
    ours = models.rollout(models.Denoiser(EpsNetwork(), schedule, "epsilon"), noise, {}, timesteps)
    torch.testing.assert_close(ours, x_t, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------- the training steps

@pytest.fixture(scope="module")
def embedded_model():
    return models.load_model(str(data.EMOJI_TEACHER))


def setup(model, *flags):
    """Everything a training step needs, for a batch of two, with these flags."""
    args = train.parse_arguments(["--batch-size", "2", *flags])
    networks = train.Networks(model, args)
    prompts = ["cat face", "red apple"] if model.name == str(data.EMOJI_TEACHER) else ["0", "1"]
    return networks, model.encode(prompts), data.Draws(0, 0, 2, device=model.device), args


@pytest.fixture
def networks(embedded_model):
    return setup(embedded_model, "--gan-weight", "0")


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module, before):
    return any((a != b).any() for a, b in zip(module.parameters(), before))


def test_student_and_fake_score_start_equal_to_the_teacher(networks):
    nets, *_ = networks
    for copied in (nets.student, nets.fake_score.denoiser, nets.averaged_student):
        assert not moved(copied, weights(nets.teacher))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.parameters(), nets.teacher.parameters()))


def test_first_direction_without_guidance_is_zero(networks):
    nets, cond, draws, args = networks
    t = torch.tensor([300, 800])
    x_t = draws.normal(*nets.model.sample_shape)
    with torch.no_grad():
        x0_real = models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, 1.0)
        assert losses.dm_direction(x0_real, nets.fake_score(x_t, t, cond)[0]).abs().max() == 0


def test_teacher_builds_no_graph(networks):
    nets, cond, draws, args = networks
    x_t = draws.normal(*nets.model.sample_shape)
    assert not models.guided_x0(nets.teacher, x_t, 500, cond, nets.uncond, 3.0).requires_grad


def test_guidance_in_one_pass_is_guidance_in_two(networks):
    nets, cond, draws, args = networks
    x_t = draws.normal(*nets.model.sample_shape)
    x0_cond = nets.teacher(x_t, 500, cond)
    x0_uncond = nets.teacher(x_t, 500, nets.model.encode(["", ""]))
    torch.testing.assert_close(models.guided_x0(nets.teacher, x_t, 500, cond, nets.uncond, 3.0),
                               x0_uncond + 3.0 * (x0_cond - x0_uncond), atol=1e-3, rtol=1e-3)


def test_student_step_moves_the_student_only_and_fake_score_step_the_fake_score_only(networks):
    nets, cond, draws, args = networks
    noise = draws.normal(2, *nets.model.sample_shape).transpose(0, 1)
    x = models.rollout(nets.student, noise, cond, nets.timesteps[:2])
    before = {name: weights(module) for name, module in
              (("teacher", nets.teacher), ("student", nets.student), ("fake", nets.fake_score), ("text", nets.model.text_encoders[0][1]))}
    train.student_step(nets, x, None, nets.timesteps[1], cond, None, draws, args)
    assert moved(nets.student, before["student"])
    assert not moved(nets.teacher, before["teacher"]) and not moved(nets.fake_score, before["fake"])
    assert all(p.grad is None for p in [*nets.fake_score.parameters(), *nets.teacher.parameters()])

    before["student"] = weights(nets.student)
    train.fake_score_step(nets, x.detach(), cond, None, draws, args)
    assert moved(nets.fake_score, before["fake"])
    assert not moved(nets.student, before["student"]) and not moved(nets.teacher, before["teacher"])
    assert not moved(nets.model.text_encoders[0][1], before["text"])


def test_student_step_follows_the_surrogate_loss(networks):
    """The step's gradient, as the student receives it, against the papers' formulation through a scalar loss."""
    nets, cond, draws, args = networks
    noise = draws.normal(1, *nets.model.sample_shape).transpose(0, 1)
    reference = copy.deepcopy(nets.student)
    x_reference = models.rollout(reference, noise, cond, nets.timesteps[:1])
    replay = data.Draws(0, 7, 2)
    t = replay.integers(20, 981)
    x_t = nets.schedule.add_noise(x_reference.detach(), replay.normal(*x_reference.shape[1:]), t)
    with torch.no_grad():
        x0_real = models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, args.guidance)
        direction = (nets.fake_score(x_t, t, cond)[0] - x0_real) / (x_reference - x0_real).abs().mean((1, 2, 3), keepdim=True)
    losses.surrogate_loss(x_reference, direction).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])

    x = models.rollout(nets.student, noise, cond, nets.timesteps[:1])
    figures = train.student_step(nets, x, None, 999, cond, None, data.Draws(0, 7, 2), args)
    torch.testing.assert_close(figures["student_grad_norm"], expected, rtol=1e-4, atol=0)


def test_rollout_gives_gradients_through_the_last_step_only(networks):
    """The gradients of a three-step rollout are those of its last step alone, from the x_t that the first two led to."""
    nets, cond, draws, args = networks
    noise = draws.normal(3, *nets.model.sample_shape).transpose(0, 1)
    with torch.no_grad():
        x0 = models.rollout(nets.student, noise[:2], cond, nets.timesteps[:2])
        x_t = nets.schedule.add_noise(x0, noise[2], torch.tensor([499, 499]))
    expected = torch.autograd.grad(nets.student(x_t, 499, cond).sum(), list(nets.student.parameters()))
    ours = torch.autograd.grad(models.rollout(nets.student, noise, cond, nets.timesteps[:3]).sum(), list(nets.student.parameters()))
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------- the variants

@pytest.fixture(scope="module")
def plane_model():
    return gmm.Model("gmm")


def gradient_in_x(model, x, t_student, *flags, sources=None):
    """What train.student_step hands to x.backward, and what it drew: x is a leaf here, so its .grad keeps it."""
    nets, cond, _, args = setup(model, *flags)
    with torch.no_grad():  # a fake score that differs from the teacher, so that there is something to match
        for parameter in nets.fake_score.denoiser.parameters():
            parameter.mul_(0.9)
    x = x.clone().requires_grad_()
    train.student_step(nets, x, None, t_student, cond, sources, data.Draws(0, 3, 2), args)
    return x.grad, nets, cond, args, data.Draws(0, 3, 2)


@pytest.mark.parametrize("flags", [["--variant", "dmd2", "--gan-weight", "0"],
                                   ["--variant", "decoupled", "--schedule", "coupled", "--normaliser", "guided"]], ids=["dmd2", "decoupled"])
def test_dmd2_and_coupled_decoupled_dmd_are_the_formula_of_the_paper(embedded_model, flags):
    x = torch.randn(2, *embedded_model.sample_shape, generator=torch.Generator().manual_seed(0))
    gradient, nets, cond, args, replay = gradient_in_x(embedded_model, x, 749, *flags)
    t = replay.integers(20, 981)
    x_t = nets.schedule.add_noise(x, replay.normal(*x.shape[1:]), t)
    with torch.no_grad():
        x0_real = models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, args.guidance)
        expected = (nets.fake_score(x_t, t, cond)[0] - x0_real) / (x - x0_real).abs().mean((1, 2, 3), keepdim=True) / x.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_decoupled_dmd_reads_each_half_at_its_own_level_with_the_conditional_normaliser(plane_model):
    x = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    gradient, nets, cond, args, replay = gradient_in_x(plane_model, x, 499, "--variant", "decoupled", "--guidance", "4",
                                                       "--ca-weight", "0.7", "--dm-weight", "1.3")
    t_dm, t_ca = replay.integers(20, 981), replay.integers(20, 499)
    x_dm = nets.schedule.add_noise(x, replay.normal(*x.shape[1:]), t_dm)
    x_ca = nets.schedule.add_noise(x, replay.normal(*x.shape[1:]), t_ca)
    with torch.no_grad():
        real_dm, real_ca = nets.teacher(x_dm, t_dm, cond), nets.teacher(x_ca, t_ca, cond)
        uncond_ca = nets.teacher(x_ca, t_ca, plane_model.encode(["", ""]))
        norm_dm, norm_ca = ((x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3) for real in (real_dm, real_ca))
        expected = 1.3 * (nets.fake_score(x_dm, t_dm, cond)[0] - real_dm) / norm_dm - 0.7 * 3 * (real_ca - uncond_ca) / norm_ca
    torch.testing.assert_close(gradient, expected / x.numel(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["coupled", "full", "constrained", "hybrid"])
@pytest.mark.parametrize("t_student", [999, 749, 249, 19, 1])
def test_drawn_levels(kind, t_student):
    t_dm, t_ca = train.draw_levels(kind, t_student, 1000, data.Draws(0, 0, 20000))
    low, high = (20, 980) if kind != "constrained" else (min(20, t_student // 2), min(980, t_student - 1))
    assert t_dm.min() == low and t_dm.max() == high
    assert (t_ca == t_dm).all() == (kind == "coupled" or (kind == "constrained" and t_student == 1))
    if kind in ("constrained", "hybrid"):
        assert t_ca.max() < t_student and t_ca.min() == min(20, t_student // 2)
    if kind == "full":
        assert t_ca.min() == 20 and t_ca.max() == 980 and abs(torch.corrcoef(torch.stack([t_ca, t_dm]).float())[0, 1]) < 0.05


def test_gan_and_mean_variance_add_their_own_gradients(plane_model):
    x = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    plain, *_ = gradient_in_x(plane_model, x, 999, "--gan-weight", "0")
    flags = ["--gan-weight", "0.3", "--mean-variance-weight", "0.2", "--mean-variance-target", "0.1", "0.9"]
    both, nets, cond, args, replay = gradient_in_x(plane_model, x, 999, *flags)
    free_x, t = x.clone().requires_grad_(), replay.integers(20, 981)
    _, logit = nets.fake_score(nets.schedule.add_noise(free_x, replay.normal(*x.shape[1:]), t), t, cond)
    extra = 0.3 * losses.gan_student_loss(logit) + 0.2 * losses.mean_variance_loss(free_x, 0.1, 0.9)
    torch.testing.assert_close(both - plain, torch.autograd.grad(extra, free_x)[0], rtol=1e-3, atol=1e-6)


def test_f_distill_weighs_the_direction_by_h_at_its_own_x_t(plane_model):
    x = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    flags = ["--variant", "fdistill", "--gan-weight", "1e-12"]
    plain, *_ = gradient_in_x(plane_model, x, 999, *flags, "--divergence", "reverse-kl")
    weighed, nets, cond, args, replay = gradient_in_x(plane_model, x, 999, *flags, "--divergence", "js")
    t = replay.integers(20, 981)
    with torch.no_grad():
        _, logit = nets.fake_score(nets.schedule.add_noise(x, replay.normal(*x.shape[1:]), t), t, cond)
    r = logit.exp()
    if t[0] * 10 // 1000 == t[1] * 10 // 1000:
        r = r / (0.9 + 0.1 * r.mean())
    else:
        r = r / (0.9 + 0.1 * r)
    h = r / (r + 1)
    torch.testing.assert_close(weighed, plain * (h / h.mean()).view(2, 1, 1, 1), rtol=1e-3, atol=1e-7)


def test_reverse_kl_of_f_distill_is_dmd2_exactly(plane_model):
    x = torch.randn(2, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    dmd2, *_ = gradient_in_x(plane_model, x, 999, "--variant", "dmd2", "--student-steps", "1")
    fdistill, *_ = gradient_in_x(plane_model, x, 999, "--variant", "fdistill", "--divergence", "reverse-kl", "--student-steps", "1")
    assert torch.equal(dmd2, fdistill)


def weight_on_a_rank(rank, logit, t, file, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    fake_score = models.FakeScore(torch.nn.Identity())
    h = train.divergence_weight(fake_score, logit.chunk(2)[rank], t.chunk(2)[rank], 1000, "forward-kl")
    torch.save((h, fake_score.ratio_means), f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def test_f_distill_normalises_over_the_global_batch(tmp_path):
    """Two processes with half of the batch each against one with all of it."""
    logit, t = torch.randn(16, generator=torch.Generator().manual_seed(0)), torch.arange(16) * 60
    fake_score = models.FakeScore(torch.nn.Identity())
    h = train.divergence_weight(fake_score, logit, t, 1000, "forward-kl")
    assert h.mean().item() == pytest.approx(1, abs=1e-6) and h.std() > 0.1
    torch.multiprocessing.spawn(weight_on_a_rank, (logit, t, tmp_path / "meeting", tmp_path / "result"), nprocs=2)
    (first, means), (second, _) = (torch.load(f"{tmp_path}/result.{rank}", weights_only=True) for rank in range(2))
    torch.testing.assert_close(torch.cat([first, second]), h)
    torch.testing.assert_close(means, fake_score.ratio_means)


GRADIENT_CASES = {
    "dmd2": ["--variant", "dmd2"],
    "dmd": ["--variant", "dmd", "--pairs", "PAIRS"],
    "fdistill": ["--variant", "fdistill"],
    "decoupled": ["--variant", "decoupled"],
    "gan-alone": ["--dm-weight", "0", "--ca-weight", "0", "--gan-weight", "1"],
    "ca-gan-mean-variance": ["--dm-weight", "0", "--gan-weight", "1", "--mean-variance-weight", "1", "--mean-variance-target", "0", "1"],
    "everything": ["--variant", "fdistill", "--schedule", "hybrid", "--normaliser", "guided", "--student-input", "data", "--mean-variance-weight", "1",
                   "--mean-variance-target", "0", "1", "--regression-weight", "0.25", "--pairs", "PAIRS"],
}


@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_which_parameters_receive_a_gradient(embedded_model, case, tmp_path, monkeypatch):
    """Every variant on the embedded teacher: the student step gives all of the student's parameters a gradient and no other, the
    fake-score step all of the fake score's, head included, and no other."""
    flags = [str(tmp_path) if flag == "PAIRS" else flag for flag in GRADIENT_CASES[case]]
    nets, _, _, args = setup(embedded_model, *flags)
    if "--pairs" in flags:
        data.make_pairs(tmp_path, dict(model=None, prompts=None, count=3, steps=2, guidance=args.guidance, seed=0))
    sources = train.open_sources(embedded_model, args)
    modules = {"student": nets.student, "fake score": nets.fake_score, "teacher": nets.teacher, "text": embedded_model.text_encoders[0][1],
               "decoder": embedded_model.vae, "average": nets.averaged_student}
    seen = []

    def with_gradient():
        return {name: {key for key, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.abs().max() > 0}
                for name, module in modules.items()}

    for optimizer in (nets.student_optimizer, nets.fake_optimizer):
        monkeypatch.setattr(optimizer, "step", lambda: seen.append(with_gradient()))
    train.iterate(nets, sources, 0, args)
    everything = {name: {key for key, _ in module.named_parameters()} for name, module in modules.items()}
    nothing = {name: set() for name in modules}
    assert seen[0] == nothing | {"student": everything["student"]}
    assert seen[1] == nothing | {"fake score": everything["fake score"]}
    assert (nets.fake_score.head is None) == (args.gan_weight == 0)


def test_the_critic_reaches_the_encoder_half_and_the_denoising_loss_not_the_head(embedded_model):
    nets, cond, draws, args = setup(embedded_model)
    x0, logit = nets.fake_score(draws.normal(*embedded_model.sample_shape), 500, cond)
    names = [name for name, _ in nets.fake_score.named_parameters()]
    got = lambda out: {name for name, g in zip(names, torch.autograd.grad(out.sum(), list(nets.fake_score.parameters()), retain_graph=True,
                                                                          allow_unused=True)) if g is not None}
    later = tuple(f"denoiser.network.{part}" for part in ("up_blocks", "conv_norm_out", "conv_out"))
    assert got(logit) == {name for name in names if not name.startswith(later)}
    assert got(x0) == {name for name in names if not name.startswith("head")}


def test_regression_follows_the_pairs(plane_model, tmp_path):
    data.make_pairs(tmp_path, dict(model="gmm", prompts=None, count=5, steps=4, guidance=3.0, seed=0))
    nets, cond, _, args = setup(plane_model, "--variant", "dmd", "--pairs", str(tmp_path))
    sources, x = train.open_sources(plane_model, args), torch.randn(2, 2, 1, 1)
    gradients = {}
    nets.student_optimizer.step = lambda: gradients.update({name: p.grad.clone() for name, p in nets.student.named_parameters()})
    train.student_step(nets, x.requires_grad_(), None, 999, cond, sources, data.Draws(0, 3, 2), args)  # x is a leaf: no DM gradient reaches the student
    replay = data.Draws(0, 3, 2)
    replay.integers(20, 981), replay.normal(2, 1, 1)
    noise, x0, prompts = sources.pairs.draw(replay)
    loss = 0.25 * (nets.student(noise, 999, plane_model.encode(prompts)) - x0).square().mean()
    for (name, parameter), expected in zip(nets.student.named_parameters(), torch.autograd.grad(loss, list(nets.student.parameters()))):
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=1e-7)


def test_pairs_are_the_teacher_s_deterministic_samples(plane_model, tmp_path):
    config = dict(model="gmm", prompts=None, count=300, steps=10, guidance=2.0, seed=0)
    data.make_pairs(tmp_path, config)
    data.make_pairs(tmp_path, config | {"count": 400})  # the second shard is made again, whole
    pairs = data.Pairs(tmp_path, plane_model, 2.0)
    assert len(pairs.prompts) == 400 and sorted(path.name for path in tmp_path.iterdir()) == ["00000.safetensors", "00001.safetensors", "config.json"]
    all_noise, all_x0, all_prompts = pairs.read(range(400))
    expected = sample.teacher_row(plane_model, 10, 2.0).draw(all_noise[None], plane_model.encode(all_prompts))
    torch.testing.assert_close(all_x0, expected, atol=2e-3, rtol=2e-3)  # half precision
    noise, x0, prompts = pairs.draw(data.Draws(0, 0, 7))
    index = [(all_noise == row).flatten(1).all(1).nonzero().item() for row in noise]
    assert torch.equal(all_x0[index], x0) and [all_prompts[i] for i in index] == prompts


def test_noised_real_data_as_the_student_s_input(plane_model, monkeypatch):
    nets, _, _, args = setup(plane_model, "--student-input", "data", "--gan-weight", "0", "--student-steps", "4")
    sources, seen = train.open_sources(plane_model, args), {}
    real = nets.student.forward
    monkeypatch.setattr(nets.student, "forward", lambda x_t, t, cond: seen.update(x_t=x_t, t=t, cond=cond) or real(x_t, t, cond))
    train.iterate(nets, sources, 5, args)
    replay = data.Draws(args.seed, 5, 2)
    t = nets.timesteps[replay.below(4)]
    x_real, prompts = sources.real.draw(replay)
    torch.testing.assert_close(seen["x_t"], nets.schedule.add_noise(x_real, replay.normal(*x_real.shape[1:]), torch.tensor([t, t])))
    assert seen["t"] == t and seen["cond"]["class_labels"].tolist() == [int(prompt) for prompt in prompts]


# ---------------------------------------------------------------------------------------------------- the plane

@pytest.mark.parametrize("label", [0, 3, gmm.LABELS])
def test_the_plane_s_denoiser_is_exact(plane_model, label):
    """Its x0 is Tweedie's formula for the gradient of its log density, with a label and without."""
    x_t = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in T_VALUES:
        alpha, sigma = (level.view(1, 1) for level in levels(plane_model.schedule, t))
        free, labels = x_t.clone().requires_grad_(), torch.full((64,), label)
        score, = torch.autograd.grad(plane_model.mixture.log_density(free, alpha, sigma, labels).sum(), free)
        expected = (free.detach() + sigma ** 2 * score) / alpha
        x0 = plane_model.teacher(x_t.float()[..., None, None], t, {"class_labels": labels})[..., 0, 0]
        torch.testing.assert_close(x0.double(), expected, atol=2e-3, rtol=1e-3)


def test_the_plane_s_density_integrates_to_one_and_its_samples_follow_it(plane_model):
    line = torch.linspace(-4, 4, 400)
    grid, one = torch.cartesian_prod(line, line), torch.ones(1, 1)
    for label in range(gmm.LABELS + 1):
        density = plane_model.mixture.log_density(grid, one, 0.05 * one, torch.full((len(grid),), label)).exp()
        assert (density.sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=1e-3)
        x = plane_model.truth.draw(torch.full((20000,), label), torch.Generator().manual_seed(0))
        mean = (density[:, None] * grid).sum(0) / density.sum()
        torch.testing.assert_close(x.mean(0), mean, atol=0.03, rtol=0)


def test_figures_of_exact_samples_and_of_wrong_ones(plane_model):
    generator, label = torch.Generator().manual_seed(0), torch.arange(8000) % gmm.LABELS
    target, exact = plane_model.truth.draw(label, generator), plane_model.truth.draw(label, generator)
    good = gmm.measure(plane_model.mixture, exact, label, target)
    assert good["modes"] == 1 and good["near"] > 0.97 and good["sliced"] < 0.05 and abs(good["kl"]) < 0.1 and good["mass"] < 0.03
    assert len(good["per_label"]) == gmm.LABELS and good["per_label"][2]["modes"] == 1
    one_mode = plane_model.mixture.means[label * 4]
    bad = gmm.measure(plane_model.mixture, one_mode, label, target)
    assert bad["modes"] == 0.25 and bad["mass"] == pytest.approx(0.6, abs=1e-6) and bad["near"] == 1
    shifted = gmm.sliced_wasserstein(exact, exact + torch.tensor([0.5, 0.0]))
    assert shifted == pytest.approx(0.5 * 2 / math.pi, abs=1e-3)  # mean of |cos| over directions
    wide = torch.randn(20000, 2, generator=generator), 1.5 * torch.randn(20000, 2, generator=generator)
    exact_kl = math.log((1.5 ** 2 + 0.01) / 1.01) - 1 + 1.01 / (1.5 ** 2 + 0.01)  # of the smoothed Gaussians, in two dimensions
    assert gmm.kernel_kl(*wide) == pytest.approx(exact_kl, abs=0.06)


def test_the_plane_s_networks_start_fitted_to_the_teacher(plane_model):
    generator = torch.Generator().manual_seed(0)
    label, t = torch.randint(gmm.LABELS + 1, (2000,), generator=generator), torch.randint(20, 1000, (2000,), generator=generator)
    x_t = plane_model.schedule.add_noise(plane_model.truth.draw(label, generator)[..., None, None], torch.randn(2000, 2, 1, 1, generator=generator), t)
    difference = plane_model.origin(x_t, t, {"class_labels": label}) - plane_model.teacher(x_t, t, {"class_labels": label})
    assert difference.square().mean().sqrt() < 0.05


def test_the_plane_s_prompts_are_labels(plane_model):
    assert plane_model.encode(["0", "", "3"])["class_labels"].tolist() == [0, gmm.LABELS, 3]
    with pytest.raises(errors.UserError, match="'cat' is no prompt of gmm"):
        plane_model.encode(["cat"])


# ---------------------------------------------------------------------------------------------------- the judge

def test_frechet_distance_in_closed_form():
    """b = c a + m has the same eigenvectors as a, so the distance is |mean difference|^2 + (c - 1)^2 tr(C_a), exactly."""
    torch.manual_seed(0)
    a = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    b = 1.7 * a + 0.3
    expected = (b.mean(0) - a.mean(0)).square().sum() + 0.49 * a.T.cov().trace()
    distance = lambda a, b: evaluation.frechet_distance(evaluation.Gaussian.of(a), evaluation.Gaussian.of(b))
    assert distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert distance(a, a) == pytest.approx(0, abs=1e-8)


def test_judge_knows_real_pictures_when_they_are_moved():
    judge = judges.EmojiJudge()
    captions = judge.captions[::15]
    moved = judge.real(captions, seed=3)
    right = lambda pictures, prompts: (judge(pictures, {"whole": pictures}, prompts)["nearest"] >= 0).double().mean()
    assert right(moved, captions) >= 0.97
    assert right(moved, captions[1:] + captions[:1]) <= 0.05
    blur = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(moved, (5,) * 4, value=1.0), 11, 1)
    assert right(blur, captions) <= 0.5
    assert judge.accepted("cat") == [i for i, caption in enumerate(judge.captions) if "cat" in caption.split()]
