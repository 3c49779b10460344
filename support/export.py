"""A student as one file for other programs, or as a diffusers folder.

    python -m support.export --student runs/x --out student.safetensors     # for ComfyUI
    python -m support.export --student runs/x --out folder --dtype fp16     # a LoRA is merged

ComfyUI finds the file in models/diffusion_models. runs/x/student/ itself is what diffusers loads;
the README.md in it, which is the model card, shows how.
"""

import functools
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
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
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
    blocks = dict(OUTSIDE)
    count = 1
    for level, block in enumerate(unet.down_blocks):
        for i in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{i}"] = f"input_blocks.{count}.0"
            blocks[f"down_blocks.{level}.attentions.{i}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for level, block in enumerate(unet.up_blocks):
        for i in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{i}"] = f"output_blocks.{count}.0"
            blocks[f"up_blocks.{level}.attentions.{i}"] = f"output_blocks.{count}.1"
            count += 1
        place = 1 + hasattr(block, "attentions")  # the last part of the level's last block
        blocks[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{count - 1}.{place}"
    names = {}
    for name in unet.state_dict():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        inside = name.removeprefix(f"{block}.")
        if ".resnets." in name:
            part, kind = inside.split(".")
            inside = f"{RESNET[part]}.{kind}"
        names[name] = f"{blocks[block]}.{inside}"
    return names


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
        checkpoint.replace_file(out, functools.partial(write_single_file, network))
    else:
        checkpoint.replace_folder(out, network.save_pretrained)
    millions = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(f"{out}: {millions:.0f} million parameters")


if __name__ == "__main__":
    cli.run(main)
