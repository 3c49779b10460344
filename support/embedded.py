"""The embedded data set: 1,453 drawings of OpenMoji (CC BY-SA 4.0) and their captions.

The captions are the Unicode names of their code points. lab/openmoji.py made the files in assets/.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from models import ASSETS

# A class of the class-conditional teacher is the first of these words that a caption has.
CLASSES = (
    *("clock", "moon", "heart", "hand", "arrow"),
    *("letter", "chess", "cat", "person", "face"),
)
CLASS_WIDTH = 0.5  # of its images' shifts and scales, see shift_and_scale
SHEET_COLUMNS = 40
MAX_WORDS = 32  # of a caption


def drop_words(caption, u, empty=0.0):
    """One training prompt from a full caption and 2 + MAX_WORDS uniform numbers u.

    A share `empty` of prompts has no word, which trains the unconditional branch that guidance
    needs. 20 % lack some words, so that "cat" alone is a prompt too. The rest is in full.
    """
    if u[0] < empty:
        return ""
    if u[0] >= empty + 0.20:
        return caption
    words = caption.split()
    stays = int(u[1] * len(words))
    kept = [word for i, word in enumerate(words) if i == stays or u[2 + i] < 0.5]
    return " ".join(kept)


@functools.cache
def captions():
    lines = (ASSETS / "emoji_captions.txt").read_text(encoding="utf-8").splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


@functools.cache
def classes():
    """[[index into captions(), ...] of each class]"""
    groups = {name: [] for name in CLASSES}
    for i, caption in enumerate(captions()):
        words = set(caption.split())
        name = next((name for name in CLASSES if name in words), None)
        if name:
            groups[name].append(i)
    return list(groups.values())


@functools.cache
def images(size):
    """All images of the embedded set, uint8 (N, 3, size, size), size 128 or 32, in the order of
    captions(). Kept: do not change them."""
    with Image.open(ASSETS / f"emoji_{size}.webp") as file:
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    rows = sheet.shape[0] // size
    tiles = sheet.view(rows, size, SHEET_COLUMNS, size, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, size, size)[: len(captions())].contiguous()


def shift_and_scale(images, generator, width=1.0):
    """uint8 (B, 3, 2S, 2S) -> (B, 3, S, S) in [-1, 1], each shrunk by up to a quarter and moved by
    up to 5 of 64 pixels, both times `width`. So a caption has many right images, and their mean,
    which one step of an undistilled network shows, is a blur."""
    batch, _, size, _ = images.shape
    scale = 1 / (1 - 0.25 * width * torch.rand(batch, generator=generator))
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * width * 5 / 32
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (batch, 3, size // 2, size // 2), align_corners=False)
    # Negated, so that the zeros that grid_sample pads with are white.
    return 1 - 2 * F.grid_sample(1 - images.float() / 255, grid, align_corners=False)
