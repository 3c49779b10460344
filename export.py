"""A student for other programs: its model card, and one file with the names that ComfyUI and the original code give to weights.

    python export.py --student runs/x --out student.safetensors              # one file for ComfyUI's models/diffusion_models
    python export.py --student runs/x --out folder --dtype fp16              # a diffusers UNet; a LoRA is merged into its teacher

runs/x/student/ itself is what diffusers loads: the README.md in it, which is the model card, shows how.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

import errors
from errors import UserError

# Parts of a name, as diffusers and as the original code have them.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
          "conv_shortcut": "skip_connection"}
OUTSIDE = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
           "add_embedding.linear_2": "label_emb.0.2", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}


def original_names(unet):
    """{name of a weight in diffusers: name in the original code} of a UNet of Stable Diffusion's kind.

    There, the input blocks are counted through all levels, a down-sampling one ending each level; so are the output blocks, where
    up-sampling is the last part of a level's last block.
    """
    each, names = unet.config.layers_per_block + 1, {}
    if not isinstance(each, int):
        raise UserError("a UNet with different numbers of layers on its levels has no original names")
    for name in unet.state_dict():
        part = name.split(".")
        for ours, theirs in OUTSIDE.items():
            if name.startswith(f"{ours}."):
                names[name] = name.replace(ours, theirs, 1)
        if part[0] == "mid_block":
            place, rest = f"middle_block.{1 if part[1] == 'attentions' else 2 * int(part[2])}", part[3:]
        elif part[0] in ("down_blocks", "up_blocks"):
            level, kind, number, rest = int(part[1]), part[2], int(part[3]), part[4:]
            side, first = ("input_blocks", 1 + level * each) if part[0] == "down_blocks" else ("output_blocks", level * each)
            if kind == "downsamplers":
                place, rest = f"{side}.{first + each - 1}.0.op", rest[1:]
            elif kind == "upsamplers":
                place = f"{side}.{first + each - 1}.{2 if hasattr(unet.up_blocks[level], 'attentions') else 1}"
            else:
                place = f"{side}.{first + number}.{int(kind == 'attentions')}"
        else:
            continue
        if "resnets" in part:
            rest = [RESNET.get(rest[0], rest[0]), *rest[1:]]
        names[name] = ".".join([place, *rest])
    return names


def write_single_file(unet, path):
    names = original_names(unet)
    tensors = {f"model.diffusion_model.{names[name]}": tensor.contiguous() for name, tensor in unet.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def model_card(model, timesteps, config):
    """README.md of a student."""
    teacher, steps = config["model"] or "assets/emoji_teacher", len(timesteps)
    if not hasattr(model, "pipeline_class"):  # the plane, EDM: no pipeline of diffusers draws with it
        return f"A student of {teacher} for {steps} step{'s' * (steps > 1)}, timesteps {timesteps} of its {len(model.schedule)} noise levels: `python sample.py --student RUN`.\n"
    pipeline = model.pipeline_class().__name__
    if config["lora"]:
        load = [f'pipe = {pipeline}.from_pretrained("{teacher}")', 'pipe.load_lora_weights("path/to/this/folder")']
    else:
        load = ['student = UNet2DConditionModel.from_pretrained("path/to/this/folder")', f'pipe = {pipeline}.from_pretrained("{teacher}", unet=student)']
    of_no_interest = ("keep", "picture_every", "save_every", "timeout", "track")
    flags = "\n".join(f"| {name} | {value} |" for name, value in config.items() if value not in (None, False) and name not in of_no_interest)
    return f"""---
base_model: {teacher}
pipeline_tag: text-to-image
tags: [distribution-matching-distillation, {'lora, ' if config['lora'] else ''}few-step]
---

A student that draws in {steps} step{'s' * (steps > 1)} what `{teacher}` draws in 50, made by distribution matching distillation (`--variant {config['variant']}`).

Timesteps {timesteps}, no guidance (`guidance_scale=0` in diffusers), a scheduler that predicts x0 and adds new noise (LCMScheduler, which may warn that these are not
its own timesteps; they are the ones that the student was trained for):

    from diffusers import LCMScheduler, {'' if config['lora'] else 'UNet2DConditionModel, '}{pipeline}
    {chr(10).join(load).replace(chr(10), chr(10) + '    ')}
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe("a prompt", timesteps={timesteps}, guidance_scale=0).images[0].save("picture.png")

| flag | value |
|---|---|
{flags}
"""


def parse_arguments():
    parser = errors.Parser(__doc__)
    parser.add_argument("--student", required=True, metavar="PATH", help="run directory, UNet directory, file of weights or LoRA")
    parser.add_argument("--model", metavar="PATH", help="its teacher (default: the one that the run names)")
    parser.add_argument("--out", required=True, metavar="PATH", help="FILE.safetensors, or a new folder")
    parser.add_argument("--dtype", type=errors.dtype("float32", "bfloat16", "float16"), default="float16", metavar="DTYPE", help="fp32, bf16 or fp16")
    return parser.parse_args()


def main():
    import checkpoint
    import data
    import models
    import sample
    args = parse_arguments()
    out = Path(args.out)
    if out.exists() or not out.absolute().parent.is_dir():
        raise UserError(f"--out {out} exists already" if out.exists() else f"there is no directory {out.parent} for --out {out}")
    if out.suffix not in ("", ".safetensors"):
        raise UserError(f"--out {out} should end in .safetensors, or be a folder without an ending")
    model = models.load_model(args.model or sample.run_configuration(args.student).get("model") or data.EMOJI_TEACHER, vae="none")
    if out.suffix and not hasattr(model, "pipeline_class"):
        raise UserError(f"--out {out}: only students of Stable Diffusion go into one file; name a folder")
    with models.quiet_libraries():
        unet = models.load_student(args.student, model).network.to(getattr(torch, args.dtype))
        if out.suffix == ".safetensors":
            checkpoint.replace_file(out, lambda path: write_single_file(unet, path))
        else:
            checkpoint.replace_folder(out, unet.save_pretrained)
    print(f"{out}: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} million parameters")


if __name__ == "__main__":
    errors.run(main)
