"""What is wrong with a record of instruction data: one pure function a class, text in, evidence or None out.

The classes are the ten that AlpacaDataCleaned lists for the released 52,002 records, as far as a program can see them,
and the marks that a teacher, its prompt and its stop string leave behind. Precision comes before recall: a rule in
doubt says nothing. What they find on released records was read and judged one by one; docs/LOG.md has the figures.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache

from rapidfuzz.distance import LCSseq
from tqdm import tqdm

from alpaca import arithmetic
from alpaca.rouge import tokenize

NEAR_DUPLICATE = 0.7  # ROUGE-L F, as in the generator, but of instruction and input together

# ---------------------------------------------------------------------------------------------------------------------
# What several rules ask.

# The ways in which a teacher writes "there is no input" into the field that should be empty.
NO_INPUT = re.compile(
    r"\W*(no[ _-]?inputs?( (is |was )?(required|needed|necessary|provided|given|available))?|none|null|nil|nan|n/a|"
    r"n\.a\.?|not applicable|(none|not) (required|needed|provided))\W*",
    re.IGNORECASE,
)
CODE = re.compile(
    r"```|^[ \t]*(def|class|import|from|#include|public|private|function|var|let|const|for|while|if|return|print|"
    r"SELECT|INSERT|UPDATE|CREATE|DELETE|ALTER|echo)\b.*[\w\])'\"][;:{)][ \t]*$|"
    r"^[ \t]*(SELECT|INSERT INTO|CREATE TABLE)\b|"
    r"^[ \t]*(import|from) [\w.]+( import .*)?$|</\w+>|<(html|div|p|a|br|img|head|body|\?php|!DOCTYPE)\b|[;{][ \t]*$|"
    r"\w+\([^()]*\)\s*(;|\{|=>)|=>|[!=]==?\s|:=|\+=|\bdef \w+\(|\bprint\(|console\.log|"
    r"\\(begin|frac|text|sqrt|times)\b",
    re.MULTILINE,
)
CODE_TASK = re.compile(
    r"\b(code|coding|program(s|ming)?|script|function|algorithm|python|java|javascript|typescript|c\+\+|c#|php|ruby|"
    r"rust|sql|html|css|xml|json|yaml|csv|regex|regular expression|api|bash|shell|command[ -]line|latex|markdown|class|"
    r"method|query|pseudo-?code|debug|compile|string literal|escape|encod\w+|unicode|url)\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=8)  # several rules ask about the same output, one after the other
def is_code(text: str) -> bool:
    return bool(CODE.search(text))


def input_of(record: dict) -> str:
    """The input, or "" where it only says that there is none."""
    text = record["input"].strip()
    return "" if NO_INPUT.fullmatch(text) else text


CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2028\u2029\ufeff\u00ad]")


def around(text: str, start: int, end: int, margin: int = 30) -> str:
    """The piece of text that shows what was found: white space folded, control characters spelled, … where cut."""
    piece = CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text[max(0, start - margin) : end + margin])
    piece = re.sub(r"\s+", " ", piece)
    return ("…" if start > margin else "") + piece.strip() + ("…" if end + margin < len(text) else "")


def _found(pattern: re.Pattern, record: dict, fields=("instruction", "input", "output")) -> str | None:
    for field in fields:
        if match := pattern.search(record[field]):
            return f"{field}: {around(record[field], *match.span())}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Fields that are empty or say that they are.

ANSWER_MAY_BE_A_SIGN = re.compile(
    r"\b(punctuat\w+|symbol|character|sign|operator|emoji|mark|print|blank)", re.IGNORECASE
)


def empty_output(record: dict) -> str | None:
    output = record["output"].strip()
    if not output:
        return "output: (empty)"
    if re.fullmatch(r"[\s.…_-]+", output) and not ANSWER_MAY_BE_A_SIGN.search(record["instruction"]):
        return f"output: {output[:40]}"
    return None


NA_OUTPUT = re.compile(
    r"\W*(n/a|n\.a\.?|nan|no[ _-]?(output|input|answer|response)( (is )?(required|needed|necessary|provided|"
    r"available))?|not applicable|output|tbd|to ?do)\W*",
    re.IGNORECASE,
)


def na_output(record: dict) -> str | None:
    """ "N/A" where an answer should be; "none" and "null" are left alone, because they often are the answer."""
    output = record["output"].strip()
    if not NA_OUTPUT.fullmatch(output) or output.startswith("```"):
        return None
    asked = (record["instruction"] + record["input"]).lower()
    said = output.strip("<>[](){}.\"'` ").lower()
    return None if said in asked else f"output: {output}"


NULL_IS_CONTENT = re.compile(r"\b(word|value|type|term|keyword|null|none|nan|python|translate)\b", re.IGNORECASE)


def input_field(record: dict) -> str | None:
    text = record["input"].strip()
    if record["input"] and not text:
        return "input: white space only"
    if not NO_INPUT.fullmatch(text):
        return None
    if text.lower() in ("none", "null", "nil", "nan") and NULL_IS_CONTENT.search(record["instruction"]):
        return None
    return f"input: {text}"


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that no text model can follow, or that make no sense.

URL = re.compile(r"(https?://|www\.)[^\s\"'<>)]+", re.IGNORECASE)
READS_A_PAGE = re.compile(
    r"\b(summari[sz]\w*|read|article|website|web ?page|page|blog|post|paper|story|news|video|link|report|document|"
    r"pdf|critique|review|artwork|painting|source|content|main idea|headline|caption|analy[sz]e)\b",
    re.IGNORECASE,
)
URL_IS_THE_TEXT = re.compile(
    r"\b(urls?|domain|protocol|shorten|hyperlink|cit(e|ation)|reference|bibliography|regex|regular expression|code|"
    r"script|program|function|algorithm|html|markdown|command|curl|path|query string|parameters?|valid\w*|"
    r"safe|phishing|spam|suspicious|scam)\b",
    re.IGNORECASE,
)


def link(record: dict) -> str | None:
    """Asks about a page behind a link that a text model cannot open: whatever the answer says is made up."""
    instruction, text = record["instruction"], input_of(record)
    match = URL.search(f"{instruction}\n{text}")
    if not match or URL_IS_THE_TEXT.search(URL.sub("", instruction)) or not READS_A_PAGE.search(instruction):
        return None
    # A pasted article that happens to hold a link has its own words: 15 are more than any "Article URL:" needs.
    pasted = URL.sub("", text) if URL.search(text) else text + URL.sub("", instruction).partition(":")[2]
    return None if len(pasted.split()) > 15 else f"link: {match[0][:80]}"


PICTURE = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|paintings?|illustrations?|logos?|posters?|infographics?|memes?|"
    r"gifs?|icons?|graphics?|collages?|videos?|animations?|wallpapers?|screenshots?|"
    r"graphs?)"
)
MAKES_A_PICTURE = re.compile(
    r"(?:^|[.!?]\s+|please |then )(?:(?:draw|paint|doodle|photograph|animate)\s+(?:me |us )?(?:an?|the|this|your|two|"
    r"three|some)\b(?!\s+(?:\w+\s+){0,2}(?:conclusions?|comparisons?|parallels?|inferences?|distinctions?|analog\w+|"
    r"contrast|connections?|links?|lessons?|morals?|line between|card|blank|tables?|timelines?))|"
    r"(?:create|make|design|generate|produce|edit|crop|resize|find|take|insert|upload|render)\s+"
    rf"(?:(?!caption|description|title|prompt|for\b|about|to\b|that|of\b|with\b|from\b|based|ideas?\b)[\w'-]+\s+){{0,5}}?"
    rf"{PICTURE}\b(?![-/'’]|\s+(?:captions?|descriptions?|scripts?|titles?|slogans?|games?|books?|story|stories|concepts?|"
    r"ideas?|names?|texts?|class\w+|recog\w+|process\w+|galler\w+|generators?|editors?|upload\w*|detect\w*|datasets?|"
    r"search\w*|urls?|tags?|elements?|files?|sharing|stream\w*|tutorials?|conferenc\w*|essay|editing|designers?|novels?|"
    r"calculus|theory|database|algorithm|organi[sz]ers?|lessons?|plans?|ads?|contents?|calls?|chats?)))",
    re.IGNORECASE,
)
LOOKS_AT_A_PICTURE = re.compile(
    r"\b(?:this|these|following|given|attached|provided|below|above|(?:in|on|of|from) the)\s+(?:images?|pictures?|"
    r"photos?|photographs?|screenshots?|artworks?|audio|video clips?|recordings?|gifs?)"
    r"\b(?!\s+(?:of|captions?|descriptions?|titles?|formats?|sizes?|files?|quality|frames?|books?|industry))",
    re.IGNORECASE,
)
PICTURE_PLACEHOLDER = re.compile(
    r"[<\[(]\s*(?:an? |the |insert |attached )*(?:image|picture|photo|photograph|video|audio|graph|chart)s?"
    r"(?: (?:of|attached|here|file|provided|shown|showing)\b[^>\])]*)?\s*[>\])](?!\()",
    re.IGNORECASE,
)
PICTURE_IN_TEXT = re.compile(
    r"\b(ascii|svg|turtle|tikz|mermaid|graphviz|emoji|in words|in text|text-based|caption|description|alt[- ]text|"
    r"word picture|verbal|prompt|imagin\w+)\b",
    re.IGNORECASE,
)


def needs_media(record: dict) -> str | None:
    """Asks for a picture, or to look at one that is not there."""
    instruction = record["instruction"]
    if match := PICTURE_PLACEHOLDER.search(record["input"]):
        return f"input: {around(record['input'], *match.span())}"
    if (match := PICTURE_PLACEHOLDER.fullmatch(record["output"].strip(" ."))) and not is_code(instruction):
        return f"output: {match[0]}"
    if PICTURE_IN_TEXT.search(instruction) or CODE_TASK.search(instruction):
        return None
    if match := MAKES_A_PICTURE.search(instruction):
        return f"instruction: {match[0].strip()}"
    # Words about the picture in the input are something to work from; a link or the name of a file is not.
    shown = re.sub(r"\S+\.(?:jpe?g|png|gif|bmp|mp[34]|wav)\b", "", URL.sub("", input_of(record)))
    if (match := LOOKS_AT_A_PICTURE.search(instruction)) and not shown.strip():
        return f"instruction: {match[0]}"
    return None


LETTERS_ON_PURPOSE = re.compile(
    r"\b(anagram|unscrambl\w*|scrambl\w*|deco\w+|decrypt|encrypt\w*|cipher\w*|acronym|password|letters?|abbreviat\w+|"
    r"spell\w*|meaning of|stand for|keyboard)\b",
    re.IGNORECASE,
)


def nonsense(record: dict) -> str | None:
    """An instruction without words, with one word again and again, or with keys hit at random."""
    instruction = record["instruction"].strip()
    if not re.search(r"[^\W\d_]", instruction):
        return f"instruction: {instruction or '(empty)'}"
    if NO_INPUT.fullmatch(instruction) or re.fullmatch(r"\W*(instructions?|input|output|test)\W*", instruction, re.I):
        return f"instruction: {instruction}"
    if match := re.search(r"\b([^\W\d_]{2,})(\W+\1\b){3,}", instruction, re.IGNORECASE):
        if not re.search(rf"[\"'“].*{re.escape(match[1])}", instruction):
            return f"instruction: {match[0][:60]}"
    # "catchphrase" has six consonants in a row and no English word has seven; quoted text and codes may.
    if (match := re.search(r"\b[a-z]*[bcdfghjklmnpqrstvwxz]{7,}[a-z]*\b", instruction)) and not (
        LETTERS_ON_PURPOSE.search(instruction) or CODE_TASK.search(instruction)
    ):
        return f"instruction: {match[0]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# An instruction that refers to something which is not there.

NOT_A_TEXT = r"(?:year|day|week|month|morning|night|season|decade|century|generation|steps? in)s?\b"
TEXT = (
    r"(?:text|sentence|paragraph|passage|article|excerpt|phrase|statement|e-?mail|tweet|review|snippet|dialogue|thread|"
    r"transcript|code)s?"
)
PASTED = (
    rf"(?:{TEXT}|(?:list|word|number|option|stor(?:y|ie)|poem|letter|note|message|log|recipe|document|pdf|essay|figure|"
    r"change|item|event|fact|quote|argument|claim|scenario|question|equation|expression|sequence|string|function|program|"
    r"script|quer(?:y|ie)|table)s?|data|information|feedback)"
)
POINTS_AT = re.compile(
    rf"\bthe following\b(?!\s+{NOT_A_TEXT})|\b(?:the|these|this) (?:given|provided|attached|above|below)\b|"
    r"\b(?:given|provided|listed|shown|described|mentioned|written|quoted) (?:below|above|here)\b|"
    rf"\b{PASTED} (?:below|above)\b(?!\s+(?:\d|an?\b|the\b|average|zero))|"
    rf"^[^.?!]*\b(?:this|these) (?:\w+ )?{TEXT}\b(?!\s+(?:should|must|will|needs?)\b)|"
    rf"^given (?:an?|two|three|some|the) (?:[\w-]+ ){{0,2}}(?:{PASTED}|paper|premise|topic|title|description|input)\b",
    re.IGNORECASE,
)
ASKS = (
    "Make|Use|Write|Give|Keep|Include|Provide|Explain|Choose|Select|Then|Please|Do not|Don't|Be|Your|Output|It should|"
    "You|The (?:output|answer)|Generate|Create|Find|Determine|Identify|Come up|Compose|Calculate|Suggest|Construct|"
    "Design|Build|Tell|Classify|Describe|Answer|Compute|Edit|Rewrite|Summari[sz]e|Arrange|List|Name|What|How|Which|Produce|"
    "Develop|Convert|Sort|Translate|Predict|Rate|Evaluate|Analy[sz]e"
)
CODE_NOUN = re.compile(
    r"\b(code|program|script|snippet|function|class|method|query|algorithm|loop|regex)\b", re.IGNORECASE
)
GENERIC_CODE = re.compile(
    r"\b(write|create|design|implement|develop|generate|build|code|construct|devise|make|script)\b.{0,60}"
    r"\b(function|program|script|algorithm|code|method|class|query|sql|regex|expression|pseudo-?code|application|model)\b",
    re.IGNORECASE | re.DOTALL,
)


def _pointer(record: dict) -> tuple[str, str] | None:
    """The words that point at content (with some around them) and the noun after them, when no content is there."""
    instruction = record["instruction"].strip()
    match = POINTS_AT.search(instruction)
    if not match or input_of(record) or is_code(instruction):
        return None
    rest = instruction[match.end() :].rstrip(" .?!:")
    # Content stands after a colon, a line break, a dash, a quotation mark or a bracket, …
    if re.search(r"[:\n\"“”‘(\[{<—–]|\s-\s|\s'", rest) or re.search(r"[\"“\n].+[\"”\n]", instruction, re.DOTALL):
        return None
    # … or it is a list, "a, b or c" or "3 5 7", directly after the noun. After a preposition it is something else: "the
    # following animal as a mammal, bird or fish".
    noun = re.split(r"\b(?:using|in|by|with|into|to|for|as|that|which|from|on|is|are|was)\b", rest)[0]
    noun = re.split(rf",\s*(?:{ASKS})\b", noun, flags=re.IGNORECASE)[0]
    if "," in noun or len(re.findall(r"\d+", noun)) > 1 or re.match(r"\W*(?:is|are|was)\b.*,", rest):
        return None
    # "… the following. <a sentence of its own that is the content>", and content that stands before "the above".
    if re.search(rf"[.?!]\s+(?!(?:{ASKS})\b)\w", rest) or (re.search(r"above", match[0], re.I) and match.start() > 60):
        return None
    # "Write a function that sorts the given list" speaks of the function's argument; "the following list" does not.
    if "following" not in match[0].lower() and GENERIC_CODE.search(instruction):
        return None
    return around(instruction, *match.span(), margin=50), noun or match[0]


def missing_input(record: dict) -> str | None:
    """Speaks of "the following text", and there is none."""
    pointer = _pointer(record)
    return f"instruction: {pointer[0]}" if pointer and not CODE_NOUN.search(pointer[1]) else None


EMPTY_CODE = re.compile(
    r"```[\w+#-]*\s*```|^[ \t]*(?:#|//)\s*(?:your |insert |put |write |add )?(?:code|logic|implementation)"
    r"(?: goes)? here\W*$|\[(?:insert )?code here\]",
    re.IGNORECASE | re.MULTILINE,
)


def empty_code(record: dict) -> str | None:
    """Asks about code that is not there, or answers with a code block that is empty."""
    if match := EMPTY_CODE.search(record["output"]):
        # "``` ```" also matches the fence that ends one block and the fence that starts the next.
        if not match[0].startswith("```") or record["output"][: match.start()].count("```") % 2 == 0:
            return f"output: {around(record['output'], *match.span())}"
    pointer = _pointer(record)
    return f"instruction: {pointer[0]}" if pointer and CODE_NOUN.search(pointer[1]) else None


# ---------------------------------------------------------------------------------------------------------------------
# Marks of the machinery.

NEXT_TASK = re.compile(r"(\d+)\s*\.\s*Instruction:", re.IGNORECASE)
PROMPT_MARKS = re.compile(
    r"(\d+)\s*\.\s*Input:(?=.*\b\1\s*\.\s*Output:)|###\s*(?:Instruction|Response|Input):|"
    r"//\s*(?:EOM|end of output)\s*//|Below is an instruction that describes a task|<\|(?:endoftext|im_end|im_start)\|>"
    r"|[<\[]no ?(?:input|output)[>\]]",
    re.IGNORECASE | re.DOTALL,
)


def merged(record: dict) -> str | None:
    """The teacher's prompt or the next task runs on inside a field."""
    for field in ("instruction", "input", "output"):
        text = record[field]
        match = NEXT_TASK.search(text)
        # "2. Instruction:" after "1. Warm-up:" is a part of a lesson plan, unless "2. Input:" or "2. Output:" follows
        if match and (
            re.search(rf"\b{match[1]}\s*\.\s*(?:Input|Output):", text, re.IGNORECASE)
            or not re.search(rf"^\s*{int(match[1]) - 1}\.\s", text, re.MULTILINE)
        ):
            return f"{field}: {around(text, *match.span())}"
    return _found(PROMPT_MARKS, record, ("instruction", "output"))


MOJIBAKE = re.compile(
    "\ufffd|Ã[\u0080-\u00bf\u0152-\u0178\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]|Â[\u0080-\u00bf]|"
    "â€|â\u0080|ðŸ|ï»¿|ΓÇ[ÖöôÿªÑ£¥]|Ð[\u0080-\u00bf]Ñ|[\u0080-\u009f]"
)


ABOUT_ENCODINGS = re.compile(r"\b(mojibake|encod(ed|ing)|decod(ed|ing)|garbled|utf-?8)\b", re.IGNORECASE)


def mojibake(record: dict) -> str | None:
    return None if _found(ABOUT_ENCODINGS, record) else _found(MOJIBAKE, record)


ESCAPE = re.compile(r"\\[nrt](?![a-z])|\\[\"']|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\\\n")
LATEX = re.compile(r"\\[(\[]|\$[^$\n]*\\[a-z]+[^$\n]*\$")
ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|copy|rsquo|lsquo|rdquo|ldquo|mdash|ndash|hellip|#\d{2,5}|#x[0-9a-f]{2,5});", re.I
)


def stray_escape(record: dict) -> str | None:
    """Control characters anywhere; backslash escapes and HTML entities where nothing is about code."""
    if evidence := _found(CONTROL, record):
        return evidence
    evidence = _found(ESCAPE, record) or _found(ENTITY, record)
    if not evidence or CODE_TASK.search(record["instruction"]):
        return None
    fields = (record["instruction"], record["input"], record["output"])
    return None if any(is_code(text) or LATEX.search(text) for text in fields) else evidence


# ---------------------------------------------------------------------------------------------------------------------
# An output that stops in mid-sentence.

NEVER_LAST = re.compile(r"\b(?:and|or|nor|the|a|an|because|their|my|your|our|whose|such as|than)$", re.IGNORECASE)
SELDOM_LAST = re.compile(
    r"\b(?:of|to|in|at|by|for|from|with|on|into|between|about|approximately|is|are|was|were|be|equals|but|which|that|its|"
    r"including|although|while|whereas|when|if|has|have|will|can|should|would)$",
    re.IGNORECASE,
)
# The original's stop string "20." ends a text before "in 2020." and "costs $20.", and "\n20" a list after item 19: of
# 2,000 released outputs 2 end with item 15, none with 16 to 18, 20 with 19, none with 20.
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
STOPPED_AT_20 = re.compile(
    rf"\b(?:in|since|until|during|late|early|mid|(?:{MONTH})(?: \d\d?,)?) (?:18|19|20)$|\s[$€£=]$"
)
CLOSING = re.compile(r"\b(regards|sincerely|yours|love|wishes|thanks|truly|cheers|faithfully|hugs),$", re.IGNORECASE)
TITLES = "".join(rf"(?<!\b{title})" for title in ("Mr", "Mrs", "Ms", "Dr", "St", "vs", "Jr", "Sr", "Inc", "etc", "No"))
SENTENCE_END = re.compile(rf"(?<=[a-z]{{2}}){TITLES}[.!?][\"”']?\s+(?=[A-Z\"“])|(?<=[)\"”])[.!?]\s+(?=[A-Z])")


def _lines(record: dict) -> list[str]:
    """The lines of an output that is text; code has ends of its own."""
    return [] if is_code(record["output"]) else [s for line in record["output"].split("\n") if (s := line.strip())]


def cut_off(record: dict) -> str | None:
    """Only what cannot be an end: titles, lists, labels, verse, code, forms and signatures rightly lack a full stop."""
    if record["output"].count("```") % 2:
        return "output: a ``` block is never closed"
    lines = _lines(record)
    if not lines:
        return None
    last = lines[-1]
    if re.match(r"19[.)]\s", last) and any(re.match(r"18[.)]\s", line) for line in lines):
        asked = re.search(r"\b(19|nineteen)\b", record["instruction"], re.IGNORECASE)
        return None if asked else f"output: ends with item {last[:60]}"
    words = len(re.findall(r"\w+", last))
    # In verse and in lists, where most lines end as they like, "… that we are dreaming of" is as good an end as any.
    stops = sum(line[-1] in ".!?:;" for line in lines[:-1])
    free_ends = len(lines) > 2 and stops * 2 < len(lines) - 1
    prose = not free_ends and (words > 11 or SENTENCE_END.search(record["output"]))
    if (
        (STOPPED_AT_20.search(last) and words > 3)
        or (NEVER_LAST.search(last) and words > 5)
        or (SELDOM_LAST.search(last) and words > 3 and prose)
        or (last[-1] in "([{" and words > 5)
        or (last[-1] == "," and words > 5 and not free_ends and not CLOSING.search(last))
    ):
        return f"output: …{last[-60:]}"
    return None


def no_full_stop(record: dict) -> str | None:
    """A last sentence without an end, after sentences with one. Opt-in: most often only the full stop is missing."""
    lines = _lines(record)
    if not lines or not SENTENCE_END.search(lines[-1]) or not lines[-1][-1].isalnum():
        return None
    fragment = SENTENCE_END.split(lines[-1])[-1]
    if len(fragment.split()) < 4 or re.search(r"[#@]|https?:|www\.|\.com", fragment):
        return None
    return f"output: …{lines[-1][-60:]}"


# ---------------------------------------------------------------------------------------------------------------------
# Sums.


def wrong_arithmetic(record: dict) -> str | None:
    """An equation in the output whose sides differ, or a bare sum in the instruction that the output gets wrong."""
    output, text = record["output"], input_of(record)
    if is_code(output):
        return None
    if evidence := arithmetic.wrong_equation(output, asked=f"{record['instruction']}\n{text}"):
        return f"output: {evidence}"
    return arithmetic.wrong_answer(record["instruction"], text, output)


# ---------------------------------------------------------------------------------------------------------------------
# Records that are there twice.


def duplicates(records: list[dict]) -> dict[int, str]:
    """Index of each later copy → its original: same instruction and input, whatever the case and the white space."""
    first: dict[tuple, int] = {}
    found = {}
    for i, record in enumerate(records):
        key = tuple(" ".join(record[field].split()).casefold() for field in ("instruction", "input"))
        if first.setdefault(key, i) != i:
            found[i] = f"same instruction and input as record {first[key]}"
    return found


def near_duplicates(records: list[dict], threshold: float = NEAR_DUPLICATE) -> dict[int, str]:
    """Index of each record whose instruction and input have ROUGE-L F > threshold with an earlier kept one → evidence.

    Copies that duplicates() names are left out. The decisions are those of comparing with every kept record in order
    (tests/test_analyze_data.py has that oracle), but few pairs are compared. With t the threshold, F > t means
    2·lcs > t·(m + n). So n is between m·r and m/r with r = t/(2 - t), and more than m·r of the m tokens are shared.
    Of the m - floor(m·r) rarest tokens of one text at least one is then among as many rarest of the other: only texts
    that meet in such a token are verified.
    """
    tokens = [tokenize(f"{record['instruction']} {input_of(record)}") for record in records]
    frequency = Counter(token for text in tokens for token in text)
    # One character a token, the rarest first, and from behind the surrogates, which no encoder accepts.
    character = {token: chr(0xE000 + i) for i, token in enumerate(sorted(frequency, key=frequency.get))}
    texts = ["".join(character[token] for token in text) for text in tokens]
    cut = threshold - 1e-9  # the margin keeps rounding from pruning a pair at the threshold
    ratio = cut / (2 - cut)
    holders: dict[tuple[str, int], list[int]] = defaultdict(list)
    copies, found = duplicates(records), {}
    for i, text in enumerate(texts):
        if i in copies:
            continue
        length, seen, bag = len(text), Counter(), []
        for token in text:  # the second "the" of a text meets only the second "the" of another
            bag.append((token, seen[token]))
            seen[token] += 1
        rarest = sorted(bag)[: length - int(length * ratio)]
        for j in sorted({j for key in rarest for j in holders[key]}):
            other = texts[j]
            if not length * ratio < len(other) < length / ratio:
                continue
            lcs = LCSseq.similarity(text, other)
            if 2 * lcs <= cut * (length + len(other)):
                continue
            precision, recall = lcs / len(other), lcs / length
            f = 2 * precision * recall / (precision + recall)  # in this order: the floats of alpaca/rouge.py
            if f > threshold:
                found[i] = f"ROUGE-L {f:.2f} with record {j}: {around(records[j]['instruction'], 0, 60)}"
                break
        else:
            for key in rarest:
                holders[key].append(i)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# All classes, in the order of the report: why a record of it is bad, and who finds it.

RECORD_CLASSES: dict[str, tuple[str, Callable[[dict], str | None]]] = {
    "empty-output": ("the output is empty", empty_output),
    "na-output": ("the output says N/A where an answer should be", na_output),
    "input-field": ('the input says that there is none: it should be ""', input_field),
    "link": ("asks about a page behind a link: the answer is made up", link),
    "missing-input": ("refers to text that is not there: the answer is made up", missing_input),
    "empty-code": ("the code that it speaks of is not there", empty_code),
    "needs-media": ("asks to make or to look at a picture", needs_media),
    "nonsense": ("the instruction makes no sense", nonsense),
    "merged": ("the next task or the teacher's prompt runs on inside", merged),
    "cut-off": ("the output is cut off", cut_off),
    "no-full-stop": ("the last sentence has no end", no_full_stop),
    "wrong-arithmetic": ("a calculation is wrong", wrong_arithmetic),
    "mojibake": ("text that was decoded with the wrong encoding", mojibake),
    "stray-escape": ("escape or control characters that belong to no code", stray_escape),
}
SET_CLASSES: dict[str, tuple[str, Callable[[list[dict]], dict[int, str]]]] = {
    "duplicate": ("an earlier record asks the same in the same words", duplicates),
    "near-duplicate": ("an earlier record asks almost the same in almost the same words", near_duplicates),
}
CLASSES = {name: reason for name, (reason, _) in (RECORD_CLASSES | SET_CLASSES).items()}
OPT_IN = {"no-full-stop"}  # under 80% precision: docs/LOG.md


def find(records: list[dict], classes: set[str]) -> list[dict]:
    """All findings of these classes, by record: {"record": index from 0, "class", "reason", "evidence"}."""
    found = []
    rules = [(name, *rest) for name, rest in RECORD_CLASSES.items() if name in classes]
    for i, record in enumerate(tqdm(records, desc="lint", unit="record", disable=None)):
        found += [(i, name, reason, text) for name, reason, rule in rules if (text := rule(record))]
    for name, (reason, rule) in SET_CLASSES.items():
        if name in classes:
            found += [(i, name, reason, text) for i, text in rule(records).items()]
    keys = ("record", "class", "reason", "evidence")
    return [dict(zip(keys, finding, strict=True)) for finding in sorted(found, key=lambda finding: finding[0])]
