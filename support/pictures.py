"""Drawing: grids of samples with labels, and curves."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from support.cli import UserError


def to_pil(image):
    """(3, H, W) in [0, 1] -> PIL"""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


def save(image, path, **options):
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **options)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"the image {path} cannot be written: {why}") from None


def draw_grid(rows, columns, path):
    """rows: [(label, images (N, 3, H, W) in [0, 1]), ...]; columns: N captions."""
    size = rows[0][1].shape[-1]
    zoom = max(1, 128 // size)
    cell, left, top = size * zoom + 8, 190, 56
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (left + cell * len(columns), top + cell * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, caption in enumerate(columns):
        place = (left + cell * (i + 0.5), top - 6)
        text = wrap(caption or "(no prompt)", font, cell - 6)
        pen.multiline_text(place, text, font=font, fill="black", anchor="md", align="center")
    for j, (label, images) in enumerate(rows):
        place = (10, top + cell * (j + 0.5))
        pen.multiline_text(place, label, font=font, fill="black", anchor="lm", spacing=5)
        for i, image in enumerate(images):
            enlarged = (size * zoom, size * zoom)
            tile = to_pil(image).resize(enlarged, Image.Resampling.BICUBIC)
            sheet.paste(tile, (left + cell * i + 4, top + cell * j + 4))
    save(sheet, path)


def wrap(text, font, width, most=3):
    """Break at spaces so that each line fits; what does not fit into `most` lines is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = lines[:most]
        lines[-1] += "..."
    return "\n".join(lines)


@dataclass
class Curve:
    """points: [(x, y), ...]. band: the healthy range of y. level: the teacher's y."""

    title: str
    points: list
    band: tuple | None = None
    level: float | None = None


def draw_curves(curves, path):
    """One small panel each, in two columns."""
    width, height = 420, 190
    rows = (len(curves) + 1) // 2
    sheet = Image.new("RGB", (2 * width, max(1, rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k, curve in enumerate(curves):
        left, top = (k % 2) * width + 62, (k // 2) * height + 26
        draw_curve(pen, curve, (left, top, width - 80, height - 54))
    save(sheet, path)


def draw_curve(pen, curve, box):
    x0, y0, w, h = box
    font = ImageFont.load_default(13)
    xs = [x for x, _ in curve.points]
    ys = [y for _, y in curve.points]
    if curve.level is not None:
        ys = [*ys, curve.level]
    low, high = min(ys), max(ys)
    span, reach = (high - low) or 1.0, (xs[-1] - xs[0]) or 1

    def across(x):
        return x0 + w * (x - xs[0]) / reach

    def down(y):
        return y0 + h - h * (min(max(y, low), high) - low) / span

    if curve.band:  # as much of it as is in the panel
        bottom, top = down(curve.band[0]), down(curve.band[1])
        pen.rectangle((x0, top, x0 + w, bottom), fill=(230, 242, 230))
    pen.rectangle((x0, y0, x0 + w, y0 + h), outline="gray")
    title = curve.title
    if curve.level is not None:
        pen.line((x0, down(curve.level), x0 + w, down(curve.level)), fill="darkorange")
        title += " (orange: the teacher's)"
    if curve.band:
        title += " (green: healthy)"
    pen.text((x0, y0 - 20), title, font=font, fill="black")
    line = [(across(x), down(y)) for x, y in curve.points]
    pen.line(line if len(line) > 1 else line * 2, fill="steelblue", width=2)
    pen.text((x0 - 5, y0), f"{high:.3g}", font=font, fill="black", anchor="rm")
    pen.text((x0 - 5, y0 + h), f"{low:.3g}", font=font, fill="black", anchor="rm")
    pen.text((x0, y0 + h + 4), str(xs[0]), font=font, fill="black")
    last = f"iteration {xs[-1]}"
    pen.text((x0 + w, y0 + h + 4), last, font=font, fill="black", anchor="ra")


def write_text(sheet, text, place):
    font = ImageFont.load_default(14)
    ImageDraw.Draw(sheet).text(place, text, font=font, fill="black", anchor="lm")
