"""The flags of train.py, sample.py, eval.py and data.py. Imports nothing slow, so that --help and
mistakes are answered at once."""

import argparse
import functools

from support import cli, judges
from support.cli import UserError, decay, natural, positive, positive_number, share, weight

DEFAULT_VARIANT = "decoupled"
DEFAULT_RUN = f"runs/{DEFAULT_VARIANT}"
SAMPLERS = ("deterministic", "heun", "stochastic")
UNSAVED = ("help", "out", "resume")  # flags that are no part of what a run is


def add_flag(parser, flag, takes, default, text, **options):
    """takes: a type of support/cli.py, a tuple of choices, or what --help calls any other word.
    text: what --help says of it."""
    if isinstance(takes, str):
        kind = {"metavar": takes}
    elif isinstance(takes, tuple):
        kind = {"choices": takes}
    else:
        kind = {"type": takes, "metavar": "N"}
    parser.add_argument(flag, default=default, help=text, **kind | options)


def add_device_flags(parser, *dtypes, default):
    add = functools.partial(add_flag, parser)
    otherwise = default or "bfloat16 where the hardware has it, else float32"
    add("--device", "DEVICE", None, "(default: cuda if there is one)")
    add("--dtype", dtypes, default, f"of matrix products (default: {otherwise})", type=cli.dtype)


def add_memory_flags(parser):
    add = functools.partial(add_flag, parser)
    add("--vae", "PATH", None, "another decoder, such as madebyollin/taesd")
    add("--encoder-device", "DEVICE", None, "of text encoders and VAE (default: --device)")
    add("--config", "DIR", None, "of a pipeline whose kind a single-file --model is (default: hub)")


def add_teacher_flags(parser):
    add = functools.partial(add_flag, parser)
    add("--image-size", positive, None, "pixels of width and height (default: the model's own)")
    add(
        "--guidance-norm",
        ("none", "row", "token"),
        None,
        "what of a flow teacher's output keeps its norm under guidance: row in Lumina 2's "
        "pipeline, token in Qwen-Image's (default: none)",
    )


# ----------------------------------------------------------------------------- train.py


def train_parser(doc):
    parser = cli.Parser(doc)
    add_method_flags(parser.add_argument_group("method"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    memory = parser.add_argument_group("memory")
    add = functools.partial(add_flag, memory)
    add("--micro-batch", positive, None, "samples at once: gradient accumulation (default: all)")
    memory.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass",
    )
    add_memory_flags(memory)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_method_flags(group):
    add = functools.partial(add_flag, group)
    add(
        "--model",
        "PATH",
        None,
        "the teacher: Stable Diffusion 1.5, 2 or XL as a diffusers directory, hub id or "
        ".safetensors file; a flow model (SD3, SANA, Z-Image, Lumina 2, FLUX, FLUX.2 klein, "
        "Qwen-Image) as one of the former two; EDM's .pkl or UNet2DModel directory; world-flow or "
        "emoji-classes, the embedded ones of these kinds (default: world, that of the first)",
    )
    add_teacher_flags(group)
    add(
        "--prompts",
        "FILE",
        None,
        "training prompts: .txt, .csv, .json, .jsonl, .parquet or .pkl, or the folder that "
        "`data.py prompts` wrote (default: the embedded world's)",
    )
    add(
        "--real",
        "PATH",
        None,
        "real data, for the GAN and --student-input data: latents or pixels made by data.py, "
        "a folder of images with captions, or DMD2's LMDB (default: the embedded teachers' own)",
    )
    add("--variant", "NAME", DEFAULT_VARIANT, "preset of switches: dmd, dmd2, fdistill, decoupled")
    add("--student-steps", positive, 4, "of the sampler it is trained for")
    add("--first-timestep", natural, None, "of its sampler (default: the noisiest, 999 of 1000)")
    add(
        "--student-input",
        ("backward", "data"),
        "backward",
        "the student trains on its own earlier steps or on noised real data",
    )
    add(
        "--guidance",
        positive_number,
        None,
        "of the teacher; 1 is none (default: its own, 7.5 for SD)",
    )
    add("--fake-updates", positive, 2, "fake-score updates per student update; 5 to 10 in DMD2")
    add("--dm-weight", weight, 1.0, "of distribution matching")
    add("--ca-weight", weight, 1.0, "of CFG augmentation")
    add(
        "--schedule",
        "NAME",
        "coupled",
        "noise levels of DM and CA: coupled, full, constrained or hybrid",
    )
    add(
        "--noise-levels",
        share,
        [0.02, 0.98],
        "the range of these levels, in shares of all timesteps",
        nargs=2,
        metavar=("LOW", "HIGH"),
    )
    add("--renoise-shift", positive_number, 1.0, "of DM's levels towards noise; 1 is none")
    add(
        "--normaliser",
        ("guided", "conditional", "none"),
        "guided",
        "DM and CA are divided by the mean of |x - x0|, x0 being the guided or conditional "
        "teacher's, or not at all",
    )
    add("--normaliser-floor", positive_number, 1e-3, "the least that they are divided by")
    add(
        "--divergence",
        "NAME",
        "reverse-kl",
        "reverse-kl, or with the GAN softened-reverse-kl, js, hellinger, forward-kl, jeffreys",
    )
    add(
        "--random-steps",
        natural,
        0,
        "train the student at up to N timesteps, drawn anew each iteration; 0: at its sampler's",
    )
    add(
        "--off-trajectory",
        share,
        0.0,
        "share of the iterations in which the student's input lies off its sampler's trajectory: "
        "one deterministic step of its own further, at any timestep",
    )
    add(
        "--first-step-weight",
        weight,
        0.0,
        "of a loss that alone trains the student's first step, to lead where several of the "
        "teacher's lead; DP-DMD has 0.05",
    )
    add(
        "--ida",
        share,
        1.0,
        "share of itself that the fake score keeps when the student moves; the rest becomes the "
        "student's",
    )
    add("--gan-weight", weight, 0.0, "of the student's GAN loss")
    add("--critic-weight", positive_number, 1e-2, "of the critic's loss beside the denoising loss")
    add("--r1-weight", weight, 0.0, "of the critic's change beside real data; FastGen: 100 to 1000")
    add("--regression-weight", weight, 0.0, "of the distance to the teacher's samples")
    add("--regression", ("mse", "lpips"), "mse", "which distance that is")
    add("--pairs", "DIR", None, "for the regression: made by `python data.py pairs`")
    add(
        "--mean-variance-weight",
        weight,
        0.0,
        "of a sample's mean and variance against the teacher's",
    )
    add("--lora", natural, 0, "rank of the LoRA that is the student; 0 is the whole network")
    add("--fake-lora", natural, None, "the same for the fake score (default: as --lora)")
    add("--lora-alpha", positive_number, 8.0, "a LoRA is scaled by alpha / rank")


def add_optimisation_flags(group):
    add = functools.partial(add_flag, group)
    add("--iterations", positive, 400, "fake-score updates in all")
    add("--batch-size", positive, 16, "over all ranks")
    add("--learning-rate", positive_number, 5e-4, "of the student")
    add("--fake-learning-rate", positive_number, 5e-4, "of the fake score")
    add("--warmup", natural, 50, "iterations until the rates are reached")
    add("--clip", weight, 10.0, "largest norm of a gradient; 0 is any")
    add("--ema", decay, 0.95, "decay of the averaged student at each of its updates; 0 is none")


def add_run_flags(group):
    add = functools.partial(add_flag, group)
    add("--out", "DIR", None, "run directory (default: runs/VARIANT)")
    add("--resume", "DIR", None, "go on with a run, with its flags; other flags override them")
    add("--init", "PATH", None, "begin with the weights of a run (fake score too) or of a student")
    add("--seed", natural, 0, "everything random follows from it")
    add_device_flags(group, "float32", "bfloat16", default=None)
    add("--track", ("wandb", "trackio"), None, "send metrics and images there too")
    add("--save-every", positive, 100, "iterations between checkpoints, images and curves")
    group.add_argument(
        "--keep-going", action="store_true", help="do not stop when the student has collapsed"
    )
    add("--keep", positive, 2, "newest checkpoints to keep")
    add(
        "--shard",
        ("full", "hybrid", "none"),
        "full",
        "under torchrun each rank holds 1/N of the networks, 1/N of its node's copy, or all",
    )


def announce_train(args):
    """One line, printed before anything slow is imported."""
    out = args.resume or args.out or f"runs/{args.variant}"
    if args.resume:
        return f"going on with {out}; loading"
    return (
        f"{args.variant}: teacher {args.model or 'world'}, {args.iterations} iterations of "
        f"{args.batch_size} samples, into {out}; loading"
    )


def parse_train(doc, presets, arguments=None):
    """The command line; the preset of its variant fills in what it does not say."""
    parser = train_parser(doc)
    variant = parser.parse_args(arguments).variant
    cli.check_choice("--variant", variant, presets)
    parser.set_defaults(**presets[variant])
    return parser.parse_args(arguments)


def checked_flags(config, where):
    """{name: value} of a run's saved flags, as the parser reads them. Those that it does not know,
    of an earlier version, are left out."""
    known = {action.dest for action in train_parser("")._actions} - set(UNSAVED)
    config = {name: value for name, value in config.items() if name in known}
    args = train_parser("").parse_args(saved_as_arguments(config, where))
    return {name: getattr(args, name) for name in config}


def saved_as_arguments(config, where):
    """A run's saved flags as a command line. They go through the parser that the command line goes
    through, so a file in a run directory can say no more than a user could."""
    parser = train_parser("")
    actions = {action.dest: action for action in parser._actions}
    arguments = []
    for name, value in config.items():
        if name not in actions or name in UNSAVED:
            raise UserError(f"{where} has a flag that is not known: {name}")
        flag = actions[name].option_strings[0]
        if isinstance(value, dict) or len(str(value)) > 10_000:
            raise UserError(f"{where}: {name} should be a word or a number")
        if actions[name].nargs == 0:  # a switch
            arguments += [flag] * bool(value)
        elif isinstance(value, list):
            if not all(isinstance(number, (int, float)) for number in value):
                raise UserError(f"{where}: {name} should be numbers, not {value}")
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    try:
        parser.parse_args(arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return arguments


# ----------------------------------------------------------------------------- sample.py, eval.py


def add_student_flags(parser):
    """Flags that sample.py and eval.py share."""
    add = functools.partial(add_flag, parser)
    add(
        "--student",
        "PATH",
        None,
        "run, checkpoint, network directory, file of a UNet's weights (.safetensors, .bin, "
        f".pt) or LoRA file (default {DEFAULT_RUN})",
    )
    add("--compare", "PATH", None, "several students, or checkpoints of a run", nargs="+")
    add("--model", "PATH", None, "the teacher (default: the one that the run names)")
    add_teacher_flags(parser)
    add(
        "--steps",
        positive,
        None,
        "numbers of student steps (default: what it was distilled for, half of it, and 1)",
        nargs="+",
    )
    add("--first-timestep", natural, None, "of the student's sampler (default: as distilled)")
    add("--teacher-steps", positive, None, "(default: 50, or 18 of EDM's networks)")
    add(
        "--sampler",
        SAMPLERS,
        None,
        "of the teacher: DDIM; heun and stochastic are for EDM's networks",
    )
    add("--guidance", positive_number, None, "of the teacher (default: as distilled, or its own)")
    add("--seed", natural, 0, "of the noise")
    add_device_flags(parser, "float32", "bfloat16", "float16", default="float32")
    add_memory_flags(parser)


def sample_parser(doc):
    parser = cli.Parser(doc)
    add_student_flags(parser)
    add = functools.partial(add_flag, parser)
    add("--prompts", "PROMPT", None, "in quotes, or one file of them, as for train.py", nargs="+")
    add("--out", "FILE", "samples.png", "the grid of all rows")
    add("--images", "DIR", None, "also each image as a PNG, with how it was made in its metadata")
    add("--batch-size", positive, 8, "samples drawn at once")
    return parser


def eval_parser(doc):
    parser = cli.Parser(doc)
    add_student_flags(parser)
    add = functools.partial(add_flag, parser)
    parser.add_argument("--teacher-only", action="store_true", help="no student is needed")
    parser.add_argument(
        "--no-teacher",
        action="store_true",
        help="leave out the teacher's row, which costs the most; differences are then to the first "
        "student",
    )
    add(
        "--images",
        "DIR",
        None,
        "folders of images (or EDM's .zip), a row each; without --student, --compare or "
        "--model no model is loaded",
        nargs="+",
    )
    add(
        "--protocol",
        "NAME",
        None,
        "imagenet64-50k, coco30k-256, coco10k-512, world, emoji-classes or as-is: what is "
        "drawn, how it is cut and resized, what compares with it (default: by the model)",
    )
    add("--samples", positive, None, "(default: the protocol's)")
    add("--prompts", "FILE", None, "as for train.py; labels or names for class-conditional models")
    parser.add_argument(
        "--no-coverage",
        action="store_true",
        help="leave out the repeated prompts, which coverage and diversity are measured by",
    )
    add("--reference", "PATH", None, "for fid: a folder, EDM's .zip, or an .npz of statistics")
    add("--write-reference", "FILE", None, "write statistics of --reference, and no more")
    add("--batch-size", positive, 50, "images drawn and judged at once")
    add("--out", "DIR", "evaluation", "of numbers, table and curves")
    judges.add_flags(parser)
    return parser


# ----------------------------------------------------------------------------- data.py


def data_parser(doc):
    parser = cli.Parser(doc)
    parser.add_argument("what", choices=("prompts", "pairs", "latents", "pixels"))
    add = functools.partial(add_flag, parser)
    add("--out", "DIR", None, "folder for them", required=True)
    add("--model", "PATH", None, "the teacher, as for train.py (default: the embedded one)")
    add_teacher_flags(parser)
    add_device_flags(parser, "float32", "bfloat16", default=None)
    add("--prompts", "FILE", None, "of prompts and pairs, as for train.py")
    add = functools.partial(add_flag, parser.add_argument_group("pairs"))
    add("--count", positive, 4096, "how many")
    add("--steps", positive, 50, "of the teacher's sampler")
    add("--guidance", positive_number, None, "(default: the teacher's own)")
    add("--seed", natural, 0, "of the noise")
    add("--batch-size", positive, 16, "samples drawn at once")
    add = functools.partial(add_flag, parser.add_argument_group("latents and pixels"))
    add("--images", "DIR", None, "images with captions; of pixels a folder a class, or EDM's .zip")
    add("--size", positive, 64, "of pixels")
    add("--bad-share", weight, 0.01, "of images that may be damaged or lack a caption: left out")
    return parser


# ----------------------------------------------------------------------------- support/


def export_parser(doc):
    parser = cli.Parser(doc)
    add = functools.partial(add_flag, parser)
    add("--student", "PATH", None, "run, checkpoint, folder, weights or LoRA", required=True)
    add("--model", "PATH", None, "its teacher (default: the one that the run names)")
    add("--config", "DIR", None, "as for train.py (default: the run's)")
    add("--out", "PATH", None, "FILE.safetensors, or a new folder", required=True)
    add("--dtype", ("float32", "bfloat16", "float16"), "float16", "of weights", type=cli.dtype)
    return parser


def benchmark_parser(doc):
    parser = train_parser(doc)
    parser.add_argument("count", metavar="ITERATIONS", type=positive, help="how many to time")
    return parser


def costs_parser(doc):
    parser = cli.Parser(doc)
    parser.add_argument("what", choices=("memory", "flops"))
    return parser
