"""The encoding of a file of text, guessed from its bytes where it is not UTF-8."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import charset_normalizer

from pipelines.core.errors import InputError

# What is in use besides UTF-8, and the letters beyond ASCII of the languages that it is used for: of several, where spaces part them.
WESTERN = "äöüß àâçéèêëîïôùûœ áéíóúñü ãõáâàçéêíóô åäöæøé àèéìòù ëéïóöü"
CENTRAL = "ąćęłńóśźż áčďéěíňóřšťúůýž áäčďéíĺľňóôŕšťúýž áéíóöőúüű ăâîşţ čćđšž"
TURKISH = "çğıöşüâî"
CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюяёіїєґў"
ENCODINGS = {
    **dict.fromkeys(("cp1252", "mac_roman"), WESTERN),
    **dict.fromkeys(("cp1250", "iso8859_2"), CENTRAL),
    **dict.fromkeys(("cp1251", "koi8_r", "cp866"), CYRILLIC),
    "cp1253": "αβγδεζηθικλμνξοπρςστυφχψωάέήίόύώϊϋ",
    "cp1254": TURKISH,
    "cp1255": "אבגדהוזחטיךכלםמןנסעףפץצקרשת",
    "cp1256": "ءآأؤإئابةتثجحخدذرزسشصضطظعغـفقكلمنهوىي",
}
# The same of East Asia: a smaller character set, whose characters of two bytes are the common ones, and what many of them are.
WIDE_ENCODINGS = {
    "cp932": ("shift_jis", "[ぁ-ん]"),
    "euc_jp": ("shift_jis", "[ぁ-ん]"),
    "cp949": ("euc_kr", "[가-힣]"),
    "gb18030": ("gb2312", "[一-鿿]"),
    "big5": ("big5", "[一-鿿]"),
    **dict.fromkeys(("utf_16_le", "utf_16_be"), ("gb18030", "[ぁ-ヿ一-鿿]")),
}
BINARY = (
    b"PK\3\4",
    b"\x1f\x8b",
    b"\xd0\xcf\x11\xe0",
    b"PAR1",
    b"BZh",
    b"(\xb5/\xfd",
    b"%PDF",
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
)
PUNCTUATION = "“”‘’„–—…€£«»¡¿°·½®™©§\xa0"


# ---- Encodings


def encoding_of(file: BinaryIO, path: Path, is_table: bool = False) -> str:
    """The encoding of a file of text: what its first bytes say, else UTF-8, else what its lines look like. Raises InputError for a binary file, and
    says what to do where it should have been a table."""
    head = file.read(4096)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = head[::2].count(0), head[1::2].count(0)
    if max(zeros) > len(head) / 8 and not min(zeros):  # every other byte of Latin letters
        return "utf_16_be" if zeros[0] else "utf_16_le"
    file.seek(0)
    counts: Counter[str] = Counter()
    other = b""
    for line in file:
        if not line.isascii():
            try:
                line.decode("utf-8", "surrogatepass")  # half of a pair is not UTF-8, but nothing else either
                counts["UTF-8"] += 1
            except UnicodeDecodeError:
                counts["other"] += 1
                other += line[:4096] if len(other) < 1 << 16 else b""
    if not counts["other"]:
        return "utf-8-sig"
    if head.startswith(BINARY):  # the first line of a PDF is ASCII
        problem = (
            "no text but a PDF, an image, an archive or another binary file; save its text in a .txt file, or remove it"
        )
        if is_table:
            problem = (
                "a spreadsheet, an archive or another binary file whatever its name says; save it as CSV or unpack it"
            )
        raise InputError(f"expected a file of text, found that {path} is {problem}")
    if counts["UTF-8"] < counts["other"] and (encoding := _guess(other)):
        return encoding
    raise InputError(
        f"expected one encoding in {path}, UTF-8 or another, found bytes in {counts['other']} lines that are not UTF-8, such as "
        f"{other[:60]!r}, beside {counts['UTF-8']} lines that are; repair the file, or name its encoding with --encoding"
    )


def _guess(content: bytes) -> str | None:
    """The encoding that makes the likeliest text, Western European where no other has more of the letters of its languages."""
    ranks = {}
    for name in (*ENCODINGS, *WIDE_ENCODINGS):
        # Asked for one after another: of several, charset-normalizer leaves those out that come after a fair one.
        for match in charset_normalizer.from_bytes(content, cp_isolation=[name], threshold=1.0):
            share = _share_of_usual(content.decode(name), name)
            ranks[name] = (-round(share, 1), name != "cp1252", match.chaos, -match.coherence)
    return min(ranks, key=lambda name: ranks[name], default=None)


def _share_of_usual(text: str, encoding: str) -> float:
    """How many of the characters beyond ASCII are usual in the languages that an encoding is used for."""
    if encoding in ENCODINGS and ENCODINGS[encoding] not in (
        WESTERN,
        CENTRAL,
        TURKISH,
    ):  # no letters of theirs beside Latin ones
        text = re.sub(r"(?<=[A-Za-z])[^\x00-\x7f]|[^\x00-\x7f](?=[A-Za-z])", "\ufffd", text)
    beyond = [character for character in text if not character.isascii()]
    if encoding in ENCODINGS:
        return max(
            sum(((one in PUNCTUATION + letters) + (one.lower() in PUNCTUATION + letters)) / 2 for one in beyond)
            for letters in ENCODINGS[encoding].split()
        ) / len(beyond)
    narrower, many = WIDE_ENCODINGS[encoding]
    common = sum(len(one.encode(narrower, "ignore")) == 2 for one in beyond)
    return min(common, 3 * len(re.findall(many, text))) / len(beyond)
