"""A stub of a judge behind an API, for the tests of remote_judge.py and eval.py compare.

with serving() as server:
    RemoteJudge(server.url, "stub", key=None)
    server.requests                  # (path, Authorization header, model, question) of each so far
"""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub(BaseHTTPRequestHandler):
    """A judge that prefers the longer answer. For some questions it fails at first, or always."""

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        prompt = request["messages"][0]["content"]
        question = re.search(r"\[Question\]\n(.*)\n", prompt)[1]
        with server.lock:
            server.requests.append(
                (self.path, self.headers.get("Authorization"), request["model"], question)
            )
            first_time = [one[3] for one in server.requests].count(question) <= 2
        if question == "busy" and first_time:
            return self.reply(429, b"", {"Retry-After": "0"})
        if question == "patient" and first_time:
            return self.reply(429, b"quota", {"Retry-After": "99999"})
        if question == "broken" and first_time:
            return self.reply(503, b"")
        if self.headers.get("Unanswered"):
            self.rfile.read(1)  # until the client gives up
            return None
        if question == "html" and first_time:
            return self.reply(200, b"<html>")
        if question == "down" and server.is_down:
            return self.reply(500, b"")
        if question == "refused":
            return self.reply(401, b'{"error":\n "no such key"}')
        if question == "elsewhere":
            return self.reply(302, b"", {"Location": server.url.replace("/v1", "/other")})
        first, second = re.search(r"\[Answer 1\]\n(.*)\n\n\[Answer 2\]\n(.*)\n", prompt).groups()
        better = 1 if len(first) > len(second) else 2 if len(first) < len(second) else "tie"
        text = {"nonsense": "I like both \u2028 or \ud800 none", "first": "Verdict: 1"}.get(
            question, f"So.\nVerdict: {better}"
        )
        content = {"choices": [{"message": {"content": text}}]}
        return self.reply(200, json.dumps(content).encode())

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Authorization"), None, ""))
        self.reply(200, b"{}")

    def reply(self, status, body, headers=()):
        try:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), **dict(headers)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:
            pass  # the client has given up

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    """The server, with its `url`, its `requests`, and `is_down` for the question "down"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.requests, server.lock, server.is_down = [], threading.Lock(), True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
