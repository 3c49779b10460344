"""What every entry point does with bad input: one line that says what is wrong and what to do, and an exit status."""

import argparse
import difflib
import sys


class UserError(Exception):
    """Something the user can mend. status is what the command exits with."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        shown = action.default not in (None, False, argparse.SUPPRESS) and "default" not in (action.help or "")
        return (action.help or "") + (" (default %(default)s)" if shown else "")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, flags in full only, and a guess at what a misspelt flag was meant to be."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=HelpFormatter, allow_abbrev=False, fromfile_prefix_chars="@")

    def convert_arg_line_to_args(self, line):
        """A recipe, `@recipes/NAME.args`: flags and values between blanks, `#` to the end of the line is a comment."""
        return line.split("#")[0].split()

    def parse_args(self, arguments=None):
        args, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
            self.error(f"unknown argument {unknown[0]}" + (f", did you mean {close[0]}?" if close else ", see --help"))
        return args

    def error(self, message):
        if message.startswith("[Errno"):  # argparse's words for an @FILE that it cannot open
            message = f"the recipe cannot be read: {message.split('] ', 1)[-1]}"
        raise UserError(message)


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def natural(text):
    """A whole number, 0 or above, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


def positive_number(text):
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def weight(text):
    """A finite number, 0 or above, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, 0 or above")
    return value


def dtype(*names):
    """One of these, or its short form, for argparse."""
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

    def parse(text):
        if short.get(text, text) not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(names)}")
        return short.get(text, text)

    return parse


def run(main):
    """Call main; a UserError becomes its one line and exit status."""
    try:
        main()
    except UserError as error:
        print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
