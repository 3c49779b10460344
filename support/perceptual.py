"""LPIPS (1801.03924), for --regression lpips."""

import torch
import torch.nn.functional as F

from support.cli import UserError, first_line


def lpips_loss(model):
    """A function like losses.regression_loss, of the decoded images of two batches of latents."""
    if not model.decodes:
        raise UserError(
            "--regression lpips compares images, and --vae none leaves out their decoder: use "
            "--regression mse"
        )
    try:
        import lpips
    except ImportError:
        raise UserError(
            "--regression lpips needs a package that is not installed: pip install lpips"
        ) from None
    try:
        distance = lpips.LPIPS(net="vgg", verbose=False).requires_grad_(False)
    except OSError as error:  # torchvision fetches VGG's weights when they are first used
        why = first_line(error)
        raise UserError(f"--regression lpips cannot get VGG's weights: {why}") from None
    distance.to(model.encoder_device)

    def loss(x, x0_pair):
        """(B, ...), (B, ...) -> (B,)"""
        with torch.no_grad():
            target = enlarged(model.pixels(x0_pair))
        return distance(enlarged(model.pixels(x)), target).flatten()

    return loss


def enlarged(images):
    """VGG sees images of 224 pixels at least."""
    size = max(224, images.shape[-1])
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)
