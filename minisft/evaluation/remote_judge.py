"""A judge behind an OpenAI-compatible API.

    judge = RemoteJudge("http://127.0.0.1:8000/v1", "judge-model", key=None)
    for number, text in judge.replies(["Which answer is better? ..."]): ...

Written by hand, because the standard library can send this one kind of request. The `openai`
package would be another dependency, and it does not repeat a request whose reply is not a chat
completion, such as the error page of a proxy.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from minisft.common.errors import UserError
from minisft.common.words import valid_text
from minisft.evaluation.judge import MAX_NEW_TOKENS

NUM_WORKERS = 4  # requests at a time
MAX_PAUSE = 60  # seconds before a retry, even if a server asks for more


class RemoteJudge:
    """A model behind an API.

    key: sent as a bearer token, if given. A request is repeated after a network error, status 408,
    429 or 5xx, or a reply that is not a chat completion. The pauses before that are 1, 2, 4, ...
    seconds, or what `Retry-After` says. Any other status raises UserError.
    """

    def __init__(
        self,
        url: str,
        name: str,
        key: str | None,
        timeout: float = 120,
        retries: int = 5,
        pause: float = 1.0,
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"--judge_url {url}: must begin with http:// or https://")
        key = (key or "").strip()  # a key that comes from a file ends with a new line
        for source, text in (("--judge_url", url), ("OPENAI_API_KEY", key)):
            if not (text.isascii() and text.isprintable()) or " " in text:
                raise UserError(
                    f"{source}: has a space, or a character that is not ASCII. Remove it."
                )
        self.url, self.name, self.key = url.rstrip("/") + "/chat/completions", name, key
        self.timeout, self.retries, self.pause = timeout, retries, pause

    def replies(self, prompts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield (number of a prompt, the judge's text) as the replies arrive."""
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            numbers = {pool.submit(self.ask, text): number for number, text in enumerate(prompts)}
            try:
                for reply in as_completed(numbers):
                    yield numbers[reply], reply.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, prompt: str) -> str:
        """The judge's text for a prompt."""
        reason = ""
        for attempt in range(self.retries + 1):
            pause = self.pause * 2**attempt
            try:
                return self._request(prompt)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}{_explanation(error)}"
                if error.code not in (408, 429) and error.code < 500:
                    raise UserError(
                        f"--judge_url {self.url}: {reason}. Check the address, --judge_model and "
                        "the key in OPENAI_API_KEY."
                    ) from error
                wanted = error.headers.get("Retry-After", "")
                if wanted.isdecimal():
                    pause = min(float(wanted), MAX_PAUSE)
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                reason = "the reply is not a chat completion"
            if attempt < self.retries:
                time.sleep(pause)
        raise UserError(
            f"--judge_url {self.url}: {reason}, {self.retries + 1} times. The verdicts so far are "
            "saved; continue with --resume."
        )

    def _request(self, prompt: str) -> str:
        """The judge's text, from a single request."""
        content = {
            "model": self.name,
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
            "messages": [{"role": "user", "content": prompt}],
        }
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(content).encode(), headers)
        if self.key:
            # Unredirected: if the server redirects to another one, that must not get the key.
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            text = json.load(reply)["choices"][0]["message"]["content"]
        # JSON may spell a lone surrogate, which cannot be written to a file.
        return valid_text(text) if isinstance(text, str) else ""


def _explanation(error: urllib.error.HTTPError) -> str:
    """The beginning of an error's body, which tells a wrong key from a spent quota."""
    try:
        text = error.read(500).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        text = ""
    return f" ({' '.join(text.split())})" if text.strip() else ""
