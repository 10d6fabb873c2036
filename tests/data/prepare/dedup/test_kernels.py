"""The table of first documents and the keys of bands, against dictionaries and numpy."""

import numpy as np

from data.prepare.dedup.kernels import FirstDocuments, band_keys


def test_the_table_grows_and_keeps_the_first_document() -> None:
    rng = np.random.default_rng(1)
    keys = rng.integers(-(1 << 63), (1 << 63) - 1, 120_000)
    keys[60_000:] = rng.permutation(keys)[:60_000]
    keys[:3] = 0, -1, 0
    table, first, expected = FirstDocuments(0), dict[int, int](), []
    for document, key in enumerate(keys.tolist()):
        if key in first:
            expected.append((document, first[key]))
        first.setdefault(key, document)
    rows = np.stack([keys, np.arange(len(keys))], axis=1)
    results = [np.stack(table.repeats(part), axis=1) for part in np.array_split(rows, 7)]
    np.testing.assert_array_equal(np.concatenate(results), expected)
    assert table.count == len(first) and 2 * len(first) <= len(table.keys) <= 8 * len(first)


def test_keys_of_bands() -> None:
    values = np.random.default_rng(2).integers(0, 1 << 32, (5, 64), dtype=np.uint32)
    keys = band_keys(values, 4)
    for band in range(16):
        key = np.zeros(5, dtype=np.uint64)
        for column in range(4 * band, 4 * band + 4):
            key = (key ^ values[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        np.testing.assert_array_equal(keys[:, band], key)
