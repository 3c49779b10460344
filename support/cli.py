"""Command lines: one-line errors, recipes, and the types of flags. Imports nothing slow."""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import shlex
import sys


class UserError(Exception):
    """Something that the user can mend. `status` is what the command exits with."""

    def __init__(self, message, status=2):
        super().__init__(" ".join(message.split("\n")))  # of a file's own words, too, one line
        self.status = status


# What other programs call our flags, where difflib would not find them.
ALIASES = {
    "--lr": "--learning-rate",
    "--bs": "--batch-size",
    "--steps": "--student-steps",
    "--num-steps": "--student-steps",
    "--num-inference-steps": "--steps",
    "--epochs": "--iterations",
    "--max-steps": "--iterations",
    "--max-train-steps": "--iterations",
    "--cfg": "--guidance",
    "--cfg-scale": "--guidance",
    "--output-dir": "--out",
    "--teacher": "--model",
    "--pretrained-model-name-or-path": "--model",
    "--gradient-accumulation-steps": "--micro-batch",
    "--mixed-precision": "--dtype",
    "--rank": "--lora",
    "--max-grad-norm": "--clip",
    "--report-to": "--track",
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        if action.default in (None, False, argparse.SUPPRESS) or "default" in text:
            return text
        return text + " (default %(default)s)"


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and a guess at what a misspelt flag
    meant."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            fromfile_prefix_chars="@",
        )

    def convert_arg_line_to_args(self, line):
        """One line of a recipe, `@recipes/NAME.args`, read as a shell would read it."""
        line = line.removeprefix("\ufeff")
        try:
            for comment in re.finditer(r"(^|\s)#", line):  # shlex has them within words too
                with contextlib.suppress(ValueError):  # within quotes it is none
                    return shlex.split(line[: comment.start()])
            return shlex.split(line)
        except ValueError as error:
            raise UserError(
                f"the recipe has a line that cannot be read ({error}): {line}"
            ) from None

    def parse_args(self, arguments=None, namespace=None):
        try:
            args, unknown = self.parse_known_args(arguments, namespace)
        except UnicodeDecodeError:
            raise UserError("the recipe cannot be read: it is not UTF-8 text") from None
        except RecursionError:
            raise UserError("the recipe cannot be read: it names itself") from None
        for name, value in vars(args).items():
            if value == "":
                raise UserError(f"--{name.replace('_', '-')} is empty")
        if unknown:
            self.error(f"unknown argument {unknown[0]}{self.hint(unknown[0])}")
        return args

    def hint(self, word):
        """What was meant by a word that is no flag."""
        known = [flag for action in self._actions for flag in action.option_strings]
        if word.endswith(".args"):
            return f", did you mean @{word}?"
        flag = word.split("=")[0].replace("_", "-")
        meant = [ALIASES.get(flag), flag, *difflib.get_close_matches(flag, known, 1)]
        found = [flag for flag in meant if flag in known]
        return f", did you mean {found[0]}?" if found else ", see --help"

    def error(self, message):
        if message.startswith("[Errno"):  # argparse's words for an @FILE that it cannot open
            message = f"the recipe cannot be read: {message.split('] ', 1)[-1]}"
        raise UserError(message)


def answer_early(make_parser, doc, announce=None):
    """Answer --help and mistakes in the flags at once: call this before torch is imported.
    announce(args) then says what is going to happen."""

    def parse():
        args = make_parser(doc).parse_args()
        if announce and os.environ.get("RANK", "0") == "0":
            print(announce(args), flush=True)

    run(parse)


# ----------------------------------------------------------------------------- types of flags


def number(read, fits, wanted):
    """The type of a flag: a word that `read` reads, and that then fits."""

    def parse(text):
        try:
            value = read(text)
        except ValueError:
            value = float("nan")  # which fits nothing
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


positive = number(int, lambda n: n > 0, "a whole number above 0")
natural = number(int, lambda n: n >= 0, "a whole number, 0 or above")
positive_number = number(float, lambda x: 0 < x < float("inf"), "a number above 0")
weight = number(float, lambda x: 0 <= x < float("inf"), "a number, 0 or above")
share = number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
decay = number(float, lambda x: 0 <= x < 1, "in [0, 1)")


def dtype(text):
    """The dtype that a short name stands for."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)


def check_choice(flag, value, choices):
    """For choices that lie in a table of a module that is slow to import."""
    if value not in choices:
        close = difflib.get_close_matches(value, choices, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"argument {flag}: {value!r} is not one of {', '.join(choices)}{hint}")


# ----------------------------------------------------------------------------- running


def import_package(name, needed_by, install=None):
    """An optional package, or a module of it. needed_by: a flag or a file. install: what pip
    installs (default: the package)."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # the latter of one that does not fit another
        install = install or name.partition(".")[0]
        raise UserError(
            f"{needed_by} needs a package that is not installed: pip install {install} "
            f"({first_line(error)})"
        ) from None


def first_line(error):
    """What an exception says, in one line."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if lines[0].endswith(":") and len(lines) > 1:
        return f"{lines[0]} {lines[1].strip()}"
    return lines[0]


OUT_OF_MEMORY = (  # what Python, a GPU and the CPU's allocator say
    *("MemoryError", "OutOfMemoryError"),
    *("CUDA out of memory", "not enough memory", "can't allocate memory"),
)


def explain(error):
    """One line and an exit status, or None where that is not for the user to mend."""
    command = os.path.basename(sys.argv[0])
    if isinstance(error, UserError):
        return f"{command}: {error}", error.status
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if any(words in f"{type(error).__name__}: {error}" for words in OUT_OF_MEMORY):
        advice = (
            "train with a smaller --micro-batch, --activation-checkpointing, --lora or more GPUs"
        )
        return f"{command}: out of memory: {advice}; draw with a smaller --batch-size", 1
    return None


def run(main):
    """Call main. What the user can mend becomes one line and an exit status."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        said = explain(error)
        if said is None:
            raise
        print(said[0], file=sys.stderr)
        sys.exit(said[1])
