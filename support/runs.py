"""A run's flags, and going on with a run: what may change, and what must be the same."""

import hashlib
import sys
from pathlib import Path

import fsdp
import losses
from support import checkpoint, cli, flags, students
from support.cli import UserError


def parse_arguments(doc, presets, arguments=None):
    """Precedence, lowest first: defaults, the variant's preset, a resumed run's flags, the command
    line."""
    arguments = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    parser = flags.train_parser(doc)
    parser.set_defaults(variant=None)
    said = parser.parse_args(arguments)
    if said.out and said.resume:
        raise UserError("--out and --resume DIR both name a run directory: use one")
    out = Path(said.resume or said.out or f"runs/{said.variant or flags.DEFAULT_VARIANT}")
    resumes = said.resume is not None or checkpoint.restarted_by_torchrun(out)
    saved = {}
    if resumes:
        saved = read_saved(out, said.variant)
        arguments = flags.saved_as_arguments(saved, out / "config.json") + arguments
    args = flags.parse_train(doc, presets, arguments)
    args.out, args.resume = out, resumes
    fsdp.device_and_dtype(args)
    check_arguments(args)
    if saved:
        for change in checkpoint.differing(saved, configuration(args)):
            fsdp.print_main(f"changed: {change}")
    return args


def read_saved(out, variant):
    """The flags of the run that is gone on with."""
    if out.parent.name == "checkpoints":
        raise UserError(
            "--resume takes a run directory; to go on from an earlier checkpoint, delete the newer "
            "ones"
        )
    saved = checkpoint.read_config(out)
    if variant not in (None, saved.get("variant")):
        raise UserError(
            "--variant is a preset for the beginning of a run: with --resume name the switches "
            f"themselves, or begin another run by --init {out}"
        )
    return saved


def configuration(args):
    """The flags that are kept with a run."""
    return {name: value for name, value in vars(args).items() if name not in flags.UNSAVED}


def refuse(wrong, message):
    if wrong:
        raise UserError(message)


def check_arguments(args):
    """Flags that do not go together, before anything is loaded."""
    cli.check_choice("--divergence", args.divergence, losses.DIVERGENCES)
    low, high = args.noise_levels
    refuse(low >= high, f"argument --noise-levels: {low} is not below {high}")
    if args.lora or args.fake_lora:
        students.check_peft("--lora" if args.lora else "--fake-lora")
        refuse(args.init, "--init begins with whole weights, LoRAs with the teacher's: use one")
    fake_lora = args.lora if args.fake_lora is None else args.fake_lora
    refuse(
        args.ida < 1 and args.lora != fake_lora,
        "--ida mixes student and fake score: both are whole, or LoRAs of one rank (--lora, "
        "--fake-lora)",
    )
    on_data = args.student_input == "data"
    refuse(
        args.random_steps and on_data,
        "--random-steps draws the timesteps of the student's own sampler: it needs "
        "--student-input backward",
    )
    refuse(
        args.off_trajectory > 0 and on_data,
        "--off-trajectory leaves the trajectory of the student's own sampler: it needs "
        "--student-input backward",
    )
    refuse(
        args.first_step_weight > 0 and (args.student_steps < 2 or on_data or args.random_steps),
        "--first-step-weight is of the first of the student's own steps: it needs "
        "--student-steps 2 or more, --student-input backward and no --random-steps",
    )
    refuse(
        args.r1_weight > 0 and args.gan_weight == 0,
        "--r1-weight is of the GAN's critic: it needs a --gan-weight above 0",
    )
    refuse(
        args.divergence != "reverse-kl" and args.gan_weight == 0,
        f"--divergence {args.divergence} reads the density ratio off the GAN's head: it needs "
        "a --gan-weight above 0",
    )
    model = f" --model {args.model}" if args.model else ""
    guidance = f" --guidance {args.guidance:g}" if args.guidance else ""
    refuse(
        args.regression_weight > 0 and not args.pairs,
        "--regression-weight needs noise-image pairs: make them by `python data.py pairs --out "
        f"DIR{model}{guidance}` and name them by --pairs DIR, or use --regression-weight 0",
    )
    terms = ("dm", "ca", "gan", "regression", "mean_variance")
    refuse(
        not any(getattr(args, f"{term}_weight") for term in terms),
        "nothing moves the student: --dm-weight, --ca-weight, --gan-weight, --regression-weight "
        "and --mean-variance-weight are all 0",
    )
    refuse(
        on_data and args.first_timestep is not None,
        "--student-input data does not go with --first-timestep: at its first timestep the "
        "student is given pure noise when it draws, and noised real data are something else",
    )
    if args.divergence != "reverse-kl" and args.batch_size == 1:
        fsdp.print_main(
            "warning: f-distill divides h by its mean over the batch: with --batch-size 1 it is "
            "DMD2"
        )


def warn_of_guidance(model, args):
    """Where guidance, the flag's or else the model's own, does nothing or nothing good."""
    if args.guidance == 1:
        if args.schedule != "coupled":
            fsdp.print_main(
                f"warning: --schedule {args.schedule} with --guidance 1: without guidance CA is 0, "
                "and DM alone is left"
            )
        return
    if model.prediction == "edm":
        fsdp.print_main(
            f"warning: --guidance {args.guidance:g}: EDM's networks learnt every image with its "
            "label, and their output without one guides nowhere; --guidance 1 is none"
        )
    if getattr(model.pipe, "config", {}).get("is_distilled"):
        fsdp.print_main(
            f"warning: {model.name} is distilled itself: guidance, and so CA, have no effect there"
        )


# ----------------------------------------------------------------------------- going on


def about(nets, sources):
    """What a checkpoint must have in common with the run that goes on from it."""
    network = nets.model.origin.network
    options = {name: value for name, value in network.config.items() if name[0] != "_"}
    return {
        "teacher": nets.teacher_print,
        "network": {"class": nets.model.network_class.__name__} | options,
        "data": data_about(sources),
    }


def data_about(sources):
    """{flag: a short text}"""
    about = {"prompts": sources.prompts.texts}
    for name, source in (("real", sources.real), ("pairs", sources.pairs)):
        about[name] = [source.count, source.digests] if source is not None else None
    texts = {name: repr(thing).encode() for name, thing in about.items()}
    return {name: hashlib.sha256(text).hexdigest()[:16] for name, text in texts.items()}


def restore(nets, sources, args):
    """Put the newest whole checkpoint back. Returns its iteration, 0 if there is none yet."""
    folder, manifest = checkpoint.newest_whole(args.out)
    if not folder:
        fsdp.print_main(f"{args.out} has no checkpoint yet: it starts from the beginning")
        return 0
    present = about(nets, sources)
    fields = checkpoint.differing(manifest["network"], present["network"])
    if manifest["teacher"] != present["teacher"]:
        fields.append("the teacher's weights are others")
    for name, digest in present["data"].items():
        same_flag = getattr(args, name) == manifest["config"].get(name)
        if same_flag and digest != manifest["data"].get(name):  # another flag was printed already
            fields.append(f"--{name} holds other data than before")
    if fields:
        raise UserError(
            f"{folder} is of another model or of other data: {'; '.join(fields)}. To begin another "
            f"run with its weights: --init {args.out}"
        )
    checkpoint.load(folder, nets.tensors())
    students.write_student(args.out, nets, manifest["config"])  # a kill may have come before it
    fsdp.print_main(f"going on from {folder}")
    if manifest["iteration"] >= args.iterations:
        had = manifest["iteration"]
        fsdp.print_main(f"this run has had its {had} iterations; --iterations asks for more")
    return manifest["iteration"]
