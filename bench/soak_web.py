"""Does the web page keep its memory and its answers? 15 minutes with 8 clients that come and go.

    python bench/soak_web.py
    python bench/soak_web.py --minutes 1
    python bench/soak_web.py --write_docs        # also the table of docs/benchmarks.md

Starts chat.py --web with examples/base. Each client opens the page's API, has conversations of
one to three questions, stops some answers, leaves in the middle of others, and sends a malformed
call now and then. A complete answer must be the one that the same conversation got before, up to a
near tie: the page reuses what it has computed, in other pieces each time, and where the two best
tokens are equal up to rounding, either may be chosen. The memory of the server must not grow after
its first quarter, and its log must not have a traceback. Exits with 1 otherwise, and then writes no
table.
"""

import argparse
import collections
import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.measure import MAX_GROWTH, ROOT, early_and_late, flags, resident_memory  # noqa: E402
from bench.tables import markdown, update  # noqa: E402
from minisft.chat.markup import unescape  # noqa: E402
from minisft.common.sequences import common_prefix_length  # noqa: E402
from minisft.generation.assistant import Assistant  # noqa: E402
from minisft.generation.generate import generate_steps  # noqa: E402
from minisft.generation.sampling import Sampling  # noqa: E402
from minisft.generation.thoughts import AnswerDecoder  # noqa: E402
from minisft.text.messages import Message  # noqa: E402

CLIENTS = 8
# What can happen to a question. The last two must not.
OUTCOMES = "answered", "stopped", "left", "malformed", "refused", "near tie", "LOST", "DIFFERENT"
HEAD = ["minutes", *OUTCOMES, "memory", "tracebacks", "end after Ctrl-C"]
QUESTIONS = [f"What is {number} plus {number + 1}?" for number in range(20)]
SETTINGS = (40, 1.0, 0, 1.0, 1.0, True, "")  # the fields of Sampling: greedy, 40 tokens
MODEL = ROOT / "examples" / "base"
LOADING = {"template": "plain", "device": "cpu", "dtype": "float32"}
# Two logits closer than this are a near tie. With a cache and without it, a logit of this model
# differs by up to 1.5e-5.
NEAR_TIE = 1e-4
STATISTICS = re.compile(r"tokens, the first after")


class Client(threading.Thread):
    """Has conversations until `ended` is set. answers: {questions so far: last answer}, shared."""

    def __init__(
        self, port: int, seed: int, ended: threading.Event, answers: dict[tuple[str, ...], str]
    ) -> None:
        super().__init__(daemon=True)
        self.port, self.generator, self.ended = port, random.Random(seed), ended
        self.answers, self.counts = answers, collections.Counter[str]()
        self.differing: list[tuple[list[Message], str]] = []  # (chat with its answer, first answer)

    def run(self) -> None:
        """Come, talk, go."""
        while not self.ended.is_set():
            session, asked = uuid.uuid4().hex, []
            for _ in range(self.generator.randint(1, 3)):
                asked.append(self.generator.choice(QUESTIONS))
                if not self.talk(session, asked):
                    break

    def talk(self, session: str, asked: list[str]) -> bool:
        """Ask the last question; False if the client leaves after it."""
        what = self.generator.random()
        if what < 0.05:
            self.call("ask", session, ["malformed"])
            self.counts["malformed"] += 1
            return False
        event = self.call("ask", session, [asked[-1], "", *SETTINGS])
        if event is None:
            self.counts["refused"] += 1
            return False
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request("GET", f"/gradio_api/call/ask/{event}")
        response = connection.getresponse()
        if what < 0.15:
            response.readline()
            connection.close()
            self.counts["left"] += 1
            return False
        if what < 0.25:
            self.post("run/stop", {"data": [None], "session_hash": session})
        lines = response.read().decode().splitlines()
        views = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        view = next((view for view in reversed(views) if isinstance(view, list)), None)
        if view is None:
            self.counts["LOST"] += 1
            return False
        if not STATISTICS.search(str(view)) or "Stopped." in str(view):
            self.counts["stopped"] += 1
            return False
        chat: list[Message] = [
            {"role": message["role"], "content": unescape(message["content"][0]["text"])}
            for message in view[0]
        ]
        first = self.answers.setdefault(tuple(asked), chat[-1]["content"])
        if chat[-1]["content"] != first:
            self.differing.append((chat, first))
            return False  # what follows would differ, too
        self.counts["answered"] += 1
        return True

    def call(self, name: str, session: str, data: list) -> str | None:
        """The id of an event; None if it is refused."""
        reply = self.post(f"call/{name}", {"data": data, "session_hash": session})
        return reply.get("event_id")

    def post(self, path: str, body: dict) -> dict:
        """The reply to a POST, {} if it is not JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", f"/gradio_api/{path}", json.dumps(body), headers)
        try:
            return json.loads(connection.getresponse().read())
        except ValueError:
            return {}


def margin_where_they_part(assistant: Assistant, chat: list[Message], first: str) -> float:
    """The difference of the two best logits, computed without a cache, where two answers part.

    chat: ends with an answer. first: another answer to the same messages.
    """
    *messages, last = chat
    sampling = Sampling(SETTINGS[0], greedy=True)
    ids, margin, text = assistant.prompt_ids(messages, sampling), 0.0, ""
    decoder = AnswerDecoder(assistant.template, ids)
    common = common_prefix_length(last["content"], first)
    for step in generate_steps(assistant.model, [ids], sampling, assistant.stop_ids):
        best, second = step.logits[0].topk(2).values.tolist()
        margin, text = best - second, text + decoder.push(step.tokens[0])[1]
        if len(text) > common:
            break
    return margin


def judge_differing(clients: list[Client]) -> collections.Counter[str]:
    """How many of the answers that differ are near ties; prints each."""
    counts = collections.Counter[str]()
    differing = [pair for client in clients for pair in client.differing]
    if differing:
        assistant = Assistant(MODEL, **LOADING)
    for chat, first in differing:
        margin = margin_where_they_part(assistant, chat, first)
        counts["near tie" if margin < NEAR_TIE else "DIFFERENT"] += 1
        print(
            f"{chat}, first {first!r}: where they part, the two best logits differ by {margin:.1e}"
        )
    return counts


def main() -> None:
    """Serve, let the clients talk, and judge."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write_docs", action="store_true", help="the table of docs/benchmarks.md")
    options = parser.parse_args()
    # A shell's background commands ignore SIGINT, and so would the server.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = flags(model_name_or_path=MODEL, **LOADING, web=True, server_port=port)
    log = Path(tempfile.mkstemp(prefix="soak-web-", suffix=".log")[1])
    with open(log, "wb") as file:
        server = subprocess.Popen(
            [sys.executable, "chat.py", *words], cwd=ROOT, stdout=file, stderr=file
        )
    try:
        while "Ctrl-C" not in log.read_text():
            if server.poll() is not None:
                sys.exit(f"chat.py has ended; see {log}")
            time.sleep(0.2)
        ended, answers = threading.Event(), {}
        clients = [Client(port, options.seed + number, ended, answers) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        used, until = [], time.monotonic() + 60 * options.minutes
        while time.monotonic() < until and server.poll() is None:
            used.append(resident_memory(server.pid))
            time.sleep(min(1.0, options.minutes))
        ended.set()
        for client in clients:
            client.join(300)
        began = time.monotonic()
        server.send_signal(signal.SIGINT)
        server.wait()
        end_seconds = time.monotonic() - began
    finally:
        server.kill()
    counts = sum((client.counts for client in clients), judge_differing(clients))
    early, late = early_and_late(used)
    tracebacks = log.read_text().count("Traceback")
    growth = late / early
    memory = f"{early / 2**20:,.0f} to {late / 2**20:,.0f} MiB, x{growth:.2f}"
    row = [f"{options.minutes:g}", *(f"{counts[name]:,}" for name in OUTCOMES)]
    row += [memory, tracebacks, f"{end_seconds:.1f} s"]
    print(markdown(HEAD, [row]))
    print(f"log: {log}")
    alive = all(not client.is_alive() for client in clients)
    is_good = counts["answered"] and not (counts["LOST"] or counts["DIFFERENT"] or tracebacks)
    if not (is_good and growth <= MAX_GROWTH and alive and end_seconds < 2):
        sys.exit(1)
    if options.write_docs:
        update("benchmarks.md", "soak_web", HEAD, [row], order=[row[0]])


if __name__ == "__main__":
    main()
