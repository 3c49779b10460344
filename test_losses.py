"""Every formula against closed form or against diffusers. Run with: pytest"""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler

import data
import eval as evaluation
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


# ---------------------------------------------------------------------------------------------------- the DMD direction

@pytest.mark.parametrize("family", SCHEDULES)
@pytest.mark.parametrize("t", T_VALUES)
def test_dmd_direction_is_the_gradient_of_the_kl_between_diffused_densities(family, t):
    """For a student x = shift + scale z, E[direction * denominator * alpha^2 / sigma^2 * dx/dtheta] over z and the noise is the
    derivative of KL(student_t || teacher_t), taken here by automatic differentiation of a quadrature."""
    alpha, sigma = levels(SCHEDULES[family], t)
    theta = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)  # shift, scale
    nodes, weights = gauss_hermite()
    deviation = (alpha ** 2 * theta[1] ** 2 + sigma ** 2).sqrt()
    u = alpha * theta[0] + deviation * nodes
    kl = (weights * (-0.5 * nodes ** 2 - deviation.log() - 0.5 * math.log(2 * math.pi) - TEACHER.log_density(u, alpha, sigma))).sum()
    true_gradient, = torch.autograd.grad(kl, theta)

    shift, scale = theta.detach()
    z, eps = torch.meshgrid(nodes, nodes, indexing="ij")
    probability = weights[:, None] * weights[None]
    x = (shift + scale * z).reshape(-1, 1)
    x_t = alpha * x + sigma * eps.reshape(-1, 1)
    x0_real = TEACHER.x0(x_t, alpha, sigma)
    x0_fake = Mixture([1.0], [shift], [scale]).x0(x_t, alpha, sigma)
    denominator = (x - x0_real).abs().clamp(min=1e-3)
    gradient_in_x = losses.dmd_direction(x, x0_real, x0_fake, floor=1e-3) * denominator * alpha ** 2 / sigma ** 2
    along = [(probability.reshape(-1, 1) * gradient_in_x * dx).sum() for dx in (torch.ones_like(x), z.reshape(-1, 1))]
    torch.testing.assert_close(torch.stack(along), true_gradient, rtol=1e-3, atol=1e-9)


def test_dmd_direction_of_a_student_that_equals_the_teacher_is_zero():
    x, x0 = torch.randn(2, 5, 3, 4, 4)
    assert losses.dmd_direction(x, x0, x0).abs().max() == 0


def test_dmd_direction_is_normalised_per_sample_and_finite_without_correction():
    x = torch.zeros(2, 1, 2, 2)
    x0_real = torch.stack([torch.full((1, 2, 2), 4.0), torch.zeros(1, 2, 2)])
    direction = losses.dmd_direction(x, x0_real, x0_real + 1, floor=0.5)
    torch.testing.assert_close(direction[0], torch.full((1, 2, 2), 0.25))  # 1 / mean |0 - 4|
    torch.testing.assert_close(direction[1], torch.full((1, 2, 2), 2.0))   # 1 / floor
    assert losses.dmd_direction(x, x, x).isfinite().all()
    with pytest.raises(ValueError, match=r"x \(2, 1, 2, 2\).*x0_fake \(1, 1, 2, 2\)"):
        losses.dmd_direction(x, x, x[:1])


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


@pytest.fixture
def networks(embedded_model, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--batch-size", "2"])
    args = train.parse_arguments()
    networks = train.Networks(embedded_model, args)
    cond = embedded_model.encode(["cat face", "red apple"])
    return networks, cond, train.Draws(0, 0, embedded_model.device), args


def weights(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module, before):
    return any((a != b).any() for a, b in zip(module.parameters(), before))


def test_student_and_fake_score_start_equal_to_the_teacher(networks):
    nets, *_ = networks
    for copied in (nets.student, nets.fake_score, nets.averaged_student):
        assert not moved(copied, weights(nets.teacher))
        assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copied.parameters(), nets.teacher.parameters()))


def test_first_direction_without_guidance_is_zero(networks):
    nets, cond, draws, args = networks
    t = torch.tensor([300, 800])
    x_t = draws.normal(2, *nets.model.sample_shape)
    with torch.no_grad():
        x0_real = models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, 1.0)
        assert losses.dmd_direction(x_t, x0_real, nets.fake_score(x_t, t, cond)).abs().max() == 0


def test_teacher_builds_no_graph(networks):
    nets, cond, draws, args = networks
    x_t = draws.normal(2, *nets.model.sample_shape)
    assert not models.guided_x0(nets.teacher, x_t, 500, cond, nets.uncond, 3.0).requires_grad


def test_guidance_in_one_pass_is_guidance_in_two(networks):
    nets, cond, draws, args = networks
    x_t = draws.normal(2, *nets.model.sample_shape)
    x0_cond = nets.teacher(x_t, 500, cond)
    x0_uncond = nets.teacher(x_t, 500, nets.model.encode(["", ""]))
    torch.testing.assert_close(models.guided_x0(nets.teacher, x_t, 500, cond, nets.uncond, 3.0),
                               x0_uncond + 3.0 * (x0_cond - x0_uncond), atol=1e-3, rtol=1e-3)


def test_student_step_moves_the_student_only_and_fake_score_step_the_fake_score_only(networks):
    nets, cond, draws, args = networks
    noise = draws.normal(2, 2, *nets.model.sample_shape)
    x = models.rollout(nets.student, noise, cond, nets.timesteps[:2])
    before = {name: weights(module) for name, module in
              (("teacher", nets.teacher), ("student", nets.student), ("fake", nets.fake_score), ("text", nets.model.text_encoder))}
    train.student_step(nets, x, cond, draws, args)
    assert moved(nets.student, before["student"])
    assert not moved(nets.teacher, before["teacher"]) and not moved(nets.fake_score, before["fake"])
    assert all(p.grad is None for p in [*nets.fake_score.parameters(), *nets.teacher.parameters()])

    before["student"] = weights(nets.student)
    train.fake_score_step(nets, x.detach(), cond, draws, args)
    assert moved(nets.fake_score, before["fake"])
    assert not moved(nets.student, before["student"]) and not moved(nets.teacher, before["teacher"])
    assert not moved(nets.model.text_encoder, before["text"])


def test_student_step_follows_the_surrogate_loss(networks):
    """The step's gradient, as the student receives it, against the papers' formulation through a scalar loss."""
    nets, cond, draws, args = networks
    noise = draws.normal(1, 2, *nets.model.sample_shape)
    reference = copy.deepcopy(nets.student)
    x_reference = models.rollout(reference, noise, cond, nets.timesteps[:1])
    replay = train.Draws(0, 7, draws.device)
    t = replay.integers(20, 981, (2,))
    x_t = nets.schedule.add_noise(x_reference.detach(), replay.normal(*x_reference.shape), t)
    with torch.no_grad():
        direction = losses.dmd_direction(x_reference, models.guided_x0(nets.teacher, x_t, t, cond, nets.uncond, args.guidance),
                                         nets.fake_score(x_t, t, cond))
    losses.surrogate_loss(x_reference, direction).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])

    x = models.rollout(nets.student, noise, cond, nets.timesteps[:1])
    figures = train.student_step(nets, x, cond, train.Draws(0, 7, draws.device), args)
    torch.testing.assert_close(figures["student_grad_norm"], expected, rtol=1e-4, atol=0)


def test_rollout_gives_gradients_through_the_last_step_only(networks):
    """The gradients of a three-step rollout are those of its last step alone, from the x_t that the first two led to."""
    nets, cond, draws, args = networks
    noise = draws.normal(3, 2, *nets.model.sample_shape)
    with torch.no_grad():
        x0 = models.rollout(nets.student, noise[:2], cond, nets.timesteps[:2])
        x_t = nets.schedule.add_noise(x0, noise[2], torch.tensor([499, 499]))
    expected = torch.autograd.grad(nets.student(x_t, 499, cond).sum(), list(nets.student.parameters()))
    ours = torch.autograd.grad(models.rollout(nets.student, noise, cond, nets.timesteps[:3]).sum(), list(nets.student.parameters()))
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------- the judge

def test_frechet_distance_in_closed_form():
    """b = c a + m has the same eigenvectors as a, so the distance is |mean difference|^2 + (c - 1)^2 tr(C_a), exactly."""
    torch.manual_seed(0)
    a = torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    b = 1.7 * a + 0.3
    expected = (b.mean(0) - a.mean(0)).square().sum() + 0.49 * a.T.cov().trace()
    assert evaluation.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert evaluation.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_judge_knows_real_pictures_when_they_are_moved():
    judge = evaluation.Judge()
    chosen = torch.arange(0, len(judge.captions), 15)
    moved_pictures = judge.moved(chosen.tolist(), seed=3)
    captions = [judge.captions[i] for i in chosen]
    assert sum(index is not None for index in judge.right(moved_pictures, captions)) >= 0.97 * len(captions)
    wrong = judge.right(moved_pictures, captions[1:] + captions[:1])
    assert sum(index is not None for index in wrong) <= 0.05 * len(captions)
    blur = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(moved_pictures, (5,) * 4, value=1.0), 11, 1)
    assert sum(index is not None for index in judge.right(blur, captions)) <= 0.5 * len(captions)
    assert judge.existing("cat") == sum("cat" in caption.split() for caption in judge.captions)
