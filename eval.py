"""Numbers for students, their teacher, and folders of images.

    python eval.py                                # the student of `python train.py` and its teacher
    python eval.py --compare runs/a runs/b runs/c    # several students, from the same noise
    python eval.py --compare runs/a/checkpoints/*    # a run's checkpoints: a table and curves.png
    python eval.py --teacher-only --guidance 5       # a teacher at another guidance scale
    python eval.py --images FOLDER --reference FOLDER --inception FILE        # images on disk
    python eval.py --protocol coco30k-256 --reference val2014 --write-reference coco.npz
    torchrun --standalone --nproc_per_node=8 eval.py ...    # shared out; the numbers of one process

--out holds metrics.json, table.txt and parts/: what each image was judged to be, from which an
interrupted evaluation goes on. Delete parts/ when you are done: 50,000 images make 0.8 GB.

What is measured depends on the model, or on --protocol (support/protocols.py):

  alignment    (world, emoji-classes) share of samples that are right. World: they show just the
               objects of the prompt, on its colour and in its relation; single, colour, two,
               position and unseen are its parts (support/judges/world.py). Classes: the nearest
               image of the set is of the class (support/judges/classes.py)
  coverage     distinct kinds among the right ones of 32 samples of a prompt, as a share of those
               that exist; mean over some prompts, three times. World: colours and places, 44
               kinds. Classes: the images of the class
  frechet      (embedded set) Frechet distance of Gaussians fitted to samples and to the set, on 80
               features (world: 160 of the judge). Few samples raise it; the row of real images
               shows what is left at best
  fid, patch fid    the same of 2,048 Inception features, against --reference. 1706.08500
  kid, is, precision, recall    by torch-fidelity: 1801.01401, 1606.03498, 1904.06991 (3
                                neighbours);
               without --inception the latter two on the embedded set's 80 features
  clip, pickscore, image reward    of each image with its prompt
  mean, deviation, saturation   of an image's values in [0, 1]: over-saturation raises the latter
                                two
  diversity    root mean square distance of two thumbnails of one prompt, mean over prompts

+- is a standard error: over samples where a metric is a mean, over 20 bootstrap draws for Frechet
distances, over 10 splits for is, over subsets of 1,000 for kid (of ten thousand images or more;
else ?), over three repetitions for coverage, over prompts for diversity; for precision and recall
that of a share. The second table has differences to the first row with 95 % intervals, 1.96
standard errors. For means and Frechet distances of rows from the same noise they are of paired
differences; for precision, recall and coverage as if rows were independent, and coverage's, of
three repetitions, are rather 80 %.
"""

import contextlib
import json
import re
import time
from pathlib import Path

from support import cli, flags

if __name__ == "__main__":
    cli.answer_early(flags.eval_parser, __doc__)


import data
import fsdp
import sample
from support import images, judges, pictures, references, report
from support.checkpoint import make_writable, replace_text
from support.cli import UserError
from support.judges.inception import Inception
from support.judging import Source, folder_source, judge_source, read_parts, some_of
from support.metrics import (
    COVERAGE_REPEATS,
    COVERAGE_SAMPLES,
    Gaussian,
    coverage_samples,
    metrics_of,
)
from support.prompt_files import read_prompts
from support.protocols import PROTOCOLS
from support.weights import fingerprint, fingerprints

# ---------------------------------------------------------------------------- the rows of the table


def model_source(setting, sampler, key):
    """Samples of a model. Every row gets the same noise at the same place among the prompts."""
    model, args, prompts = setting.model, setting.args, setting.prompts
    label = sampler.label.replace("\n", ", ")

    def draw(start, stop):
        noise = sample.column_noise(model, stop - start, sampler.noises, args.seed, first=start)
        try:
            made = model.decode(sampler.draw(noise, model.encode(prompts[start:stop])))
        except UserError as error:
            raise UserError(f"{label}: {error}", error.status) from None
        return list(enumerate(made, start)), {}

    key = key | {"seed": args.seed, "dtype": args.dtype} | fingerprints(model)
    return Source(label, key, prompts, setting.counted, draw)


def real_source(setting):
    """What a perfect model of the embedded set would draw."""
    seed = setting.args.seed
    real = setting.own.real(setting.prompts, seed + 1)

    def draw(start, stop):
        return list(enumerate(real[start:stop], start)), {}

    key = {"kind": "real", "seed": seed}
    return Source("real images", key, setting.prompts, setting.counted, draw)


def model_sources(setting, students, guidance):
    """The rows of the teacher as it should be, of the undistilled network at a student's numbers of
    steps with and without guidance, of students, and of real images."""
    args, model = setting.args, setting.model
    rows = [] if args.no_teacher else [(args.teacher_steps, guidance)]
    if setting.own and not args.compare:
        few = students[0].steps if students else args.steps or (4, 2, 1)
        for scale in dict.fromkeys((guidance, 1.0)):
            rows += [(steps, scale) for steps in few]
    sources = []
    key = {"kind": "teacher", "weights": fingerprint(model.denoiser)}
    for steps, scale in rows:
        sampler = sample.TeacherSampler(model, steps, scale, args.sampler)
        sources.append(model_source(setting, sampler, key | {"row": sampler.label}))
    for student in students:
        key = {"kind": "student", "weights": fingerprint(student.denoiser)}
        key["first timestep"] = student.first_timestep
        for steps, sampler in zip(student.steps, student.samplers(model)):
            sources.append(model_source(setting, sampler, key | {"steps": steps}))
    if setting.own:
        sources.append(real_source(setting))
    return sources


# ----------------------------------------------------------------------------- the setting


class Setting:
    """Protocol, judges, reference and prompts: what is the same for all rows."""

    def __init__(self, args, model=None):
        self.args, self.model = args, model
        self.warnings, self.bad, self.counts = [], {}, {}
        if args.reference and not Path(args.reference).exists():
            raise UserError(f"--reference {args.reference}: there is no such file or folder")
        self.protocol_name = args.protocol or (model and data.embedded_set(model)) or "as-is"
        cli.check_choice("--protocol", self.protocol_name, PROTOCOLS)
        self.protocol = PROTOCOLS[self.protocol_name]
        self.check_model()
        fsdp.print_main("loading the judges")
        self.judges = judges.make(args, self)
        self.own = self.judge_of(judges.OwnJudge)
        self.inception = self.judge_of(Inception)
        self.prompts, self.counted = self.choose_prompts() if model else ([], 0)
        self.check_counts()
        self.reference = {}
        if self.own:
            features = self.own.reference()
            self.reference["layout"] = {"gaussian": Gaussian.of(features), "features": features}
        if args.reference and not args.write_reference:
            is_file = Path(args.reference).suffix == ".npz"
            read = references.of_file if is_file else references.of_folder
            found, about = read(args.reference, self)
            self.reference |= found
            references.warn_of_reference(self, about)

    def judge_of(self, kind):
        found = [judge for judge in self.judges if isinstance(judge, kind)]
        return found[0] if found else None

    def warn(self, text):
        self.warnings.append(text)

    def check_model(self):
        model, name, own = self.model, self.protocol_name, self.protocol.size
        if model is None:
            return
        if own and own != model.image_size:
            size = model.image_size
            raise UserError(
                f"--protocol {name} is of images of {own}x{own}; {model.name} draws {size}x{size}"
            )
        labels, kind = model.labels is not None, self.protocol.prompts
        if kind != "a file" and (kind == "labels") != labels:
            raise UserError(
                f"--protocol {name} is of {kind}, which {model.name} does not take for prompts"
            )

    def require_captions(self, flag):
        """Called by judges of images by their captions, before they load anything."""
        if self.model and self.model.labels is not None:
            raise UserError(
                f"{flag} judges images by captions; the prompts of {self.model.name} are labels"
            )

    def check_counts(self):
        """Warn of numbers that compare with nothing."""
        args, protocol = self.args, self.protocol
        self.coverage_samples = coverage_samples(self.prompts[self.counted :] or self.prompts)
        if self.own and self.model and self.counted < protocol.samples:
            fewer = ""
            if self.coverage_samples < COVERAGE_SAMPLES and not args.no_coverage:
                fewer = f", {self.coverage_samples} of {COVERAGE_SAMPLES} a prompt for coverage"
            self.warn(
                f"{self.counted} of the protocol's {protocol.samples} samples{fewer}: frechet, "
                "recall and coverage compare within this table only"
            )
        if self.inception and not self.inception.published:
            self.warn(
                "the Inception weights are not the published ones: fid, kid, is, precision and "
                "recall compare with nothing"
            )

    def choose_prompts(self):
        """The prompts of all samples, and how many of them are the protocol's."""
        args, model = self.args, self.model
        count, repeated = args.samples or self.protocol.samples, []
        if args.prompts or self.protocol.prompts == "a file":
            if not args.prompts and model.labels is None:
                raise UserError(
                    f"--protocol {self.protocol_name} needs --prompts FILE; recipes/README.md says "
                    "where COCO's are"
                )
            known = read_prompts(args.prompts) if args.prompts else model.prompts
            data.warn_of_cut(model, known)
            if model.labels is not None:
                known = [str(model.label(prompt)) for prompt in known]
                prompts = [known[i % len(known)] for i in range(count)]
            else:
                prompts = known[:count]
                repeated = [prompt for prompt in prompts[:8] for _ in range(8)]
        elif self.protocol.prompts == "labels":
            prompts = [str(i % model.labels) for i in range(count)]
        else:
            prompts = self.own.prompts(count, args.seed)
            each = COVERAGE_SAMPLES * COVERAGE_REPEATS
            repeated = [prompt for prompt in self.own.open_prompts for _ in range(each)]
        return prompts + ([] if args.no_coverage else repeated), len(prompts)

    def check_captions(self, source):
        """Of a folder's images, before any of them is judged by its caption."""
        if source.key["kind"] != "folder":
            return
        needy = [judge.flag for judge in self.judges if hasattr(judge, "captions_needed")]
        without = sum(not prompt or prompt.isdecimal() for prompt in source.prompts)
        if needy and without:
            raise UserError(
                f"{needy[0]} judges images by their captions, and {without} of "
                f"{len(source.prompts)} in {source.label} have none: they stand in metadata.jsonl "
                "(file_name, text) or in a .txt beside each image"
            )
        try:
            for prompt in dict.fromkeys(source.prompts if self.own else ()):
                self.own.check(prompt)
        except UserError as error:
            raise UserError(f"{source.label}: {error}") from None

    def check_bad(self, where, bad, count):
        """Images that could not be used are named and counted; too many end the evaluation."""
        if len(bad) > images.BAD_SHARE * count:
            raise UserError(
                f"{len(bad)} of the {count} images in {where} cannot be used, more than one in a "
                f"hundred: {some_of(bad)}"
            )
        if bad:
            self.bad |= bad
            named = ", ".join(list(bad)[:3])
            self.warn(f"{len(bad)} of {count} images in {where} were left out as bad: {named}")

    def measure(self, sources):
        """[(label, {name: Metric}), ...] on the main rank, [] on the others."""
        for source in sources:
            self.check_captions(source)
        files = [judge_source(source, self.judges, self) for source in sources]
        fsdp.gather_objects(None)  # all parts are there
        table = []
        for source, parts in zip(sources, files) if fsdp.is_main() else ():
            judged, bad = read_parts(parts)
            self.check_bad(source.label, bad, len(source.prompts))
            self.counts[source.label] = len(judged["index"])
            prompts = [source.prompts[i] for i in judged["index"].tolist()]
            count = int((judged.pop("index") < source.counted).sum())
            metrics = metrics_of(judged, prompts, count, self.reference, self.own, self.args.seed)
            if self.protocol.published and count < self.protocol.samples:
                self.warn(
                    f"{source.label}: {count:,} of the {self.protocol.samples:,} images of "
                    f"{self.protocol_name} compare with nothing that is published"
                )
            elif "fid" in metrics and count < 2048:
                self.warn(
                    f"{source.label}: a fid of {count:,} images, fewer than features, says little"
                )
            table.append((source.label, metrics))
        return table


# ----------------------------------------------------------------------------- command line


def parse_arguments(arguments=None):
    parser = flags.eval_parser(__doc__)
    args = parser.parse_args(arguments)
    ways = (args.student is not None) + (args.compare is not None) + args.teacher_only
    if ways > 1:
        parser.error("--student, --compare and --teacher-only say which students: use one")
    if args.write_reference:
        if not args.reference:
            parser.error("--write-reference FILE needs --reference FOLDER, which it is made of")
        if args.images or args.student or args.compare:
            parser.error(
                "--write-reference judges nothing: leave out --images, --student and --compare"
            )
        if Path(args.reference).suffix == ".npz":
            parser.error(f"--write-reference makes statistics of images; {args.reference} are some")
    return args


def evaluate(args):
    began = time.perf_counter()
    students, sources = [], []
    only_images = args.images and not (
        args.student or args.compare or args.teacher_only or args.model
    )
    if args.write_reference or only_images:
        fsdp.device_and_dtype(args)
        setting = Setting(args)
        if args.write_reference:
            return references.write(args.write_reference, setting)
    else:
        fsdp.print_main("loading the models")
        paths = [] if args.teacher_only else args.compare or [args.student or flags.DEFAULT_RUN]
        model, students, args.guidance = sample.load_teacher_and_students(args, paths)
        setting = Setting(args, model)
        if len({student.guidance for student in students}) > 1:
            theirs = ", ".join(f"{student.name} {student.guidance}" for student in students)
            setting.warn(
                f"the students were distilled with different guidance: {theirs}; the teacher's row "
                f"has {args.guidance:g}"
            )
        sources = model_sources(setting, students, args.guidance)
    sources += [folder_source(folder, most=args.samples) for folder in args.images or ()]
    if not sources:
        raise UserError("no row is left to judge: --teacher-only and --no-teacher leave out both")
    labels = [source.label for source in sources]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two rows of the table are {label}: name each once")
    table = setting.measure(sources)
    if fsdp.is_main():
        publish(setting, sources, students, table, time.perf_counter() - began)


def publish(setting, sources, students, table, seconds):
    """Print the tables; write them, metrics.json and the curves."""
    out = Path(setting.args.out)
    text = report.as_text(setting, sources, students, table)
    numbers = report.as_json(setting, sources, students, table, seconds)
    replace_text(out / "table.txt", text + "\n")
    replace_text(out / "metrics.json", json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    count = setting.counted or max(setting.counts.values())
    repeated = len(setting.prompts) - setting.counted
    more = f"; {repeated} more of repeated prompts" if repeated else ""
    print(f"{count} images a row by {setting.protocol_name}{more}")
    print(text + f"\nnumbers: {out}/metrics.json")
    draw_curves(out, students, table)


def draw_curves(out, students, table):
    """curves.png, where all students are checkpoints of one run."""
    runs = {student.path.parent for student in students}
    names = [student.path.name for student in students]
    if len(runs) > 1 or len(names) < 2 or not all(re.fullmatch(r"\d+", name) for name in names):
        return
    points = {}
    for label, metrics in table:
        number = re.match(r"\d+", label)
        for name, metric in metrics.items() if number else ():
            points.setdefault(name, []).append((int(number[0]), metric.value))
    curves = [pictures.Curve(name, sorted(line)) for name, line in points.items()]
    pictures.draw_curves(curves, Path(out) / "curves.png")
    print(f"curves: {out}/curves.png")


def main(arguments=None):
    args = parse_arguments(arguments)
    args.device, _ = fsdp.device_and_dtype(args)
    fsdp.start("none", args.device)
    fsdp.broadcast_from_main(make_writable, args.out)
    try:
        evaluate(args)
    except UserError:
        out = Path(args.out)
        for folder in (*out.glob("parts/*"), out / "parts", out):
            with contextlib.suppress(OSError):  # refused before anything was judged
                folder.rmdir()
        raise
    except KeyboardInterrupt:
        raise UserError(
            f"interrupted; what has been judged is kept in {args.out}/parts, and the same command "
            "goes on with the rest",
            status=130,
        ) from None


if __name__ == "__main__":
    fsdp.run(main)
