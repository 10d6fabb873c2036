"""The filter `quality`.

Its rules are datatrove's: the rules of Gopher (Rae et al. 2021, quality and repetition)
and of FineWeb (Penedo et al. 2024) with their published thresholds, over words of any script. The
two rules for English only are off, stop words and a minimum mean word length, and so is the maximum
number of words, which `max_characters` replaces.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# Words are separated by spaces, as in the Gopher paper; in scripts written without spaces, every
# character is a word.
_NO_SPACES = "\u2e80-\ua4cf\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\s{_NO_SPACES}]+")


@lru_cache(maxsize=1)
def word_splitter() -> Any:
    """The splitting of text into words and sentences for datatrove; its import takes half a second.

    A sentence ends with terminal punctuation of any script, or with its line.
    """
    from datatrove.utils.text import TERMINAL_PUNCTUATION
    from datatrove.utils.word_tokenizers import WordTokenizer

    end = re.escape("".join(sorted(TERMINAL_PUNCTUATION)))
    sentence = re.compile(rf"[^{end}\n]+[{end}]*|[{end}]+")

    class Words(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return _WORDS.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return sentence.findall(text)

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in sentence.finditer(text)]

    return Words()


@lru_cache(maxsize=3)
def quality_rule(name: str) -> Callable[[str], str | None]:
    """A function from a text to the rule that it breaks, or None, for one set of rules."""
    from datatrove.data import Document as TheirDocument
    from datatrove.pipeline.filters.fineweb_quality_filter import FineWebQualityFilter
    from datatrove.pipeline.filters.gopher_quality_filter import GopherQualityFilter
    from datatrove.pipeline.filters.gopher_repetition_filter import GopherRepetitionFilter

    words = word_splitter()
    if name == "gopher":
        rules = GopherQualityFilter(
            max_doc_words=None, min_avg_word_length=None, min_stop_words=None, language=words
        )
    elif name == "repetition":
        rules = GopherRepetitionFilter(language=words)
    else:
        rules = FineWebQualityFilter(language=words)

    def judge(text: str) -> str | None:
        verdict = rules.filter(TheirDocument(text=text, id=""))
        return None if verdict is True else f"{name}: {verdict[1]}"

    return judge
