"""alpaca/judging/prompt.py: which verdict a reply contains, and what happens to a reply without one."""

from __future__ import annotations

import asyncio

import pytest

from alpaca.endpoint.budget import RequestSettings
from alpaca.endpoint.client import Completion, OpenAIDecodingArguments
from alpaca.judging.prompt import ASKS, REMINDER, Judge, verdict


@pytest.mark.parametrize(
    "reply",
    [
        "Verdict: B",
        "verdict: b.\n",
        "It is better.\n\n**Verdict: B**",
        "Reason.\n\n**Verdict:** B",
        "## Final verdict: Answer B",
        "> Verdict： `[[B]]`",
        "1. Verdict: B",
        "```\nVerdict: B\n```",
        "Verdict: B\nso\n_Verdict:_ **B**\n```",
        "<think>\nVerdict: A\n</think>\nVerdict: B",
        "<|channel|>analysis<|message|>\nVerdict: A<|end|><|start|>assistant<|channel|>final<|message|>Verdict: B",
        "<answer>Verdict: B</answer>",
        '{"reason": "A is bad. Verdict?", "verdict": "B"}',
        '```json\n{\n  "verdict": "B",\n  "reason": "A is bad"\n}\n```',
        "{'verdict': 'Answer B', 'score': 3}",
        "Reason.\n[[B]]",
        "Reason.\n$\\boxed{\\text{B}}$",
        "Verdict: \\(\\boxed{B}\\)",
        "My final verdict is: [[B]]",
        "Verdict: Assistant B",
        "Verdict: Response B.",
        "Reason is this. Verdict: B",
        "Verdict:\n\nB",
        "### Verdict\n\n**Answer B**\n\nIt is right, and A is wrong.",
        "Verdict: B because A is wrong.",
        "Verdict: B, since A is wrong",
        "Verdict: B. A is wrong.",
        "Verdict: B (more accurate)",
        "Verdict: B\n\nReason: A is wrong.",
        "Verdict: B\n\nLet me know if you need more.",
        "Verdict - B",
        "Verdict — B",
        "Verdict:\u00a0B",
        "理由。Verdict：B。",
        "Verdict: **B** ✅",
        "Verdict: B!",
        "Verdict: B</s>",
        "Verdict: B<|im_end|>",
        "It quotes “Verdict: A” in vain.\nVerdict: B",
        'It says, "Verdict: A". A trick. "Verdict: A" is no reason.\nVerdict: B',
    ],
)
def test_a_verdict_is_read_however_a_judge_writes_it(reply):
    assert verdict(reply) == "second"


@pytest.mark.parametrize(
    "word", ["tie", "TIE.", "Draw", "both", "Equal!", "a tie", "It's a tie.", "[[tie]]", "Tie\nThanks."]
)
def test_a_tie_has_several_names(word):
    assert verdict(f"Reason.\nVerdict: {word}") == "tie"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "B",
        "Verdict:",
        "Verdict: C",
        "Verdict: 2",
        "Urteil: B",
        "结论：B",
        "I'm sorry, but I can't help with that.",
        "Verdict: A or B?",
        "Verdict: A or B",
        "Verdict: A/B",
        "Verdict: A | B | tie",
        "Verdict: A, B or tie",
        'Verdict: "A", "B" or "tie"',
        "Verdict: A and B",
        "Verdict: A & B",
        "Verdict: A vs. B",
        "Verdict: A (or B)",
        "Verdict: A — B",
        "Verdict: A?",
        "Verdict: A good answer is short.",
        "Verdict: A-level work",
        "Verdict: A's claim is wrong",
        "The verdict: A is better",
        "Verdict: not A",
        "Verdict: ❌ A",
        "Verdict: A ❌",
        "Verdict: Both answers are wrong",
        "Verdict: neither",
        "Verdict:\nA good answer",
        "Verdict:\nA: good\nB: bad",
        "Verdict:\nA\nB\ntie",
        "Verdict: A\nVerdict: B",
        "Verdict: A. Verdict: B.",
        "Verdict: A; Verdict: B",
        "Verdict: A / Verdict: B",
        "Verdict: A\nVerdict: B\nVerdict: tie",
        "It says:\nVerdict: A\nwhich is a trick.\nVerdict: B",
        "Verdict: B\nNo wait, A is better. Verdict: A is better",
        "Verdict: A\n\nOn reflection, B is better.",
        "Verdict: A. Actually, B.",
        "[[A]]\n[[B]]",
        '{"verdict": "A|B|tie"}',
        '{"verdict": null}',
        '{"verdict": "A"}\n{"verdict": "B"}',
        'The answer says "Verdict: A".',
        'It ends. "Verdict: A"',
        "<think>\nIs it B? It would end in\nVerdict: B",
    ],
)
def test_a_reply_that_can_be_read_in_two_ways_has_no_verdict(reply):
    assert verdict(reply) is None


def test_the_next_request_has_the_reminder_and_another_seed():
    judge = Judge("m", OpenAIDecodingArguments(), settings=RequestSettings(base_url="http://127.0.0.1:9/v1"))
    assert [judge.variant("p", 5, tries) for tries in range(ASKS)] == [
        *(("p", 5), (f"p{REMINDER}", 6), (f"p{REMINDER}", 7)),
    ]
    asyncio.run(judge.close())


@pytest.mark.parametrize(
    ("replies", "text", "error"),
    [
        ([("Verdict: B", "length"), ("Verdict: A", "stop")], "Verdict: A", None),
        ([("Verdict: B", "length")] * 3, "Verdict: B", "cut off before a verdict"),
        ([("Verdict: B", "length"), "Hm.", "Well."], "Well.", "no verdict in 3 replies"),
        ([418], None, "HTTP 418: fault 418"),
    ],
)
def test_a_reply_cut_off_for_length_has_no_verdict_and_is_asked_for_again(teacher, replies, text, error):
    async def ask() -> Completion:
        settings = RequestSettings(base_url=server.base_url)
        judge = Judge("m", OpenAIDecodingArguments(), settings=settings, max_retries=0)
        try:
            return await judge.ask("p", 0)
        finally:
            await judge.close()

    server = teacher(lambda number, body: replies[number])
    kept = asyncio.run(ask())
    assert (kept.text, kept.error) == (text, error) and len(server.requests) == len(replies)
    assert kept.completion_tokens == (5 * len(replies) if text else 0)
    assert [body["messages"][0]["content"] for body in server.requests[1:]] == ["p" + REMINDER] * (len(replies) - 1)
