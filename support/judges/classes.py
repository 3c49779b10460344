"""The embedded classes as a yardstick: the nearest image of the set tells what a sample shows."""

import torch
import torch.nn.functional as F

from support import embedded
from support.cli import UserError
from support.judges import OwnJudge
from support.metrics import mean_metric

FLAGS = {}
EDGE_WEIGHT = 4.0  # edges are weaker than colours; times 4 both count alike


def centred(images, size=32):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size): the square around the ink, so that place and
    size do not count. It spans all but the outer 1 % of the ink on each side, lest a speck
    decide."""
    ink = (images.amin(1) < 0.7).float()
    bounds = []
    for along in (2, 1):  # what is left is y first, then x
        mass = ink.sum(along).cumsum(1)
        low = (mass < 0.01 * mass[:, -1:]).sum(1)
        high = (mass < 0.99 * mass[:, -1:]).sum(1) + 1
        bounds.append((low, torch.maximum(high, low + 1)))
    (top, bottom), (left, right) = bounds
    side = torch.maximum(bottom - top, right - left).clamp(max=images.shape[-1])
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side / images.shape[-1]
    theta[:, 0, 2] = (left + right) / images.shape[-1] - 1
    theta[:, 1, 2] = (top + bottom) / images.shape[-2] - 1
    grid = F.affine_grid(theta, (len(images), 3, size, size), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, align_corners=False)


def cell_features(images, cells):
    """(N, 3, H, W) in [0, 1] -> (N, 5 cells^2): mean colour, and mean strength of edges either way,
    in cells x cells squares."""
    right = F.pad(images, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs().mean(1, keepdim=True)
    below = F.pad(images, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs().mean(1, keepdim=True)
    planes = torch.cat([images, EDGE_WEIGHT * right, EDGE_WEIGHT * below], 1)
    return F.adaptive_avg_pool2d(planes, cells).flatten(1)


def layout(images):
    """Features of 4x4 cells, (N, 3, H, W) -> (N, 80), in units of 1/10 of the grey range."""
    return 10 * cell_features(images, 4)


class ClassJudge(OwnJudge):
    """Prompts are the numbers of classes."""

    def __init__(self):
        self.classes = embedded.classes()
        self.class_of = torch.empty(len(embedded.images()), dtype=torch.long)
        for number, group in enumerate(self.classes):
            self.class_of[group] = number
        halved = F.avg_pool2d(embedded.images().float() / 255, 2)
        self.appearance = cell_features(centred(halved), 8)

    def prompts(self, count, seed):
        return [str(i % len(self.classes)) for i in range(count)]

    def check(self, prompt):
        self.number(prompt)

    def number(self, prompt):
        if not prompt.isdecimal() or int(prompt) >= len(self.classes):
            raise UserError(
                f"the embedded set has no class {prompt!r}: its classes are 0 to "
                f"{len(self.classes) - 1}"
            )
        return int(prompt)

    def kinds(self, prompt):
        return len(self.classes[self.number(prompt)])

    def metrics(self, right, prompts):
        return {"alignment": mean_metric(right)}

    def real(self, prompts, seed):
        """Real images (N, 3, 16, 16) in [0, 1] of prompts, at random places and sizes."""
        generator = torch.Generator().manual_seed(seed)
        groups = [self.classes[self.number(prompt)] for prompt in prompts]
        u = torch.rand(len(prompts), generator=generator).tolist()
        index = [group[int(u_i * len(group))] for group, u_i in zip(groups, u)]
        return (embedded.shift_and_scale(embedded.images()[index], generator) + 1) / 2

    def reference(self):
        """Layout features of 200 images of each class."""
        return layout(self.real(self.prompts(200 * len(self.classes), seed=0), seed=0))

    def nearest(self, images):
        """Index of the nearest image of the set, by mean colour and edge strength in 8x8 cells of
        the square around the ink."""
        return torch.cdist(cell_features(centred(images), 8), self.appearance).argmin(1)

    def __call__(self, images, views, prompts):
        seen = next(iter(views.values())).cpu()
        nearest = self.nearest(seen)
        wanted = torch.tensor([self.number(prompt) for prompt in prompts])
        right = self.class_of[nearest] == wanted
        return {"kind": torch.where(right, nearest, -1), "features layout": layout(seen)}


def make(args, setting):
    return [ClassJudge()] if setting.protocol_name == "emoji-classes" else []
