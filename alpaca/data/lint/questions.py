"""Lint's rules for instructions and inputs: a record in, evidence or None out."""

from __future__ import annotations

import re

from alpaca.data.lint.fields import CODE_TASK, NO_INPUT, around, input_of, is_code

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
    """Asks about a page behind a link that a text model cannot open: the answer is made up."""
    instruction, text = record["instruction"], input_of(record)
    match = URL.search(f"{instruction}\n{text}")
    if not match or URL_IS_THE_TEXT.search(URL.sub("", instruction)) or not READS_A_PAGE.search(instruction):
        return None
    # A pasted article that contains a link has words of its own: 15 are more than any "Article URL:" needs.
    pasted = URL.sub("", text) if URL.search(text) else text + URL.sub("", instruction).partition(":")[2]
    return None if len(pasted.split()) > 15 else f"link: {match[0][:80]}"


PICTURE = (
    r"(?:images?|pictures?|photos?|photographs?|drawings?|paintings?|illustrations?|logos?|posters?|infographics?|memes?|"
    r"gifs?|icons?|graphics?|collages?|videos?|animations?|wallpapers?|screenshots?|graphs?)"
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
    """Asks for a picture, or to look at a missing one."""
    instruction = record["instruction"]
    if match := PICTURE_PLACEHOLDER.search(record["input"]):
        return f"input: {around(record['input'], *match.span())}"
    if (match := PICTURE_PLACEHOLDER.fullmatch(record["output"].strip(" ."))) and not is_code(instruction):
        return f"output: {match[0]}"
    if PICTURE_IN_TEXT.search(instruction) or CODE_TASK.search(instruction):
        return None
    if match := MAKES_A_PICTURE.search(instruction):
        return f"instruction: {match[0].strip()}"
    # A description of the picture in the input is enough to work from; a link or a file name is not.
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
    """An instruction without words, with one word repeated over and over, or with random letters."""
    instruction = record["instruction"].strip()
    if not re.search(r"[^\W\d_]", instruction):
        return f"instruction: {instruction or '(empty)'}"
    if NO_INPUT.fullmatch(instruction) or re.fullmatch(r"\W*(instructions?|input|output|test)\W*", instruction, re.I):
        return f"instruction: {instruction}"
    if match := re.search(r"\b([^\W\d_]{2,})(\W+\1\b){3,}", instruction, re.IGNORECASE):
        if not re.search(rf"[\"'“].*{re.escape(match[1])}", instruction):
            return f"instruction: {match[0][:60]}"
    # "catchphrase" has six consonants in a row. No English word has seven, but quoted text and codes may.
    if (match := re.search(r"\b[a-z]*[bcdfghjklmnpqrstvwxz]{7,}[a-z]*\b", instruction)) and not (
        LETTERS_ON_PURPOSE.search(instruction) or CODE_TASK.search(instruction)
    ):
        return f"instruction: {match[0]}"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Instructions that refer to missing content.

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
CODE_NOUN = re.compile(r"\b(code|program|script|snippet|function|class|method|query|algorithm|loop|regex)\b", re.I)
GENERIC_CODE = re.compile(
    r"\b(write|create|design|implement|develop|generate|build|code|construct|devise|make|script)\b.{0,60}"
    r"\b(function|program|script|algorithm|code|method|class|query|sql|regex|expression|pseudo-?code|application|model)\b",
    re.IGNORECASE | re.DOTALL,
)


def _pointer(record: dict) -> tuple[str, str] | None:
    """Return the words that point at missing content (with some around them) and the noun after them; else None."""
    instruction = record["instruction"].strip()
    match = POINTS_AT.search(instruction)
    if not match or input_of(record) or is_code(instruction):
        return None
    rest = instruction[match.end() :].rstrip(" .?!:")
    # Content follows a colon, a line break, a dash, a quotation mark or a bracket, …
    if re.search(r"[:\n\"“”‘(\[{<—–]|\s-\s|\s'", rest) or re.search(r"[\"“\n].+[\"”\n]", instruction, re.DOTALL):
        return None
    # … or it is a list, "a, b or c" or "3 5 7", directly after the noun. A list after a preposition is not the content:
    # "the following animal as a mammal, bird or fish".
    noun = re.split(r"\b(?:using|in|by|with|into|to|for|as|that|which|from|on|is|are|was)\b", rest)[0]
    noun = re.split(rf",\s*(?:{ASKS})\b", noun, flags=re.IGNORECASE)[0]
    if "," in noun or len(re.findall(r"\d+", noun)) > 1 or re.match(r"\W*(?:is|are|was)\b.*,", rest):
        return None
    # Content may be a sentence of its own after "… the following.", or come before "the above".
    if re.search(rf"[.?!]\s+(?!(?:{ASKS})\b)\w", rest) or (re.search(r"above", match[0], re.I) and match.start() > 60):
        return None
    # "Write a function that sorts the given list" means the function's argument; "the following list" does not.
    if "following" not in match[0].lower() and GENERIC_CODE.search(instruction):
        return None
    return around(instruction, *match.span(), margin=50), noun or match[0]


def missing_input(record: dict) -> str | None:
    """Refers to "the following text", and no text follows."""
    pointer = _pointer(record)
    return f"instruction: {pointer[0]}" if pointer and not CODE_NOUN.search(pointer[1]) else None


EMPTY_CODE = re.compile(
    r"```[\w+#-]*\s*```|^[ \t]*(?:#|//)\s*(?:your |insert |put |write |add )?(?:code|logic|implementation)"
    r"(?: goes)? here\W*$|\[(?:insert )?code here\]",
    re.IGNORECASE | re.MULTILINE,
)


def empty_code(record: dict) -> str | None:
    """Asks about missing code, or answers with an empty code block."""
    if match := EMPTY_CODE.search(record["output"]):
        # "``` ```" also matches the end of one block and the start of the next.
        if not match[0].startswith("```") or record["output"][: match.start()].count("```") % 2 == 0:
            return f"output: {around(record['output'], *match.span())}"
    pointer = _pointer(record)
    return f"instruction: {pointer[0]}" if pointer and CODE_NOUN.search(pointer[1]) else None
