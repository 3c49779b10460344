"""Numbers for students and their teacher: alignment, coverage, a Frechet distance, saturation.

    python eval.py                                   # the student of `python train.py`, a few minutes on two CPU cores
    python eval.py --student runs/mine --samples 1000 --out mine.json
    python eval.py --teacher-only --guidance 5       # a teacher at another guidance scale

The pictures of the embedded data set are the judge, so no network has to be trusted or downloaded:

  alignment  share of samples, one for each of --samples full captions, whose nearest picture in the set carries all words of
             the prompt. Both are cut to the square around their ink and compared by mean colour and edge strength in 8x8 cells,
             so place and size do not count, and a blur is not taken for the picture that it is a blur of.
  coverage   distinct right emojis among 32 samples of a one-word prompt, as a share of those that exist; mean of the words
             cat, heart and moon, three times 32 samples each.
  frechet    Frechet distance between Gaussians fitted to samples and to the set, on 80 features, mean colour and edge
             strength in each of 4x4 cells, in units of 1/10 of the grey range. Few samples raise it; the last row, real
             pictures at random places and sizes, shows what is left for a perfect model.
  mean, deviation   of the picture's values in [0, 1], averaged over pictures: over-saturation shows as a rising deviation.

A run on gmm.py's plane gets that file's figures instead, from four times 4096 samples; `measure` there says what they are.

Every number has a standard error: over samples for alignment, mean and deviation, over 20 bootstrap draws of the samples for the
Frechet distance, over the three repetitions for coverage.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import errors
import checkpoint
import sample

COVERAGE_WORDS = ("cat", "heart", "moon")
COVERAGE_SAMPLES, COVERAGE_REPEATS = 32, 3
BATCH = 50
EDGE_WEIGHT = 4.0  # edges are weaker than colours; times 4 both count alike


# ---------------------------------------------------------------------------------------------------- the judge

def centred(pictures, size=32):
    """(N, 3, H, W) in [0, 1] -> (N, 3, size, size): the square around the ink, so that where and how large it is does not
    count. The square spans all but the outer 1 % of the ink on each side, lest a speck decide."""
    ink = (pictures.amin(1) < 0.7).float()
    bounds = []
    for along in (2, 1):  # what is left is y first, x then
        mass = ink.sum(along).cumsum(1)
        low = (mass < 0.01 * mass[:, -1:]).sum(1)
        high = (mass < 0.99 * mass[:, -1:]).sum(1) + 1
        bounds.append((low, torch.maximum(high, low + 1)))
    (top, bottom), (left, right) = bounds
    side = torch.maximum(bottom - top, right - left).clamp(max=pictures.shape[-1])
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = side / pictures.shape[-1]
    theta[:, 0, 2] = (left + right) / pictures.shape[-1] - 1
    theta[:, 1, 2] = (top + bottom) / pictures.shape[-2] - 1
    grid = F.affine_grid(theta, (len(pictures), 3, size, size), align_corners=False)
    return 1 - F.grid_sample(1 - pictures, grid, align_corners=False)


def cell_features(pictures, cells):
    """(N, 3, H, W) in [0, 1] -> (N, 5 cells^2): mean colour, and mean strength of edges either way, in cells x cells squares."""
    right = F.pad(pictures, (0, 1, 0, 0), mode="replicate").diff(dim=3).abs().mean(1, keepdim=True)
    below = F.pad(pictures, (0, 0, 0, 1), mode="replicate").diff(dim=2).abs().mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(torch.cat([pictures, EDGE_WEIGHT * right, EDGE_WEIGHT * below], 1), cells).flatten(1)


def layout(pictures):
    """The features of the Frechet distance, (N, 3, H, W) -> (N, 80)."""
    return 10 * cell_features(pictures, 4)


def frechet_distance(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) for features (N, D), (M, D).    1706.08500, equation 6

    The trace of the root is taken as that of the symmetric (C_a^(1/2) C_b C_a^(1/2))^(1/2), which has the same eigenvalues.
    """
    a, b = a.double(), b.double()
    covariance_a, covariance_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross).item()


class Judge:
    """The embedded set as a yardstick."""

    def __init__(self):
        self.captions = [caption for _, caption in data.emoji_captions()]
        self.words = [set(caption.split()) for caption in self.captions]
        self.pictures = data.emoji_pictures(128)                                       # (1453, 3, 128, 128)
        self.appearance = cell_features(centred(F.avg_pool2d(self.pictures.float() / 255, 2)), 8)
        self.layout = layout(self.moved(range(len(self.captions)), seed=0))

    def moved(self, index, seed):
        """Real pictures as the teacher learnt them, at random places and sizes: (N, 3, 64, 64) in [0, 1]."""
        return (data.shift_and_scale(self.pictures[list(index)], torch.Generator().manual_seed(seed)) + 1) / 2

    def nearest(self, pictures):
        """Index of the nearest picture of the set, for each."""
        return torch.cdist(cell_features(centred(pictures), 8), self.appearance).argmin(1).tolist()

    def right(self, pictures, prompts):
        """For each picture the index of its nearest in the set where that carries the prompt's words, else None."""
        return [i if set(prompt.split()) <= self.words[i] else None for i, prompt in zip(self.nearest(pictures), prompts)]

    def existing(self, word):
        return sum(word in words for words in self.words)


def with_error(values):
    """Mean and standard error of (N,) values."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else float("nan")


def measure(judge, pictures, prompts, coverage_pictures, seed):
    """All numbers of one row, {name: (value, standard error)}. coverage_pictures: {word: [(32, 3, 64, 64), ...]} or None."""
    features = layout(pictures)
    generator = torch.Generator().manual_seed(seed)
    draws = [frechet_distance(features[torch.randint(len(features), (len(features),), generator=generator)], judge.layout)
             for _ in range(20)]
    figures = {"alignment": with_error([index is not None for index in judge.right(pictures, prompts)])}
    if coverage_pictures:
        shares = [[len(set(judge.right(part, [word] * len(part))) - {None}) / judge.existing(word) for part in parts]
                  for word, parts in coverage_pictures.items()]
        figures["coverage"] = with_error([sum(repeat) / len(repeat) for repeat in zip(*shares)])
    figures["frechet"] = frechet_distance(features, judge.layout), torch.tensor(draws).std().item()
    figures["mean"] = with_error(pictures.mean((1, 2, 3)))
    figures["deviation"] = with_error(pictures.flatten(1).std(dim=1))
    return figures


# ---------------------------------------------------------------------------------------------------- drawing what is judged

def draw(model, row, prompts, steps, seed, bar):
    """Pictures (N, 3, H, W) of one row for N prompts, in batches; every row gets the same noise for the same prompt."""
    noise = sample.column_noise(model, len(prompts), steps, seed)
    pictures = []
    for i in range(0, len(prompts), BATCH):
        pictures.append(model.decode(row.draw(noise[:, i:i + BATCH], model.encode(prompts[i:i + BATCH]))))
        bar.update(len(pictures[-1]))
    return torch.cat(pictures)


def parse_arguments():
    parser = errors.Parser(__doc__)
    sample.add_common_flags(parser)
    parser.add_argument("--samples", type=errors.positive, default=300, help="captions that are drawn")
    parser.add_argument("--out", default="eval.json", metavar="FILE")
    parser.add_argument("--teacher-only", action="store_true", help="no student is needed")
    parser.add_argument("--no-coverage", action="store_true", help="leave coverage out, which is half of the time")
    return parser.parse_args()


def rows_to_measure(model, student, args, guidance):
    """The teacher as it should be, the undistilled network at few steps with and without guidance, the student."""
    rows = [sample.teacher_row(model, args.teacher_steps, guidance)]
    for scale in dict.fromkeys((guidance, 1.0)):
        rows += [sample.teacher_row(model, steps, scale) for steps in args.steps]
    return rows + [sample.student_row(student, model.schedule.timesteps(steps, args.first_timestep)) for steps in args.steps if student]


def print_table(table):
    names = list(table[0][1])
    print(f"{'':40}" + "".join(f"{name:>19}" for name in names))
    for label, figures in table:
        cells = "".join(f"{'-':>19}" if name not in figures else f"{figures[name][0]:>10.3f} +-{figures[name][1]:6.3f}" for name in names)
        print(f"{label:40}{cells}")


def measure_pictures(model, rows, args):
    """[(label, figures), ...] of every row and of real pictures, which come last."""
    judge = Judge()
    shape = model.decode(torch.zeros(1, *model.sample_shape, device=model.device)).shape[1:]
    if shape != (3, 64, 64):
        raise errors.UserError(f"{model.name} draws {tuple(shape)} pictures; eval.py measures the embedded models' only")
    if args.samples > len(judge.captions):
        raise errors.UserError(f"--samples {args.samples}: the set has {len(judge.captions)} captions")
    chosen = torch.randperm(len(judge.captions), generator=torch.Generator().manual_seed(args.seed))[:args.samples]
    prompts = [judge.captions[i] for i in chosen]
    words = [] if args.no_coverage else [word for word in COVERAGE_WORDS for _ in range(COVERAGE_SAMPLES * COVERAGE_REPEATS)]
    table = []
    with tqdm(total=len(rows) * (len(prompts) + len(words)), unit="picture") as bar:
        for row in rows:
            label = row.label.replace("\n", ", ")
            bar.set_description(label)
            pictures = draw(model, row, prompts + words, max(args.steps), args.seed, bar)
            parts = pictures[len(prompts):].split(COVERAGE_SAMPLES)
            coverage = {word: parts[i * COVERAGE_REPEATS:(i + 1) * COVERAGE_REPEATS] for i, word in enumerate(COVERAGE_WORDS)} if words else None
            table.append((label, measure(judge, pictures[:len(prompts)], prompts, coverage, args.seed)))
    table.append(("real pictures", measure(judge, judge.moved(chosen.tolist(), args.seed + 1), prompts, None, args.seed)))
    print(f"{len(prompts)} captions; coverage: {COVERAGE_REPEATS} x {COVERAGE_SAMPLES} samples of each of "
          + ", ".join(f"{word} ({judge.existing(word)} exist)" for word in COVERAGE_WORDS))
    return table


def main():
    args = parse_arguments()
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise errors.UserError(f"--out {out}: " + ("is a directory" if out.is_dir() else f"there is no directory {out.parent}"))
    model, student, guidance = sample.load_teacher_and_student(args, args.teacher_only)
    rows = rows_to_measure(model, student, args, guidance)
    table = model.measure_rows(rows, guidance, max(args.steps), args.seed) if hasattr(model, "measure_rows") else measure_pictures(model, rows, args)
    print_table(table)
    report = {"model": model.name, "student": None if args.teacher_only else args.student or sample.DEFAULT_RUN,
              "guidance": guidance, "seed": args.seed, "samples": args.samples, "coverage_samples": COVERAGE_SAMPLES, "coverage_repeats": COVERAGE_REPEATS,
              "rows": [{"label": label} | {name: {"value": value, "standard_error": error} for name, (value, error) in figures.items()}
                       for label, figures in table]}
    checkpoint.replace_file(out, lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
    print(f"numbers: {out}")


if __name__ == "__main__":
    errors.run(main)
