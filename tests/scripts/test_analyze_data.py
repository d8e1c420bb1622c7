"""analyze_data.py and lint: every class of lint finds its fault and lets its neighbour be; fetch against a
real server that misbehaves; stats and the partition by literal values."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import assert_one_line_error, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import analyze_data
import utils
from alpaca import UserError
from alpaca.common import cli, shapes
from alpaca.common.records import SHIPPED
from alpaca.data import released, rouge
from alpaca.data.lint import answers as lint_answers
from alpaca.data.lint import arithmetic
from alpaca.data.lint import classes as lint
from alpaca.data.rouge import RougePool

# ---------------------------------------------------------------------------------------------------------------------
# lint: for each class records that have the fault, and records that only look as if they had.


def record(instruction="Name a colour of the rainbow.", output="Green.", input=""):
    return {"instruction": instruction, "input": input, "output": output}


def numbered(last: int) -> str:
    return "\n".join(f"{i}. Thing number {i}" for i in range(1, last + 1))


FAULTS = {
    "empty-output": [record(output=""), record(output=" \n"), record(output="...")],
    "na-output": [record(output="N/A"), record(output="<No Output>"), record(output="nan")],
    "input-field": [
        record(input="<noinput>"),
        record(input="No input required."),
        record(input="N/A"),
        record(input="none"),
        record(input="  "),
        record(input="&lt;noinput&gt;"),
    ],
    "link": [
        record("Summarize the given article in 50 words.", "It is about bees.", "https://news.example.com/bees"),
        record("What is the main idea of this page: https://example.com/farming", "Farming fed cities."),
    ],
    "missing-input": [
        record("Classify the following animal as a mammal, bird or reptile.", "Mammal."),
        record("Rewrite this sentence in the passive voice.", "The ball was thrown."),
        record("Find the spelling mistakes in the given text.", "There are two."),
        record("Given the following ingredients, provide a recipe.", "Boil the pasta."),
        record("Given a news article, write a headline.", "Bees Dance"),
        record("Summarize the paragraph below.", "It is about tea."),
        record("Correct the following sentence. Keep it short.", "He goes home."),
        record("Create a program that prints the following pattern:", "A triangle of stars."),
    ],
    "empty-code": [
        record("Explain what the following code does.", "It sorts a list."),
        record("Find the bug in the function below.", "The index is off by one."),
        record("Reverse a string in Python.", "Here it is:\n```python\n```"),
    ],
    "needs-media": [
        record("Draw a picture of a horse.", "Here is a horse."),
        record("Design a logo for a bakery.", "A loaf in a circle."),
        record("Describe what you see in the photo.", "A dog on a beach."),
        record("Write a tweet that announces our new mug.", "Look at this mug!", "[Image of the mug]"),
    ],
    "nonsense": [
        record("1234 ?", "Green."),
        record("", "Green."),
        record("noinput", "Green."),
        record("Please sdfghjkl the colour.", "Green."),
        record("Say the the the the the colour.", "Green."),
    ],
    "merged": [
        record(output="Green.\n##\n12. Instruction: Name a fruit.\n12. Input:\n<noinput>\n12. Output:\nApple"),
        record(output="Green.\n\n6. Instruction: Name a fruit."),
        record(output="<noinput> Green is one."),
        record(output="Green is one. &lt;noinput&gt;"),
        record(output="Green.\n//EOM//"),
        record(output="Green.\n\n### Instruction:\nName a fruit."),
    ],
    "chat-token": [
        *(record(output=f"Green.{mark}") for mark in ("</s>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>", "[/INST]")),
        record(output="<think>\nWhich one?\n</think>\nGreen."),
        record(output="<|channel|>final<|message|>Green."),
        record("[INST] Name a color of the rainbow."),
    ],
    "as-an-ai": [
        record(output="As an AI language model, I cannot see the rainbow."),
        record(output="I'm just a language model. Green, perhaps."),
    ],
    "error-text": [
        record(output="$ERROR$"),
        record(output="Error: Rate limit reached for requests"),
        record(output="502 Bad Gateway"),
    ],
    "label": [record(output="Output: Green."), record(output="**Answer:** Green.")],
    "chatter": [
        record(output="Green. I hope this helps!"),
        record(output="Green is one.\n\nLet me know if you need anything else."),
        record(output="Green.\n\nIf you have any other questions, feel free to ask! 😊"),
        record(output="Green. Would you like me to name more?"),
    ],
    "echo": [
        record(output="Name a colour of the rainbow.\nGreen."),
        record("列出彩虹的三种不同颜色和它们的顺序。", "列出彩虹的三种不同颜色和它们的顺序：红、绿、蓝。"),
    ],
    "repetition": [
        record(output="Green is a colour. " * 60),
        record(output="One is green.\n" + "绿色是彩虹的一种颜色。" * 9),
    ],
    "cut-off": [
        record(output="The war began in 1914. It was ended by a treaty that was signed in 19"),
        record(output="Poverty rates rose sharply and stayed high in 20"),
        record(output=numbered(19)),
        record(output="Green light has a wavelength between those of blue light and"),
        record(output="There are many colours. Green is the colour of leaves, of grass and of"),
        record(output="The colours of the rainbow are red, orange, yellow,"),
        record("Print green in Python.", "```python\nprint('green')\n"),
    ],
    "wrong-arithmetic": [
        record(output="Each box holds 12, so 12 x 30 = 350 pencils."),
        record("What is 15 plus 27?", "15 plus 27 is 43."),
        record("What is 7 x 8?", "54"),
        record("Evaluate the following expression.", "21", "3 + 4 * 2"),
        record("Find the median of the following data set.", "5", "1, 2, 4, 5, 8, 9"),
    ],
    "mojibake": [
        record(output="The cafÃ© is green."),
        record(output="It\u00e2\u20ac\u2122s green."),
        record(output="Gr\ufffdn."),
    ],
    "stray-escape": [
        record(output="Green.\\nIt is the colour of leaves."),
        record(output='She said \\"green\\".'),
        record(output="Green &amp; blue."),
        record(output="Green.\u200b"),
        record(output="Gre\x08en."),
    ],
}

SOUND = {
    "empty-output": [record("Which punctuation mark ends a sentence?", "."), record(output="5")],
    "na-output": [
        record("Name the error in this line, or answer N/A.", "N/A", "x = 1"),
        record("Which of these planets has no name?", "None", "Mars, Venus"),
    ],
    "input-field": [
        record("Which type does this Python value have?", "NoneType", "None"),
        record("Translate this into French.", "Rien", "Nothing"),
    ],
    "link": [
        record("Which protocol does this URL use?", "HTTPS", "https://example.com/a"),
        record(
            "Summarize the article.",
            "Bees dance.",
            "Bees tell each other where the flowers are by dancing in the hive; see https://example.com/bees for more.",
        ),
    ],
    "missing-input": [
        record("Classify the following animal: a whale.", "Mammal."),
        record('Rewrite this sentence: "He threw the ball."', "The ball was thrown."),
        record("Which of the following is a mammal, a dog or a fish?", "A dog."),
        record("What happened the following year?", "Peace was made.", "The war went on until 1918."),
        record("Describe the year following the French Revolution and the following decade.", "They were wild."),
        record("Write a function that sorts the given list.", "def f(x):\n    return sorted(x)"),
        record("List the numbers above 7 and below 10.", "8 and 9."),
        record("Write a story with the following words: cat, ship.", "A cat sailed."),
        record("Write a story about a king. This text should rhyme.", "A king could sing."),
    ],
    "empty-code": [
        record("Explain what the following code does: print(1)", "It prints 1."),
        record("Reverse two strings in Python.", "```python\na[::-1]\n```\n```python\nb[::-1]\n```"),
    ],
    "needs-media": [
        record("Draw a conclusion from these facts: it rains, and Ann has no umbrella.", "Ann gets wet."),
        record("Design a video game about bees.", "You are a bee."),
        record("Create an ASCII drawing of a box.", "+-+\n| |\n+-+"),
        record("Write a caption for the photo.", "Two friends at sea.", "Two women in a sailing boat, laughing"),
        record("Give me the big picture of inflation.", "Prices rise."),
        record("Sketch a plan for a week in Rome.", "Walk, eat, sleep."),
    ],
    "nonsense": [
        record("Unscramble these letters: sdfghjklm.", "There is no such word."),
        record('What does "no no no no" mean in the song?', "Refusal."),
    ],
    "merged": [
        record("Outline a lesson.", "1. Warm-up: sing.\n2. Instruction: explain colours.\n3. Practice: paint."),
        record(
            "Name the parts of a computer.", "1. Input: the keyboard.\n2. Processing: the chip.\n3. Output: the screen."
        ),
    ],
    "chat-token": [
        record("Which token ends a Llama 3 turn?", "<|eot_id|>"),
        record("Cross out a word in HTML.", "<s>green</s>"),
        record("Compose two F# functions.", "f <| g x |> h"),
    ],
    "as-an-ai": [
        record("Are you a robot?", "I am an AI language model."),
        record("What is an N-gram?", "An n-gram language model counts words."),
    ],
    "error-text": [
        record("What does HTTP status 502 mean?", "502 Bad Gateway: a proxy had no answer."),
        record("Name a kind of mistake.", "Error of judgment."),
    ],
    "label": [
        record("What is the output of this machine?", "Output: 40 watts."),
        record("Pair them.", "A: green\nB: red"),
    ],
    "chatter": [
        record("Write to a customer about a delay.", "It comes on Monday. Please let me know if that is too late."),
        record("Invite Ann for tea.", "Dear Ann, tea is at four. Let me know if you can come."),
        record("Translate this.", "It costs more. Let me know if that helps.", "Es kostet mehr. Let me know."),
        record(output="Green. Let me know was the name of a song. It was long."),
    ],
    "echo": [
        record("The colour of a leaf in spring is", "The colour of a leaf in spring is green."),
        record("Repeat after me: green is good.", "Repeat after me: green is good."),
    ],
    "repetition": [
        record("Write the lyrics of a song.", "Green, green, green\n" * 9),
        record("Draw up an empty form.", "| ____ | ____ |\n" * 9),
        record(output="A leaf is green. Is it? Yes, it is. " * 3 + "Grass is green too. So is moss."),
    ],
    "cut-off": [
        record("Name the 19 shades of green that I showed you.", numbered(19)),
        record(output=numbered(20)),
        record(output="Green"),
        record("Suggest a title.", "The World We Dream Of"),
        record("Write a verse.", "The leaves above\nAre what we love\nThe deep green world\nThat we are dreaming of"),
        record(
            "Write a short note.",
            "Dear Ann,\n\nthank you for the green scarf.\n\nWith all my very best and warmest regards,",
        ),
        record("Write a tweet.", "Spring is here. Go out and look at all that #green"),
        record("List two tips.", "- Turn off the lights\n- Close the windows that you came in by"),
        record("Add 7 and 13.", "The sum of 7 and 13 is 20"),
    ],
    "wrong-arithmetic": [
        record(output="12 x 30 = 360, and 22 / 7 = 3.14."),
        record(output="Solve 2x + 3 = 7 and x + 1 + 2 = 5: x = 2."),
        record(output="18-24 = 20%, 25-34 = 35%"),
        record("What is 2 + 2 = 5 in the novel?", "A lie that must be believed: 2 + 2 = 5."),
        record("What is 17 divided by 5?", "17 / 5 = 3 remainder 2"),
    ],
    "mojibake": [record(output="A café in São Paulo, Ångström and “naïve” – fine…"), record(output="CAFÉ”")],
    "stray-escape": [
        record("Print green and a newline in Python.", 'print("green\\n")'),
        record("Which HTML entity is an ampersand?", "&amp;"),
        record("Write the fraction.", "$\\frac{1}{2}\\neq 1$"),
    ],
}


def classes_of(one: dict) -> list[str]:
    return [finding["class"] for finding in lint.find([one], set(lint.CLASSES) - lint.OPT_IN)]


@pytest.mark.parametrize(("name", "faulty"), [(name, one) for name, records in FAULTS.items() for one in records])
def test_a_fault_is_found_under_its_class(name, faulty):
    assert name in classes_of(faulty)


@pytest.mark.parametrize("sound", [one for records in SOUND.values() for one in records])
def test_what_only_looks_like_a_fault_is_let_be(sound):
    assert classes_of(sound) == []


def test_every_class_of_one_record_has_a_fault_and_a_false_positive_here():
    assert set(FAULTS) == set(SOUND) == set(lint.RECORD_CLASSES) - {"no-full-stop"}


def test_a_missing_full_stop_is_opt_in():
    unended = record(output="Green is one. It lies between yellow and blue")
    assert classes_of(unended) == []
    assert [f["class"] for f in lint.find([unended], {"no-full-stop"})] == ["no-full-stop"]
    assert lint_answers.no_full_stop(record(output="Green is one. It lies between yellow and blue.")) is None


def test_duplicates_are_later_copies_whatever_the_case_and_white_space():
    records = [
        record("Name a colour.", "Green.", "from the rainbow"),
        record("Name a colour.", "Red.", "from a flag"),
        record("name a  colour.", "Blue.", "From the rainbow\n"),
    ]
    assert lint.duplicates(records) == {2: "same instruction and input as record 1"}


def test_near_duplicates_are_near_an_earlier_kept_record_and_copies_are_no_near_duplicates():
    """8 of 9 tokens in common: F = 8/9. Record 4 is near only to the dropped record 2 (6 of 9), so it stays."""
    records = [
        record("Tell me how bees find their way back home"),
        record("Tell me how bees find the way back home"),
        record("Tell me how bees find their way back home"),
        record("Tell us how ants find the way back there"),
        record("What is the capital of Peru?"),
    ]
    found = lint.near_duplicates(records)
    assert found == {1: "ROUGE-L 0.89 with record 1: Tell me how bees find their way back home"}


@pytest.mark.parametrize(
    "tasks",
    [
        ["Calculate 12 + 7.", "Calculate 12 - 7.", "Calculate 12 × 7."],
        ["Explain what && does in Bash.", "Explain what || does in Bash."],
        ["Write hello world in C++.", "Write hello world in C#.", "Write hello world in C."],
        ["Convert −5 °C to Fahrenheit.", "Convert 5 °C to Fahrenheit."],
        ["Compute (2 + 3) * 4.", "Compute 2 + (3 * 4)."],
        [("Is it true?", "3 > 2"), ("Is it true?", "3 < 2")],
        [
            ("Translate the sentence to English.", "我喜欢猫。"),
            ("Translate the sentence to English.", "今天天气很好。"),
        ],
        [("Put the sentence into the past tense and say why.", text) for text in ("He runs.", "We often sleep.")],
        ["用Python写一个循环。", "Python适合初学者吗？", "解释Python的列表。", "列出3种水果。", "把3写成罗马数字。"],
    ],
)
def test_different_tasks_in_much_the_same_words_are_no_near_duplicates(tasks):
    assert (
        lint.near_duplicates([record(one) if isinstance(one, str) else record(one[0], input=one[1]) for one in tasks])
        == {}
    )


def test_near_duplicates_are_found_in_any_script_and_whatever_their_punctuation():
    """The poems share 10 characters of 10 and 12; symbols are equal after NFKC."""
    tasks = [
        "请写一首关于春天的诗。",
        "请你也写一首关于春天的诗！",
        "Name a well-known (old) poem.",
        "name a „well known“（old）poem",
    ]
    found = lint.near_duplicates([record(task) for task in tasks])
    assert found == {
        1: "ROUGE-L 0.91 with record 1: 请写一首关于春天的诗。",
        3: "ROUGE-L 1.00 with record 3: Name a well-known (old) poem.",
    }


def test_near_duplicates_are_found_among_more_tokens_than_there_are_code_points(monkeypatch):
    """That is 1,114,112; here 8. Tried once with 1,120,000 tokens, which takes a quarter of a minute."""
    monkeypatch.setattr(rouge, "CHARACTERS", 8)
    records = [record(" ".join(f"w{i}" for i in range(start, start + 5))) for start in range(0, 50, 5)]
    records += [record(records[i]["instruction"] + " more") for i in (0, -1)]
    assert list(lint.near_duplicates(records)) == [10, 11]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=14).map(" ".join), max_size=25),
    st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9]),
)
def test_pruning_changes_no_decision_on_near_duplicates(texts, threshold):
    records = [record(text) for text in texts]
    copies, kept, expected = lint.duplicates(records), RougePool(), set()
    for i, text in enumerate(texts):
        if i not in copies:
            if (kept.scores(text) > threshold).any():
                expected.add(i)
            else:
                kept.add(text)
    assert set(lint.near_duplicates(records, threshold)) == expected


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("2 + 3 = 6", "2 + 3 = 6"),
        ("2 + 3 = 5 = 6 - 2", "5 = 6 - 2"),
        ("So (3 + 4) × 2 = 15.", "(3 + 4) × 2 = 15"),
        ("1,250 ÷ 5 = 205 a day", "1,250 ÷ 5 = 205"),
        ("20% of 50 = 15", "20% * 50 = 15"),
        ("$12.50 + $25.00 = $37.60", "$12.50 + $25.00 = $37.60"),
        ("3² + 4² = 26", "3^2 + 4^2 = 26"),
        ("It costs 40 (5 x 8 = 45).", "5 x 8 = 45"),
        ("- Total: 5 + 5 = **11**", "5 + 5 = 11"),
        ("10 / 40 = 32%", "10 / 40 = 32%"),
        ("2 + 3 = 5 + 4 = 9", None),  # a loose chain of right sums
        ("10 / 3 = 3.33, 2 / 3 = 0.666, 3.14 x 5 x 5 = 78.54", None),  # rounded, cut, and π
        ("3/4 = 75%, 3/4 x 100 = 75%", None),
        ("Step 1 - 5 + 3 = 8", None),
        ("x2 + 3 = 9, f(3) + 1 = 2, √16 + 2 = 6, 2H + 1 = 4", None),
        ("8:00 + 2 = 10:00, 1 + 1 = 2nd, 3 + 4 = 7x, 2 + 2 = 4!", None),
        ("1 million = 1000 x 1000, 2 + 3 = 5 million", None),
        ("555-1234 = 7, 2020-01-05 = 7, 1/5/2020 = 5", None),
        ("2 + 2 = 5 is false", None),
        ("0 / 0 = 1, 9^9^9^9 = 1, 1 + (2 = 3", None),
        ("5 + 3 == 9, 2 + 2 => 5, a += 2 + 3", None),
    ],
)
def test_an_equation_is_wrong_only_when_it_is_arithmetic_and_its_sides_differ(line, wrong):
    assert arithmetic.wrong_equation(line) == wrong


@pytest.mark.parametrize(
    ("instruction", "text", "output", "wrong"),
    [
        ("What is 12 + 30?", "", "The answer is 41.", "12 + 30 is not 41"),
        ("What is 12 + 30?", "", "42", None),
        ("Calculate the average of [2, 4, 5, 7, 8].", "", "The average of [2, 4, 5, 7, 8] is 5.4.", "5.2, not 5.4"),
        ("Calculate the average of [2, 4, 5, 7, 8].", "", "The average of [2, 4, 5, 7, 8] is 5.2.", None),
        ("Find the mean of these numbers.", "1, 2, 2", "1.67", None),
        ("Find the sum of the even numbers in 1, 2, 3.", "", "2", None),
        ("What is 10 / 4, rounded?", "", "3", None),
        ("What is 2020-01-05?", "", "A Sunday, day 5.", None),
    ],
)
def test_a_bare_sum_as_the_question_needs_its_value_in_the_answer(instruction, text, output, wrong):
    found = arithmetic.wrong_answer(instruction, text, output)
    assert found is None if wrong is None else found.endswith(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# lint: the command.


@pytest.fixture
def data(tmp_path):
    """Six records: 1 (two faults) and 4 are bad, 5 is a copy of 0."""
    records = [
        record(f"Name {what}.", "Green.") for what in ("a colour", "a fruit", "one herb", "an old town", "a sea")
    ]
    records[1] |= {"input": "N/A", "output": ""}
    records[4] |= {"output": "Gr\ufffdn.", "id": 7}
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*records, records[0]]))
    return path


def test_lint_parts_the_records_and_leaves_the_input_alone(data, tmp_path, capsys):
    before, paths = data.read_bytes(), [tmp_path / name for name in ("clean.json", "rejects.jsonl", "report.jsonl")]
    analyze_data.lint(str(data), *map(str, paths))
    records = json.loads(before)
    clean, rejects, report = map(utils.jload, paths)
    assert data.read_bytes() == before
    assert clean == [records[0], records[2], records[3]]
    assert [{key: one[key] for key in one if key != "lint"} for one in rejects] == [records[i] for i in (1, 4, 5)]
    assert rejects[1]["id"] == 7
    assert [[found["class"] for found in one["lint"]] for one in rejects] == [
        ["empty-output", "input-field"],
        ["mojibake"],
        ["duplicate"],
    ]
    assert report[2] == {
        "record": 5,
        "class": "mojibake",
        "reason": "text decoded with the wrong encoding",
        "evidence": "output: Gr\ufffdn.",
    }
    assert [found["record"] for found in report] == [2, 2, 5, 6]
    printed = capsys.readouterr().out
    assert "4 findings in 3 of 6 records" in printed and "3 clean records in" in printed
    assert f"{'mojibake':<16}{1:>8}   text decoded" in printed


def test_lint_looks_for_the_classes_that_only_and_skip_leave(data, capsys):
    analyze_data.lint(str(data), only="duplicate, mojibake")
    assert "2 findings in 2 of 6 records" in capsys.readouterr().out
    analyze_data.lint(str(data), skip="duplicate,mojibake")
    assert "2 findings in 1 of 6 records" in capsys.readouterr().out
    with pytest.raises(UserError, match="--only 'mojibaké' is not a class: choose from empty-output, na-output"):
        analyze_data.lint(str(data), only="mojibaké")


def test_the_exit_code_is_0_with_findings_and_1_under_strict(data):
    run = run_script("analyze_data.py", "lint", "--data_path", data)
    assert (run.returncode, run.stderr) == (0, "")
    assert run_script("analyze_data.py", "lint", "--data_path", data, "--strict", "True").returncode == 1
    clean = run_script("analyze_data.py", "lint", "--data_path", data, "--strict", "True", "--only", "merged")
    assert clean.returncode == 0 and "0 findings" in clean.stdout


def test_half_of_a_surrogate_pair_is_reported_and_written(tmp_path):
    record = {"instruction": "Say more than N/A.", "input": "no input", "output": "\ud83d"}
    utils.jdump([record, record | {"input": "\ud83d no input\ufeff"}], tmp_path / "data.json")
    flags = [
        word for name in ("output", "rejects", "report") for word in (f"--{name}_path", tmp_path / f"{name}.jsonl")
    ]
    result = run_script("analyze_data.py", "lint", "--data_path", tmp_path / "data.json", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert utils.jload(tmp_path / "rejects.jsonl")[0]["output"] == "\ud83d"


def test_no_control_character_of_a_record_reaches_the_terminal(tmp_path, capsys):
    utils.jdump([record(output="Green\x9b2J\x1b[2J lies between yellow and blue light and")], tmp_path / "data.json")
    analyze_data.lint(str(tmp_path / "data.json"))
    printed = capsys.readouterr().out
    assert "mojibake" in printed and "\\x9b2J" in printed and not {"\x9b", "\x1b"} & set(printed)


@pytest.mark.parametrize("flag", ["output_path", "rejects_path", "report_path"])
def test_lint_refuses_to_write_over_its_input(data, flag, tmp_path):
    (tmp_path / "link.json").symlink_to(data)
    for path in (data, tmp_path / "link.json"):
        with pytest.raises(UserError, match=f"--{flag} and --data_path are the same file"):
            analyze_data.lint(str(data), **{flag: str(path)})


def test_the_shipped_data_has_no_finding():
    run = run_script("analyze_data.py", "lint", "--data_path", "alpaca_data.json", "--strict", "True")
    assert run.returncode == 0 and "\n0 findings in 0 of" in run.stdout, run.stdout


def test_importing_analyze_data_loads_no_torch():
    code = "import sys, analyze_data; print(sorted({'torch', 'transformers', 'openai', 'spacy'} & set(sys.modules)))"
    assert run_script("-c", code).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------------------------------
# Conversations.

SYSTEM = (
    "You are the careful and friendly assistant of a shop and answer in short plain sentences without guesses. " * 3
)
TWO = [("Why is the sky blue?", "Air scatters blue light most."), ("Who wrote Hamlet?", "Shakespeare wrote it.")]


def talk(*texts: str, system: str = "") -> dict:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def found_in(tmp_path, records: list) -> list[tuple]:
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    analyze_data.lint(str(tmp_path / "talks.jsonl"), report_path=str(tmp_path / "report.jsonl"))
    report = (tmp_path / "report.jsonl").read_text().splitlines()
    return [(one["record"], one["class"], one["evidence"]) for one in map(json.loads, report)]


def test_a_shared_system_text_or_greeting_makes_no_near_duplicates(tmp_path):
    assert found_in(tmp_path, [talk(*one, system=SYSTEM) for one in TWO]) == []
    hello = [talk("Hello", "Hi, how can I help?", *one) for one in TWO]
    assert found_in(tmp_path, hello) == []
    again = talk("Hello", "Good day! What do you need?", "Tell me, why is the sky blue?", "Air does it.", system=SYSTEM)
    near = "ROUGE-L 0.86 with record 1: Hello Why is the sky blue?"  # 6 tokens in common of 6 and 8: F = 12/14
    assert found_in(tmp_path, [*hello, again, hello[1]]) == [
        (3, "near-duplicate", near),
        (4, "duplicate", "same instruction and input as record 2"),
    ]


def test_the_input_of_a_record_with_a_system_text_is_compared_as_an_input(tmp_path):
    """The question has it too, under a heading; counted twice it would be 0.90. 11 tokens in common of 13 and 14."""
    text = "bees dance to show the way to flowers that they found"
    records = [record(task, "A dance.", text) | {"system": SYSTEM} for task in ("Summarize it.", "Add a title.")]
    assert found_in(tmp_path, records) == [(2, "near-duplicate", "ROUGE-L 0.81 with record 1: Summarize it.")]
    assert [shapes.whole_text(one) for one in utils.load_records(tmp_path / "talks.jsonl")] == [
        "Summarize it.",
        "Add a title.",
    ]


def test_rules_for_one_record_see_no_system_text(tmp_path):
    """It points at a text and at a page to read, and hides that an answer begins with a copy of its question."""
    system = "Summarize the following text from https://example.com/news in one word."
    talks = [talk(*TWO[0], system=system), talk(*TWO[0], *TWO[1], system=system)]
    assert [found for found in found_in(tmp_path, talks) if found[1] != "near-duplicate"] == []
    echo = talk("Write one line of praise for tea.", "Write one line of praise for tea. Tea warms.", system=SYSTEM)
    assert [(number, name) for number, name, _ in found_in(tmp_path, [echo])] == [(1, "echo")]


def test_a_finding_has_the_number_that_the_reader_gives(tmp_path, capsys):
    records = [talk("Name a sea."), talk(*TWO[0]), talk(*TWO[1]), talk("Name a town."), talk(*TWO[0])]
    assert found_in(tmp_path, records) == [(5, "duplicate", "same instruction and input as record 2")]
    assert "2 without an answer dropped: 1, 4\n" in capsys.readouterr().out
    flags = {"output_path": tmp_path / "clean.jsonl", "rejects_path": tmp_path / "rejects.jsonl"}
    analyze_data.lint(str(tmp_path / "talks.jsonl"), **{name: str(path) for name, path in flags.items()})
    clean, rejects = map(utils.jload, flags.values())
    assert [one["instruction"] for one in clean] == [TWO[0][0], TWO[1][0]]
    assert [one["instruction"] for one in rejects] == [TWO[0][0]]


# ---------------------------------------------------------------------------------------------------------------------
# stats


def test_stats_count_all_questions_and_answers_of_a_conversation_and_no_system_text():
    """Questions of 1 + 5 and 1 + 3 words, answers of 5 + 5 and 5 + 3."""
    records = [talk("Hello", "Hi, how can I help?", *one, system=SYSTEM) for one in TWO]
    found = analyze_data.figures([shapes.in_our_fields(one, {}, True)[1] for one in records])
    assert found["duplicate_instructions"] == 0 and found["first_verbs"] == {"hello": 2}
    assert found["words"]["instruction"] == {"min": 4, "mean": 5.0, "median": 4, "p90": 6, "p99": 6, "max": 6}
    assert found["words"]["output"] == {"min": 8, "mean": 9.0, "median": 8, "p90": 10, "p99": 10, "max": 10}


def test_stats_counts_words_inputs_duplicates_and_first_verbs(tmp_path, capsys):
    """Instructions of 3, 3, 3 and 4 words; one input of 2; outputs of 1, 2, 3 and 10 words."""
    records = [
        record("Name a colour.", "Green."),
        record("Name a fruit.", "An apple.", "not red"),
        record("name a  colour.", "It is blue."),
        record('"Sing" me a song.', "la " * 10),
    ]
    path, out = tmp_path / "data.json", tmp_path / "stats.json"
    path.write_text(json.dumps(records))
    analyze_data.stats(str(path), output_path=str(out))
    assert json.loads(out.read_text()) == {
        "records": 4,
        "with_input": 1,
        "share_with_input": 0.25,
        "duplicate_instructions": 1,
        "duplicate_instructions_and_inputs": 1,
        "words": {
            "instruction": {"min": 3, "mean": 3.2, "median": 3, "p90": 4, "p99": 4, "max": 4},
            "input": {"min": 2, "mean": 2.0, "median": 2, "p90": 2, "p99": 2, "max": 2},
            "output": {"min": 1, "mean": 4.0, "median": 2, "p90": 10, "p99": 10, "max": 10},
        },
        "first_verbs": {"name": 3},
    }
    printed = capsys.readouterr().out.splitlines()
    assert "with an input                           1   25.0%" in printed
    assert "words             min     mean   median      p90      p99      max" in printed
    assert "output              1      4.0        2       10       10       10" in printed
    assert "  name                   3   75.0%" in printed
    with pytest.raises(UserError, match="the same file"):
        analyze_data.stats(str(path), output_path=str(path))


def test_stats_counts_tokens_with_a_tokenizer_and_of_the_whole_example(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path, out = tmp_path / "data.json", tmp_path / "stats.json"
    path.write_text(json.dumps([record()]))
    analyze_data.stats(str(path), str(tmp_path / "tokenizer"), str(out))
    tokens = json.loads(out.read_text())["tokens"]
    count = len(tokenizer("Green.", add_special_tokens=False)["input_ids"])
    assert tokens["output"] == {"min": count, "mean": count, "median": count, "p90": count, "p99": count, "max": count}
    prompt = utils.format_prompt(record()["instruction"])
    assert tokens["example"]["max"] == len(tokenizer(prompt + "Green.", add_special_tokens=False)["input_ids"])
    assert tokens["input"]["max"] == 0
    with pytest.raises(UserError, match="--tokenizer .*nowhere cannot be loaded"):
        analyze_data.stats(str(path), str(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------------------------------
# fetch, from a real server on 127.0.0.1.

CONTENT = bytes(range(256)) * 8  # 2,048 bytes
HALF = len(CONTENT) // 2


class Mirror:
    """Serves ``content`` with Range. The n-th request meets the n-th fault, and those after the last the last.

    Faults: "half" (half of what was asked for, then the connection closes), "nothing" (headers, then it closes),
    "whole" (Range is ignored), an int (HTTP status), ("length", n) (n more in Content-Length than there are; with n < 0
    so many fewer are sent), None (no fault).
    """

    def __init__(self, content: bytes, *faults):
        self.ranges: list[str | None] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                fault = faults[min(len(mirror.ranges), len(faults) - 1)] if faults else None
                asked = self.headers["Range"]
                mirror.ranges.append(asked)
                start = 0 if asked is None or fault == "whole" else int(asked.removeprefix("bytes=").rstrip("-"))
                if isinstance(fault, int) or start >= len(content):
                    self.send_response(fault if isinstance(fault, int) else 416)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                body = content[start:]
                announced = len(body) + (fault[1] if isinstance(fault, tuple) else 0)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(announced))
                self.end_headers()
                body = {"half": body[: len(body) // 2], "nothing": b""}.get(str(fault), body)
                self.wfile.write(body[:announced])
                self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/alpaca_data.json"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setattr(released, "WAIT", 0)
    running = []

    def start(*faults, content=CONTENT) -> Mirror:
        running.append(Mirror(content, *faults))
        return running[-1]

    yield start
    for one in running:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def blob(tmp_path) -> str:
    (tmp_path / "right").write_bytes(CONTENT)
    return released.git_blob_id(tmp_path / "right")


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"right"}


def test_the_blob_id_is_gits(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert released.git_blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert analyze_data.RELEASED_BLOB == "3779ddbc040543ab1834ef216c983d6fcc06cc9a"


def test_fetch_puts_a_verified_file_in_place_and_does_nothing_the_second_time(mirror, blob, tmp_path, capsys):
    server, out = mirror(), tmp_path / "new" / "data.json"
    for _ in range(2):
        analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and names(out.parent) == {"data.json"}
    assert server.ranges == [None]
    assert "exists and is correct" in capsys.readouterr().out


def test_fetch_resumes_where_the_server_broke_off(mirror, blob, tmp_path):
    server, out = mirror("half", "half", None), tmp_path / "data.json"
    analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and names(tmp_path) == {"data.json"}
    assert server.ranges == [None, "bytes=1024-", "bytes=1536-"]


def test_fetch_gives_up_in_the_end_keeps_the_part_and_the_same_command_resumes(mirror, blob, tmp_path, capsys):
    server, out = mirror("half", "nothing"), tmp_path / "data.json"
    with pytest.raises(UserError, match="broke at 1,024 of 2,048 bytes, 6 times in a row; .* has 1,024 bytes"):
        analyze_data.fetch(str(out), server.url, blob)
    assert names(tmp_path) == {"data.json.part"} and len(server.ranges) == 7
    sound = mirror()
    analyze_data.fetch(str(out), sound.url, blob)
    assert out.read_bytes() == CONTENT and sound.ranges == ["bytes=1024-"]
    assert "data.json.part after 1,024 bytes" in capsys.readouterr().out


def test_fetch_believes_the_content_and_not_the_length(mirror, blob, tmp_path):
    """Too long a length looks like a break, but the content is right."""
    server, out = mirror(("length", 1000)), tmp_path / "data.json"
    analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and server.ranges == [None]


def test_fetch_starts_again_when_the_server_ignores_range(mirror, blob, tmp_path):
    server, out = mirror("half", "whole"), tmp_path / "data.json"
    analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and server.ranges == [None, "bytes=1024-"]


def test_fetch_throws_a_part_away_that_is_longer_than_the_file(mirror, blob, tmp_path):
    server, out = mirror(), tmp_path / "data.json"
    (tmp_path / "data.json.part").write_bytes(CONTENT + b"more")
    analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and server.ranges == ["bytes=2052-", None]


def test_fetch_finishes_a_part_that_is_whole_without_a_request(mirror, blob, tmp_path):
    server, out = mirror(), tmp_path / "data.json"
    (tmp_path / "data.json.part").write_bytes(CONTENT)
    analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == CONTENT and server.ranges == []


@pytest.mark.parametrize("fault", [None, "whole"])
def test_fetch_refuses_a_wrong_file_with_both_ids_and_keeps_it_aside(mirror, blob, tmp_path, fault):
    server, out = mirror(fault, content=b"hello\n"), tmp_path / "data.json"
    ids = f"\\(blob id ce013625030ba8dba906f756967f9e9ca394464a, not {blob}\\), kept as"
    with pytest.raises(UserError, match=ids):
        analyze_data.fetch(str(out), server.url, blob)
    assert names(tmp_path) == {"data.json.wrong"}
    assert (tmp_path / "data.json.wrong").read_bytes() == b"hello\n"


def test_fetch_never_overwrites_a_file_that_is_there(mirror, blob, tmp_path):
    server, out = mirror(), tmp_path / "data.json"
    out.write_bytes(b"hello\n")
    with pytest.raises(UserError, match="ce013625030ba8dba906f756967f9e9ca394464a, not .*choose another --output_path"):
        analyze_data.fetch(str(out), server.url, blob)
    assert out.read_bytes() == b"hello\n" and server.ranges == []


def test_fetch_takes_a_local_copy_by_path_and_by_file_url(blob, tmp_path):
    for i, url in enumerate((str(tmp_path / "right"), (tmp_path / "right").as_uri())):
        analyze_data.fetch(str(tmp_path / f"{i}.json"), url, blob)
        assert (tmp_path / f"{i}.json").read_bytes() == CONTENT
    with pytest.raises(UserError, match="is not a file: give an https address"):
        analyze_data.fetch(str(tmp_path / "2.json"), str(tmp_path / "nowhere"), blob)


def test_fetch_retries_a_busy_server_but_not_a_missing_page(mirror, blob, tmp_path):
    busy = mirror(503, 429, None)
    analyze_data.fetch(str(tmp_path / "data.json"), busy.url, blob)
    assert busy.ranges == [None] * 3
    missing = mirror(404)
    with pytest.raises(UserError, match="answers HTTP 404 .*: check the url, or give a mirror's"):
        analyze_data.fetch(str(tmp_path / "other.json"), missing.url, blob)
    assert missing.ranges == [None]


def test_fetch_says_in_one_line_that_it_was_refused(mirror, tmp_path):
    server = mirror(content=b"hello\n")
    run = run_script("analyze_data.py", "fetch", "--output_path", tmp_path / "data.json", "--url", server.url)
    assert_one_line_error(run, "blob id ce013625", f"not {analyze_data.RELEASED_BLOB}", "data.json.wrong")


# ---------------------------------------------------------------------------------------------------------------------
# publish: the licenses, the folder, and a hub on 127.0.0.1. What the folder holds: tests/data/test_publish.py.

OWN = [record("Name a color.", "Green."), record("Name a fruit.", "Apple."), record("Name a bird.", "Wren.")]
TOKEN = "hf_notatokenbutsecret"


@pytest.fixture
def own(tmp_path):
    utils.jdump(OWN, tmp_path / "own.json")
    return tmp_path / "own.json"


def test_publish_asks_for_a_license_that_the_hub_knows(own, tmp_path):
    with pytest.raises(UserError, match="^--license is missing: give the data's license .*cc-by-4.0"):
        analyze_data.publish(str(own), str(tmp_path / "out"))
    with pytest.raises(UserError, match="--license 'CC BY 4.0' is not a name on the hub"):
        analyze_data.publish(str(own), str(tmp_path / "out"), "CC BY 4.0")
    assert not (tmp_path / "out").exists()


def test_one_shipped_record_among_others_keeps_its_license(own, tmp_path):
    """Recognized by its texts, whatever the file, the case and the white space."""
    shipped = utils.load_records(SHIPPED)[7]
    utils.jdump([*OWN, shipped | {"instruction": shipped["instruction"].upper() + " "}], own)
    with pytest.raises(UserError, match="^1 record is from alpaca_data.json.* CC BY-NC 4.0. --license is missing"):
        analyze_data.publish(str(own), str(tmp_path / "out"))
    with pytest.raises(
        UserError, match="--license apache-2.0 is not possible: 1 record is from .*cc-by-nc-4.0, or remove"
    ):
        analyze_data.publish(str(own), str(tmp_path / "out"), "apache-2.0")
    analyze_data.publish(str(own), str(tmp_path / "out"), "cc-by-nc-4.0")
    assert "1 record is from alpaca_data.json" in (tmp_path / "out" / "README.md").read_text()


def test_a_shipped_record_keeps_its_license_as_a_conversation_and_under_a_system_text(own, tmp_path):
    shipped = next(one for one in utils.load_records(SHIPPED) if one["input"])
    question = shapes.user_message(shipped["instruction"], shipped["input"])["content"]
    again = [talk(question, shipped["output"]), talk(question, shipped["output"], system=SYSTEM)]
    utils.jdump([*OWN, *again, shipped | {"system": SYSTEM}], own)
    with pytest.raises(UserError, match="^3 records are from alpaca_data.json"):
        analyze_data.publish(str(own), str(tmp_path / "out"))


def test_the_released_file_keeps_its_license(own, tmp_path, monkeypatch):
    monkeypatch.setattr("alpaca.common.records.RELEASED_BLOB", released.git_blob_id(own))
    with pytest.raises(UserError, match="are from the data that Stanford Alpaca released, under CC BY-NC 4.0"):
        analyze_data.publish(str(own), str(tmp_path / "out"), "mit")


def test_publish_adds_to_no_folder_and_leaves_nothing_when_it_is_interrupted(own, tmp_path, monkeypatch):
    (out := tmp_path / "out").mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out already exists"):
        analyze_data.publish(str(own), str(out), "mit")
    (out / "notes.txt").unlink()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze_data, "find", interrupt)  # after the files, before the card
    with pytest.raises(KeyboardInterrupt):
        analyze_data.publish(str(own), str(out), "mit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "own.json"] and not any(out.iterdir())


def test_publish_draws_a_test_or_is_given_one_but_not_both(own, tmp_path):
    both = {"eval_fraction": 0.5, "eval_data_path": str(own)}
    with pytest.raises(UserError, match="drop one of them"):
        analyze_data.publish(str(own), str(tmp_path / "out"), "mit", **both)
    with pytest.raises(UserError, match="--eval_fraction 1e-09 of 3 records leaves a split empty"):
        analyze_data.publish(str(own), str(tmp_path / "out"), "mit", eval_fraction=1e-9)


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the hub: make the data set, check the card, how to send each file, one commit."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"sha": "0" * 40, "id": "me/birds", "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "You don't have the rights to create a dataset under me"}, 403)
        if self.path == "/api/repos/create":
            return self.reply({"url": f"{self.server.url}/datasets/me/birds"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            return self.reply(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
            )
        if "/commit/" in self.path:
            url = f"{self.server.url}/datasets/me/birds/commit/{'1' * 40}"
            return self.reply({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        self.reply({"errors": [], "warnings": []})

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(own, tmp_path, **env):
    argv = ("publish", "--data_path", own, "--output_dir", tmp_path / "out", "--license", "mit", "--push", "me/birds")
    env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | env
    return run_script("analyze_data.py", *argv, env=env)


def test_push_lists_the_files_and_uploads_the_folder_as_it_is(own, tmp_path, hub):
    run = push(own, tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert run.returncode == 0, run.stderr
    listed = run.stdout.partition("uploading these files to me/birds")[0]
    assert all(name in listed for name in ("README.md", "data/train.parquet", "jsonl/records.jsonl"))
    assert run.stdout.endswith(f"published: {hub.url}/datasets/me/birds\n")
    assert TOKEN not in run.stdout + run.stderr
    made = json.loads(next(body for path, _, body in hub.seen if path == "/api/repos/create"))
    assert (made["type"], made["name"]) == ("dataset", "birds")
    commit = next(body for path, _, body in hub.seen if "/commit/" in path)
    sent = [json.loads(line)["value"] for line in commit.splitlines() if b'"file"' in line]
    files = {one["path"]: base64.b64decode(one["content"]) for one in sent}
    on_disk = {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in (tmp_path / "out").rglob("*.*")}
    assert files == on_disk and len(files) == 3


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"HF_TOKEN": "hf_other"}, "You don't have the rights"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": TOKEN}, "refused"),
        ({"HF_HUB_OFFLINE": "1", "HF_TOKEN": TOKEN}, "offline mode"),
        ({}, "run hf auth login, then hf upload me/birds"),
    ],
)
def test_a_push_that_fails_says_why_in_a_line_and_the_folder_is_whole(own, tmp_path, hub, env, word):
    run = push(own, tmp_path, **{"HF_ENDPOINT": hub.url} | env)
    assert_one_line_error(run, "is complete, but its upload failed ", word, "hf upload me/birds")
    assert TOKEN not in run.stdout + run.stderr and "hf_other" not in run.stdout + run.stderr
    assert [r["instruction"] for r in utils.load_records(tmp_path / "out")] == [r["instruction"] for r in OWN]


def test_the_documented_commands_are_accepted(monkeypatch):
    """Each command of the docstring passes the check that comes before anything runs."""
    lines = [line.split()[2:] for line in analyze_data.__doc__.splitlines() if line.startswith("    python ")]
    assert [line[0] for line in lines] == ["fetch", "stats", "lint", "review", "plot", "publish"]
    for line in lines:
        assert cli.parse({line[0]: getattr(analyze_data, line[0])}, line)
