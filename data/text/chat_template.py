"""The chat template of a Hugging Face folder: conversations in the released form, in Jinja.

transformers, vLLM and SGLang render it from messages in OpenAI's form. Its text is that of
`data.text.dsml.render`, bos before it.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from data.files import write_atomically
from data.storage import AnyPath
from data.text.prompts import OWN_PROMPTS, Prompts
from data.text.segments import (
    ASSISTANT,
    DSML,
    END_THINK,
    EXTRACTED_URL,
    REMINDER,
    TASK_TOKENS,
    THINK,
    USER,
)
from data.text.tokenizer import HF_CONFIG_FILE, Tokenizer

CHAT_TEMPLATE_FILE = "chat_template.jinja"
_TOKENS = frozenset(
    {USER, ASSISTANT, THINK, END_THINK, DSML, REMINDER, EXTRACTED_URL, *TASK_TOKENS.values()}
)


def chat_template(prompts: Prompts = OWN_PROMPTS) -> str:
    """Returns the template with these prompt texts.

    Where text spells a special token, a tokenizer reads the token: a template has one string, in
    which the two are the same.
    """
    tools_before, tools_after = prompts.around_tools
    schema_before, schema_after = prompts.around_schema
    texts = {
        "max_effort": prompts.before_all,
        "tools_before": tools_before,
        "tools_after": tools_after,
        "schema_before": schema_before,
        "schema_after": schema_after,
    }
    assigned = (f"{{%- set {name} = {_literal(parts)} -%}}\n" for name, parts in texts.items())
    return "".join(assigned) + Path(__file__).with_name(CHAT_TEMPLATE_FILE).read_text("utf-8")


def export_chat_template(tokenizer: Tokenizer, folder: AnyPath, prompts: Prompts) -> None:
    """Writes the template next to a tokenizer's files.

    An imported tokenizer keeps its own. Without the special tokens of conversations there is none.
    """
    own = tokenizer.path.with_name(CHAT_TEMPLATE_FILE)
    if tokenizer.path.suffix == ".json" and own.is_file():
        write_atomically(folder / CHAT_TEMPLATE_FILE, own.read_bytes())
    elif {*tokenizer.special} >= _TOKENS and not _has_template(folder / HF_CONFIG_FILE):
        write_atomically(folder / CHAT_TEMPLATE_FILE, chat_template(prompts).encode())


def _has_template(path: AnyPath) -> bool:
    """Whether a tokenizer_config.json has a template in it."""
    return bool(json.loads(path.read_text("utf-8")).get("chat_template"))


def _literal(segments: Iterable[str]) -> str:
    """Returns a string literal of Jinja, whose escapes are those of JSON for ASCII characters."""
    return json.dumps("".join(segments), ensure_ascii=False)
