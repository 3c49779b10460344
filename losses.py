"""The equations of distribution matching distillation, as pure functions of tensors.

x is the student's sample, x_t is x diffused to timestep t. A network's prediction of the clean
sample behind x_t is an x0: x0_fake is the fake score's, x0_cond the teacher's given the condition,
x0_guided the same with guidance, x0_real the teacher's in general.

Shapes: x, x_t and every x0 are (B, ...). alpha and sigma broadcast against them
(models.Schedule.at gives (B, 1, 1, 1)). A loss gives one number a sample, (B,): the training step
sums them and divides by the batch size in one visible place. Samples and directions are in the
model's own units (latents of deviation about 1). Nothing here draws random numbers, holds state or
knows of networks. A function that is given tensors of different shapes raises ValueError.
"""

import torch
import torch.nn.functional as F


def check_same_shape(**tensors):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes differ: {listed}")


def mean_per_sample(values):
    """(B, ...) -> (B,), the mean over all but the first dimension."""
    return values.flatten(1).mean(1)


def score(x0, x_t, alpha, sigma):
    """Score of the diffused density, from the posterior mean x0 (Tweedie's formula).

        grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2                              2311.18828

    x0, x_t (B, ...) -> (B, ...), in 1 / units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0=x0, x_t=x_t)
    return (alpha * x0 - x_t) / sigma**2


# ---------------------------------------------------------------------------- DMD and Decoupled DMD


def dm_direction(x0_cond, x0_fake):
    """Distribution matching: the direction of the reverse KL's gradient in x.

        DM = x0_fake - x0_cond                                2311.18828; named DM in 2511.22677

    Why: (s_fake - s_real) alpha = DM alpha^2 / sigma^2 is the exact gradient of
    KL(fake_t || real_t). The papers replace alpha^2 / sigma^2 by 1 / normaliser, which makes the
    step about as long at every noise level. DMD and DMD2 read the guided teacher: add
    ca_direction. A descent step moves x against the direction.

    x0_cond, x0_fake (B, ...) -> (B, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0_cond=x0_cond, x0_fake=x0_fake)
    return x0_fake - x0_cond


def ca_direction(x0_cond, x0_guided):
    """CFG augmentation: what guidance adds to distribution matching.

        CA = x0_cond - x0_guided = -(w - 1) (x0_cond - x0_uncond)                   2511.22677

    where x0_guided = x0_uncond + w (x0_cond - x0_uncond). The first form holds for every kind of
    guidance, and shows that at one x_t the two add up to DMD2's numerator:
    DM + CA = x0_fake - x0_guided.

    x0_cond, x0_guided (B, ...) -> (B, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0_cond=x0_cond, x0_guided=x0_guided)
    return x0_cond - x0_guided


def normaliser(x, x0_real, floor):
    """What a direction is divided by, one number a sample.

        max(mean_CHW |x - x0_real|, floor)                                          2311.18828

    x0_real is the guided teacher's in DMD, DMD2 and f-distill. The paper on Decoupled DMD
    (2511.22677) has no normaliser; its ports divide each half by that of the conditional teacher.
    The released code of DMD and DMD2 has no floor, and so divides 0 by 0 where the teacher does not
    change a sample.

    x, x0_real (B, ...) -> (B, 1, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_real=x0_real)
    mean = mean_per_sample((x - x0_real).abs()).clamp(min=floor)
    return mean.view(-1, *[1] * (x.dim() - 1))


def surrogate_loss(x, direction):
    """The loss that papers write for a direction; its gradient in x is direction / elements.

        0.5 mean_CHW (x - stopgrad(x - direction))^2                 2405.14867, released code

    The training step calls x.backward(direction / elements) instead. That is the same gradient,
    without a number that looks like a measure of progress and is none. The tests show the equality.

    x, direction (B, ...) -> (B,). Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, direction=direction)
    return 0.5 * mean_per_sample((x - (x - direction).detach()).square())


# ----------------------------------------------------------------------------- f-distill

# h(r) = r^2 f''(r), where r = p / q is the teacher's over the student's diffused density:
# grad D_f(p || q) = -E_q[h(r) (s_p - s_q) dx_t/dtheta], 2502.15681. All but the first two grow with
# r: they weigh most where the teacher has density and the student lacks it.
DIVERGENCES = {  #                                          f(r)
    "reverse-kl": lambda r: torch.ones_like(r),  #          -log r, which is DMD
    "softened-reverse-kl": lambda r: 1 / (r + 1),  #        (r + 1) log(1/2 + 1 / (2 r))
    "js": lambda r: r / (r + 1),  #                         r log r - (r + 1) log((r + 1) / 2)
    "hellinger": lambda r: r.sqrt() / 4,  #                 1 - sqrt(r)
    "forward-kl": lambda r: r,  #                           r log r
    "jeffreys": lambda r: r + 1,  #                         (r - 1) log r
}


def density_ratio(logit, low=0.1, high=20.0):
    """r = p / q = exp(logit), since an optimal discriminator's logit is log p / q.

    The discriminator compares the student's samples with real data, which stand in for the
    teacher's, as in the paper. Logits are cut off at +-10 and ratios at [low, high]: 2502.15681,
    released code. Any shape -> that shape.
    """
    return logit.clamp(-10, 10).exp().clamp(low, high)


def time_bin(t, T, bins):
    """The one of `bins` equal parts of [0, T) that each timestep lies in. t (B,) -> (B,)."""
    return (t * bins // T).clamp(max=bins - 1)


def update_bin_means(means, total, count, decay=0.9):
    """Running mean of the ratio in each time bin: the first of f-distill's two normalisations.

    E_q[r] = 1 at each noise level, so r / mean is r with the discriminator's error taken out.
    total and count are sums over all processes of the ratios in each bin and of their number. A
    bin without any keeps its mean. All (bins,) -> (bins,).                         2502.15681
    """
    check_same_shape(means=means, total=total, count=count)
    moved = decay * means + (1 - decay) * total / count.clamp(min=1)
    return torch.where(count > 0, moved, means)


# ----------------------------------------------------------------------------- GAN


def gan_student_loss(logit_fake):
    """softplus(-logit), the non-saturating loss. 1406.2661, 2405.14867.    (B,) -> (B,)"""
    return F.softplus(-logit_fake)


def gan_critic_loss(logit_real, logit_fake):
    """Binary cross-entropy with label 1 for real, so that the best logit is log p_real / p_fake.

        softplus(logit_fake) + softplus(-logit_real)                                2405.14867

    (B,), (B,) -> (B,). Raises ValueError if the shapes differ.
    """
    check_same_shape(logit_real=logit_real, logit_fake=logit_fake)
    return F.softplus(logit_fake) + F.softplus(-logit_real)


def r1_penalty(logit_real, logit_near):
    """(logit_real - logit_near)^2, a critic's change between real data and data a little beside it,
    which keeps it from growing steep. R1 (1801.04406) without second derivatives: 2501.08316.

    (B,), (B,) -> (B,). Raises ValueError if the shapes differ.
    """
    check_same_shape(logit_real=logit_real, logit_near=logit_near)
    return (logit_real - logit_near).square()


# ----------------------------------------------------------------------------- other terms


def regression_loss(x, x0_pair):
    """Mean square of the student's sample less the teacher's, both made of the same noise.

    2311.18828 compares images by LPIPS (--regression lpips); this is the form for latents.
    (B, ...), (B, ...) -> (B,). Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_pair=x0_pair)
    return mean_per_sample((x - x0_pair).square())


def jump_target(x_t, x_s, alpha_t, sigma_t, alpha_s, sigma_s):
    """The x0 by which one deterministic step leads from x_t at t to x_s at s.

        x0 = (x_s - (sigma_s / sigma_t) x_t) / (alpha_s - (sigma_s / sigma_t) alpha_t)  2202.00512

    A student that predicts it goes in one step where a sampler went in several: progressive
    distillation, and DP-DMD's first step (2602.03139).
    x_t, x_s (B, ...), the rest broadcastable to them -> (B, ...). Raises ValueError if the shapes
    differ.
    """
    check_same_shape(x_t=x_t, x_s=x_s)
    ratio = sigma_s / sigma_t
    return (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)


def mean_variance_loss(x, mean, variance):
    """KL divergence of a Gaussian with the sample's own mean and variance from N(mean, variance).

        0.5 ((var_i + (mu_i - mean)^2) / variance - 1 - log(var_i / variance))      2511.22677

    x (B, ...) with at least two elements a sample; mean, variance numbers -> (B,).
    """
    x = x.flatten(1)
    own_mean = x.mean(1)
    own_variance = x.var(1, correction=0).clamp(min=1e-8)
    ratio = own_variance / variance
    return 0.5 * (ratio + (own_mean - mean) ** 2 / variance - 1 - ratio.log())


def denoising_weight(prediction, alpha, sigma):
    """The weight w(t) that makes w |x0_pred - x0|^2 the loss that each model family knows.

        epsilon       alpha^2 / sigma^2          |eps_pred - eps|^2                 2006.11239
        v_prediction  1 / sigma^2                |v_pred - v|^2                     2202.00512
        flow          1 / sigma^2                |u_pred - u|^2                     2209.03003
        edm           1 / sigma^2 + 1 / 0.5^2    equation 8, table 1                2206.00364

    alpha, sigma of any one shape -> that shape. Raises ValueError for another prediction.
    """
    if prediction == "epsilon":
        return alpha**2 / sigma**2
    if prediction in ("v_prediction", "flow"):
        return 1 / sigma**2
    if prediction == "edm":
        return 1 / sigma**2 + 4
    raise ValueError(f"no denoising weight for prediction type {prediction!r}")


def denoising_loss(x0_pred, x, weight):
    """The fake score's loss: mean_CHW of weight |x0_pred - x|^2, x the sample that was diffused.

    x0_pred, x (B, ...), weight broadcastable to them -> (B,). Raises ValueError if the shapes
    differ.                                                                         2311.18828
    """
    check_same_shape(x0_pred=x0_pred, x=x)
    return mean_per_sample(weight * (x0_pred - x).square())


def health(x, x0_real, x0_fake):
    """Metrics that tell a run that learns from one that goes astray, one number a sample.

        mean    mean of the sample: drifts when a run changes all colours
        std     deviation of the sample: rises when a run over-saturates, falls when it goes grey
        gap     |x0_real - x0_fake| / |x0_real - x|: how far the fake score is from the teacher, in
                units of the teacher's correction. Near 0 the student has nothing to learn; far
                above 1 the fake score is lost
        cosine  of (x0_real - x) and (x0_fake - x): 1 when both would correct the sample alike

    x, x0_real, x0_fake (B, ...) -> dict of (B,). Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_real=x0_real, x0_fake=x0_fake)
    x, x0_real, x0_fake = x.detach().flatten(1), x0_real.flatten(1), x0_fake.flatten(1)
    to_real = x0_real - x
    to_fake = x0_fake - x
    return {
        "mean": x.mean(1),
        "std": x.std(dim=1),
        "gap": (to_real - to_fake).norm(dim=1) / to_real.norm(dim=1).clamp(min=1e-12),
        "cosine": F.cosine_similarity(to_real, to_fake, dim=1),
    }
