"""The flags of train.py, sample.py, eval.py and data.py. Imports nothing slow, so that --help and
mistakes are answered at once."""

import argparse

from support import cli, judges
from support.cli import UserError

DEFAULT_VARIANT = "decoupled"
DEFAULT_RUN = f"runs/{DEFAULT_VARIANT}"
SAMPLERS = ("deterministic", "heun", "stochastic")
TRAINING_DTYPE = "bfloat16 where the hardware has it, else float32; weights are float32"
UNSAVED = ("out", "resume")  # flags that are no part of what a run is


def add_device_flags(parser, *dtypes, default):
    parser.add_argument("--device", metavar="DEVICE", help="(default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        type=cli.dtype(*dtypes),
        metavar="DTYPE",
        default=default,
        help=f"of matrix products: {', '.join(dtypes)} (default: {default or TRAINING_DTYPE})",
    )


def add_memory_flags(parser):
    parser.add_argument("--vae", metavar="PATH", help="another decoder, such as madebyollin/taesd")
    parser.add_argument(
        "--encoder-device", metavar="DEVICE", help="of text encoders and VAE (default: --device)"
    )
    parser.add_argument(
        "--config",
        metavar="DIR",
        help="for a single .safetensors --model: the directory of a pipeline of its kind "
        "(default: the hub is asked)",
    )


# ----------------------------------------------------------------------------- train.py


def train_parser(doc):
    parser = cli.Parser(doc)
    add_method_flags(parser.add_argument_group("method"))
    add_optimisation_flags(parser.add_argument_group("optimisation"))
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--micro-batch",
        type=cli.positive,
        metavar="N",
        help="samples that go through a network at once; the rest of a rank's batch follows in "
        "turn, which is gradient accumulation (default: all)",
    )
    memory.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass",
    )
    add_memory_flags(memory)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_teacher_flags(add):
    add(
        "--image-size",
        type=cli.positive,
        metavar="PIXELS",
        help="width and height of images, where a network takes any (default: the model's own)",
    )
    add(
        "--guidance-norm",
        choices=("none", "row", "token"),
        help="what of a flow teacher's output keeps its norm under guidance: row in Lumina 2's "
        "pipeline, token in Qwen-Image's (default: none)",
    )


def add_method_flags(group):
    add = group.add_argument
    add(
        "--model",
        metavar="PATH",
        help="the teacher: Stable Diffusion 1.5, 2 or XL as a diffusers directory, hub id or "
        ".safetensors file; a flow model (SD3, SANA, Z-Image, Lumina 2, FLUX, FLUX.2 klein, "
        "Qwen-Image) as one of the former two; EDM's .pkl or UNet2DModel directory; world-flow or "
        "emoji-classes, the embedded ones of these kinds (default: world, that of the first)",
    )
    add_teacher_flags(add)
    add(
        "--prompts",
        metavar="FILE",
        help="training prompts: .txt, .csv, .json, .jsonl, .parquet or .pkl, or the folder that "
        "`data.py prompts` wrote (default: the embedded world's)",
    )
    add(
        "--real",
        metavar="PATH",
        help="real data, for the GAN and --student-input data: latents or pixels made by data.py, "
        "a folder of images with captions, or DMD2's LMDB (default: the embedded teachers' own)",
    )
    add(
        "--variant",
        metavar="NAME",
        default=DEFAULT_VARIANT,
        help="a preset of the switches below: dmd, dmd2, fdistill or decoupled",
    )
    add("--student-steps", type=cli.positive, default=4, help="of the sampler it is trained for")
    add(
        "--first-timestep",
        type=cli.natural,
        metavar="T",
        help="of the student's sampler (default: the noisiest, 999 of 1000)",
    )
    add(
        "--student-input",
        choices=("backward", "data"),
        default="backward",
        help="the student trains on its own earlier steps or on noised real data",
    )
    add(
        "--guidance",
        type=cli.positive_number,
        metavar="W",
        help="of the teacher; 1 is none (default: its own, 7.5 for Stable Diffusion and world)",
    )
    add(
        "--fake-updates",
        type=cli.positive,
        default=2,
        metavar="K",
        help="fake-score updates for each of the student's; DMD2 has 5 to 10",
    )
    add("--dm-weight", type=cli.weight, default=1.0, help="of distribution matching")
    add("--ca-weight", type=cli.weight, default=1.0, help="of CFG augmentation")
    add(
        "--schedule",
        metavar="NAME",
        default="coupled",
        help="noise levels of the two: coupled, full, constrained or hybrid",
    )
    add(
        "--noise-levels",
        type=cli.share,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=[0.02, 0.98],
        help="the range of these levels, in shares of all timesteps",
    )
    add(
        "--renoise-shift",
        type=cli.positive_number,
        default=1.0,
        metavar="K",
        help="shift of DM's levels towards noise, on top of a flow model's own; 1 is none",
    )
    add(
        "--normaliser",
        choices=("guided", "conditional", "none"),
        default="guided",
        help="the teacher's x0 that both are normalised by",
    )
    add("--normaliser-floor", type=cli.positive_number, default=1e-3)
    add(
        "--divergence",
        metavar="NAME",
        default="reverse-kl",
        help="reverse-kl, or with the GAN softened-reverse-kl, js, hellinger, forward-kl, jeffreys",
    )
    add(
        "--random-steps",
        type=cli.natural,
        default=0,
        metavar="MOST",
        help="train the student at timesteps that are drawn anew in each iteration, up to so many "
        "of them; 0: at those it draws with",
    )
    add(
        "--off-trajectory",
        type=cli.share,
        default=0.0,
        metavar="SHARE",
        help="of the iterations, in which the student's input lies off its sampler's trajectory: "
        "one deterministic step of its own further, at any timestep",
    )
    add(
        "--first-step-weight",
        type=cli.weight,
        default=0.0,
        help="of a loss that alone trains the student's first step, to lead where several of the "
        "teacher's lead; DP-DMD has 0.05",
    )
    add(
        "--ida",
        type=cli.share,
        default=1.0,
        metavar="D",
        help="after a student step the fake score becomes D of itself and 1 - D of the student; 1 "
        "is all of itself",
    )
    add("--gan-weight", type=cli.weight, default=0.0, help="of the student's GAN loss")
    add(
        "--critic-weight",
        type=cli.positive_number,
        default=1e-2,
        help="of the critic's loss beside the denoising loss",
    )
    add(
        "--r1-weight",
        type=cli.weight,
        default=0.0,
        help="of the critic's change beside real data, in units of its loss; FastGen has 100 to "
        "1000",
    )
    add("--regression-weight", type=cli.weight, default=0.0)
    add("--regression", choices=("mse", "lpips"), default="mse")
    add("--pairs", metavar="DIR", help="for the regression: made by `python data.py pairs`")
    add("--mean-variance-weight", type=cli.weight, default=0.0)
    add(
        "--lora",
        type=cli.natural,
        default=0,
        metavar="RANK",
        help="train a LoRA of this rank as the student; 0 is the whole network",
    )
    add(
        "--fake-lora",
        type=cli.natural,
        metavar="RANK",
        help="the same for the fake score (default: as --lora)",
    )
    add("--lora-alpha", type=cli.positive_number, default=8.0, help="a LoRA counts alpha / rank")


def add_optimisation_flags(group):
    add = group.add_argument
    add("--iterations", type=cli.positive, default=400, help="fake-score updates in all")
    add("--batch-size", type=cli.positive, default=16, help="over all ranks")
    add("--learning-rate", type=cli.positive_number, default=5e-4, help="of the student")
    add("--fake-learning-rate", type=cli.positive_number, default=5e-4, help="of the fake score")
    add("--warmup", type=cli.natural, default=50, help="iterations until the rates are reached")
    add("--clip", type=cli.weight, default=10.0, help="largest norm of a gradient; 0 is any")
    add(
        "--ema",
        type=cli.decay,
        default=0.95,
        help="decay of the averaged student at each of its updates; 0 is none",
    )


def add_run_flags(group):
    add = group.add_argument
    add("--out", metavar="DIR", help="run directory (default: runs/VARIANT)")
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on with the run in DIR, or in --out, with its flags; other flags override them",
    )
    add(
        "--init",
        metavar="PATH",
        help="begin with the weights of a run (student and fake score) or of any student",
    )
    add("--seed", type=cli.natural, default=0, help="everything random follows from it")
    add_device_flags(group, "float32", "bfloat16", default=None)
    add("--track", choices=("wandb", "trackio"), help="send metrics and images there too")
    add(
        "--save-every",
        type=cli.positive,
        default=100,
        metavar="N",
        help="iterations between checkpoints, images and curves",
    )
    add("--keep-going", action="store_true", help="do not stop when the student has collapsed")
    add("--keep", type=cli.positive, default=2, metavar="N", help="newest checkpoints to keep")
    add(
        "--shard",
        choices=("full", "hybrid", "none"),
        default="full",
        help="under torchrun each rank holds 1/N of the networks, 1/N of its node's copy, or all",
    )


def announce_train(args):
    """One line, printed before anything slow is imported."""
    if args.resume is not None:
        return f"going on with {args.resume or args.out or f'runs/{args.variant}'}; loading"
    return (
        f"{args.variant}: teacher {args.model or 'world'}, {args.iterations} iterations of "
        f"{args.batch_size} samples, into {args.out or f'runs/{args.variant}'}; loading"
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
    known = {action.dest for action in train_parser("")._actions}
    config = {name: value for name, value in config.items() if name in known - {*UNSAVED, "help"}}
    arguments = saved_as_arguments(config, "", where)
    try:
        args = train_parser("").parse_args(arguments)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return {name: getattr(args, name) for name in config}


def saved_as_arguments(config, doc, where):
    """A run's saved flags as a command line. They go through the parser that the command line goes
    through, so a file in a run directory can say no more than a user could."""
    actions = {action.dest: action for action in train_parser(doc)._actions}
    arguments = []
    for name, value in config.items():
        if name not in actions or name in UNSAVED or name == "help":
            raise UserError(f"{where} has a flag that is not known: {name}")
        flag = actions[name].option_strings[0]
        if isinstance(value, dict) or len(str(value)) > 10_000:
            raise UserError(f"{where}: {name} should be a word or a number")
        if isinstance(actions[name], argparse.BooleanOptionalAction):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif actions[name].nargs == 0:
            arguments += [flag] * bool(value)
        elif isinstance(value, list):
            numbers = all(isinstance(number, (int, float)) for number in value)
            if not numbers:
                raise UserError(f"{where}: {name} should be numbers, not {value}")
            arguments += [flag, *map(str, value)]
        elif value is not None:
            arguments.append(f"{flag}={value}")
    return arguments


# ----------------------------------------------------------------------------- sample.py, eval.py


def add_student_flags(parser):
    """Flags that sample.py and eval.py share."""
    add = parser.add_argument
    add(
        "--student",
        metavar="PATH",
        help="run, checkpoint, network directory, file of a UNet's weights (.safetensors, .bin, "
        f".pt) or LoRA file (default {DEFAULT_RUN})",
    )
    add("--model", metavar="PATH", help="the teacher (default: the one that the run names)")
    add_teacher_flags(add)
    add(
        "--steps",
        type=cli.positive,
        nargs="+",
        help="numbers of student steps (default: what it was distilled for, half of it, and 1)",
    )
    add(
        "--first-timestep",
        type=cli.natural,
        metavar="T",
        help="of the student's sampler (default: what it was distilled for, else the noisiest)",
    )
    add("--teacher-steps", type=cli.positive, help="(default: 50, or 18 of EDM's networks)")
    add(
        "--sampler",
        choices=SAMPLERS,
        help="of the teacher: deterministic (DDIM); heun and stochastic are for EDM's networks",
    )
    add(
        "--guidance",
        type=cli.positive_number,
        help="of the teacher (default: what the student was distilled with, else its own)",
    )
    add("--seed", type=cli.natural, default=0, help="of the noise")
    add_device_flags(parser, "float32", "bfloat16", "float16", default="float32")
    add_memory_flags(parser)


def sample_parser(doc):
    parser = cli.Parser(doc)
    add_student_flags(parser)
    add = parser.add_argument
    add(
        "--prompts",
        nargs="+",
        help="prompts in quotes, or one file of them: .txt, .csv, .json, .jsonl, .parquet or .pkl",
    )
    add("--compare", nargs="+", metavar="PATH", help="several students, in place of --student")
    add("--out", default="samples.png", metavar="FILE")
    add(
        "--images",
        metavar="DIR",
        help="also write each image as a PNG of its own, with how it was made in its metadata",
    )
    add("--batch-size", type=cli.positive, default=8, help="samples drawn at once")
    return parser


def eval_parser(doc):
    parser = cli.Parser(doc)
    add_student_flags(parser)
    add = parser.add_argument
    add("--compare", nargs="+", metavar="PATH", help="several students, or checkpoints of a run")
    add("--teacher-only", action="store_true", help="no student is needed")
    add(
        "--no-teacher",
        action="store_true",
        help="leave out the teacher's row, which costs the most; differences are then to the first "
        "student",
    )
    add(
        "--images",
        nargs="+",
        metavar="DIR",
        help="folders of images (or EDM's .zip), a row each; without --student, --compare or "
        "--model no model is loaded",
    )
    add(
        "--protocol",
        metavar="NAME",
        help="imagenet64-50k, coco30k-256, coco10k-512, world, emoji-classes or as-is: what is "
        "drawn, how it is cut and resized, what compares with it (default: by the model)",
    )
    add("--samples", type=cli.positive, help="(default: the protocol's)")
    add(
        "--prompts",
        metavar="FILE",
        help="a file of them, as for train.py; labels or names for class-conditional models",
    )
    add(
        "--no-coverage",
        action="store_true",
        help="leave out the repeated prompts, which coverage and diversity are measured by",
    )
    add(
        "--reference",
        metavar="PATH",
        help="for fid: a folder of images, EDM's .zip, or statistics (.npz, EDM's too)",
    )
    add("--write-reference", metavar="FILE", help="write statistics of --reference, and no more")
    add("--batch-size", type=cli.positive, default=50, help="images drawn and judged at once")
    add("--out", metavar="DIR", default="evaluation")
    judges.add_flags(parser)
    return parser


# ----------------------------------------------------------------------------- data.py


def data_parser(doc):
    parser = cli.Parser(doc)
    add = parser.add_argument
    add("what", choices=("prompts", "pairs", "latents", "pixels"))
    add("--out", required=True, metavar="DIR", help="folder for them")
    add("--model", metavar="PATH", help="the teacher, as for train.py (default: the embedded one)")
    add_teacher_flags(add)
    add_device_flags(parser, "float32", "bfloat16", default=None)
    add("--prompts", metavar="FILE", help="of prompts and pairs, as for train.py")
    pairs = parser.add_argument_group("pairs")
    pairs.add_argument("--count", type=cli.positive, default=4096)
    pairs.add_argument("--steps", type=cli.positive, default=50, help="of the teacher's sampler")
    pairs.add_argument(
        "--guidance", type=cli.positive_number, metavar="W", help="(default: the teacher's own)"
    )
    pairs.add_argument("--seed", type=cli.natural, default=0)
    pairs.add_argument("--batch-size", type=cli.positive, default=16, help="samples drawn at once")
    images = parser.add_argument_group("latents and pixels")
    images.add_argument(
        "--images",
        metavar="DIR",
        help="folder of images with captions; for pixels one folder a class, or EDM's .zip",
    )
    images.add_argument("--size", type=cli.positive, default=64, help="of pixels")
    images.add_argument(
        "--bad-share",
        type=cli.weight,
        default=0.01,
        help="of the images that may be damaged or without a caption: they are named and left out",
    )
    return parser


# ----------------------------------------------------------------------------- support/


def export_parser(doc):
    parser = cli.Parser(doc)
    add = parser.add_argument
    add(
        "--student",
        required=True,
        metavar="PATH",
        help="run, checkpoint, network directory, file of weights, or LoRA file",
    )
    add("--model", metavar="PATH", help="its teacher (default: the one that the run names)")
    add("--config", metavar="DIR", help="as for train.py (default: the run's)")
    add("--out", required=True, metavar="PATH", help="FILE.safetensors, or a new folder")
    add(
        "--dtype",
        type=cli.dtype("float32", "bfloat16", "float16"),
        metavar="DTYPE",
        default="float16",
        help="of the weights: float32, bfloat16 or float16",
    )
    return parser


def benchmark_parser(doc):
    parser = train_parser(doc)
    parser.add_argument("count", metavar="ITERATIONS", type=cli.positive, help="how many to time")
    return parser


def costs_parser(doc):
    parser = cli.Parser(doc)
    parser.add_argument("what", choices=("memory", "flops"))
    return parser
