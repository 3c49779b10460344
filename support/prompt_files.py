"""Prompts in files: text, one prompt a line, or a pickled list of strings."""

import pickle
from pathlib import Path

from support.cli import UserError


class PlainUnpickler(pickle.Unpickler):
    """Reads text, numbers, None, lists, tuples and dicts. Everything else in a pickle asks for a
    class or a function by name, and gets none."""

    def find_class(self, module, name):
        message = f"it asks for {module}.{name}, and nothing in a file is executed"
        raise pickle.UnpicklingError(message)


def read_pickle(path):
    """list of str from a pickle of strings, or of a dict with strings for values."""
    with open(path, "rb") as file:
        try:
            prompts = PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle can fail in any way
            why = str(error) or type(error).__name__
            raise UserError(f"the prompt file {path} is no pickle of strings: {why}") from None
    prompts = list(prompts.values()) if isinstance(prompts, dict) else prompts
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"the prompt file {path} is no pickle of strings")
    return prompts


def read_prompts(path):
    """list of str, blank prompts left out."""
    path = Path(path)
    try:
        if path.suffix in (".pkl", ".pickle"):
            prompts = read_pickle(path)
        else:
            prompts = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"the prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8 text") from None
    prompts = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not prompts:
        raise UserError(f"the prompt file {path} holds no prompt")
    return prompts
