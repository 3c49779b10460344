"""The equations of distribution matching distillation, as pure functions of tensors.

Shapes: x, x_t and every x0_* are (B, ...), alpha and sigma broadcast against them (models.Schedule.at gives (B, 1, 1, 1)).
Samples are in the model's own units (latents of deviation about 1), and so are directions. Nothing here draws random
numbers, holds state, or knows of networks; a function that could receive tensors of different shapes raises ValueError.

Names: x is the student's sample, x_t that sample diffused to timestep t, x0_fake what the fake score takes x_t's clean picture
to be; x0_cond and x0_uncond the same of the teacher with and without the condition, x0_real of the teacher in general.
"""

import torch


def check_same_shape(**tensors):
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def per_sample_mean(values):
    """(B, ...) -> (B, 1, ..., 1), the mean over all but the first dimension."""
    return values.flatten(1).mean(1).view(-1, *[1] * (values.dim() - 1))


def score(x0, x_t, alpha, sigma):
    """Score of the diffused density whose posterior mean is x0: grad log p_t(x_t) = (alpha x0 - x_t) / sigma^2.

    Tweedie's formula, as used in 2311.18828. x0, x_t (B, ...) -> (B, ...), in 1 / units of x.
    Raises ValueError if the shapes differ.
    """
    check_same_shape(x0=x0, x_t=x_t)
    return (alpha * x0 - x_t) / sigma ** 2


def dm_direction(x0_cond, x0_fake):
    """Distribution matching: the gradient of the reverse KL divergence with respect to the student's sample, but for a positive
    weight a sample.

        DM = x0_fake - x0_cond                                                              2311.18828; named so in 2511.22677

    With score's identity, (s_fake - s_real) alpha = DM alpha^2 / sigma^2: the exact gradient of KL(fake_t || real_t) is DM times
    alpha^2 / sigma^2. The papers replace that factor by 1 / normaliser, which makes the step about as long at every noise level.
    DMD and DMD2 read x0_real with guidance: see ca_direction. A descent step moves x against it.

    x0_cond, x0_fake (B, ...) -> (B, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0_cond=x0_cond, x0_fake=x0_fake)
    return x0_fake - x0_cond


def ca_direction(x0_cond, x0_uncond, guidance):
    """CFG augmentation: what a guided teacher adds to distribution matching.

        CA = -(w - 1) (x0_cond - x0_uncond)                                                                        2511.22677

    At one x_t the two make up DMD2's numerator: x0_fake - x0_guided = DM + CA, with x0_guided = x0_uncond + w (x0_cond -
    x0_uncond). x0_cond, x0_uncond (B, ...), guidance scale w -> (B, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0_cond=x0_cond, x0_uncond=x0_uncond)
    return -(guidance - 1) * (x0_cond - x0_uncond)


def normaliser(x, x0_real, floor):
    """What a direction is divided by, one number a sample:

        max(mean_CHW |x - x0_real|, floor)                                                  2311.18828, as its released code has it

    x0_real is the guided teacher's in DMD, DMD2 and f-distill, the conditional teacher's in Decoupled DMD (2511.22677). The floor,
    which the released code lacks, keeps a sample that the teacher does not change at all from giving 0 / 0.
    x, x0_real (B, ...) -> (B, 1, ...), in units of x. Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_real=x0_real)
    return per_sample_mean((x - x0_real).abs()).clamp(min=floor)


# ---------------------------------------------------------------------------------------------------- f-divergences

# h(r) = r^2 f''(r) for r = p / q, teacher's over student's diffused density: grad D_f(p || q) = -E_q[h(r) (s_p - s_q) dx_t/dtheta],
# 2502.15681. All but the first two grow with r: they look hardest where the teacher has the density and the student lacks it.
DIVERGENCES = {                                          # f(r)
    "reverse-kl": lambda r: torch.ones_like(r),          # -log r, which is DMD
    "softened-reverse-kl": lambda r: 1 / (r + 1),        # (r + 1) log(1/2 + 1 / (2 r))
    "js": lambda r: r / (r + 1),                         # r log r - (r + 1) log((r + 1) / 2), Jensen-Shannon
    "hellinger": lambda r: r.sqrt() / 4,                 # 1 - sqrt(r), squared Hellinger
    "forward-kl": lambda r: r,                           # r log r
    "jeffreys": lambda r: r + 1,                         # (r - 1) log r
}


def density_ratio(logit, low=0.1, high=20.0):
    """r = p / q = exp(logit), logit being log p / q where the discriminator is optimal. The head compares real data, not the teacher's
    samples, with the student's: data stand in for the teacher (and for the guided teacher), as in the paper. Logits beyond +-10 and ratios beyond
    [low, high] are cut off.    2502.15681, as its released code has it.    Any shape -> that shape."""
    return logit.clamp(-10, 10).exp().clamp(low, high)


def time_bin(t, T, bins):
    """Which of `bins` equal parts of [0, T) each timestep lies in. t (B,) -> (B,)."""
    return (t * bins // T).clamp(max=bins - 1)


def update_bin_means(means, total, count, decay=0.9):
    """The running mean a time bin: first stage of f-distill's normalisation, r / mean_bin r, which evens out the levels of noise
    (exactly, E_q[r] = 1 at each). total and count, (bins,), are the sums over all processes of the ratios in each bin and of
    their numbers; a bin without any keeps its mean. All (bins,) -> (bins,).    2502.15681"""
    check_same_shape(means=means, total=total, count=count)
    return torch.where(count > 0, decay * means + (1 - decay) * total / count.clamp(min=1), means)


# ---------------------------------------------------------------------------------------------------- GAN

def gan_student_loss(logit_fake):
    """softplus(-logit) = -log sigmoid(logit), the non-saturating loss of 1406.2661 as in 2405.14867. (B,) -> scalar."""
    return torch.nn.functional.softplus(-logit_fake).mean()


def gan_critic_loss(logit_real, logit_fake):
    """softplus(logit_fake) + softplus(-logit_real): binary cross-entropy with label 1 for real, so that the optimal logit is
    log p_real / p_fake.    2405.14867.    (B,), (B,) -> scalar."""
    return torch.nn.functional.softplus(logit_fake).mean() + torch.nn.functional.softplus(-logit_real).mean()


# ---------------------------------------------------------------------------------------------------- regression and mean-variance

def regression_loss(x, x0_pair):
    """Mean square of the difference between the student's sample and the teacher's deterministic sample from the same noise.
    2311.18828 takes LPIPS of the pictures; this is the form for latents.    (B, ...), (B, ...) -> scalar. Raises ValueError if
    the shapes differ."""
    check_same_shape(x=x, x0_pair=x0_pair)
    return (x - x0_pair).square().mean()


def mean_variance_loss(x, mean, variance):
    """KL divergence of a Gaussian with each sample's own mean and variance from N(mean, variance), averaged over the batch:

        0.5 ((var_i + (mu_i - mean)^2) / variance - 1 - log(var_i / variance))                                     2511.22677

    x (B, ...), at least two elements a sample; mean, variance numbers -> scalar.
    """
    x = x.flatten(1)
    own_mean, own_variance = x.mean(1), x.var(1, correction=0).clamp(min=1e-8)
    return 0.5 * ((own_variance + (own_mean - mean) ** 2) / variance - 1 - (own_variance / variance).log()).mean()


def surrogate_loss(x, direction):
    """0.5 mean (x - stopgrad(x - direction))^2, whose gradient in x is direction / x.numel().    2405.14867, released code

    The training loop does not need it: it calls x.backward(direction / x.numel()), which is the same gradient without a
    number that looks like a measure of progress and is none. It is here for readers who look for the loss, and the tests
    show the equality. x, direction (B, ...) -> scalar. Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, direction=direction)
    return 0.5 * (x - (x - direction).detach()).square().mean()


def denoising_weight(prediction, alpha, sigma):
    """Weight w(t) that makes w |x0_pred - x0|^2 the training loss each family knows.

        epsilon       alpha^2 / sigma^2          |eps_pred - eps|^2, since eps = (x_t - alpha x0) / sigma     2006.11239
        v_prediction  1 / sigma^2                |v_pred - v|^2, since x0 = alpha x_t - sigma v               2202.00512
        flow          1 / sigma^2                |u_pred - u|^2, since x0 = x_t - sigma u                     2209.03003
        edm           1 / sigma^2 + 1 / 0.5^2    equation 8 and table 1 of                                    2206.00364

    prediction is one of these names; alpha, sigma of any one shape -> that shape. Raises ValueError for another name.
    """
    if prediction == "epsilon":
        return alpha ** 2 / sigma ** 2
    if prediction in ("v_prediction", "flow"):
        return 1 / sigma ** 2
    if prediction == "edm":
        return 1 / sigma ** 2 + 4
    raise ValueError(f"no denoising weight for prediction type {prediction!r}")


def denoising_loss(x0_pred, x, weight):
    """What the fake score is trained by: mean of weight |x0_pred - x|^2 over batch and elements, x the (detached) student
    sample that was diffused.    2311.18828

    x0_pred, x (B, ...), weight broadcastable to them -> scalar. Raises ValueError if the shapes differ.
    """
    check_same_shape(x0_pred=x0_pred, x=x)
    return (weight * (x0_pred - x).square()).mean()


def health(x, x0_real, x0_fake):
    """Figures that tell a run that learns from one that goes astray, each averaged over the batch.

        std     deviation of each sample over its elements: rises when a run over-saturates, falls when it goes grey
        gap     |x0_real - x0_fake| / |x0_real - x|: how far the fake score is from the teacher, in units of the
                teacher's correction; near 0 the student has nothing to learn, far above 1 the fake score is lost
        cosine  of (x0_real - x) and (x0_fake - x): 1 when both would correct the sample alike

    x, x0_real, x0_fake (B, ...) -> dict of scalars. Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_real=x0_real, x0_fake=x0_fake)
    x, x0_real, x0_fake = (tensor.detach().flatten(1) for tensor in (x, x0_real, x0_fake))
    to_real, to_fake = x0_real - x, x0_fake - x
    return {
        "std": x.std(dim=1).mean(),
        "gap": ((to_real - to_fake).norm(dim=1) / to_real.norm(dim=1).clamp(min=1e-12)).mean(),
        "cosine": torch.nn.functional.cosine_similarity(to_real, to_fake, dim=1).mean(),
    }
