"""A model judges which of two answers is better: one of ours, or one behind an address.

    ask = RemoteJudge("http://127.0.0.1:8000/v1", "judge-model", key=None)
    verdicts = judge(ask, comparisons, "runs/comparison/verdicts.jsonl")

Judges favour an answer for its place, so every pair is asked twice, the other way round the second
time. A verdict is written down as soon as it is known: a run that broke goes on where it stopped.
"""

import hashlib
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from minisft.common.errors import UserError
from minisft.evaluation.compare import Item, answer_items
from minisft.evaluation.confidence import mcnemar, wilson
from minisft.generation.generate import Sampling

MAX_NEW_TOKENS = 512  # of a judgement
WORKERS = 4  # requests under way at a time
LONGEST_PAUSE = 60  # seconds between requests, whatever a server asks for
VERDICT = re.compile(r"verdict\W*(?:answer\W*)?(1|2|tie)(?![0-9a-z])", re.IGNORECASE)
INSTRUCTION = """\
Two assistants answered the question below. Judge which answer is better: correct, to the point, \
complete, in the language of the question. Neither their order nor their length counts. Give your \
reason in one or two sentences, then a last line that reads "Verdict: 1", "Verdict: 2" or, if \
neither is better, "Verdict: tie".

[Question]
{question}

[Answer 1]
{first}

[Answer 2]
{second}
"""


@dataclass(frozen=True)
class Comparison:
    """A question, and the answers of a baseline and of another model."""

    question: str
    baseline: str
    other: str

    def prompts(self):
        """The texts for the judge: the baseline's answer first, then the other's."""
        return [
            INSTRUCTION.format(question=self.question, first=first, second=second)
            for first, second in ((self.baseline, self.other), (self.other, self.baseline))
        ]


class LocalJudge:
    """An Assistant of ours as judge, deciding greedily."""

    def __init__(self, assistant, name, batch_size):
        self.assistant, self.name, self.batch_size = assistant, name, batch_size

    def __call__(self, prompts):
        """Yield (number of the prompt, the judge's text) as batches are finished."""
        room = min(MAX_NEW_TOKENS, self.assistant.max_length // 2)
        sampling = Sampling(max_new_tokens=room, greedy=True)
        for start in range(0, len(prompts), self.batch_size):
            items = [
                Item([{"role": "user", "content": text}], "")
                for text in prompts[start : start + self.batch_size]
            ]
            answers = answer_items(self.assistant, items, sampling, self.batch_size)
            for place, one in enumerate(answers, start):
                yield place, "(no room in the context)" if one["is_skipped"] else one["answer"]


class RemoteJudge:
    """A model behind an address that takes OpenAI's `/chat/completions`.

    key: sent as bearer token where there is one. A request that fails by the network, by status
    408, 429 or 5xx, or with a reply that is not of that form, is made again after 1, 2, 4 ...
    seconds (or what `Retry-After` says); any other status is a UserError.
    """

    def __init__(self, url, name, key, timeout=120, retries=5, pause=1.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge_url {url}: begins with neither http:// nor https://")
        key = (key or "").strip()  # files that keys are kept in end with a new line
        for what, text in (("--judge_url", url), ("OPENAI_API_KEY", key)):
            if not (text.isascii() and text.isprintable()) or " " in text:
                raise UserError(f"{what}: has a space, or a character that is not ASCII")
        self.url, self.name, self.key = url.rstrip("/") + "/chat/completions", name, key
        self.timeout, self.retries, self.pause = timeout, retries, pause

    def __call__(self, prompts):
        """Yield (number of the prompt, the judge's text) as replies come, several under way."""
        with ThreadPoolExecutor(WORKERS) as pool:
            asked = {pool.submit(self.ask, text): number for number, text in enumerate(prompts)}
            try:
                for reply in as_completed(asked):
                    yield asked[reply], reply.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, prompt):
        """The judge's text for one prompt."""
        body = json.dumps(
            {
                "model": self.name,
                "temperature": 0,
                "max_tokens": MAX_NEW_TOKENS,
                "messages": [{"role": "user", "content": prompt}],
            }
        ).encode()
        for attempt in range(self.retries + 1):
            wait = self.pause * 2**attempt
            try:
                request = urllib.request.Request(
                    self.url, body, {"Content-Type": "application/json"}
                )
                if self.key:  # not for another server, where this one points to one
                    request.add_unredirected_header("Authorization", f"Bearer {self.key}")
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    text = json.load(reply)["choices"][0]["message"]["content"]
                # Half a surrogate pair may be in JSON, but in no file.
                return text.encode("utf-8", "replace").decode() if isinstance(text, str) else ""
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}{_said(error)}"
                if error.code not in (408, 429) and error.code < 500:
                    raise UserError(
                        f"--judge_url {self.url}: {reason}; see its address, "
                        "--judge_model and the key in OPENAI_API_KEY"
                    ) from error
                told = error.headers.get("Retry-After", "")
                wait = min(float(told), LONGEST_PAUSE) if told.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                reason = "the reply is not a chat completion"
            if attempt < self.retries:
                time.sleep(wait)
        raise UserError(
            f"--judge_url {self.url}: {reason}, {self.retries + 1} times; the verdicts "
            "so far are kept, go on with --resume"
        )


def _said(error):
    """The beginning of what a server says besides a status: which of model, key, quota it is."""
    try:
        text = error.read(500).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return f" ({' '.join(text.split())})" if text.strip() else ""


def parse_verdict(text):
    """1, 2 or "tie" from a judge's text: the last verdict in it; None where there is none."""
    found = VERDICT.findall(text)
    return None if not found else "tie" if found[-1].lower() == "tie" else int(found[-1])


def judge(ask, comparisons, path, advance=lambda count: None):
    """Of each Comparison both verdicts: with the baseline's answer first, with the other's first.

    1, 2, "tie", or None where it could not be read. path: the JSON lines in which verdicts are
    kept; those that are in it are not asked for again.
    """
    known = _known(path)
    prompts = [text for one in comparisons for text in one.prompts()]
    keys = [hashlib.sha256(f"{ask.name}\n{text}".encode()).hexdigest() for text in prompts]
    missing = list({key: place for place, key in enumerate(keys) if key not in known}.values())
    advance(len(prompts) - len(missing))
    with open(path, "a", encoding="utf-8") as file:
        for number, text in ask([prompts[place] for place in missing]):
            line = {"key": keys[missing[number]], "verdict": parse_verdict(text), "text": text}
            known[line["key"]] = line["verdict"]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            advance(1)
    verdicts = [known[key] for key in keys]
    return list(zip(verdicts[::2], verdicts[1::2], strict=True))


def _known(path):
    """key -> verdict of the lines that were written whole."""
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    *whole, cut = text.split("\n")  # at no other end of line, which a judge may have written
    if cut:
        path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    try:
        return {line["key"]: line["verdict"] for line in map(json.loads, whole)}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a file of verdicts; remove it") from error


def outcome(baseline_first, other_first):
    """What two verdicts mean for the other model: "win", "tie", "loss", or None if one is missing.

    It wins with both, or with one and a tie; verdicts that contradict each other are a tie.
    """
    if baseline_first is None or other_first is None:
        return None
    points = {1: -1, 2: 1, "tie": 0}
    total = points[baseline_first] - points[other_first]
    return "win" if total > 0 else "loss" if total < 0 else "tie"


def tally(verdicts):
    """Wins, ties and losses with the Wilson interval of each share, and a sign test's p-value.

    verdicts: what `judge` returns. `contradicting` counts the ties whose two verdicts named the
    same place, `first_place` the share of the verdicts for an answer that named the one shown
    first: both orders were asked, so a judge without a liking for a place gives one half.
    """
    outcomes = [outcome(*pair) for pair in verdicts]
    read = [one for one in outcomes if one]
    places = [one for pair in verdicts if None not in pair for one in pair if one != "tie"]
    report = {
        "unreadable": len(outcomes) - len(read),
        "contradicting": sum(pair in ((1, 1), (2, 2)) for pair in verdicts),
        "first_place": places.count(1) / len(places) if places else None,
    }
    for name in ("win", "tie", "loss"):
        share = read.count(name) / max(1, len(read))
        report[name] = {
            "count": read.count(name),
            "share": share,
            "interval": wilson(share, len(read)),
        }
    return report | {"p_value": mcnemar(read.count("loss"), read.count("win"))}


def cost_line(comparisons, price_in=0.0, price_out=0.0):
    """What judging will take at most; prices are for a million tokens.

    Tokens are estimated: one for each Chinese character, for each four bytes of other text.
    """
    texts = [text for one in comparisons for text in one.prompts()]
    others = "".join(one for text in texts for one in text if one <= "\u2e7f")
    tokens_in = sum(map(len, texts)) - len(others) + len(others.encode()) // 4
    tokens_out = len(texts) * MAX_NEW_TOKENS
    cost = (tokens_in * price_in + tokens_out * price_out) / 10**6
    return (
        f"judging: {len(texts):,} requests, about {tokens_in:,} tokens to read, at most "
        f"{tokens_out:,} to write" + f"; at most about {cost:,.2f}" * bool(cost)
    )
