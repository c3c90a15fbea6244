"""When two answers are the same one.

Scores, and rewards of answers, agree on it.
"""

import re
import string
import unicodedata

_BETWEEN_DIGITS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(
    rf"(?!(?<=\d)\.(?=\d))(?!(?<!\w)-(?=\d))[{re.escape(string.punctuation)}]"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Return a text without what makes no difference between two answers.

    That is what the script of SQuAD 1.1 takes out, case, punctuation, articles and more than one
    space, but numbers stay: the point in 3.5 and the minus of -2 are kept, and 1,000 is 1000.
    Letters are compared in Unicode's form NFKC.

    Source: evaluate-v1.1.py of Rajpurkar et al., 2016.
    """
    text = _BETWEEN_DIGITS.sub("", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", text)).split())
