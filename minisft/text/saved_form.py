"""What a saved model tells other programs about its conversations.

    form = saved_form(tokenizer, "auto", "runs/cherry", listed_stops=[2])
    print(form.chat_template, form.stop_ids)

A model that was fine-tuned with `--template alpaca` must be prompted in this form by every program,
whatever chat template its base has.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from minisft.common.outputs import recorded_options
from minisft.text.chat_template import ChatTemplate
from minisft.text.template_choice import setting, trained_template
from minisft.text.tokenizer import Tokenizer

# Writes SentencePiece's leading space, where llama.cpp may not add it.
WRITE_SPACE = "{{- ' ' -}}"


@dataclass(frozen=True)
class SavedForm:
    """How other programs prompt a model.

    chat_template: Jinja, or None. stop_ids: the tokens that end an answer. adds_bos: True if
    llama.cpp must add BOS. writes_space: the chat template writes SentencePiece's leading space, so
    llama.cpp must not add it.
    """

    chat_template: str | None
    stop_ids: list[int]
    adds_bos: bool
    writes_space: bool = False


def saved_form(
    tokenizer: Tokenizer, name: str, trained_dir: str | Path, listed_stops: list[int]
) -> SavedForm:
    """The form of a folder for transformers and vLLM.

    name: a template; "auto" is that of the training, else the checkpoint's own. listed_stops: the
    stop tokens of generation_config.json.
    """
    if name == "auto" and not tokenizer.chat_template and not recorded_options(trained_dir):
        return SavedForm(None, listed_stops, tokenizer.add_bos_token)
    template = trained_template(name, tokenizer, trained_dir)
    stop_ids = sorted(template.stop_token_ids(listed_stops))
    bos = template.bos_token
    adds_bos = bool(bos) and template.facts.prompt.startswith(bos)
    return SavedForm(saved_text(template), stop_ids, adds_bos)


def saved_text(template: ChatTemplate) -> str:
    """The template's text, asking for no thoughts by default if the training did not."""
    if template.facts.has_thinking_switch and not template.enable_thinking:
        line = setting("enable_thinking", False)
        return template.text if template.text.startswith(line) else line + template.text
    return template.text


def saved_form_for_llama_cpp(
    tokenizer: Tokenizer, name: str, trained_dir: str | Path, listed_stops: list[int]
) -> SavedForm:
    """The form of a GGUF file.

    With SentencePiece, llama.cpp adds a space to all text after a control token, or never. If the
    training had a space only at the start, the chat template writes it and llama.cpp adds none.
    """
    form = saved_form(tokenizer, name, trained_dir, listed_stops)
    if form.chat_template is None or not has_space_only_at_start(tokenizer):
        return form
    template = trained_template(name, tokenizer, trained_dir)
    if not text_follows_control(template):
        return form
    text = form.chat_template
    if not template.tokens.find(template.facts.prompt)[:1] or (
        template.tokens.find(template.facts.prompt)[0].start > 0
    ):
        text = WRITE_SPACE + text
    return replace(form, chat_template=text, writes_space=True)


def has_space_only_at_start(tokenizer: Tokenizer) -> bool:
    """True if a text gets a leading space, but not after special tokens."""
    return tokenizer.leading_space and not tokenizer.prefix_after_special


def text_follows_control(template: ChatTemplate) -> bool:
    """True if text stands directly behind a control token: `</s>\\n`."""
    words = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    controls = set(template.tokens.ids.values())
    return any(
        id in controls and following not in controls
        for id, following in pairwise(template.encode_prompt(words))
    )
