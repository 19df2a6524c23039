"""Do time and memory grow in proportion to the size of a hostile or huge input?

    python bench/hostile.py                     # about three minutes on one core
    python bench/hostile.py "one word" turns    # only these
    python bench/hostile.py --write_docs        # also the table of docs/benchmarks.md

Reads every kind of input twice, the second time four times as large, each in a process of its own.
Prints processor seconds and memory above those of a small input. Four times as much for four times
the size is linear. What is above a stated limit is refused; then both figures are about zero.
"""

import argparse
import json
import os
import struct
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import measure  # noqa: E402
from bench.tables import markdown, update  # noqa: E402
from minisft.common.errors import UserError  # noqa: E402
from minisft.common.tensor_files import read_header  # noqa: E402
from minisft.data.build_batches import batches_of_rows  # noqa: E402
from minisft.data.dataset import open_rows  # noqa: E402
from minisft.gguf.reader import read_gguf  # noqa: E402
from minisft.text.template_choice import get_template  # noqa: E402
from minisft.text.tokenizer import Tokenizer  # noqa: E402

FACTOR = 4  # between the two sizes
HEAD = ["input", "size", "seconds", "MB", "4 times the size: seconds", "and MB", "outcome"]
BASE = measure.ROOT / "examples" / "base"


def instruction(output: str) -> str:
    """A row with this answer."""
    return json.dumps({"instruction": "go", "output": output})


def conversation(messages: list[dict], **more: object) -> str:
    """A row with these messages."""
    return json.dumps({"messages": messages, **more})


def turn(role: str, content: str = "ok", **more: object) -> dict:
    """A message."""
    return {"role": role, "content": content, **more}


def call(number: int) -> dict:
    """A tool call."""
    return {"name": "add", "arguments": {"a": number}}


# name: (a size, the row or rows of that size)
ROWS: dict[str, tuple[int, Callable[[int], str]]] = {
    "words": (12 * 10**6, lambda size: instruction("word " * (size // 5))),
    "one word": (12 * 10**6, lambda size: instruction("w" * size)),
    "question": (12 * 10**6, lambda size: json.dumps({"instruction": "w" * size, "output": "a"})),
    # Each row is followed by a blank line.
    "blank lines": (10**4, lambda size: "\n\n".join([instruction("ok")] * size)),
    "turns": (10**5, lambda size: conversation([turn("user"), turn("assistant")] * (size // 2))),
    "tool calls": (
        25 * 10**4,
        lambda size: conversation(
            [turn("user"), turn("assistant", "", tool_calls=[call(n) for n in range(size)])]
        ),
    ),
    "tools": (
        10**5,
        lambda size: conversation(
            [turn("user"), turn("assistant")], tools=[{"name": f"f{n}"} for n in range(size)]
        ),
    ),
}


def write_row(path: Path, text: str) -> None:
    """A short row, and this one."""
    path.write_text(f"{instruction('ok')}\n{text}\n")


def read_row(path: Path) -> object:
    """Encode the rows in a file, as train.py does before the first step."""
    template = get_template("chatml", Tokenizer.load(BASE))
    return batches_of_rows(open_rows(path), template, cutoff_len=1024)


def write_safetensors(path: Path, size: int) -> None:
    """A header with many names."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": entry for number in range(size)}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def write_gguf_keys(path: Path, size: int) -> None:
    """A GGUF file with many keys."""
    names = [f"k{number}".encode() for number in range(size)]
    keys = [struct.pack("<Q", len(name)) + name + struct.pack("<IB", 7, 1) for name in names]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, size) + b"".join(keys))


def write_dataset_info(path: Path, size: int) -> None:
    """A list of many data sets."""
    entries = {f"d{number}": {"file_name": path.name} for number in range(size)}
    path.write_text(instruction("ok") + "\n")
    (path.parent / "dataset_info.json").write_text(json.dumps(entries))


def read_dataset_info(path: Path) -> object:
    """Look for a data set that is not there."""
    return open_rows("missing", dataset_dir=path.parent)


# name: (a size, a function that writes a file of that size, the function that is measured)
FILES: dict[str, tuple[int, Callable[[Path, int], None], Callable[[Path], object]]] = {
    "names in safetensors": (25_000, write_safetensors, read_header),
    "names in safetensors, refused": (10**6, write_safetensors, read_header),
    "keys in GGUF": (25 * 10**4, write_gguf_keys, read_gguf),
    "names in dataset_info.json": (10**5, write_dataset_info, read_dataset_info),
}


def write_aside(name: str, path: Path, size: int) -> None:
    """Write an input in another process, whose memory does not count."""
    if process := os.fork():
        os.waitpid(process, 0)
        return
    if name in ROWS:
        write_row(path, ROWS[name][1](size))
    else:
        FILES[name][1](path, size)
    os._exit(0)


def measure_one(name: str, size: int) -> None:
    """Read an input of this size, and print the processor seconds and the bytes that it took."""
    read = read_row if name in ROWS else FILES[name][2]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        write_aside(name, path, size)
        measure.forget_peak_memory()
        before, began = measure.peak_memory(), os.times()
        try:
            read(path)
            outcome = "read"
        except UserError as error:
            outcome = textwrap.shorten(str(error).rpartition(": ")[2], 60, placeholder=" …")
        ended = os.times()
    seconds = sum(ended[:4]) - sum(began[:4])
    print(json.dumps([seconds, measure.peak_memory() - before, outcome]))


def main() -> None:
    """Measure all kinds of input, or those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join([*ROWS, *FILES])}")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write_docs", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    if options.size is not None:
        return measure_one(options.names[0], options.size)
    known, rows = {**ROWS, **FILES}, []
    if unknown := set(options.names) - known.keys():
        parser.error(f"no such input: {', '.join(sorted(unknown))}")
    for name in options.names or known:
        size = known[name][0]
        empty, small, large = (measured(name, size) for size in (0, size, FACTOR * size))
        cells = [name, f"{size:,}"]
        for seconds, memory, _ in (small, large):
            cells += [f"{seconds - empty[0]:.2f}", f"{(memory - empty[1]) / 1e6:.0f}"]
        rows.append([*cells, large[2]])
        print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{markdown(HEAD, rows)}")
    if options.write_docs:
        update("benchmarks.md", "hostile", HEAD, rows, order=known)


def measured(name: str, size: int) -> tuple[float, int, str]:
    """What measure_one prints, from a process of its own."""
    said = measure.output_of("bench/hostile.py", name, "--size", size)
    return json.loads(said.splitlines()[-1])


if __name__ == "__main__":
    main()
