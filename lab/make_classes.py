"""Make the embedded class-conditional teacher again, EDM's ImageNet network in miniature.

    python -m lab.make_classes                           # half an hour on two cores

A UNet2DModel on 16x16 pixels with EDM's preconditioning, loss and distribution of noise levels
(2206.00364); its labels.txt names the classes. An interrupted command goes on from --work.
"""

import functools
from pathlib import Path

import torch
from diffusers import UNet2DModel

import data
import losses
import models
from lab.training import average_of, maker_parser, train
from support import checkpoint, cli, edm, embedded
from support.families import FAMILIES

UNET = dict(
    size=16,
    channels=(32, 64, 128),
    layers=1,
    attends=(False, False, True),
    labels=len(embedded.CLASSES),
)


def class_loss(generator, network, images, groups, args):
    labels = torch.randint(len(groups), (args.batch_size,), generator=generator)
    u = torch.rand(args.batch_size, generator=generator).tolist()
    index = []
    for label, u_i in zip(labels.tolist(), u):
        group = groups[label]
        index.append(group[int(u_i * len(group))])
    x0 = embedded.shift_and_scale(images[index], generator).to(args.device)
    sigma = (1.2 * torch.randn(args.batch_size, generator=generator) - 1.2).exp().to(args.device)
    eps = torch.randn(x0.shape, generator=generator).to(args.device)
    levels = models.Schedule(torch.ones_like(sigma), sigma, sigma.log() / 4)  # one for each sample
    t = torch.arange(len(sigma))
    denoiser = models.Denoiser(network, levels, "edm", FAMILIES["UNet2DModel"])
    x_t = levels.add_noise(x0, eps, t)
    x0_pred = denoiser(x_t, t, {"class_labels": labels.to(args.device)})  # (B, 3, 16, 16)
    weight = losses.denoising_weight("edm", 1, sigma).view(-1, 1, 1, 1)
    return losses.denoising_loss(x0_pred, x0, weight).mean()


def make_teacher(args):
    torch.manual_seed(args.seed)
    network = edm.prepare_network(UNet2DModel(**edm.unet_options(**UNET))).to(args.device)
    networks = torch.nn.ModuleDict({"unet": network})
    average = average_of(networks)
    loss_of = functools.partial(
        class_loss,
        network=network,
        images=embedded.images(),
        groups=embedded.classes(),
        args=args,
    )
    train("classes", args.iterations, networks, loss_of, args, average)

    def write(folder):
        unet = average.module["unet"].eval()
        unet.class_embedding.weight.data[-1] = 0  # no label, never trained: EDM's adds nothing then
        unet.half().save_pretrained(folder)
        (folder / "labels.txt").write_text("".join(f"{name}\n" for name in embedded.CLASSES))

    checkpoint.replace_folder(Path(args.out), write)


def main(arguments=None):
    parser = maker_parser(__doc__, "runs/classes-teacher", 64)
    add = parser.add_argument
    add("--out", default=data.EMBEDDED["emoji-classes"], metavar="DIR")
    add("--iterations", type=cli.positive, default=5000)
    args = parser.parse_args(arguments)
    make_teacher(args)
    print(f"{args.out}. Measure it: python eval.py --teacher-only --model {args.out}")


if __name__ == "__main__":
    cli.run(main)
