"""Prompts in files: .txt, .csv, .tsv, .json, .jsonl, .parquet and .pkl, read as what they are."""

import csv
import json
from pathlib import Path

from support.cli import UserError, import_package
from support.weights import DATA_BYTES, Unpickler, in_one_line, read_text

COLUMNS = ("prompt", "caption", "text", "prompts", "captions")  # the first that is there


def from_text(path):
    lines = read_text(path, DATA_BYTES).split("\n")  # only line feeds end a line
    first = next((line.strip() for line in lines if line.strip()), "")
    if first.startswith("{") and first.endswith("}"):
        raise ValueError("its first line looks like JSON: name it .jsonl, or .json")
    return lines


def from_table(path):
    """A column of a .csv or .tsv with a header."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = read_text(path, DATA_BYTES).split("\n")
    rows = list(csv.reader([f"{line}\n" for line in lines], delimiter=delimiter, strict=True))
    header, *rows = [row for row in rows if row]
    column = column_of(header)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(f"row {number} has {len(row)} columns, the first has {len(header)}")
    return [row[column] for row in rows]


def column_of(names):
    lower = [str(name).strip().lower() for name in names]
    for column in COLUMNS:
        if column in lower:
            return lower.index(column)
    raise ValueError(f"it has {', '.join(map(str, names))}, and none of {', '.join(COLUMNS)}")


def text_of(entry):
    """A prompt, or an object that has one."""
    if isinstance(entry, dict):
        return list(entry.values())[column_of(entry)]
    return entry


def from_json(path):
    """A list of prompts or of objects with one; an object whose values are prompts; or one with
    such a list under a usual name."""
    content = json.loads(read_text(path, DATA_BYTES))
    if isinstance(content, dict):
        lists = [content[name] for name in COLUMNS if isinstance(content.get(name), list)]
        content = lists[0] if lists else list(content.values())
    return [text_of(entry) for entry in content]


def from_json_lines(path):
    lines = read_text(path, DATA_BYTES).split("\n")
    return [text_of(json.loads(line)) for line in lines if line.strip()]


def from_parquet(path):
    table = import_package("pyarrow.parquet", f"--prompts {path}").ParquetFile(path)
    name = table.schema_arrow.names[column_of(table.schema_arrow.names)]
    return table.read(columns=[name]).column(name).to_pylist()


def from_pickle(path):
    """A pickle of strings, or of a dict with strings for values."""
    with open(path, "rb") as file:
        prompts = Unpickler(file).load()
    return list(prompts.values()) if isinstance(prompts, dict) else list(prompts)


READERS = {
    ".txt": from_text,
    ".csv": from_table,
    ".tsv": from_table,
    ".json": from_json,
    ".jsonl": from_json_lines,
    ".parquet": from_parquet,
    ".pkl": from_pickle,
    ".pickle": from_pickle,
}


def is_prompt_file(word):
    """Whether a word of --prompts is the name of a file, and no prompt."""
    return Path(word).suffix.lower() in READERS or Path(word).is_file()


def read_prompts(path):
    """list of str; blank lines of a text are no prompts."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(READERS)
        raise UserError(
            f"the prompt file {path} is none of {known}: its ending says how it is read"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"the prompt file {path} cannot be read: it is no regular file")
    with in_one_line(f"the prompt file {path} cannot be read"):
        prompts = reader(path)
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            kind = type(prompt).__name__
            raise UserError(f"the prompt file {path}: entry {number} is no text but a {kind}")
    kept = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not kept:
        raise UserError(f"the prompt file {path} holds no prompt")
    blank = len(prompts) - len(kept)
    if blank and reader is not from_text:
        print(f"{path}: {blank} of {len(prompts)} prompts are blank and left out")
    return kept
