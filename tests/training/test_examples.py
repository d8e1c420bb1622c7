"""examples.py: the label rule against the original's, and a cache that is whole, shared, and keyed by content."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
import unicodedata
from copy import deepcopy

import pytest
from conftest import ROOT, make_records
from made_templates import FAMILIES, Family, same
from made_tokenizers import sentencepiece_in, shipped
from oracles_train import rows_one_by_one, tokenize_one_by_one

import train
import utils
from alpaca import UserError
from alpaca.chat_template import chat_ids, chat_template, mark_trained
from alpaca.inference.load import load_tokenizer
from alpaca.prompts import answer_ids
from alpaca.training import examples

# What may merge with the colon, or the text, that ends a prompt.
AWKWARD = [
    "-",
    ":",
    ")",
    "\n",
    "\n\n",
    " ",
    "  x",
    "\t",
    "...",
    "é",
    "日本",
    "🙂",
    "\u0301",
    "0",
    "'s",
    ".",
    "//",
    "=>",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_half_a_character_is_refused_with_its_records_number(tokenizer):
    """JSON can spell it, as "\\ud83d"; it is no text, and a tokenizer ends with a traceback."""
    records = make_records(2) + [{"instruction": "Say it.", "input": "", "output": "x\ud83dy"}]
    with pytest.raises(UserError, match=r"training record 3 contains '\\ud83d', half of a surrogate pair: remove it"):
        examples.SupervisedDataset(records, tokenizer, 512, "training")


def two_thousand_rows() -> list[dict]:
    """The shipped records, the seed tasks, and answers, inputs and instructions with awkward ends and beginnings."""
    records = shipped()
    for line in (ROOT / "seed_tasks.jsonl").read_text().splitlines():
        task = json.loads(line)
        records += [{"instruction": task["instruction"], **instance} for instance in task["instances"]]
    for i, record in enumerate(records[:800]):
        text = AWKWARD[i % len(AWKWARD)]
        where = ("output", "input", "instruction")[i // len(AWKWARD) % 3]
        new = record[where][:60] + text if where != "output" else text + record[where][:60]
        records.append(record | {where: new})
    return records + [{"instruction": f"Say {text}", "input": "", "output": text} for text in [*AWKWARD, ""]]


KINDS = ("", "llama_", "mistral_", "opt_", "smollm2_", "gpt4_", "llama3_", "qwen_")


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_the_prompt_as_chat_asks_it_then_the_answer_and_eos(kind, request):
    """… and equals the original's two-pass rule wherever no token spans prompt and answer."""
    tokenizer = request.getfixturevalue(f"{kind}tokenizer")
    records, spans = two_thousand_rows(), 0
    assert len(records) >= 2000
    prompts = [utils.format_prompt(record["instruction"], record["input"]) for record in records]
    wholes = [prompt + record["output"] + tokenizer.eos_token for prompt, record in zip(prompts, records, strict=True)]
    rows = [
        *(tokenizer(texts)["input_ids"] for texts in (prompts, wholes)),
        examples.preprocess(records, tokenizer, 10**6),
    ]
    for record, prompt, whole, example in zip(records, *rows, strict=True):
        ids, labels, n = example["input_ids"], example["labels"], len(prompt)
        assert ids[:n] == prompt and labels == [-100] * n + ids[n:], record
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[n:-1]
        if kind not in ("llama_", "mistral_"):  # whose decoders remove a space in front
            answer = record["output"] if kind != "qwen_" else unicodedata.normalize("NFC", record["output"])
            assert tokenizer.decode(ids[n:-1]) == answer
        if whole[:n] == prompt:
            assert ids == whole, record
        else:
            spans += 1
    assert spans > 100 or not kind  # else the rows do not show the fault that the rule is for


def test_a_special_token_that_the_merges_can_build_stays_text(tmp_path):
    """With "</" and "s>" in a vocabulary, transformers' merges make </s> of them, sentencepiece does not."""
    import sentencepiece
    from transformers import AutoTokenizer

    texts = [f"{a}s> {b}</{a}" for a in "abcdefghijklmnopqrtuvwxyz" for b in "abcdefghi"]
    folder = sentencepiece_in(tmp_path, texts, split_by_unicode_script=False)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    built = AutoTokenizer.from_pretrained(folder)("a</s>", add_special_tokens=False, split_special_tokens=True)
    assert 2 in built["input_ids"]  # else there is nothing to show

    tokenizer = load_tokenizer(folder)
    record = {"instruction": "Strike <s>this</s> out.", "input": "</s>", "output": "x</s> ends </s>"}
    prompt = [1, *processor.encode(utils.format_prompt(record["instruction"], record["input"]))]
    answer = processor.encode(f"### Response:{record['output']}")[len(processor.encode("### Response:")) :]
    [example] = examples.preprocess([record], tokenizer, 512)
    assert example == {"input_ids": [*prompt, *answer, 2], "labels": [-100] * len(prompt) + [*answer, 2]}

    tokenizer.save_pretrained(tmp_path / "trained")
    served = AutoTokenizer.from_pretrained(tmp_path / "trained")  # by whatever serves it
    assert examples.preprocess([record], served, 512) == [example]


@pytest.mark.parametrize(("count", "seed"), [(0, 1), (1, 0), (7, 42), (107, 42), (1074, 3), (1075, 4)])
def test_without_copies_the_records_held_out_are_those_of_old_runs(count, seed):
    """… whose checkpoints would else go on with other data."""
    records = shipped()
    chosen = sorted(random.Random(seed).sample(range(1, len(records) + 1), count))
    kept, held_out = examples.hold_out(records, count, seed)
    assert held_out.numbers == chosen and kept.numbers == sorted(set(range(1, 1076)) - set(chosen))
    assert held_out == [records[number - 1] for number in chosen]


@pytest.mark.parametrize(
    ("copies", "count", "expected"),
    [
        ([4] * 25, 20, 20),  # each record four times
        ([4] * 25, 21, 20),
        ([4] * 25, 23, 24),
        ([4] * 25, 1, 4),  # some must be held out
        ([4] * 25, 99, 96),  # some must be kept
        ([30, *[1] * 70], 20, 20),
        ([30, *[1] * 70], 60, 60),
    ],
)
def test_copies_of_one_record_go_to_the_same_side(copies, count, expected):
    records = []
    for task, times in enumerate(copies):
        spellings = [f"Say {task}, please.", f"say  {task}, PLEASE.\n"]
        records += [{"instruction": spellings[i % 2], "input": "", "output": f"{i}"} for i in range(times)]
    random.Random(0).shuffle(records)

    def tasks(side):
        return {record["instruction"].split(",")[0].lower().split()[1] for record in side}

    drawn = []
    for seed in (*range(20), 0):
        kept, held_out = examples.hold_out(records, count, seed)
        assert sorted(kept.numbers + held_out.numbers) == list(range(1, 101))
        assert len(held_out) == expected and tasks(kept).isdisjoint(tasks(held_out))
        drawn.append(tasks(held_out))
    assert drawn[0] == drawn[-1] and len(set(map(frozenset, drawn))) > 5


def test_a_long_example_is_cut_where_the_original_cuts_it(tokenizer):
    for record, example in zip(records := shipped()[:50], examples.preprocess(records, tokenizer, 100), strict=True):
        assert example == tokenize_one_by_one(record, tokenizer, 100)


def rows(records, tokenizer, max_length=512):
    return examples.load_tokens(records, tokenizer, max_length).to_list()


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """How many records each call of `preprocess` got."""
    calls, real = [], examples.preprocess

    def counted(records, *rest):
        calls.append(len(records))
        return real(records, *rest)

    monkeypatch.setattr(examples, "preprocess", counted)
    return calls


def test_the_same_content_is_tokenized_once(tokenizer, tokenized):
    first = rows(make_records(30), tokenizer)
    assert rows(make_records(30), tokenizer) == first
    assert tokenized == [30]
    assert [{key: row[key] for key in ("input_ids", "labels")} for row in first] == examples.preprocess(
        make_records(30), tokenizer, 512
    )


def test_what_a_call_of_the_tokenizer_leaves_behind_does_not_matter(tokenizer, tokenized):
    rows(make_records(5), tokenizer)
    tokenizer("some text", max_length=3, truncation=True)  # stays in the tokenizer's state
    rows(make_records(5), tokenizer)
    assert tokenized == [5]


def test_another_maximum_record_tokenizer_or_rule_is_tokenized_again(
    tokenizer, llama_tokenizer, tokenized, monkeypatch
):
    records = make_records(5)
    rows(records, tokenizer)
    rows(records, tokenizer, max_length=200)
    rows([*records[:4], records[4] | {"output": records[4]["output"] + "."}], tokenizer)
    rows(records[:4], tokenizer)
    rows(records, llama_tokenizer)
    monkeypatch.setattr(examples, "RULE_VERSION", examples.RULE_VERSION + 1)
    rows(records, tokenizer)
    assert tokenized == [5, 5, 5, 4, 5, 5]


def test_moving_text_from_the_instruction_to_the_output_is_other_content(tokenizer):
    a = {"instruction": "Say", "input": "", "output": "ab"}
    b = {"instruction": "Say", "input": "", "output": "a"}
    keys = [examples.content_key(records, tokenizer, 512) for records in ([a], [b], [a, b], [b, a])]
    assert len(set(keys)) == 4


def test_records_that_are_tokenized_a_thousand_at_a_time_keep_their_order_and_numbers(tokenizer, tokenized):
    found = rows(make_records(2500), tokenizer)
    assert tokenized == [1000, 1000, 500]
    assert [row["record"] for row in found] == list(range(1, 2501))
    assert [row["input_ids"] for row in found] == [
        example["input_ids"] for example in examples.preprocess(make_records(2500), tokenizer, 512)
    ]


def test_a_cache_whose_maker_is_killed_is_not_there_and_is_made_again(tokenizer, tokenized):
    """SIGKILL after the first 1,000 of 1,500 records are written."""
    records = make_records(1500)

    def killed():
        real, calls = examples.preprocess, []

        def preprocess(*arguments):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        examples.preprocess = preprocess
        examples.load_tokens(records, tokenizer, 512)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    [unfinished] = examples.cache_folder().rglob("*.arrow")
    assert unfinished.parent.name.endswith(".incomplete")  # it was at work
    assert len(rows(records, tokenizer)) == 1500 and tokenized == [1000, 500]
    [finished] = examples.cache_folder().rglob("*.arrow")  # and what it left is gone
    assert examples.content_key(records, tokenizer, 512) in finished.parent.parent.name


def test_of_two_processes_at_once_one_tokenizes_and_the_other_waits(tokenizer, tmp_path):
    records, context = make_records(20), multiprocessing.get_context("fork")
    barrier = context.Barrier(2)

    def rank(number):
        real = examples.preprocess

        def slow(*arguments):
            (tmp_path / f"tokenized-{number}").touch()
            time.sleep(0.5)
            return real(*arguments)

        examples.preprocess = slow
        barrier.wait(30)
        (tmp_path / f"rows-{number}").write_text(str(len(examples.load_tokens(records, tokenizer, 512))))

    ranks = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("tokenized-*"))) == 1
    assert [path.read_text() for path in tmp_path.glob("rows-*")] == ["20", "20"]


def test_records_that_are_cut_or_left_out_are_known_by_their_numbers(tokenizer):
    records = [
        {"instruction": "Say x.", "input": "", "output": "x"},
        {"instruction": "word " * 400, "input": "", "output": "x"},
        {"instruction": "Count.", "input": "", "output": "one two three " * 100},
        {"instruction": "Say y.", "input": "", "output": "y"},
    ]
    dataset = examples.SupervisedDataset(records, tokenizer, 256, "training")
    assert (dataset.left_out, dataset.cut) == ([2], [3])
    assert len(dataset) == 3 and dataset.lengths[1] == 256
    assert dataset.lengths == [len(dataset[i]["input_ids"]) for i in range(3)]
    assert set(dataset[0]) == {"input_ids", "labels"}
    assert dataset.summary == (
        f"training: 3 examples, {sum(dataset.lengths):,} tokens; 1 cut to 256 tokens, 1 left out (the prompt alone is "
        "longer)"
    )


def test_data_of_which_nothing_fits_is_refused_also_from_the_cache(tokenizer):
    records = [{"instruction": "word " * 400, "input": "", "output": "x"}]
    for _ in range(2):
        with pytest.raises(UserError, match="raise model_max_length"):
            examples.SupervisedDataset(records, tokenizer, 256, "training")


def test_a_cache_that_cannot_be_written_is_one_line_with_the_cure(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        examples.load_tokens(make_records(2), tokenizer, 512)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations, by chat templates.

CHATTED = ("gpt4_tokenizer", "llama_tokenizer", "smollm2_tokenizer")


def on(family: str, which: str, request):
    """A fixture's tokenizer with a family's template, as train.py prepares it; "own" is SmolLM2's."""
    tokenizer = request.getfixturevalue(which)
    if family == "own":
        made, template = deepcopy(tokenizer), request.getfixturevalue("smollm2_tokenizer").chat_template
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template, kind = template, Family(template, same, "<|im_end|>")
    else:
        kind = FAMILIES[family]
        made = kind.on(tokenizer)
    train.use_end_token(made)
    made.chat_template = mark_trained(made.chat_template)
    return made, kind


def conversations(system: bool) -> list[dict]:
    """Of one to four turns; answers and questions with awkward ends and beginnings, thoughts, and weights of 0."""
    records, found = shipped()[:120], []
    for i in range(24):
        messages = [{"role": "system", "content": f"Be brief. {i}"}] if system and i % 3 == 0 else []
        for turn in range(1 + i % 4):
            record, text = records[3 * i + turn % 3], AWKWARD[(i + 5 * turn) % len(AWKWARD)]
            answer = record["output"][:80] if i % 2 else text + record["output"][:60] + text
            answer = "<think>\nHm.\n</think>\n\n" + answer if i % 5 == 4 else answer
            messages.append({"role": "user", "content": record["instruction"] + text * (i % 2)})
            messages.append({"role": "assistant", "content": answer} | ({"weight": 0} if i % 7 == turn + 2 else {}))
        if any(message.get("weight", 1) for message in messages if message["role"] == "assistant"):
            found.append({"messages": messages})
    return found


@pytest.mark.parametrize("which", CHATTED)
@pytest.mark.parametrize("family", [*FAMILIES, "own"])
def test_each_answer_follows_what_chat_asks_and_is_what_the_template_makes_a_model_write(family, which, request):
    tokenizer, kind = on(family, which, request)
    end_id = tokenizer.convert_tokens_to_ids(kind.end) if kind.end else request.getfixturevalue(which).eos_token_id
    assert tokenizer.eos_token_id == end_id
    records = conversations(kind.system)
    for max_length in (10**6, 150):
        found = examples.preprocess_chat(records, tokenizer, max_length)
        for record, rows in zip(records, found, strict=True):
            expected = rows_one_by_one(record["messages"], tokenizer, kind.generated, end_id, max_length)
            assert rows == expected, record
            asked = [
                chat_ids(tokenizer, record["messages"][:k])
                for k, message in enumerate(record["messages"])
                if message["role"] == "assistant" and message.get("weight") != 0
            ]
            borders = [(row, begin) for row in rows for begin, _ in runs(row["labels"])]
            assert all(row["input_ids"][:n] == ids for (row, n), ids in zip(borders, asked, strict=False))
            assert len(borders) == len(asked) or max_length == 150
    several = sum(len(rows) > 1 for rows in examples.preprocess_chat(records, tokenizer, 10**6))
    if family in ("qwen 3", "gpt-oss", "plain"):  # which write earlier answers differently
        assert several == sum(learned(record) > 1 for record in records)
    elif (family, which) != (
        "llama 3",
        "smollm2_tokenizer",
    ):  # its prompt's two line ends are one token at the end alone
        assert several < len(records) / 2


def learned(record: dict) -> int:
    """How many answers of a conversation are learned."""
    return sum(one["role"] == "assistant" and one.get("weight", 1) for one in record["messages"])


def runs(labels: list[int]) -> list[tuple[int, int]]:
    """Where each run of supervised tokens begins and ends."""
    ends = [
        i
        for i in range(len(labels) + 1)
        if (i < len(labels) and labels[i] != -100) != (i > 0 and labels[i - 1] != -100)
    ]
    return list(zip(ends[::2], ends[1::2], strict=True))


def chat(*texts: str, weights=()) -> dict:
    """A conversation of question, answer, question, …"""
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for turn in weights:
        messages[2 * turn + 1]["weight"] = 0
    return {"messages": messages}


def texts(tokenizer, rows: list[dict]) -> list[list[str]]:
    """The supervised runs of each row, as text."""
    return [[tokenizer.decode(row["input_ids"][a:b]) for a, b in runs(row["labels"])] for row in rows]


def test_two_turns_are_one_row_where_the_template_repeats_the_first_and_two_where_it_rewrites_it(request):
    record = chat("Hi", "<think>\nA.\n</think>\n\nHo", "And?", "No more.")
    tokenizer, _ = on("qwen 2.5", "gpt4_tokenizer", request)
    [rows] = examples.preprocess_chat([record], tokenizer, 512)
    assert texts(tokenizer, rows) == [["<think>\nA.\n</think>\n\nHo<|im_end|>", "No more.<|im_end|>"]]
    tokenizer, _ = on("qwen 3", "gpt4_tokenizer", request)
    [rows] = examples.preprocess_chat([record], tokenizer, 512)
    assert texts(tokenizer, rows) == [
        ["<think>\nA.\n</think>\n\nHo<|im_end|>"],
        ["<think>\n\n</think>\n\nNo more.<|im_end|>"],
    ]
    assert "A." not in tokenizer.decode(rows[1]["input_ids"]) and "Ho<|im_end|>" in tokenizer.decode(
        rows[1]["input_ids"]
    )


def test_answers_of_weight_0_are_asked_about_and_not_learned(request):
    tokenizer, _ = on("qwen 2.5", "gpt4_tokenizer", request)
    record = chat("a", "One.", "b", "Two.", "c", "Three.", weights=(0, 2))
    [[row]] = examples.preprocess_chat([record], tokenizer, 512)
    assert texts(tokenizer, [row]) == [["Two.<|im_end|>"]]
    whole = tokenizer.decode(row["input_ids"])
    assert "One.<|im_end|>" in whole and whole.endswith("Two.<|im_end|>")


def test_an_empty_answer_is_the_end_token_alone(request):
    for family in ("llama 3", "qwen 2.5", "phi 3", "gemma"):
        tokenizer, kind = on(family, "gpt4_tokenizer", request)
        [[row]] = examples.preprocess_chat([chat("Say nothing.", "")], tokenizer, 512)
        assert texts(tokenizer, [row]) == [[kind.end]]


@pytest.mark.parametrize("which", CHATTED)
@pytest.mark.parametrize("family", ["llama 3", "phi 3", "mistral", "gpt-oss"])
def test_special_tokens_that_are_typed_stay_text_in_questions_and_answers(family, which, request):
    tokenizer, kind = on(family, which, request)
    names = [*kind.special, tokenizer.eos_token]
    typed = " and ".join(names)
    [rows] = examples.preprocess_chat([chat(f"What is {typed}?", f"{typed}."), chat("x", "y")][:1], tokenizer, 10**6)
    [plain] = examples.preprocess_chat([chat("What is it?", "it.")], tokenizer, 10**6)
    special = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(name) for name in names}
    for row, same_row in zip(rows, plain, strict=True):  # as many as without them
        assert sum(i in special for i in row["input_ids"]) == sum(i in special for i in same_row["input_ids"])
    [[answer]] = texts(tokenizer, rows)
    assert answer.endswith(f"{typed}.{tokenizer.eos_token}") or which == "llama_tokenizer"


def test_a_conversation_is_cut_left_out_and_counted_once_however_many_rows_it_has(request):
    tokenizer, _ = on("qwen 3", "gpt4_tokenizer", request)
    records = [
        chat("Hi", "Ho", "Hi again", "Ho again"),
        chat("word " * 300, "x"),
        chat("Hi", "Ho", "Count.", "one two three " * 100),
        chat("Hi", "Ho", "word " * 300, "x"),
    ]
    records = [{"instruction": "", "input": "", "output": ""} | record for record in records]
    dataset = examples.SupervisedDataset(records, tokenizer, 200, "training")
    assert (dataset.numbers, dataset.cut, dataset.left_out) == ([1, 1, 3, 3, 4], [3, 4], [2])
    assert dataset.summary.startswith(f"training: 5 examples of 3 records, {sum(dataset.lengths):,} tokens; 2 cut to")
    assert max(dataset.lengths) == 200


def test_the_cache_knows_the_template_and_every_message(request):
    tokenizer, _ = on("qwen 2.5", "gpt4_tokenizer", request)
    other, _ = on("qwen 2.5", "gpt4_tokenizer", request)
    other.chat_template = other.chat_template.replace("You help", "You are helpful")
    unmarked = deepcopy(other)
    unmarked.chat_template = None
    fields = {"instruction": "a", "input": "", "output": "b"}
    records = [fields | one for one in ({}, chat("a", "b", "c", "d"), chat("a", "b", "c", "e"))]
    records += [fields | chat("a", "b", "c", "d", weights=(0,))]
    keys = [examples.content_key([record], tokenizer, 512) for record in records]
    keys += [examples.content_key([records[1]], one, 512) for one in (other, unmarked)]
    assert len(set(keys)) == len(keys)


def test_a_record_on_which_the_template_fails_is_named(request):
    tokenizer, _ = on("gemma", "gpt4_tokenizer", request)
    fields = {"instruction": "a", "input": "", "output": "b"}
    system = {"messages": [{"role": "system", "content": "Be brief."}, *chat("a", "b")["messages"]]}
    records = examples.Records([fields, fields | chat("a", "b"), fields | system], [4, 7, 9])
    for task in (examples.check_template, lambda *rest: examples.SupervisedDataset(rest[0], rest[1], 512, rest[2])):
        with pytest.raises(UserError, match="^held-out record 9: .*chat template fails: System role not supported$"):
            task(records, tokenizer, "held-out")


def test_a_template_that_asks_with_thoughts_and_answers_without_is_refused(request):
    tokenizer, _ = on("qwen 2.5", "gpt4_tokenizer", request)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"
    )
    with pytest.raises(UserError, match=r"training record 1: .* prompts with '<think>\\n', but does not start answers"):
        examples.check_template([chat("a", "b")], tokenizer, "training")


@pytest.mark.parametrize("kind", ["", "llama_", "gpt4_", "opt_"])
def test_one_turn_in_alpacas_template_has_the_tokens_of_preprocess_and_two_are_asked_in_turn(kind, request):
    tokenizer = deepcopy(request.getfixturevalue(f"{kind}tokenizer"))
    tokenizer.chat_template = mark_trained(chat_template(tokenizer))
    records = two_thousand_rows()[::20]
    one = [[row] for row in examples.preprocess(records, tokenizer, 10**6)]
    assert [[{**row, "cut": False} for row in rows] for rows in one] == examples.preprocess_chat(
        records, tokenizer, 10**6
    )
    [rows] = examples.preprocess_chat([chat("Sing.", "- La", "Louder.", "LA")], tokenizer, 10**6)
    second = chat_ids(tokenizer, chat("Sing.", "- La", "Louder.")["messages"])
    assert rows[-1]["input_ids"][: len(second)] == second
    assert rows[-1]["labels"][len(second) :] == [*answer_ids(tokenizer, ["LA"])[0], tokenizer.eos_token_id]
