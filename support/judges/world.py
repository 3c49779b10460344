"""The embedded world's judge: a small network reads what a scene shows, as a list of objects and
their places, and the list is compared with the prompt, in the manner of GenEval (2310.11513).

lab/make_judge.py trains the network and says how often it is right about real scenes.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from models import ASSETS
from support import world
from support.checkpoint import file_digest
from support.cli import UserError
from support.judges import OwnJudge
from support.metrics import mean_metric

FLAGS = {}
WEIGHTS = ASSETS / "world_judge.safetensors"
CELLS = 16  # a scene is read in 16x16 cells
WIDTHS = (48, 96, 160)
LEAST_SHARE, LEAST_CELLS = 0.15, 4  # of the cells that show objects, for one to be there
REFERENCE = 2000  # real scenes that others are compared with
OPEN = ("cat face", "rainbow", "sailboat", "guitar")  # prompts by which coverage is measured


class Block(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(8, width) for _ in range(2))
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(2)
        )

    def forward(self, x):
        hidden = x
        for norm, conv in zip(self.norms, self.convs):
            hidden = conv(F.silu(norm(hidden)))
        return x + hidden


class Reader(torch.nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> logits (B, 33, 16, 16) of what each cell shows, 0 being the
    background, and features (B, 160)."""

    def __init__(self):
        super().__init__()
        fine, middle, coarse = WIDTHS
        self.enter = torch.nn.Conv2d(3, fine, 4, stride=2, padding=1)
        self.middle = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Conv2d(fine, middle, 4, stride=2, padding=1), Block(middle)
        )
        self.coarse = torch.nn.Sequential(
            torch.nn.Conv2d(middle, coarse, 2, stride=2), Block(coarse), Block(coarse)
        )
        self.leave = torch.nn.Sequential(
            torch.nn.Conv2d(middle + coarse, 128, 1),
            torch.nn.SiLU(),
            torch.nn.Conv2d(128, 1 + world.OBJECTS, 1),
        )

    def forward(self, images):
        middle = self.middle(self.enter(2 * images - 1))  # (B, 96, 16, 16)
        coarse = self.coarse(middle)  # (B, 160, 8, 8)
        joined = torch.cat([middle, F.interpolate(coarse, scale_factor=2)], 1)
        return self.leave(joined), coarse.mean((2, 3))


def colour_of(image, is_background):
    """The name of the plain colour behind the objects, or None where it is not plain."""
    cells = F.adaptive_avg_pool2d(image, CELLS)[:, is_background]  # (3, cells)
    if cells.shape[1] < LEAST_CELLS:
        return None
    middle = cells.median(1).values
    if (cells - middle[:, None]).abs().mean() > 0.1:
        return None
    known = torch.tensor(list(world.COLOURS.values())) / 255
    return list(world.COLOURS)[int((known - middle).norm(dim=1).argmin())]


def read_scene(cells):
    """{object: (x, y), its middle in cells} of (16, 16) numbers of what the cells show."""
    numbers, counts = cells[cells > 0].unique(return_counts=True)
    found = {}
    for number, count in zip(numbers.tolist(), counts.tolist()):
        if count >= max(LEAST_CELLS, LEAST_SHARE * counts.sum().item()):
            y, x = (cells == number).nonzero().double().mean(0).tolist()
            found[number - 1] = (x, y)
    return found


def is_right(prompt, found, colour):
    """Just the objects of the prompt are there, and where and before what it says."""
    if set(found) != set(prompt.objects):
        return False
    if prompt.colour and prompt.colour != colour:
        return False
    if prompt.relation in ("left of", "above"):
        (x, y), (other_x, other_y) = (found[i] for i in prompt.objects)
        right, below = other_x - x, other_y - y
        along, across = (right, below) if prompt.relation == "left of" else (below, right)
        return along > abs(across)
    return True


def kind_of(found, colour):
    """One of 44: background colour or none that is plain, and the quarter that the object is in."""
    x, y = next(iter(found.values()))
    number = list(world.COLOURS).index(colour) if colour else len(world.COLOURS)
    return 4 * number + 2 * (y > (CELLS - 1) / 2) + (x > (CELLS - 1) / 2)


# Of prompts, and how world.draw_prompt draws them.
CATEGORIES = {
    "single": {"alone": 1.0, "coloured": 0.0},
    "colour": {"alone": 1.0, "coloured": 1.0},
    "two": {"alone": 0.0, "coloured": 0.0, "relations": ("and",)},
    "position": {"alone": 0.0, "coloured": 0.0, "relations": ("left of", "above")},
    "unseen": {"alone": 0.0, "coloured": 0.0, "relations": ("and",), "unseen": True},
}


def category_of(prompt):
    if len(prompt.objects) == 1:
        return "colour" if prompt.colour else "single"
    if prompt.relation != "and":
        return "position"
    return "unseen" if world.held_out(*prompt.objects) else "two"


class WorldJudge(OwnJudge):
    open_prompts = OPEN

    def __init__(self):
        self.reader = Reader().eval()
        try:
            self.reader.load_state_dict(load_file(WEIGHTS))
        except FileNotFoundError:
            raise UserError(f"{WEIGHTS} is missing: python -m lab.make_judge makes it") from None
        self.about = {"world judge": file_digest(WEIGHTS)}

    @torch.no_grad()
    def read(self, images):
        """Of (N, 3, 64, 64) in [0, 1]: [({object: its place}, background colour), ...] and features
        (N, 160)."""
        logits, features = self.reader(images.float())
        cells = logits.argmax(1)  # (N, 16, 16)
        read = []
        for image, own in zip(images.float(), cells):
            read.append((read_scene(own), colour_of(image, own == 0)))
        return read, features

    def prompts(self, count, seed):
        """A fifth of each category, in turn."""
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand(count, 6, generator=generator).tolist()
        options = itertools.cycle(CATEGORIES.values())
        return [str(world.draw_prompt(u_i, **own)) for u_i, own in zip(u, options)]

    def check(self, prompt):
        world.read_prompt(prompt)

    def kinds(self, prompt):
        return 4 * (1 + len(world.COLOURS))

    def real(self, prompts, seed):
        """Real scenes (N, 3, 64, 64) in [0, 1] of prompts."""
        generator = torch.Generator().manual_seed(seed)
        return world.scenes([world.read_prompt(text) for text in prompts], generator).float() / 255

    def reference(self):
        return reference_features()

    def __call__(self, images, views, prompts):
        seen = next(iter(views.values())).cpu()
        read, features = self.read(seen)
        kinds = []
        for text, (found, colour) in zip(prompts, read):
            right = is_right(world.read_prompt(text), found, colour)
            kinds.append(kind_of(found, colour) if right else -1)
        return {"kind": torch.tensor(kinds), "features layout": features}

    def metrics(self, right, prompts):
        """The share that is right, of all and of each category."""
        categories = {}
        for i, text in enumerate(prompts):
            categories.setdefault(category_of(world.read_prompt(text)), []).append(i)
        by_category = {name: mean_metric(right[own]) for name, own in categories.items()}
        return {"alignment": mean_metric(right)} | by_category


@functools.cache
def reference_features():
    """Of real scenes, (REFERENCE, 160)."""
    judge, features = WorldJudge(), []
    prompts = judge.prompts(REFERENCE, seed=1)
    for start in range(0, len(prompts), 100):
        features.append(judge.read(judge.real(prompts[start : start + 100], start))[1])
    return torch.cat(features)


def make(args, setting):
    return [WorldJudge()] if setting.protocol_name == "world" else []
