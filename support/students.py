"""Students on disk: runs, checkpoints, network folders, files of weights, LoRAs; reading,
writing."""

import copy
import json
from pathlib import Path

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file

import fsdp
import models
from support import checkpoint, flags
from support.cli import UserError, import_package
from support.model_card import model_card
from support.weights import fingerprint, in_one_line, load_pretrained, read_json, read_weights

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def check_peft(flag):
    import_package("peft", flag)


def run_config(path):
    """The config.json of the run whose directory, student/, checkpoint or LoRA file that is; {} for
    anything else."""
    path = Path(path).absolute()
    for run in (path, *path.parents[:2]):
        file = run / "config.json"
        if file.is_file() and ((run / "student").is_dir() or (run / "checkpoints").is_dir()):
            return flags.checked_flags(read_json(file), file)
    return {}


# ----------------------------------------------------------------------------- reading


def load_student(path, model):
    """A student's Denoiser.

    path: a run (its student/), one of its checkpoints, a diffusers network folder, a file of a
    UNet's weights with diffusers' names (.safetensors, .bin, .pt: DMD2's releases), or a LoRA file,
    which is merged into a copy of the teacher.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return student_of_checkpoint(path, model)
    path = path / "student" if (path / "student").is_dir() else path
    path = path / LORA_FILE if (path / LORA_FILE).is_file() else path
    if path.is_dir():
        network = network_from_folder(path, model)
    elif path.is_file():
        weights = model.own_names(read_weights(path))
        # float32: a LoRA's part may be smaller than what a shorter dtype rounds off.
        network = copy.deepcopy(model.origin.network).float()
        if any("lora" in name for name in weights):
            merge_lora(network, weights, path, model)
        else:
            with in_one_line(f"the student {path} does not fit {model.name}"):
                network.load_state_dict(weights)
    else:
        raise UserError(f"there is no student at {path}")
    return ready(model.make_denoiser(network), model)


def ready(denoiser, model):
    """Frozen, where and how the teacher lies."""
    parameter = next(model.origin.parameters())
    return denoiser.to(parameter.device, parameter.dtype).requires_grad_(False).eval()


def whole_manifest(folder):
    manifest = checkpoint.read_manifest(folder)
    damage = checkpoint.damage_in(folder, manifest)
    if damage:
        raise UserError(f"the checkpoint {folder} is damaged: {damage}")
    return manifest


def student_of_checkpoint(folder, model):
    """The averaged student that a run had there."""
    manifest = whole_manifest(folder)
    config = flags.checked_flags(manifest["config"], folder / "manifest.json")
    if config["lora"]:
        check_peft(f"the LoRA of {folder}")
        in_float32 = next(model.origin.parameters()).dtype == torch.float32
        if in_float32 and manifest["teacher"] != fingerprint(model.denoiser):
            raise UserError(f"{folder} holds a LoRA of another teacher than {model.name}")
    student = models.trainable_copy(
        model.origin, config["lora"], config["lora_alpha"], config["seed"]
    )
    part = "averaged_student" if config["ema"] > 0 else "student"
    state = student.state_dict()
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    checkpoint.load(folder, {f"{part}.{name}": state[name] for name in names})
    return ready(student, model)


def load_fake_score(path, fake_score):
    """Fill the fake score with that of a run, and its head if both have one. A student that is no
    run has none: the fake score then stays the teacher."""
    is_checkpoint = (Path(path) / "manifest.json").is_file()
    folders = [Path(path)] if is_checkpoint else checkpoint.complete_checkpoints(path)
    if not folders:
        fsdp.print_main(f"{path} has no fake score: it starts as the teacher")
        return
    whole_manifest(folders[0])
    saved = checkpoint.names_in(folders[0])
    state = {f"fake_score.{name}": tensor for name, tensor in fake_score.state_dict().items()}
    has_head = any(name.startswith("fake_score.head.") for name in saved)
    if not has_head:
        state = {name: t for name, t in state.items() if not name.startswith("fake_score.head.")}
    checkpoint.load(folders[0], state)
    head = "" if has_head or fake_score.head is None else ", with a new head"
    fsdp.print_main(f"student and fake score begin as those of {path}{head}")


def network_from_folder(folder, model):
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no student at {folder}: neither student/config.json nor config.json is there"
        )
    kind = model.network_class
    with in_one_line(f"the student {folder} cannot be loaded"):
        config = kind.load_config(folder)
        if config.get("_class_name") != kind.__name__:
            found = config.get("_class_name")
            holds = f"a {found}" if found else "no student/, and no network"
            raise UserError(f"{folder} holds {holds}, not a {kind.__name__}")
        check_same_architecture(config, model, folder)
        return load_pretrained(kind, folder, use_safetensors=True)


def check_same_architecture(config, model, folder):
    for name, value in json.loads(model.origin.network.to_json_string()).items():
        theirs = config.get(name, value)
        if name[0] != "_" and theirs != value:
            raise UserError(
                f"the student {folder} has another architecture than {model.name}: {name} is "
                f"{theirs}, not {value}"
            )


# The two matrices of a LoRA under the names that programs give them.
LORA_PAIRS = (
    ("lora_down", "lora_up"),  # kohya
    ("lora_A", "lora_B"),  # peft
    ("lora.down", "lora.up"),  # diffusers, of old
)


def check_pairs(names, path):
    """Refuse a LoRA of which something would be left out: half a pair, or another kind's parts."""
    names = set(names)
    for name in sorted(names):
        partners = [name.replace(a, b) for a, b in LORA_PAIRS if a in name]
        partners += [name.replace(b, a) for a, b in LORA_PAIRS if b in name]
        if partners and partners[0] not in names:
            raise UserError(f"the LoRA {path} is incomplete: it has {name} but no {partners[0]}")
        if not partners and not name.endswith((".alpha", "network_alpha")):
            raise UserError(f"the LoRA {path} is of a kind that is not supported: it has {name}")
    text = [name for name in names if name.startswith(("lora_te", "text_encoder"))]
    if text:
        fsdp.print_main(
            f"{path}: its {len(text)} weights of text encoders are left out; only the UNet's count"
        )


def merge_lora(network, weights, path, model):
    """Add a LoRA, in diffusers' format or one that diffusers converts (kohya's), to the network's
    own weights. weights: what the file holds."""
    check_peft(f"the LoRA {path}")
    check_pairs(weights, path)
    kind = type(model.pipe)
    with in_one_line(f"the LoRA {path} does not fit {model.name}"):
        if model.family.network == "transformer":
            pipe = copy.copy(model.pipe)
            pipe.transformer = network
            pipe.load_lora_weights(str(path))
            pipe.fuse_lora(components=["transformer"])  # text encoders are shared with the teacher
            pipe.unload_lora_weights()
            return
        state, alphas, metadata = kind.lora_state_dict(
            str(path), unet_config=network.config, return_lora_metadata=True
        )
        in_peft = convert_unet_state_dict_to_peft(state)  # kohya's has older names before
        names = {name.split(".lora")[0] for name in in_peft if name.startswith("unet.")}
        modules = {f"unet.{name}" for name, _ in network.named_modules()}
        if not names:
            raise ValueError("it has no part for the UNet")
        if names - modules:
            unknown = min(names - modules).removeprefix("unet.")
            raise ValueError(f"{unknown} is not known there")
        kind.load_lora_into_unet(state, network_alphas=alphas, unet=network, metadata=metadata)
        network.fuse_lora()
        network.unload_lora()


# ----------------------------------------------------------------------------- writing


def write_student(out, nets, config):
    """Write the averaged student, as it is now, to out/student. Every rank calls this."""
    network = nets.averaged_student.network
    state = fsdp.full_state(network)
    if config["lora"]:
        trained = {name for name, p in nets.student.network.named_parameters() if p.requires_grad}
        state = {name: tensor for name, tensor in state.items() if name in trained}

    def write(folder):
        folder.mkdir(parents=True)
        if config["lora"]:
            save_lora(network, state, folder, nets.model)
        else:
            options = json.loads(network.to_json_string())
            options["_class_name"] = nets.model.network_class.__name__  # without FSDP's prefix
            (folder / "config.json").write_text(
                json.dumps(options, indent=2, sort_keys=True) + "\n"
            )
            file = folder / "diffusion_pytorch_model.safetensors"
            save_file(state, file, metadata={"format": "pt"})
        (folder / "README.md").write_text(model_card(nets.model, nets.timesteps, config))

    if fsdp.is_main():
        checkpoint.replace_folder(Path(out) / "student", write)


def save_lora(network, state, folder, model):
    """Write a LoRA. Of a UNet under kohya's names with diffusers' blocks,
    lora_unet_down_blocks_0_... with lora_down, lora_up and alpha, which diffusers, ComfyUI and
    kohya's tools all read whole; of a transformer as its pipeline itself writes one."""
    config = network.peft_config["default"]
    if model.family.network == "transformer":
        layers = {name.replace(".default.", "."): tensor for name, tensor in state.items()}
        about = config.to_dict() | {"target_modules": sorted(config.target_modules)}
        type(model.pipe).save_lora_weights(
            folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=about
        )
        return
    weights = {}
    for name, tensor in state.items():
        module, _, which = name.partition(".lora_")  # which: A.default.weight or B.default.weight
        stem = f"lora_unet_{module.replace('.', '_')}"
        part = {"A": "lora_down", "B": "lora_up"}[which[0]]
        weights[f"{stem}.{part}.weight"] = tensor.contiguous()
        weights[f"{stem}.alpha"] = torch.tensor(float(config.lora_alpha))
    about = {"ss_network_dim": str(config.r), "ss_network_alpha": f"{config.lora_alpha:g}"}
    metadata = {"format": "pt", "ss_network_module": "networks.lora"} | about
    save_file(weights, folder / LORA_FILE, metadata=metadata)
