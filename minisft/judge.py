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

from minisft.compare import Item, answer_items
from minisft.confidence import mcnemar, wilson
from minisft.generate import Sampling
from minisft.options import UserError

MAX_NEW_TOKENS = 512  # of a judgement
WORKERS = 4  # requests under way at a time
VERDICT = re.compile(r"verdict\W*(1|2|tie)\b", re.IGNORECASE)
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
        return [INSTRUCTION.format(question=self.question, first=first, second=second)
                for first, second in ((self.baseline, self.other), (self.other, self.baseline))]


class LocalJudge:
    """An Assistant of ours as judge, deciding greedily."""

    def __init__(self, assistant, name, batch_size):
        self.assistant, self.name, self.batch_size = assistant, name, batch_size

    def __call__(self, prompts):
        """Yield (number of the prompt, the judge's text) as batches are finished."""
        room = min(MAX_NEW_TOKENS, self.assistant.max_length // 2)
        sampling = Sampling(max_new_tokens=room, greedy=True)
        for start in range(0, len(prompts), self.batch_size):
            items = [Item([{"role": "user", "content": text}], "")
                     for text in prompts[start : start + self.batch_size]]
            answers = answer_items(self.assistant, items, sampling, self.batch_size)
            for place, one in enumerate(answers, start):
                yield place, one["answer"]


class RemoteJudge:
    """A model behind an address that takes OpenAI's `/chat/completions`.

    key: sent as bearer token where there is one. A request that fails by the network, by status
    408, 429 or 5xx, or with a reply that is not of that form, is made again after 1, 2, 4 ...
    seconds (or what `Retry-After` says); any other status is a UserError.
    """

    def __init__(self, url, name, key, timeout=120, retries=5, pause=1.0):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge_url {url}: begins with neither http:// nor https://")
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
        body = json.dumps({"model": self.name, "temperature": 0, "max_tokens": MAX_NEW_TOKENS,
                           "messages": [{"role": "user", "content": prompt}]}).encode()
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        for attempt in range(self.retries + 1):
            wait = self.pause * 2**attempt
            try:
                request = urllib.request.Request(self.url, body, headers)
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    text = json.load(reply)["choices"][0]["message"]["content"]
                return text if isinstance(text, str) else ""
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}"
                if error.code not in (408, 429) and error.code < 500:
                    raise UserError(f"--judge_url {self.url}: {reason}; see its address, "
                                    "--judge_model and the key in OPENAI_API_KEY") from error
                told = error.headers.get("Retry-After", "")
                wait = float(told) if told.isdigit() else wait
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                reason = "the reply is not a chat completion"
            if attempt < self.retries:
                time.sleep(wait)
        raise UserError(f"--judge_url {self.url}: {reason}, {self.retries + 1} times; the verdicts "
                        "so far are kept, go on with --resume")


def parse_verdict(text):
    """1, 2 or "tie" from a judge's text: the last verdict in it; None where there is none."""
    found = VERDICT.findall(text)
    return None if not found else "tie" if found[-1].lower() == "tie" else int(found[-1])


def judge(ask, comparisons, path, advance=lambda count: None):
    """The outcome of each Comparison for the other model: "win", "tie", "loss", or None.

    It wins with both verdicts, or with one and a tie; verdicts that contradict each other are a
    tie. None: a verdict could not be read. path: the JSON lines in which verdicts are kept.
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
    return [_outcome(*pair) for pair in zip(verdicts[::2], verdicts[1::2], strict=True)]


def _known(path):
    """key -> verdict of the lines that were written whole."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        path.write_text("".join(whole), encoding="utf-8")
    try:
        return {line["key"]: line["verdict"] for line in map(json.loads, whole)}
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: not a file of verdicts; remove it") from error


def _outcome(baseline_first, other_first):
    if baseline_first is None or other_first is None:
        return None
    points = {1: -1, 2: 1, "tie": 0}
    total = points[baseline_first] - points[other_first]
    return "win" if total > 0 else "loss" if total < 0 else "tie"


def tally(outcomes):
    """Wins, ties and losses with the Wilson interval of each share, and a sign test's p-value."""
    read = [one for one in outcomes if one]
    report = {"unreadable": len(outcomes) - len(read)}
    for name in ("win", "tie", "loss"):
        share = read.count(name) / max(1, len(read))
        report[name] = {"count": read.count(name), "share": share,
                        "interval": wilson(share, len(read))}
    return report | {"p_value": mcnemar(read.count("loss"), read.count("win"))}


def cost_line(comparisons, price_in=0.0, price_out=0.0):
    """What judging will take at most; prices are for a million tokens.

    Tokens are estimated: one for each Chinese character, for each four bytes of other text.
    """
    texts = [text for one in comparisons for text in one.prompts()]
    wide = sum(character > "\u2e7f" for text in texts for character in text)
    tokens_in = wide + (sum(map(len, texts)) - wide) // 4
    tokens_out = len(texts) * MAX_NEW_TOKENS
    cost = (tokens_in * price_in + tokens_out * price_out) / 10**6
    return (f"judging: {len(texts):,} requests, about {tokens_in:,} tokens to read, at most "
            f"{tokens_out:,} to write" + f"; at most about {cost:,.2f}" * bool(cost))
