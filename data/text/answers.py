"""Which tokens of a rendered conversation are the assistant's.

The ids alone show it, since text never encodes to a special token. What the model writes is its
reasoning, the answer, calls of tools and the end of the turn. Not what asks for them: text of
others, results of tools, and the tokens before an answer: `<｜Assistant｜>`, the `<think>` or
`</think>` that follows it, and those of tasks.

Letters: T tokens of a document, V vocabulary.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.compiled import compiled
from data.errors import DataError
from data.text.segments import ASSISTANT, END, END_THINK, TASK_TOKENS, THINK
from data.text.tokenizer import Tokenizer

_OTHER, _ASSISTANT, _THINK, _TASK, _END = range(5)


class Answers:
    """Finds the assistant's tokens in documents of a tokenizer.

    Raises DataError where it lacks one of the special tokens of conversations.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        kinds = {ASSISTANT: _ASSISTANT, THINK: _THINK, END_THINK: _THINK, END: _END}
        kinds |= dict.fromkeys(TASK_TOKENS.values(), _TASK)
        self._kind_V = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
        for token, kind in kinds.items():
            if token not in tokenizer.special:
                raise DataError(
                    f"{tokenizer.path} has no special token {token}; conversations need it."
                )
            self._kind_V[tokenizer.special[token]] = kind

    def mask(self, ids_T: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each token of a conversation, from its beginning, is the assistant's, [T]."""
        mask_T: NDArray[np.bool_] = _mask(self._kind_V, np.ascontiguousarray(ids_T))
        return mask_T


@compiled
def _mask(kind_V: NDArray[np.uint8], ids_T: NDArray[Any]) -> NDArray[np.bool_]:
    mask_T = np.zeros(len(ids_T), dtype=np.bool_)
    in_answer = False
    for i, token in enumerate(ids_T):
        kind = kind_V[token]
        follows_assistant = i > 0 and kind_V[ids_T[i - 1]] == _ASSISTANT
        asks = kind == _THINK and follows_assistant
        if asks or kind in (_ASSISTANT, _TASK):
            in_answer = True  # from the next token on
            continue
        mask_T[i] = in_answer
        if kind == _END:
            in_answer = False
    return mask_T
