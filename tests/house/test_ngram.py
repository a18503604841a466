"""The build's n-gram model: its probabilities sum to 1, and are those of a plain implementation with dictionaries."""

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from ngram import NGram, discounts

WORDS, END = 6, 5


def made_texts(seed, n, longest=12):
    """Texts of a few words that prefer some successors, so that contexts differ in what follows them."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(n):
        words = [int(rng.integers(END))]
        while len(words) < rng.integers(1, longest + 1):
            words.append(int((words[-1] * 2 + rng.choice([0, 1, 3], p=[0.6, 0.3, 0.1])) % END))
        texts.append(np.array(words))
    return texts


class Plain:
    """Modified Kneser-Ney as the papers write it, one n-gram at a time."""

    def __init__(self, texts, order):
        self.counts = [Counter() for _ in range(order)]  # by length
        for k in range(order, 0, -1):
            for text in texts:
                line = ["<s>", *text.tolist(), END]
                for stop in range(3, len(line) + 1):  # predicted: neither the mark nor the first word
                    if stop >= k:
                        gram = tuple(line[stop - k : stop])
                        if k == order or gram[0] == "<s>":
                            self.counts[k - 1][gram] += 1
            if k < order:
                for longer in self.counts[k]:  # each different n-gram once
                    self.counts[k - 1][longer[1:]] += 1
        self.off = [self.discounts_of(list(c.values())) for c in self.counts]

    @staticmethod
    def discounts_of(counts):
        n1, n2, n3, n4 = (counts.count(c) for c in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return [0.0, 0.5, 0.5, 0.5]
        y = n1 / (n1 + 2 * n2)
        raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return [min(max(d, 0.0), limit) for limit, d in enumerate(raw)]

    def p(self, word, context):
        lower = self.p(word, context[1:]) if context else 1 / WORDS
        counts, off = self.counts[len(context)], self.off[len(context)]
        following = [(gram[-1], c) for gram, c in counts.items() if gram[:-1] == context]
        total = sum(c for _, c in following)
        if not total:
            return lower
        own = counts[(*context, word)]
        left_over = sum(off[min(c, 3)] for _, c in following)
        return max(own - off[min(own, 3)], 0.0) / total + left_over / total * lower


@pytest.mark.parametrize(("seed", "n", "order"), [(0, 3, 3), (1, 60, 5), (2, 400, 5), (3, 60, 1), (4, 60, 2)])
def test_equal_to_a_plain_implementation(seed, n, order):
    train, held = made_texts(seed, n), made_texts(seed + 100, 12)
    found = NGram(train, vocab_size=WORDS, end=END, order=order).probabilities(held)
    plain = Plain(train, order)
    wanted = []
    for text in held:
        line = ["<s>", *text.tolist(), END]
        wanted += [plain.p(line[i], tuple(line[max(0, i - order + 1) : i])) for i in range(2, len(line))]
    assert found == pytest.approx(wanted, rel=1e-12)
    if n == 400:
        assert any(d not in (0.0, 0.5) for d in plain.off[0] + plain.off[-1]), "the estimated discounts must be met too"


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_sum_to_one_after_every_context(order):
    """Also after contexts that were never seen, and at the beginning of a text."""
    model = NGram(made_texts(5, 30), vocab_size=WORDS, end=END, order=order)
    contexts = [c for n in (1, 2, 4) for c in itertools.product(range(END), repeat=n)]
    for context in contexts[::7]:
        # the probability of each word is the one at the place after the context
        sums = sum(
            model.probabilities([np.array([*context, word])])[len(context) - 1] for word in range(WORDS)
        )  # a text that holds the word END is none that occurs, but its probability is asked for all the same
        assert sums == pytest.approx(1.0, abs=1e-12)


def test_nats_are_summed_over_all_predicted_tokens():
    texts = made_texts(6, 20)
    model = NGram(texts, vocab_size=WORDS, end=END, order=3)
    p = model.probabilities(texts)
    assert len(p) == sum(map(len, texts))  # all but the first, and the end
    assert model.nats(texts) == pytest.approx(-sum(math.log(x) for x in p))


def test_discounts_of_the_formula():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 5])
    y = 100 / 180
    assert discounts(counts) == pytest.approx([0, 1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6])


def test_a_longer_memory_predicts_text_that_has_some():
    train, held = made_texts(7, 400), made_texts(8, 40)
    nats = [NGram(train, vocab_size=WORDS, end=END, order=n).nats(held) for n in (1, 2)]
    assert nats[1] < 0.8 * nats[0]
