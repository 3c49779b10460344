"""Judges of images, a file each.

A judge's file has

    FLAGS = {"--flag": {"metavar": "PATH", "help": "..."}}     its flags, as a literal; may be empty
    def make(args, setting): ...                               a list of judges, empty if not asked

and a judge is called with a batch of images [(3, H, W), ...] in [0, 1] as they were drawn, with
their protocol's views {"whole": (B, 3, h, w), ...}, and with their prompts. It gives {name: (B,
...)}, something for each image; a (B,) becomes a metric of that name. judge.about says what it is,
checksums of weights included. eval.py finds every file of this folder.
"""

import ast
import importlib
from pathlib import Path


class OwnJudge:
    """A judge of an embedded set, which knows the set's real images. Of each image it says besides
    "features layout" its "kind": a number, -1 where it is not what the prompt says. It has

    prompts(count, seed)       the prompts of an evaluation
    check(prompt)              raises UserError where nothing in the set is right for a prompt
    kinds(prompt)              how many kinds of images are right for a prompt
    real(prompts, seed)        real images (N, 3, size, size) in [0, 1] of prompts
    reference()                features of many real images
    metrics(right, prompts)    {name: Metric} of what is right (N,), bool, of the prompts
    """

    about = {}
    open_prompts = ()  # prompts that many kinds of images fit, by which coverage is measured


def files():
    return sorted(p for p in Path(__file__).parent.glob("*.py") if p.name != "__init__.py")


def flags_of(file):
    """Its FLAGS, read without importing the file, which may be slow."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "FLAGS":
            return ast.literal_eval(node.value)
    return {}


def add_flags(parser):
    group = parser.add_argument_group("judges")
    for file in files():
        for flag, options in flags_of(file).items():
            group.add_argument(flag, **options)


def make(args, setting):
    """All judges that the command line asks for."""
    made = []
    for file in files():
        module = importlib.import_module(f"support.judges.{file.stem}")
        made += module.make(args, setting)
    return made


def about(judges):
    """What they say of themselves, together."""
    return {name: value for judge in judges for name, value in judge.about.items()}
