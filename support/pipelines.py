"""Opening diffusers pipelines: directories, hub ids, single files, and other decoders."""

import importlib.util
import inspect
import re
import sys
from pathlib import Path

import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open

from support.cli import UserError, first_line
from support.weights import check_finite, in_one_line, load_pretrained, read_json

# Parts of pipelines that nothing here needs.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def quiet_libraries():
    """No bars and remarks from diffusers and transformers while they load; errors still raise."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def open_pipeline(path, known, vae=None, config=None, with_text=True):
    """(name of its class, pipeline). known: the classes that are supported. vae, config: see
    models.load_model. with_text: whether text encoders are loaded. Raises UserError in one line."""
    quiet_libraries()
    kind, index = pipeline_kind(path, known)
    pipeline_class = getattr(diffusers, kind)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    left_out = [name for name, part in index.items() if part == [None, None]]
    parts = {name: None for name in (*UNUSED_PARTS, *left_out) if name in accepted}
    if not with_text:
        text = [name for name in accepted if name.startswith(("text_encoder", "tokenizer"))]
        parts |= dict.fromkeys(text)
    if vae is not None:
        parts["vae"] = None if vae == "none" else load_vae(vae)
    with in_one_line(f"the model {path} cannot be loaded"):
        if Path(path).is_file():
            pipe = load_single_file(path, pipeline_class, config, parts)
            for name, part in pipe.components.items():
                if isinstance(part, torch.nn.Module):
                    check_finite(dict(part.named_parameters()), f"the {name} of {path}")
        else:
            for name, part_class in network_classes(path, index).items():
                if name not in parts and name in accepted:
                    parts[name] = load_part(part_class, path, name)
            pipe = pipeline_class.from_pretrained(path, **parts)
        check_network(getattr(pipe, "unet", None), path)
        for name, part in pipe.components.items():
            if name.startswith("tokenizer") and part is not None:
                encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
                check_tokenizer(part, encoder, path)
    return kind, pipe


def check_tokenizer(tokenizer, encoder, path):
    """A tokenizer has to fit its text encoder. Without a model_max_length it would pad to 10^30
    tokens: it gets as many as the encoder has positions."""
    config = getattr(encoder, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if most and tokenizer.model_max_length > most:
        tokenizer.model_max_length = most
    length = tokenizer.model_max_length
    tokenizer([""], padding="max_length", max_length=length, truncation=True)
    known = getattr(config, "vocab_size", None)
    if known and len(tokenizer) > known:
        raise UserError(
            f"{path}: its tokenizer has {len(tokenizer)} tokens, its text encoder knows {known}"
        )


def network_classes(path, index):
    """{name of a part: class} of a pipeline's networks. The index may name classes of diffusers and
    transformers only: diffusers would import any module that it names."""
    libraries = {"diffusers": diffusers, "transformers": transformers}
    found = {}
    for name, part in index.items():
        if name[0] == "_" or name in UNUSED_PARTS or not isinstance(part, list):
            continue
        if part == [None, None]:
            continue
        library, class_name = part if len(part) == 2 else (None, part)
        part_class = getattr(libraries.get(library), str(class_name), None)
        if not isinstance(part_class, type):
            raise UserError(f"{path}: its {name} is of an unknown class, {library} {class_name}")
        if issubclass(part_class, torch.nn.Module):
            found[name] = part_class
    return found


def load_part(part_class, path, name):
    """A network of a pipeline, in the one variant that is there: whole or fp16."""
    options = {"use_safetensors": True}
    files = [file.name for file in (Path(path) / name).glob("*")]
    readable = [file for file in files if file.endswith(".safetensors")]
    if Path(path).is_dir() and not readable:
        others = [file for file in files if Path(file).suffix in (".bin", ".ckpt", ".pt")]
        hint = f"; {others[0]} is not read: convert it to .safetensors" if others else ""
        raise UserError(f"{path}/{name} holds no weights in .safetensors files{hint}")
    if readable and all(".fp16." in file for file in readable):
        print(f"{path}/{name}: only its fp16 variant is there; it is used", file=sys.stderr)
        options["variant"] = "fp16"
    try:
        return load_pretrained(part_class, path, name, **options)
    except OSError:
        if Path(path).is_dir() or "variant" in options:
            raise
        return load_pretrained(part_class, path, name, variant="fp16", **options)  # on the hub


def find_on_hub(path):
    """Ask once for what is neither a folder nor fetched already: the libraries would go on asking
    for a minute, and then say that a file is missing. Raises OSError."""
    cached = huggingface_hub.try_to_load_from_cache
    files = ("model_index.json", "config.json")
    if Path(path).exists() or any(isinstance(cached(path, file), str) for file in files):
        return
    try:
        huggingface_hub.model_info(path, timeout=10)
    except HfHubHTTPError as error:
        raise OSError(f"the hub does not give it: {first_line(error)[:100]}") from None
    except Exception as error:  # there are many for a network
        raise OSError(
            f"it is not on this machine, and the hub cannot be reached ({first_line(error)[:100]})"
        ) from None


def pipeline_kind(path, known):
    """The name of the pipeline's class and its model_index.json, {} of a file. Raises a UserError
    that says what is wrong with the path."""
    if Path(path).is_file():
        # Of files with original names, only SDXL's hold a second text encoder.
        second = any(name.startswith("conditioner.embedders.1.") for name in names_in_file(path))
        return ("StableDiffusionXLPipeline" if second else "StableDiffusionPipeline"), {}
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(f"{path} is no diffusers pipeline: it has no model_index.json")
        index = read_json(Path(path) / "model_index.json")
    else:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(
                f"there is no model directory or file {path}, and it is no hub id (owner/name)"
            )
        with in_one_line(f"the model {path} cannot be loaded"):
            find_on_hub(path)
            index = diffusers.DiffusionPipeline.load_config(path)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in known:
        raise UserError(f"{path} is a {kind}; supported are {', '.join(known)}")
    return kind, index


def names_in_file(path):
    with in_one_line(f"the model {path} cannot be loaded"), safe_open(path, "pt") as archive:
        return set(archive.keys())


def load_single_file(path, pipeline_class, config, parts):
    """The pipeline of one file with original names. The keys v_pred and ztsnr, which carry no
    weights, say how the network was trained."""
    if config is not None and not Path(config).is_dir():
        raise UserError(f"--config {config}: there is no such directory")
    if importlib.util.find_spec("accelerate") is None:
        print(
            f"warning: weights that {path} may lack would be random, which diffusers notices only "
            "with pip install accelerate",
            file=sys.stderr,
        )
    try:
        pipe = pipeline_class.from_single_file(
            str(path), config=config and str(config), local_files_only=config is not None, **parts
        )
    except OSError as error:
        raise UserError(
            f"the model {path}: its configuration cannot be fetched ({first_line(error)}). "
            f"Name the directory of another {pipeline_class.__name__} of its kind by --config DIR"
        ) from None
    except NotImplementedError:  # torch's, of parameters that nothing has filled
        raise UserError(f"the model {path} lacks some of its network's weights") from None
    names = names_in_file(path)
    changes = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        changes["rescale_betas_zero_snr"] = True
    if changes:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def load_vae(path):
    """AutoencoderKL, or AutoencoderTiny: much smaller, good enough to watch a run by."""
    with in_one_line(f"--vae {path} cannot be loaded"):
        find_on_hub(path)
        kind = diffusers.AutoencoderKL.load_config(path).get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise UserError(f"--vae {path} holds a {kind}, not an AutoencoderKL or AutoencoderTiny")
        return load_pretrained(getattr(diffusers, kind), path)


def check_network(unet, name):
    """Refuse a UNet that has inputs or outputs that we do not support."""
    if unet is None:
        return
    supported = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
        "time_cond_proj_dim": (None,),
        "num_class_embeds": (None,),
        "out_channels": (unet.config.in_channels,),
    }
    for field, values in supported.items():
        value = unet.config.get(field)
        if value not in values:
            raise UserError(f"{name}: a UNet with {field} {value!r} is not supported")


def vp_levels(scheduler, name):
    """alphas_cumprod (T,) of a variance-preserving scheduler, and its prediction type."""
    if not hasattr(scheduler, "alphas_cumprod"):
        kind = type(scheduler).__name__
        raise UserError(f"{name}: no noise schedule is known for the scheduler {kind}")
    levels = torch.as_tensor(scheduler.alphas_cumprod)
    if levels.dim() != 1 or len(levels) == 0 or not ((levels >= 0) & (levels <= 1)).all():
        raise UserError(f"{name}: its scheduler's noise levels are not between 0 and 1")
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{name}: its scheduler's prediction type {prediction!r} is not epsilon or v_prediction"
        )
    if prediction == "epsilon" and levels.min() < 1e-6:
        raise UserError(
            f"{name}: its scheduler rescales betas to zero terminal signal-to-noise ratio, where a "
            "network that predicts epsilon says nothing of x0: such a model should predict v"
        )
    return levels, prediction
