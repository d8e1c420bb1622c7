"""Chat templates in the manner of model families, and what each makes a model generate for an answer."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

from tokenizers import AddedToken

HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% set thought = '' %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
)
NO_SYSTEM = "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + ALTERNATE


def thinking(content: str) -> str:
    thought, found, text = content.rpartition("</think>")
    thought, text = (thought.split("<think>")[-1], text) if found else ("", content)
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + text.lstrip("\n")


def same(content: str) -> str:
    return content


@dataclass
class Family:
    """A template, its special tokens, what is generated for an answer's content, and the token that ends it."""

    template: str
    generated: Callable[[str], str]
    end: str | None  # None: the tokenizer's own EOS
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()  # added tokens that are not special
    system: bool = True  # whether it takes a system text
    rstrip: bool = False  # its special tokens take the white space behind them along

    def on(self, tokenizer):
        """A copy of the tokenizer with this template and its tokens; EOS is what it was."""
        made = deepcopy(tokenizer)
        new = [AddedToken(name, special=True, rstrip=self.rstrip, normalized=False) for name in self.special]
        made.add_special_tokens({"additional_special_tokens": new}) if new else None
        made.add_tokens([AddedToken(name, special=False, normalized=False) for name in self.plain])
        made.chat_template = self.template
        return made


FAMILIES = {
    "llama 3": Family(
        "{{ '<|begin_of_text|>' }}"
        "{% for m in messages %}{{ " + HEADER + " + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        str.strip,
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen 2.5": Family(
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}" + CHATML,
        same,
        "<|im_end|>",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "qwen 3": Family(QWEN3, thinking, "<|im_end|>", ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>")),
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}"
        "{% endfor %}",
        lambda content: " " + content.strip(),
        None,
        system=False,
    ),
    "llama 2": Family(  # a space before the end as well
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
        "{% else %}{{ bos_token }}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}{% endfor %}",
        lambda content: " " + content.strip() + " ",
        None,
        system=False,
    ),
    "phi 3": Family(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        same,
        "<|end|>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        rstrip=True,
    ),
    "gemma": Family(
        "{{ bos_token }}{% for m in messages %}" + NO_SYSTEM + "{{ '<start_of_turn>' + ('model' if m['role'] == "
        "'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        str.strip,
        "<end_of_turn>",
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "gpt-oss": Family(
        "{% for m in messages %}{{ '<|start|>' + m['role'] }}{{ '<|channel|>final' if m['role'] == 'assistant' }}"
        "{{ '<|message|>' + m['content'] }}"
        "{{ '<|return|>' if m['role'] == 'assistant' and loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        lambda content: "<|channel|>final<|message|>" + content,
        "<|return|>",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    ),
    "plain": Family(  # no special token at all
        "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
        same,
        None,
    ),
}
