"""The chat template that goes along with a model, for other programs to ask it as it was trained.

    text, stop_ids = conversation_form(tokenizer, "auto", "runs/cherry", listed_stops=2)
    text = as_jinja(get_template("alpaca", tokenizer))

A model fine-tuned with `--template alpaca` must be asked in that form by whoever runs it, whatever
chat template its base came with, or none. Tools are left to checkpoints' own templates.
"""

import json
import re

from minisft.options import UserError, recorded_options
from minisft.template import get_template, is_form

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
VARIABLES = {"{bos}": "bos_token", "{eos}": "eos_token", "{content}": "content",
             "{system}": "system"}


def conversation_form(tokenizer, name, trained_dir, listed_stops, for_llama_cpp=False):
    """(the chat template for a model to carry, None if it has none; the ids that end an answer).

    name: one of our templates, or "auto" for the one that `trained_dir` was trained with by
    train.py, or else the checkpoint's own, which is written as it is. listed_stops: the
    ids that end an answer of the model that was trained, as weights.generation_eos lists them.
    for_llama_cpp: see as_jinja.
    """
    trained = recorded_options(trained_dir)
    name = trained.get("template", "auto") if name == "auto" else name
    default_system = trained.get("default_system")
    try:
        template = get_template(name, tokenizer, default_system)
    except UserError:
        if name != "auto":
            raise
        return tokenizer.chat_template, listed_stops
    stop_ids = sorted(template.stop_token_ids(listed_stops))
    return chat_template_text(template, default_system, for_llama_cpp), stop_ids


def chat_template_text(template, default_system=None, for_llama_cpp=False):
    """The checkpoint's own chat template where it is this form, else the form in Jinja.

    default_system: the system prompt that the training was told to use, if any.
    """
    own = template.tokenizer.chat_template
    if default_system is None and is_form(own, template.name):
        return own
    return as_jinja(template, for_llama_cpp)


def as_jinja(template, for_llama_cpp=False):
    """The Jinja text that renders what `template.encode` encodes, for messages without tools.

    BOS included, also where only the tokenizer puts it: most programs that render a chat template
    add none, and llama.cpp looks whether there is one. Behind it llama.cpp puts the leading space
    of SentencePiece by itself; transformers does so only with tokenizers that put one behind every
    control token.
    """
    form, variables = template.form, _variables(template, for_llama_cpp)

    def expression(pattern):
        """`[INST] {content}` -> `"[INST] " + content`."""
        parts = re.split("(" + "|".join(map(re.escape, variables)) + ")", pattern)
        parts = [variables.get(part, part and json.dumps(part, ensure_ascii=False))
                 for part in parts]
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


def _variables(template, for_llama_cpp):
    """{field of a Format: what it is in Jinja}."""
    tokenizer = template.tokenizer
    if tokenizer.bos_token_id is None:
        return {**VARIABLES, "{bos}": ""}
    puts_space = for_llama_cpp or tokenizer.prefix_after_special
    if tokenizer.leading_space and not puts_space and not template.form.control:
        return {**VARIABLES, "{bos}": 'bos_token + " "'}
    return VARIABLES
