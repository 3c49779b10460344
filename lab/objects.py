"""Choose the objects of the embedded world again from Microsoft's Fluent emoji in 3D (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python -m lab.objects package/assets

An object is a picture of a single code point whose Unicode name has one or two words. Of these the
300 are taken that differ most from one another, by farthest-point sampling on thumbnails. The
result is assets/world_objects.webp, a sheet of objects of 64x64 pixels with alpha, and
assets/world_objects.txt, a name a line. They lie in the repository; nothing but this command needs
the package.
"""

import unicodedata
from pathlib import Path

import torch
from PIL import Image

from support import cli, images, world

SIZE = 64
# Words of signs, of what is told apart by its details alone, and of two names for one picture.
LEFT_OUT = {"sign", "symbol", "squared", "squad", "no", "restroom", "registered", "bookmark"}
LEFT_OUT |= {"adult", "guide"}
NOT_LAST = {"man", "woman", "boy", "girl", "child", "person"}


def name_of(file):
    """The object's name, or None where it is none."""
    codes = [code for code in file.stem.split("-") if code != "fe0f"]
    if len(codes) != 1:
        return None
    name = unicodedata.name(chr(int(codes[0], 16)), "").lower()
    words = name.split()
    if not 1 <= len(words) <= 2 or LEFT_OUT & set(words) or words[-1] in NOT_LAST:
        return None
    return name if name.replace(" ", "").isalpha() else None


def read(file):
    """RGBA, cut to what is not transparent, in the middle of a square of SIZE pixels."""
    with Image.open(file) as image:
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def thumbnail(image):
    """(768,) of an object on grey"""
    ground = Image.new("RGBA", image.size, (128, 128, 128, 255))
    small = (
        Image.alpha_composite(ground, image).convert("RGB").resize((16, 16), Image.Resampling.BOX)
    )
    return images.as_tensor(small).flatten().float() / 255


def most_different(points, count):
    """Indices of `count` rows of points (N, D): each is the one farthest from those before it."""
    chosen = [int((points - points.mean(0)).norm(dim=1).argmax())]
    distance = torch.full((len(points),), torch.inf)
    while len(chosen) < count:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).norm(dim=1))
        chosen.append(int(distance.argmax()))
    return sorted(chosen)


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the package's assets")
    args = parser.parse_args(arguments)
    files = {name_of(file): file for file in sorted(args.folder.glob("*.webp"))}
    files.pop(None, None)
    pictures = {name: read(file) for name, file in sorted(files.items())}
    points = torch.stack([thumbnail(picture) for picture in pictures.values()])
    names = [list(pictures)[i] for i in most_different(points, world.OBJECTS)]
    rows = -(-len(names) // world.SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SIZE * world.SHEET_COLUMNS, SIZE * rows))
    for i, name in enumerate(names):
        row, column = divmod(i, world.SHEET_COLUMNS)
        sheet.paste(pictures[name], (SIZE * column, SIZE * row))
    sheet.save(world.SHEET, quality=90, method=6)
    world.NAMES.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{len(names)} objects of {len(pictures)}: {world.SHEET}")


if __name__ == "__main__":
    cli.run(main)
