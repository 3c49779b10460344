"""The embedded world: scenes of one or two of 32 objects, and captions that say what is in them.

A caption leaves much open, which is what makes a few-step sampler's task hard: "cat face" has as
many right images as there are places, sizes and backgrounds. Scenes are composed when they are
asked for, from uniform numbers, so there is no end of them. lab/objects.py chose the objects.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from models import ASSETS
from support.cli import UserError
from support.images import as_tensor

SHEET, NAMES = ASSETS / "world_objects.webp", ASSETS / "world_objects.txt"
SHEET_COLUMNS = 8
OBJECTS = 32
SIZE = 64  # of a scene, and of an object on the sheet
RELATIONS = ("left of", "above", "and")  # "and" leaves open where they are
COLOURS = {
    "red": (215, 45, 45),
    "orange": (245, 145, 35),
    "yellow": (250, 225, 70),
    "green": (60, 170, 75),
    "blue": (55, 105, 220),
    "purple": (140, 75, 185),
    "pink": (245, 165, 195),
    "grey": (128, 128, 128),
    "black": (25, 25, 25),
    "white": (245, 245, 245),
}
JITTER = 12  # of a named colour, of 255
NUMBERS = 20  # uniform ones that a scene is made of: 6 for its prompt, 14 for the rest
HELD_OUT = 20  # one pair in so many never occurs in training


@functools.cache
def names():
    return NAMES.read_text(encoding="utf-8").splitlines()


@functools.cache
def objects():
    """PIL images with alpha, 64x64, in the order of names()."""
    with Image.open(SHEET) as file:
        sheet = file.convert("RGBA")
    found = []
    for i in range(OBJECTS):
        row, column = divmod(i, SHEET_COLUMNS)
        left, top = SIZE * column, SIZE * row
        found.append(sheet.crop((left, top, left + SIZE, top + SIZE)))
    return found


@functools.lru_cache(maxsize=20_000)
def object_of_edge(i, edge):
    return objects()[i].resize((edge, edge), Image.Resampling.BOX)


# ----------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompt:
    """What a caption says. objects: one or two indices; relation: of RELATIONS where there are two;
    colour: a name of COLOURS, or None where the background is open."""

    objects: tuple
    relation: str | None = None
    colour: str | None = None

    def __str__(self):
        text = names()[self.objects[0]]
        if self.relation:
            text += f" {self.relation} {names()[self.objects[1]]}"
        return text + (f" on {self.colour}" if self.colour else "")


@functools.lru_cache(maxsize=100_000)
def read_prompt(text):
    """The Prompt that a caption was made of."""
    index = {name: i for i, name in enumerate(names())}
    rest, colour, relation, found = text, None, None, None
    if " on " in text:
        rest, colour = text.rsplit(" on ", 1)
    for name in RELATIONS:
        if f" {name} " in rest:
            relation, found = name, rest.split(f" {name} ", 1)
    found = [index.get(name) for name in found or [rest]]
    if None in found or len(set(found)) < len(found) or colour not in (None, *COLOURS):
        raise UserError(
            f"the embedded world has no scene {text!r}: prompts are like 'cat face', 'guitar above "
            f"rainbow' or 'banana and sailboat on blue'; {NAMES.name} lists the objects, and the "
            f"colours are {', '.join(COLOURS)}"
        )
    return Prompt(tuple(found), relation, colour)


def held_out(i, j):
    """Whether a pair of objects is kept for the test of what was never seen together."""
    return (7 * max(i, j) - min(i, j)) % HELD_OUT == 0


def draw_prompt(u, alone=0.5, coloured=0.4, unseen=False, relations=RELATIONS):
    """A prompt from 6 uniform numbers: of one object with probability `alone`, of a named colour
    with probability `coloured`; its pairs held out, or never so."""
    colour = list(COLOURS)[int(u[0] * len(COLOURS))] if u[1] < coloured else None
    i = int(u[2] * OBJECTS)
    if u[3] < alone:
        return Prompt((i,), None, colour)
    j = int(u[4] * OBJECTS)
    while i == j or held_out(i, j) != unseen:
        j = (j + 1) % OBJECTS
    return Prompt((i, j), relations[int(u[5] * len(relations))], colour)


def shorten(prompt, u):
    """What a training image is called: 10 % of prompts have no word, which trains the unconditional
    branch that guidance needs, and half of the colours and relations are not mentioned."""
    if u[0] < 0.1:
        return ""
    relation = prompt.relation
    if relation and u[1] < 0.3:
        relation = "and"
    return str(Prompt(prompt.objects, relation, prompt.colour if u[2] < 0.7 else None))


# ----------------------------------------------------------------------------- scenes


def place_one(u):
    """((x, y, edge),): left, top and edge length of an object, in pixels."""
    edge = 36 + int(u[0] * 23)
    return ((int(u[1] * (SIZE + 1 - edge)), int(u[2] * (SIZE + 1 - edge)), edge),)


def place_two(relation, u):
    """Places of two objects, the first left of or above the second; any of the four for "and"."""
    edges = [25 + int(u[0] * 7), 25 + int(u[1] * 7)]
    room = SIZE - sum(edges)
    before = int(u[2] * (room + 1))
    between = int(u[3] * (room + 1 - before))
    along = [before, before + edges[0] + between]
    middle = 16 + u[4] * (SIZE - 32)  # of both, across, and each a little off it
    across = []
    for edge, u_i in zip(edges, u[5:7]):
        place = middle + 12 * u_i - 6 - edge / 2
        across.append(int(min(max(place, 0), SIZE - edge)))
    if relation == "and" and u[7] < 0.5:
        along = [along[0] + along[1] + edges[1] - place - edge for place, edge in zip(along, edges)]
    sideways = relation == "left of" or (relation == "and" and u[8] < 0.5)
    if sideways:
        return tuple(zip(along, across, edges))
    return tuple(zip(across, along, edges))


def background(colour, u):
    """(64, 64, 3) in [0, 255]: a named colour; else any, plain or from top to bottom."""
    if colour:
        plain = np.array(COLOURS[colour]) + JITTER * (2 * np.array(u[:3]) - 1)
        ends = [plain, plain]
    else:
        top, bottom = 255 * np.array(u[:3]), 255 * np.array(u[3:6])
        ends = [top, bottom] if u[6] < 0.5 else [top, top]
    share = np.linspace(0, 1, SIZE)[:, None, None]
    ground = (1 - share) * ends[0] + share * ends[1]
    return np.broadcast_to(ground, (SIZE, SIZE, 3)).clip(0, 255)


def compose(prompt, u):
    """A scene of a prompt from 14 uniform numbers: PIL image and the places of its objects."""
    if len(prompt.objects) == 1:
        places = place_one(u)
    else:
        places = place_two(prompt.relation, [*u[:7], *u[12:14]])
    image = Image.fromarray(background(prompt.colour, u[5:12]).round().astype(np.uint8))
    for i, (x, y, edge) in zip(prompt.objects, places):
        picture = object_of_edge(i, edge)
        image.paste(picture, (x, y), picture)
    return image, places


def scenes(prompts, generator):
    """uint8 (N, 3, 64, 64), one for each prompt."""
    made = torch.empty(len(prompts), 3, SIZE, SIZE, dtype=torch.uint8)
    u = torch.rand(len(prompts), 14, generator=generator).tolist()
    for i, prompt in enumerate(prompts):
        image, _ = compose(prompt, u[i])
        made[i] = as_tensor(image)
    return made


def prompts(count, generator, **options):
    """`count` prompts of draw_prompt."""
    u = torch.rand(count, 6, generator=generator).tolist()
    return [draw_prompt(u_i, **options) for u_i in u]
