"""Train the embedded world's judge again and say how often it is right about real scenes.

    python -m lab.make_judge                             # ten minutes on one core

The network learns what each cell of a scene shows, from scenes with exact labels. Some are blurred
or noisy, for samples are. Held-out pairs are among them: the judge must know what students are
tested on. An interrupted command goes on from --work.
"""

import functools

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lab.training import maker_parser, train
from support import cli, world
from support.images import as_tensor
from support.judges.world import CATEGORIES, CELLS, WEIGHTS, Reader, WorldJudge


def labels_of(prompt, places):
    """(16, 16): what most of each cell shows, 0 being the background."""
    shares = torch.zeros(len(places), CELLS, CELLS)
    for share, i, (x, y, edge) in zip(shares, prompt.objects, places):
        alpha = torch.zeros(world.SIZE, world.SIZE)
        picture = world.object_of_edge(i, edge).getchannel("A")
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        alpha[y : y + edge, x : x + edge] = pixels.view(edge, edge) / 255
        share.copy_(F.adaptive_avg_pool2d(alpha[None], CELLS)[0])
    most, which = shares.max(0)
    numbers = torch.tensor([1 + i for i in prompt.objects])
    return numbers[which].where(most > 0.4, 0)


def make_batch(count, generator):
    """Images (B, 3, 64, 64) in [0, 1] and labels (B, 16, 16)."""
    u = torch.rand(count, world.NUMBERS + 1, generator=generator).tolist()
    images = torch.empty(count, 3, world.SIZE, world.SIZE)
    labels = torch.empty(count, CELLS, CELLS, dtype=torch.long)
    for i, u_i in enumerate(u):
        prompt = world.draw_prompt(u_i, unseen=u_i[-1] < 0.1)
        image, places = world.compose(prompt, u_i[6:])
        images[i] = as_tensor(image) / 255
        labels[i] = labels_of(prompt, places)
    return images, labels


def worsen(images, generator):
    """A third blurred, and noise of deviation up to .06 on all."""
    blurred = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    u = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    images = torch.where(u[0] < 1 / 3, blurred, images)
    return images + 0.06 * u[1] * torch.randn(images.shape, generator=generator)


def judge_loss(generator, reader, args):
    images, labels = make_batch(args.batch_size, generator)
    logits, _ = reader(worsen(images, generator).to(args.device))
    return F.cross_entropy(logits.float(), labels.to(args.device))


def main(arguments=None):
    parser = maker_parser(__doc__, "runs/judge", 32)
    add = parser.add_argument
    add("--iterations", type=cli.positive, default=1500)
    add("--samples", type=cli.positive, default=2000, help="real scenes that it is measured on")
    args = parser.parse_args(arguments)
    torch.manual_seed(args.seed)
    reader = Reader().to(args.device)
    loss_of = functools.partial(judge_loss, reader=reader, args=args)
    train("judge", args.iterations, {"reader": reader}, loss_of, args, rate=2e-3, beta2=0.999)
    save_file({name: value.half() for name, value in reader.state_dict().items()}, WEIGHTS)
    judge = WorldJudge()
    prompts = judge.prompts(args.samples, args.seed + 1)
    judged = {}
    for start in range(0, len(prompts), 100):
        some = prompts[start : start + 100]
        images = judge.real(some, args.seed + start)
        for name, values in judge(images, {"whole": images}, some).items():
            judged.setdefault(name, []).append(values)
    judged = {name: torch.cat(values) for name, values in judged.items()}
    for name, metric in judge.metrics(judged["kind"] >= 0, prompts).items():
        print(f"{name}: {metric.value:.3f} +- {metric.error:.3f} of real scenes are found right")
    print(f"{len(CATEGORIES)} categories, {WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
