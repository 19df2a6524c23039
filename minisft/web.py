"""The page of chat.py: how what page.py does looks in a browser, with gradio.

    page = Page([Assistant("examples/base", adapter="runs/demo")], Sampling(), system="Be brief.")
    serve(page, "127.0.0.1", 7860)

Nothing is asked of other machines, by the server or by the browser.
"""

import hmac
import os
import sys
import threading
from importlib.util import find_spec

from minisft.options import UserError
from minisft.page import Talk

AT_ONCE = 8  # answers that are written at the same time; other visitors wait in the queue
QUEUE_SIZE = 64
# The browser's part of the promise: it loads and sends nothing from or to elsewhere, whatever an
# answer says. What is inline is gradio's own.
POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
          "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
          "connect-src 'self'; frame-src 'none'; object-src 'none'; base-uri 'self'; "
          "form-action 'self'; frame-ancestors 'self'")
SAVE = """(text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
    link.download = "conversation.json";
    link.click();
}"""


class Policy:
    """ASGI middleware: every response tells the browser the POLICY."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                header = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def check_gradio():
    """UserError where gradio is not installed."""
    if find_spec("gradio") is None:
        raise UserError("--web needs gradio, which is not installed: "
                        "pip install -r requirements-extras.txt")


def build(page):
    """The gradio Blocks of a Page."""
    import gradio as gr

    names = " beside ".join(assistant.name for assistant in page.assistants)
    with gr.Blocks(title=f"minisft · {names}", analytics_enabled=False) as blocks:
        talk = gr.State(Talk())
        with gr.Row():
            chats = [gr.Chatbot(label=assistant.description, height="62vh", editable="user",
                                sanitize_html=True, allow_tags=False, buttons=["copy"],
                                elem_id=f"chat{place}")
                     for place, assistant in enumerate(page.assistants)]
        notice = gr.Markdown(elem_id="notice", container=False)
        box = gr.Textbox(placeholder="Ask something", show_label=False, lines=1, max_lines=12,
                         autofocus=True, submit_btn=True, elem_id="box")
        with gr.Row():
            stop, retry, clear, download = (
                gr.Button(label, elem_id=label.lower(), size="sm")
                for label in ("Stop", "Retry", "Clear", "Download"))
        controls = _controls(gr, page)
        saved = gr.Textbox(visible=False)
        _connect(gr, page, talk, chats, notice, box, controls,
                 {"stop": stop, "retry": retry, "clear": clear})
        download.click(page.export, talk, saved, queue=False).then(None, saved, None, js=SAVE)
    return blocks


def _controls(gr, page):
    """The components of system prompt and sampling, in the order in which handlers take them."""
    sampling = page.sampling
    longest = max(assistant.max_length for assistant in page.assistants)
    with gr.Accordion("System prompt and sampling", open=False):
        system = gr.Textbox(page.system, label="System prompt", lines=2, max_lines=12,
                            elem_id="system")
        with gr.Row():
            return [
                system,
                gr.Slider(1, longest, sampling.max_new_tokens, step=1, label="Longest answer",
                          min_width=200),
                gr.Slider(0, 2, sampling.temperature, label="Temperature", min_width=200),
                gr.Slider(0, 200, sampling.top_k, step=1, label="Top k (0: all)", min_width=200),
                gr.Slider(0.01, 1, sampling.top_p, label="Top p (1: all)", min_width=200),
                gr.Slider(0.5, 2, sampling.repetition_penalty, label="Repetition penalty",
                          min_width=200),
                gr.Checkbox(sampling.greedy, label="Greedy"),
                # A Textbox, since a Number that is left empty says 0.
                gr.Textbox("" if sampling.seed is None else str(sampling.seed), elem_id="seed",
                           label="Seed (empty: different each time)"),
            ]


def _connect(gr, page, talk, chats, notice, box, controls, buttons):
    """Tie what visitors do to the methods of the Page."""
    outputs = [*chats, notice, box]

    def flat(view):
        columns, said, text = view
        return [*columns, said, gr.skip() if text is None else text]

    def ask(talk, question, *values):
        yield from map(flat, page.ask(talk, question, *values))

    def retry(talk, *values):
        yield from map(flat, page.retry(talk, *values))

    def edit(event: gr.EditData, talk, *values):
        yield from map(flat, page.edit(talk, event.index, event.value, *values))

    answering = {"outputs": outputs, "concurrency_limit": AT_ONCE, "concurrency_id": "answers",
                 "show_progress": "minimal"}
    box.submit(ask, [talk, box, *controls], api_name="ask", **answering)
    buttons["retry"].click(retry, [talk, *controls], api_name="retry", **answering)
    for chat in chats:
        chat.edit(edit, [talk, *controls], **answering)
    buttons["stop"].click(page.stop, talk, None, api_name="stop", queue=False)
    # The Chatbot's own bin empties what is shown: it means the conversation, as the button does.
    gr.on([buttons["clear"].click, *(chat.clear for chat in chats)],
          lambda talk: flat(page.clear(talk)), talk, outputs, api_name="clear", queue=False)


def launch(page, host, port, password=None, share=False):
    """Start to serve a Page; returns the gradio Blocks, of which `close()` ends it."""
    # Before gradio is imported: it asks its makers' server for its newest version otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from starlette.middleware import Middleware

    def knows_password(name, given):
        return hmac.compare_digest(given.encode(), password.encode())

    blocks = build(page).queue(max_size=QUEUE_SIZE)
    try:
        blocks.launch(
            server_name=host, server_port=port, share=share, quiet=True, footer_links=[],
            auth=knows_password if password else None, auth_message="Any name will do.",
            app_kwargs={"middleware": [Middleware(Policy)]}, prevent_thread_lock=True,
            max_file_size=1, ssr_mode=False, mcp_server=False, pwa=False, run_history=False,
        )
    except OSError as error:
        raise UserError(f"--server_port {port}: cannot be served at on {host} ({error}); choose "
                        "another") from error
    return blocks


def serve(page, host, port, password=None, share=False):
    """Serve a Page until Ctrl-C."""
    blocks = launch(page, host, port, password, share)
    open_to_all = host not in ("127.0.0.1", "localhost", "::1") or share
    if open_to_all and not password:
        print("anyone who can reach this machine can use the page: consider --password",
              file=sys.stderr)
    print(f"{blocks.share_url or blocks.local_url}  (Ctrl-C ends)", file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        blocks.close(verbose=False)
