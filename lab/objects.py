"""Choose the objects of the embedded world again from Microsoft's Fluent emoji in 3D (MIT).

    npm pack @lobehub/fluent-emoji-3d@1.1.0 && tar xzf lobehub-fluent-emoji-3d-1.1.0.tgz
    python -m lab.objects package/assets

The objects are chosen by hand: 32 that differ in shape and colour and are recognised at a glance.
The result is assets/world_objects.webp, a sheet of objects of 64x64 pixels with alpha, and
assets/world_objects.txt, a name a line. They lie in the repository; nothing but this command needs
the package.
"""

import unicodedata
from pathlib import Path

from PIL import Image

from support import cli, world

SIZE = 64
CHOSEN = """
alarm clock, banana, birthday cake, butterfly, cat face, direct hit, fire engine, fish, flying
saucer, frog face, ghost, guitar, hot pepper, mushroom, owl, panda face, penguin, pig face, purple
heart, rainbow, robot face, sailboat, snowman, soccer ball, sunflower, television, tomato, top hat,
unicorn face, volcano, watermelon, wrapped present
"""


def file_of(folder, code):
    """Some have the selector of the coloured picture in their names."""
    plain, selected = folder / f"{code:x}.webp", folder / f"{code:x}-fe0f.webp"
    return plain if plain.exists() else selected


def read(file):
    """RGBA, cut to what is not transparent, in the middle of a square of SIZE pixels."""
    with Image.open(file) as image:
        image = image.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 20)).getbbox())
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main(arguments=None):
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the package's assets")
    args = parser.parse_args(arguments)
    names = " ".join(CHOSEN.split()).split(", ")
    rows = -(-len(names) // world.SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SIZE * world.SHEET_COLUMNS, SIZE * rows))
    for i, name in enumerate(names):
        code = ord(unicodedata.lookup(name.upper()))
        row, column = divmod(i, world.SHEET_COLUMNS)
        sheet.paste(read(file_of(args.folder, code)), (SIZE * column, SIZE * row))
    sheet.save(world.SHEET, quality=90, method=6)
    world.NAMES.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    print(f"{len(names)} objects: {world.SHEET}")


if __name__ == "__main__":
    cli.run(main)
