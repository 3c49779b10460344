"""Protocols of evaluation: which samples, how many, and how they are cut and resized."""

from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from support.cli import UserError
from support.images import as_tensor
from support.pictures import to_pil


def from_pil(image):
    """PIL -> (3, H, W) in [0, 1]"""
    return as_tensor(image.convert("RGB")) / 255


def centre_crop(image, size):
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def square(image, size):
    """The largest square around the centre, resized by Lanczos, as DMD2's evaluation does first."""
    cut = centre_crop(image, min(image.size))
    return cut.resize((size, size), Image.Resampling.LANCZOS)


def patch(image, size):
    """The square of that many pixels around the centre; a smaller image whole, resized to it."""
    if min(image.size) >= size:
        return centre_crop(image, size)
    return to_pil(clean_resize(from_pil(image)[None], size)[0] / 255)


def clean_resize(images, size=299):
    """clean-fid's (2104.11222): each channel as float32, PIL's bicubic filter with antialiasing.
    (B, 3, H, W) in [0, 1] -> (B, 3, 299, 299) in [0, 255]."""
    resized = []
    for channel in (images.cpu() * 255).round().flatten(0, 1).numpy():
        image = Image.fromarray(channel, "F").resize((size, size), Image.Resampling.BICUBIC)
        resized.append(torch.from_numpy(np.asarray(image).copy()))
    return torch.stack(resized).view(len(images), 3, size, size).clamp(0, 255)


@dataclass
class Protocol:
    """samples: how many. size: of the images that a model has to draw; None takes any. views:
    {name: (function, size) of what is done to an image, or None}: Inception gives features of each,
    and the first is what gauges and the embedded set see. resize: how Inception gets to 299 pixels.
    reference: how many images samples are compared with. published: numbers that compare."""

    samples: int
    size: int | None
    views: dict = field(default_factory=lambda: {"whole": None})
    resize: str = "tensorflow"
    about: str = ""
    prompts: str = "a file"
    reference: int | None = None
    published: str = ""


# What the papers report, as their released code computes it.
PROTOCOLS = {
    "imagenet64-50k": Protocol(
        samples=50_000,
        size=64,
        prompts="labels",
        reference=1_281_167,
        published="one step: DMD2 FID 1.51, 1.28 resumed, 2.61 without a GAN; f-distill (JS) 1.16",
        about="50,000 samples of 64x64, sample i of label i mod 1000, as they are, against the "
        "statistics of all 1,281,167 training images (EDM's fid-refs/imagenet-64x64.npz: mu and "
        "sigma of 2,048 Inception features). Sources: DMD2's main/edm/test_folder_edm.py (labels "
        "in turn), EDM's fid.py (statistics, uint8 images, resizing inside the network). EDM's "
        "paper reports the least of three such numbers with different seeds; this is one.",
    ),
    "coco30k-256": Protocol(
        samples=30_000,
        size=512,
        views={"whole": (square, 256)},
        resize="clean",
        reference=40_504,
        published="SD1.5 in one step, guidance 1.75: DMD2 FID 9.28, 8.35 with a GAN; f-distill "
        "(JS) 7.42",
        about="30,000 captions of COCO 2014's validation set in their order (DMD2's "
        "captions_coco14_test.pkl), one 512x512 image each, against the 40,504 images of val2014. "
        "Both: largest square around the centre, Lanczos to 256, then clean-fid's resizing "
        "(bicubic, float, channel by channel) to 299, rounded, since torch-fidelity's network "
        "takes whole numbers; pixels are rounded to 8 bits, where DMD2 cuts them off. CLIP score "
        "of the same 256 pixels. Sources: DMD2's main/test_folder_sd.py, "
        "main/coco_eval/coco_evaluator.py, experiments/sdv1.5/README.md.",
    ),
    "coco10k-512": Protocol(
        samples=10_000,
        size=1024,
        views={"whole": (square, 512), "patch": (patch, 299)},
        resize="clean",
        published="SDXL in four steps: DMD2 FID 19.32, patch FID 20.86, CLIP .332; decoupled DMD "
        "FID 17.80, CLIP .336",
        about="10,000 captions of COCO 2014 (DMD2's coco10k/all_prompts.pkl), one 1024x1024 image "
        "each, against coco10k/subset. FID: largest square around the centre, Lanczos to 512, "
        "clean-fid's resizing to 299, rounded. Patch FID: 299x299 pixels around the centre of the "
        "image as it was drawn, and of the reference as it lies on disk. CLIP score: of the image "
        "as it was drawn, largest square, Lanczos to 256. Sources: DMD2's "
        "main/sdxl/test_folder_sdxl.py, main/coco_eval/coco_evaluator.py, "
        "experiments/sdxl/README.md.",
    ),
    "world": Protocol(
        samples=750,
        size=64,
        prompts="captions",
        about="150 prompts of each category in turn: one object, one on a named colour, two, two "
        "in a relation, two that never occur together in training. A network reads what a sample "
        "shows: right is just these objects, in the relation and on the colour that are named",
    ),
    "emoji-classes": Protocol(
        samples=1000,
        size=16,
        prompts="labels",
        about="the ten classes of the embedded class-conditional teacher in turn; judged by their "
        "images",
    ),
    "as-is": Protocol(
        samples=1000,
        size=None,
        about="images as they are; Inception resizes inside the network",
    ),
}


def refuse_sizes(sizes):
    two = " and ".join(f"{w}x{h}" for h, w in sorted(sizes)[:2])
    raise UserError(
        f"images of several sizes, such as {two}, are compared as they are: resize them, or name a "
        "--protocol that does"
    )


def views_of(images, protocol):
    """[(3, H, W), ...] in [0, 1] -> {view: (B, 3, h, w)}. Raises UserError where images are
    compared as they are and have several sizes, or another than the protocol's."""
    own = protocol.size
    if own and None in protocol.views.values():
        for image in images:
            if tuple(image.shape[1:]) != (own, own):
                raise UserError(
                    f"an image has {image.shape[2]}x{image.shape[1]} pixels; this protocol "
                    f"compares images of {own}x{own} as they are"
                )
    seen = {}
    for name, change in protocol.views.items():
        changed = images
        if change is not None:
            function, size = change
            changed = [from_pil(function(to_pil(image), size)) for image in images]
        sizes = {tuple(image.shape[1:]) for image in changed}
        if len(sizes) > 1:
            refuse_sizes(sizes)
        seen[name] = torch.stack(list(changed))
    return seen
