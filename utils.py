"""The prompt and the records, under the names that users of the original import from here."""

from alpaca.common.files import read_text, replace_file
from alpaca.common.records import jdump, jload, json_text, load_records, load_seed_tasks
from alpaca.prompts import PROMPT_DICT, format_prompt

__all__ = [
    "PROMPT_DICT",
    "format_prompt",
    "jdump",
    "jload",
    "json_text",
    "load_records",
    "load_seed_tasks",
    "read_text",
    "replace_file",
]
