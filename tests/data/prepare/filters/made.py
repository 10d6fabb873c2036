"""Made-up text for tests of filters."""

import random


def words(rng: random.Random, count: int) -> str:
    """Prose of made-up words, sentence by sentence, that breaks no rule of quality."""
    syllables = ["ka", "ro", "mi", "ten", "lu", "sa", "vor", "pe", "dun", "li"]
    text = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(count)]
    lines = [" ".join(text[i : i + 12]) for i in range(0, count, 12)]
    return ".\n".join(lines) + ".\n"
