"""The equations of distribution matching distillation, as pure functions of tensors.

Shapes: x, x_t and every x0_* are (B, ...), alpha and sigma broadcast against them (models.Schedule.at gives (B, 1, 1, 1)).
Samples are in the model's own units (latents of deviation about 1), and so are directions. Nothing here draws random
numbers, holds state, or knows of networks; a function that could receive tensors of different shapes raises ValueError.

Names: x is the student's sample, x_t that sample diffused to timestep t, x0_real and x0_fake what the teacher and the fake
score take x_t's clean picture to be.
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


def dmd_direction(x, x0_real, x0_fake, floor=1e-3):
    """The gradient of the reverse KL divergence with respect to the student's sample, up to a positive weight per sample.

        d = (x0_fake - x0_real) / max(mean_CHW |x - x0_real|, floor)               2311.18828, as its released code has it

    With score's identity, (s_fake - s_real) alpha = (x0_fake - x0_real) alpha^2 / sigma^2: the exact gradient of
    KL(p_fake,t || p_real,t) is this numerator times alpha^2 / sigma^2, and the paper's weight replaces that factor by the
    denominator, which makes the step about as long at every noise level. The floor, which the released code lacks, keeps a
    sample that the teacher does not change at all from giving 0 / 0. A descent step moves x against d.

    x, x0_real, x0_fake (B, ...) -> (B, ...), dimensionless. Raises ValueError if the shapes differ.
    """
    check_same_shape(x=x, x0_real=x0_real, x0_fake=x0_fake)
    return (x0_fake - x0_real) / per_sample_mean((x - x0_real).abs()).clamp(min=floor)


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
