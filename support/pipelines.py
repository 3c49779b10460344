"""Opening diffusers pipelines: directories, hub ids, single files, and other decoders."""

import inspect
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from support.cli import UserError, first_line
from support.weights import read_json

# Parts of pipelines that nothing here needs.
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


def quiet_libraries():
    """No bars and remarks from diffusers and transformers while they load; errors still raise."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def open_pipeline(path, known, vae=None, config=None):
    """(name of its class, pipeline). known: the classes that are supported. vae, config: see
    models.load_model. Raises UserError in one line."""
    import diffusers

    quiet_libraries()
    kind, index = pipeline_kind(path, known)
    pipeline_class = getattr(diffusers, kind)
    accepted = inspect.signature(pipeline_class.__init__).parameters
    left_out = [name for name, part in index.items() if part == [None, None]]
    parts = {name: None for name in (*UNUSED_PARTS, *left_out) if name in accepted}
    if vae is not None:
        parts["vae"] = None if vae == "none" else load_vae(vae)
    try:
        if Path(path).is_file():
            pipe = load_single_file(path, pipeline_class, config, parts)
        else:
            pipe = pipeline_class.from_pretrained(
                path, use_safetensors=True, low_cpu_mem_usage=False, **parts
            )
    except LOADING_ERRORS as error:
        raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None
    check_network(getattr(pipe, "unet", None), path)
    return kind, pipe


def pipeline_kind(path, known):
    """The name of the pipeline's class and its model_index.json, {} of a file. Raises a UserError
    that says what is wrong with the path."""
    from diffusers import DiffusionPipeline

    if Path(path).is_file():
        # Of files with original names, only SDXL's hold a second text encoder.
        second = any(name.startswith("conditioner.embedders.1.") for name in names_in_file(path))
        return ("StableDiffusionXLPipeline" if second else "StableDiffusionPipeline"), {}
    if Path(path).is_dir():
        if not (Path(path) / "model_index.json").is_file():
            raise UserError(f"{path} is no diffusers pipeline: it has no model_index.json")
        config = read_json(Path(path) / "model_index.json")
    else:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise UserError(
                f"there is no model directory or file {path}, and it is no hub id (owner/name)"
            )
        try:
            config = DiffusionPipeline.load_config(path)
        except (OSError, ValueError) as error:
            raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None
    kind = config.get("_class_name")
    if kind not in known:
        raise UserError(f"{path} is a {kind}; supported are {', '.join(known)}")
    return kind, config


def names_in_file(path):
    try:
        with safe_open(path, "pt") as archive:
            return set(archive.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model {path} cannot be loaded: {first_line(error)}") from None


def load_single_file(path, pipeline_class, config, parts):
    """The pipeline of one file with original names. The keys v_pred and ztsnr, which carry no
    weights, say how the network was trained."""
    from diffusers import DDIMScheduler

    if config is not None and not Path(config).is_dir():
        raise UserError(f"--config {config}: there is no such directory")
    try:
        pipe = pipeline_class.from_single_file(
            str(path), config=config, local_files_only=config is not None, **parts
        )
    except OSError as error:
        raise UserError(
            f"the model {path}: its configuration cannot be fetched ({first_line(error)}). "
            f"Name the directory of another {pipeline_class.__name__} of its kind by --config DIR"
        ) from None
    names = names_in_file(path)
    changes = {}
    if "v_pred" in names:
        changes["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        changes["rescale_betas_zero_snr"] = True
    if changes:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    return pipe


def load_vae(path):
    """AutoencoderKL, or AutoencoderTiny: much smaller, good enough to watch a run by."""
    import diffusers

    try:
        kind = diffusers.AutoencoderKL.load_config(path).get("_class_name")
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise UserError(f"--vae {path} holds a {kind}, not an AutoencoderKL or AutoencoderTiny")
        return getattr(diffusers, kind).from_pretrained(path, low_cpu_mem_usage=False)
    except LOADING_ERRORS as error:
        raise UserError(f"--vae {path} cannot be loaded: {first_line(error)}") from None


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
