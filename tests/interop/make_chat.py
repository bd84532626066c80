#!/usr/bin/env python3
"""Makes the fixture of chat templates: what transformers renders of conversations, and which characters it calls the
assistant's.

    python3 -m venv .venv && .venv/bin/pip install transformers jinja2
    .venv/bin/python tests/interop/make_chat.py node/tests/fixtures/chat.json

The templates are small ones of our own in the manner of each family: ChatML, Llama 3 headers with a date, Mistral
brackets that refuse turns out of order, Phi tags, and one with generation blocks.
"""
import datetime
import json
import pathlib
import sys

from transformers.utils import chat_template_utils as utils

NOW = datetime.datetime(2026, 3, 7, 15, 4, 5)


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


utils.datetime = Frozen

TEMPLATES = {
    "chatml": """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "headers": """{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- set ns = namespace(system='', first=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content']|trim %}
    {%- set ns.first = 1 %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages[ns.first:] %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
""",
    "brackets": """{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}""",
    "tags": """{% for message in messages %}
  {% if message['content'] %}
{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '<|end|>\\n' }}
  {%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "generation": """{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|a|>' }}
    {%- set parts = message.content.split('</think>') %}
    {% generation %}
    {{- parts[-1].lstrip('\\n') + '<|e|>' }}
    {% endgeneration %}

  {%- elif loop.first and message.role == 'system' %}
    {{- message | tojson }}
    {{- message | tojson(indent=2) }}
    {%- continue %}
  {%- else %}
    {{- '<|u|>' + message.content.replace('x', 'y').upper() + '<|e|>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|a|>' }}{%- endif %}""",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def turn(role, content):
    return {"role": role, "content": content}


TALKS = [
    [turn("user", "  What is 2 + 2? <&>\n"), turn("assistant", "4, \u00e9\u6f22")],
    [turn("system", "Be \"brief\".\n"), turn("user", "x?"), turn("assistant", "<think>hm</think>\n\nyes"),
     turn("user", "why"), turn("assistant", "so \U0001f600")],
    [turn("user", "only asked")],
    [turn("user", ""), turn("assistant", "one"), turn("user", "two")],
]


def render(template, talk, add):
    (text,), (marks,) = utils.render_jinja_template(
        conversations=[talk], chat_template=template, return_assistant_tokens_mask=True, add_generation_prompt=add,
        **SPECIAL)
    return text, [[len(text[:a].encode()), len(text[:b].encode())] for a, b in marks]


def case(template, talk, add):
    made = {"messages": talk, "add_generation_prompt": add}
    try:
        made["text"], marks = render(template, talk, add)
        if "generation %}" in template:
            made["assistant"] = marks
    except Exception as error:  # what the template says is what matters
        made["error"] = str(error)
    return made


if __name__ == "__main__":
    fixture = {
        "now_millis": int(NOW.replace(tzinfo=datetime.timezone.utc).timestamp() * 1000),
        "special": SPECIAL,
        "templates": [{"name": name, "template": template,
                       "cases": [case(template, talk, add) for talk in TALKS for add in (False, True)]}
                      for name, template in TEMPLATES.items()],
    }
    pathlib.Path(sys.argv[1]).write_text(json.dumps(fixture, indent=1, ensure_ascii=False) + "\n")
