"""A student as one file for other programs, or as a diffusers folder.

    python -m support.export --student runs/x --out student.safetensors     # for ComfyUI
    python -m support.export --student runs/x --out folder --dtype fp16     # a LoRA is merged

ComfyUI finds the file in models/diffusion_models. runs/x/student/ itself is what diffusers loads;
the README.md in it, which is the model card, shows how.
"""

from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.export_parser, __doc__)

import torch
from safetensors.torch import save_file

import data
import models
from support import checkpoint, students
from support.cli import UserError

# Parts of a name: diffusers' and the original code's.
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original_names(unet):
    """{name of a weight in diffusers: name in the original code} of Stable Diffusion's UNets."""
    layers = unet.config.layers_per_block
    if not isinstance(layers, int):
        raise UserError("a UNet with different numbers of layers on its levels has no such names")
    attends = [hasattr(block, "attentions") for block in unet.up_blocks]
    return {name: original_name(name, layers + 1, attends) for name in unet.state_dict()}


def original_name(name, blocks, attends):
    """blocks: of a level. attends: whether each of the upper levels does."""
    for ours, theirs in OUTSIDE.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    part = name.split(".")  # up_blocks 1 resnets 0 conv1 bias, mid_block resnets 0 conv1 bias
    if part[0] == "mid_block":
        kind, number, *rest = part[1:]
        place = 1 if kind == "attentions" else 2 * int(number)
        block = f"middle_block.{place}"
    else:
        level, kind, number, *rest = part[1:]
        block = place_in_level(part[0], int(level), kind, int(number), blocks, attends)
    if kind == "resnets":
        rest[0] = RESNET[rest[0]]
    if kind == "downsamplers":
        rest[0] = "op"
    return ".".join([block, *rest])


def place_in_level(side, level, kind, number, blocks, attends):
    """Input blocks are counted through all levels, and the last one of a level halves the size. So
    are output blocks, but there doubling the size is the last part of a level's last block."""
    if side == "down_blocks":
        first = 1 + level * blocks
        if kind == "downsamplers":
            return f"input_blocks.{first + blocks - 1}.0"
        return f"input_blocks.{first + number}.{int(kind == 'attentions')}"
    first = level * blocks
    if kind == "upsamplers":
        return f"output_blocks.{first + blocks - 1}.{1 + attends[level]}"
    return f"output_blocks.{first + number}.{int(kind == 'attentions')}"


def write_single_file(unet, path):
    names = original_names(unet)
    tensors = {}
    for name, tensor in unet.state_dict().items():
        tensors[f"model.diffusion_model.{names[name]}"] = tensor.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def main(arguments=None):
    args = flags.export_parser(__doc__).parse_args(arguments)
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out} exists already")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no directory {out.parent}")
    if out.suffix not in ("", ".safetensors"):
        raise UserError(f"--out {out} should end in .safetensors, or be a folder without an ending")
    config = students.run_config(args.student)
    model = models.load_model(
        data.model_path(args.model or config.get("model")),
        vae="none",
        config=args.config or config.get("config"),
    )
    if out.suffix and model.network_class.__name__ != "UNet2DConditionModel":
        raise UserError(
            f"--out {out}: only students of Stable Diffusion go into one file; name a folder"
        )
    network = students.load_student(args.student, model).network.to(getattr(torch, args.dtype))
    if out.suffix:

        def write(path):
            write_single_file(network, path)

        checkpoint.replace_file(out, write)
    else:
        checkpoint.replace_folder(out, network.save_pretrained)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(f"{out}: {millions:.0f} million parameters")


if __name__ == "__main__":
    cli.run(main)
