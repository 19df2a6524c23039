"""The chat template that goes along with a model, for other programs to ask it as it was trained.

    form = conversation_form(tokenizer, "auto", "runs/cherry", listed_stops=2)
    print(form.chat_template, form.stop_ids)
    text = as_jinja(get_template("alpaca", tokenizer))

A model fine-tuned with `--template alpaca` must be asked in that form by whoever runs it, whatever
chat template its base came with, or none. Tools are left to checkpoints' own templates.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from minisft.common.errors import UserError
from minisft.common.outputs import recorded_options
from minisft.text.template import Template, get_template, is_form
from minisft.text.tokenizer import Tokenizer

SKELETON = """\
{%- set system = DEFAULT -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content']STRIP -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- set system = PREFACE + system -%}
{{- BEGIN -}}
{%- if system -%}
{{- SYSTEM -}}
{%- endif -%}
{%- for message in turns -%}
{%- set content = message['content']STRIP -%}
{%- if message['role'] == 'assistant' -%}
{{- ANSWER -}}
{%- else -%}
{%- if not loop.first -%}
{{- BETWEEN -}}
{%- elif system -%}
{%- set content = FIRST -%}
{%- endif -%}
{{- USER -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- ASSISTANT -}}
{%- endif -%}
"""
VARIABLES = {
    "{bos}": "bos_token",
    "{eos}": "eos_token",
    "{content}": "content",
    "{system}": "system",
}
SPACE_BEFORE = "{{ bos_token + ' ' }}"  # before a chat template that leaves BOS to the tokenizer


@dataclass(frozen=True)
class ConversationForm:
    """What a model carries along, for other programs to ask it as it was trained."""

    chat_template: str | None  # Jinja; None where the model has none
    stop_ids: list[int]  # the tokens that end an answer
    is_exact: bool = True  # whether llama.cpp makes the ids of the training of it ...
    writes_space: bool = False  # ... provided that it puts no space before texts by itself


def trained_template(
    name: str, tokenizer: Tokenizer, trained_dir: str | Path, default_system: str | None = None
) -> Template:
    """The template to use with a model, "auto" being the one that train.py used.

    trained_dir: the adapter's or the model's folder, where train.py has left options.toml.
    default_system: the system prompt of conversations that have none; by default that of training.
    """
    trained = recorded_options(trained_dir)
    if name == "auto":
        name = trained.get("template", "auto")
    if default_system is None:
        default_system = trained.get("default_system")
    return get_template(name, tokenizer, default_system)


def conversation_form(tokenizer, name, trained_dir, listed_stops, for_llama_cpp=False):
    """The ConversationForm for a model to carry.

    name: one of our templates, or "auto" for the one that `trained_dir` was trained with by
    train.py, or else the checkpoint's own, which is written as it is. listed_stops: the
    ids that end an answer of the model that was trained, as weights.generation_eos lists them.
    """
    trained = recorded_options(trained_dir)
    name = trained.get("template", "auto") if name == "auto" else name
    default_system = trained.get("default_system")
    try:
        template = get_template(name, tokenizer, default_system)
    except UserError:
        if name != "auto":
            raise
        is_exact = tokenizer.chat_template is None or not _has_one_space(tokenizer)
        return ConversationForm(tokenizer.chat_template, listed_stops, is_exact)
    stop_ids = sorted(template.stop_token_ids(listed_stops))
    if for_llama_cpp:
        return _form_for_llama_cpp(template, default_system, stop_ids)
    return ConversationForm(chat_template_text(template, default_system), stop_ids)


def _form_for_llama_cpp(template, default_system, stop_ids):
    """With a SentencePiece vocabulary llama.cpp puts spaces everywhere or nowhere.

    Either before every text at the beginning and behind a control token, or before none. Where the
    training had one at the beginning only, none is right, and the chat template writes that one.
    """
    tokenizer, form = template.tokenizer, template.form
    if not (_has_one_space(tokenizer) and text_follows_control(template)):
        text = chat_template_text(template, default_system, puts_space=True)
        return ConversationForm(text, stop_ids)
    text = chat_template_text(template, default_system)
    if form.control:  # begins with one, not with text
        return ConversationForm(text, stop_ids, writes_space=True)
    if tokenizer.bos_token_id is None or not (template.writes_bos or tokenizer.add_bos_token):
        return ConversationForm(text, stop_ids, is_exact=False)
    if text == tokenizer.chat_template:
        own = text.removeprefix(SPACE_BEFORE)
        text = as_jinja(template) if "bos_token" in own else SPACE_BEFORE + own
    return ConversationForm(text, stop_ids, writes_space=True)


def _has_one_space(tokenizer):
    """Whether there is a space before a text, but none behind control tokens."""
    return tokenizer.leading_space and not tokenizer.prefix_after_special


def text_follows_control(template):
    """Whether prompts have text directly behind a control token that is not BOS: `</s>\n`."""
    words = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    controls = set(template.control_ids.values())
    return any(
        id in controls - {template.tokenizer.bos_token_id} and following not in controls
        for id, following in pairwise(template.encode_prompt(words))
    )


def chat_template_text(template, default_system=None, puts_space=False):
    """The checkpoint's own chat template where it is this form, else the form in Jinja.

    default_system: the system prompt that the training was told to use, if any. puts_space: see
    as_jinja.
    """
    own = template.tokenizer.chat_template
    if default_system is None and is_form(own, template.name):
        return own
    return as_jinja(template, puts_space)


def as_jinja(template, puts_space=False):
    """The Jinja text that renders what `template.encode` encodes, for messages without tools.

    BOS included, also where only the tokenizer puts it: most programs that render a chat template
    add none, and llama.cpp looks whether there is one. puts_space: whether the program puts
    SentencePiece's leading space behind BOS by itself; transformers does so only with tokenizers
    that put one behind every control token.
    """
    form, variables = template.form, _variables(template, puts_space)

    def expression(pattern):
        """`[INST] {content}` -> `"[INST] " + content`."""
        parts = re.split("(" + "|".join(map(re.escape, variables)) + ")", pattern)
        parts = [
            variables.get(part, part and json.dumps(part, ensure_ascii=False)) for part in parts
        ]
        return " + ".join(part for part in parts if part) or '""'

    adds_bos = template.tokenizer.add_bos_token and not template.writes_bos
    default = template.default_system
    default = form.default_system if default is None else default
    parts = {
        "DEFAULT": json.dumps(default, ensure_ascii=False),
        "PREFACE": json.dumps(template.preface),
        "STRIP": " | trim" if form.strip else "",
        "BEGIN": expression("{bos}" * adds_bos + form.begin),
        "SYSTEM": expression(form.system.replace("{content}", "{system}")),
        "ANSWER": expression(form.assistant + form.answer + form.after),
        "BETWEEN": expression(form.between),
        "FIRST": expression(form.system_in_user.replace("{content}", "{system}") + "{content}"),
        "USER": expression(form.user),
        "ASSISTANT": expression(form.assistant),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], SKELETON)


def _variables(template, puts_space):
    """{field of a Format: what it is in Jinja}."""
    tokenizer = template.tokenizer
    if tokenizer.bos_token_id is None:
        return {**VARIABLES, "{bos}": ""}
    puts_space = puts_space or tokenizer.prefix_after_special
    if tokenizer.leading_space and not puts_space and not template.form.control:
        return {**VARIABLES, "{bos}": 'bos_token + " "'}
    return VARIABLES
