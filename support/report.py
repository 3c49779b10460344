"""eval.py's tables and metrics.json."""

import contextlib
import hashlib
import importlib.metadata
import math
import platform
import sys

import torch

import fsdp
from support import judges
from support.metrics import COVERAGE_REPEATS
from support.runlog import mean_of, read_rows
from support.weights import fingerprints

# ----------------------------------------------------------------------------- tables


def cell(value, error):
    """As many places as the error has two digits of."""
    if not math.isfinite(error):
        return f"{value:.3f} +-?"
    places = min(4, max(0, 1 - math.floor(math.log10(error)))) if error > 0 else 3
    return f"{value:.{places}f} +-{error:.{places}f}"


def difference_cell(value, error):
    low, high = value - 1.96 * error, value + 1.96 * error
    star = "*" if low > 0 or high < 0 else " "
    return f"{value:+.3g} [{low:.3g}, {high:.3g}]{star}"


def numbers(table):
    """[(label, {name: (value, standard error)}), ...]"""
    rows = []
    for label, metrics in table:
        rows.append((label, {name: (m.value, m.error) for name, m in metrics.items()}))
    return rows


def differences(table):
    """The same of the differences to the first row, without it."""
    first = table[0][1]
    rows = []
    for label, metrics in table[1:]:
        own = {name: metric.minus(first[name]) for name, metric in metrics.items() if name in first}
        rows.append((label, own))
    return rows


def aligned(table, show, width=100):
    """numbers or differences as text, a column a name, in blocks of at most `width`."""
    names = list(dict.fromkeys(name for _, entries in table for name in entries))
    left = max(len(label) for label, _ in table)
    blocks, lines = [], None
    for name in names:
        cells = [name] + [show(*row[name]) if name in row else "-" for _, row in table]
        wide = max(map(len, cells)) + 2
        if lines is None or len(lines[0]) + wide > width:
            lines = [label.ljust(left) for label in ("", *(label for label, _ in table))]
            blocks.append(lines)
        for i, text in enumerate(cells):
            lines[i] += text.rjust(wide)
    return "\n\n".join("\n".join(line.rstrip() for line in lines) for lines in blocks)


def warnings_text(warnings):
    return "".join(f"\nWARNING: {text}" for text in warnings)


# ----------------------------------------------------------------------------- the report


def versions():
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("diffusers", "transformers", "numpy", "torch-fidelity"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def health_of(path):
    """Means of a run's own metrics, which know of the fake score, over the 50 rows before its end
    or before that checkpoint; {} for a student that is no run."""
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    last = int(path.name) if run != path else math.inf
    rows = read_rows(run / "metrics.jsonl", last)
    names = ("mean", "std", "gap", "cosine", "dm", "ca", "logit_accuracy", "fake_loss")
    means = {name: mean_of(rows, name, 50) for name in names}
    return {name: mean for name, mean in means.items() if mean is not None}


def health(students):
    """{name: health_of} of those that are runs."""
    found = {student.name: health_of(student.path) for student in students}
    return {name: means for name, means in found.items() if means}


def finite(number):
    """None for what JSON knows no number for."""
    return number if math.isfinite(number) else None


def json_row(label, entries):
    row = {"label": label}
    for name, (value, error) in entries.items():
        row[name] = {
            "value": finite(value),
            "standard_error": finite(error),
            "interval_95": [finite(value - 1.96 * error), finite(value + 1.96 * error)],
        }
    return row


def as_text(setting, sources, students, table):
    """The table, differences to its first row, the runs' own health, what is published."""
    text = aligned(numbers(table), cell) + warnings_text(setting.warnings)
    judged = {source.label for source in sources if source.key["kind"] in ("student", "folder")}
    shown = [(label, own) for label, own in differences(table) if label in judged]
    if shown:
        text += f"\n\nless {table[0][0]}, 95 % intervals; * where 0 is outside\n"
        text += aligned(shown, difference_cell)
    for name, means in health(students).items():
        listed = ", ".join(f"{key} {value:.3g}" for key, value in means.items())
        text += f"\n\nhealth of {name} in its last rows: {listed}"
    if setting.protocol.published:
        text += f"\n\npublished: {setting.protocol.published}"
    return text


def as_json(setting, sources, students, table, seconds):
    """All that metrics.json says."""
    args, prompts = setting.args, setting.prompts
    weights = {source.label: source.key["weights"] for source in sources if "weights" in source.key}
    if setting.model:
        weights |= fingerprints(setting.model)
    weights |= judges.about(setting.judges)
    settings = ("seed", "guidance", "teacher_steps", "sampler", "dtype", "device", "batch_size")
    return {
        "protocol": setting.protocol_name,
        "about": setting.protocol.about,
        "command": sys.argv[1:],
        "model": setting.model and setting.model.name,
        "samples": setting.counted,
        "images": setting.counts,
        "repeated_prompts": len(prompts) - setting.counted,
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        **{name: getattr(args, name) for name in settings},
        "processes": fsdp.world_size(),
        "coverage_samples": setting.coverage_samples if setting.own else None,
        "coverage_repeats": COVERAGE_REPEATS if setting.own else None,
        "reference": args.reference,
        "weights": weights,
        "versions": versions(),
        "warnings": setting.warnings,
        "left_out": setting.bad,
        "health": health(students),
        "seconds": round(seconds, 1),
        "rows": [json_row(label, own) for label, own in numbers(table)],
        "differences_to_first": [json_row(label, own) for label, own in differences(table)],
    }
