"""One of our templates as a chat template in Jinja: what programs that run a GGUF file render.

    text = as_jinja(get_template("alpaca", tokenizer))

A model fine-tuned with `--template alpaca` must be asked in that form by whoever runs it, whatever
chat template its base came with, or none. Tools are left to checkpoints' own templates.
"""

import json
import re

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


def as_jinja(template):
    """The Jinja text that renders what `template.render` does, for messages without tools."""
    form = template.form
    default = template.default_system
    default = form.default_system if default is None else default
    parts = {
        "DEFAULT": json.dumps(default, ensure_ascii=False),
        "PREFACE": json.dumps(template.preface),
        "STRIP": " | trim" if form.strip else "",
        "BEGIN": _expression(form.begin),
        "SYSTEM": _expression(form.system.replace("{content}", "{system}")),
        "ANSWER": _expression(form.assistant + form.answer + form.after),
        "BETWEEN": _expression(form.between),
        "FIRST": _expression(form.system_in_user.replace("{content}", "{system}") + "{content}"),
        "USER": _expression(form.user),
        "ASSISTANT": _expression(form.assistant),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], SKELETON)


def _expression(pattern):
    """`[INST] {content}` -> `"[INST] " + content`."""
    parts = re.split("(" + "|".join(map(re.escape, VARIABLES)) + ")", pattern)
    return " + ".join(VARIABLES.get(part) or json.dumps(part, ensure_ascii=False)
                      for part in parts if part) or '""'
