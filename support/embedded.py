"""The embedded classes: 309 drawings of OpenMoji (CC BY-SA 4.0) in ten classes, which the
class-conditional teacher draws. lab/openmoji.py made the files in assets/.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from models import ASSETS

SHEET, CAPTIONS = ASSETS / "emoji_32.webp", ASSETS / "emoji_captions.txt"
# An image's class is the first of these words that its caption has.
CLASSES = (
    *("clock", "moon", "heart", "hand", "arrow"),
    *("letter", "chess", "cat", "person", "face"),
)
SIZE = 32  # of the images, twice what is drawn, for clean shifts
SHEET_COLUMNS = 40


def class_of(caption):
    """The number of a caption's class, or None."""
    words = caption.split()
    return next((i for i, name in enumerate(CLASSES) if name in words), None)


@functools.cache
def captions():
    lines = CAPTIONS.read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


@functools.cache
def classes():
    """[[index into images(), ...] of each class]"""
    groups = [[] for _ in CLASSES]
    for i, caption in enumerate(captions()):
        groups[class_of(caption)].append(i)
    return groups


@functools.cache
def images():
    """uint8 (309, 3, 32, 32), in the order of captions(). Kept: do not change them."""
    with Image.open(SHEET) as file:
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    rows = sheet.shape[0] // SIZE
    tiles = sheet.view(rows, SIZE, SHEET_COLUMNS, SIZE, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, SIZE, SIZE)[: len(captions())].contiguous()


def shift_and_scale(images, generator):
    """uint8 (B, 3, 32, 32) -> (B, 3, 16, 16) in [-1, 1], each shrunk by up to an eighth and moved
    by up to 5 of 128 parts, so that a class has more right images than the set."""
    batch, _, size, _ = images.shape
    scale = 1 / (1 - 0.125 * torch.rand(batch, generator=generator))
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * 5 / 64
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (batch, 3, size // 2, size // 2), align_corners=False)
    # Negated, so that the zeros that grid_sample pads with are white.
    return 1 - 2 * F.grid_sample(1 - images.float() / 255, grid, align_corners=False)
