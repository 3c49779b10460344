"""The embedded set as a yardstick: the nearest image of the set tells what a sample shows."""

import functools

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


class EmojiJudge(OwnJudge):
    """For images of `size` pixels. With classes the prompts are their numbers, else words."""

    open_prompts = ("cat", "heart", "moon")

    def __init__(self, size=64, classes=None):
        self.captions = embedded.captions()
        self.words = [set(caption.split()) for caption in self.captions]
        self.classes = classes
        self.width = embedded.CLASS_WIDTH if classes else 1.0
        self.known = list(range(len(self.captions)))
        if classes:
            self.known = [i for group in classes for i in group]
        self.images = embedded.images(2 * size)  # (1453, 3, 2 size, 2 size)
        halved = F.avg_pool2d(self.images[self.known].float() / 255, 2)
        self.appearance = cell_features(centred(halved), 8)

    @functools.cache
    def accepted(self, prompt):
        """The images of the set that are right for a prompt."""
        found = []
        if self.classes:
            if prompt.isdecimal() and int(prompt) < len(self.classes):
                found = self.classes[int(prompt)]
        elif prompt:
            words = set(prompt.split())
            found = [i for i, own in enumerate(self.words) if words <= own]
        if not found:
            right = "words of its captions"
            if self.classes:
                right = f"the classes 0 to {len(self.classes) - 1}"
            raise UserError(
                f"nothing in the embedded set is right for the prompt {prompt!r}: prompts are "
                f"{right}"
            )
        return found

    def prompts(self, count, seed):
        """Captions, drawn without replacement."""
        if count > len(self.captions):
            raise UserError(f"--samples {count}: the set has {len(self.captions)} captions")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(self.captions), generator=generator)[:count]
        return [self.captions[i] for i in chosen]

    def check(self, prompt):
        self.accepted(prompt)

    def kinds(self, prompt):
        return len(self.accepted(prompt))

    def metrics(self, right, prompts):
        return {"alignment": mean_metric(right)}

    def real(self, prompts, seed):
        """Real images (N, 3, size, size) in [0, 1] of prompts, at random places and sizes; a full
        caption's own."""
        generator = torch.Generator().manual_seed(seed)
        own = {caption: i for i, caption in enumerate(self.captions)}
        index = []
        for prompt in prompts:
            if prompt in own and not self.classes:
                index.append(own[prompt])
            else:
                accepted = self.accepted(prompt)
                u = torch.rand((), generator=generator)
                index.append(accepted[int(u * len(accepted))])
        generator = torch.Generator().manual_seed(seed)
        return (embedded.shift_and_scale(self.images[index], generator, self.width) + 1) / 2

    def reference(self):
        """Layout features of the whole set, or of 200 images of each class."""
        prompts = self.captions
        if self.classes:
            prompts = [str(number) for number in range(len(self.classes)) for _ in range(200)]
        return layout(self.real(prompts, seed=0))

    def nearest(self, images):
        """Index of the nearest image of the set, by mean colour and edge strength in 8x8 cells of
        the square around the ink."""
        found = torch.cdist(cell_features(centred(images), 8), self.appearance).argmin(1)
        return torch.tensor(self.known)[found]

    def __call__(self, images, views, prompts):
        seen = next(iter(views.values())).cpu()
        nearest = self.nearest(seen)
        pairs = zip(nearest.tolist(), prompts)
        right = torch.tensor([i in self.accepted(prompt) for i, prompt in pairs])
        return {"kind": torch.where(right, nearest, -1), "features layout": layout(seen)}


def make(args, setting):
    if setting.protocol_name == "emoji":
        return [EmojiJudge()]
    if setting.protocol_name == "emoji-classes":
        return [EmojiJudge(16, embedded.classes())]
    return []
