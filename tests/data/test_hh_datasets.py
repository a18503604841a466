"""The named data sets of HH-RLHF on a small tree in the publisher's layout: which rows, in which order, and the notes."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tunesmith.data.datasets import open_dataset
from tunesmith.data.dialogue import Preference
from tunesmith.data.hh import HH_SUBSETS
from tunesmith.data.hh_template import HH
from tunesmith.data.readers import Report
from tunesmith.data.tokenstore import tokenise
from tunesmith.errors import UserError
from tunesmith.options.training import DataOptions

SIZES = {"train": 11, "test": 5}


def pair(subset: str, split: str, i: int) -> dict[str, str]:
    prompt = f"\n\nHuman: {subset} {split} {i}?\n\nAssistant:"
    return {"chosen": f"{prompt} good {i}", "rejected": f"{prompt} bad {i}"}


@pytest.fixture
def hh_root(tmp_path):
    """All four subsets, 11 train and 5 test rows each."""
    for subset in HH_SUBSETS:
        (tmp_path / "hh" / subset).mkdir(parents=True)
        for split, count in SIZES.items():
            lines = "".join(json.dumps(pair(subset, split, i)) + "\n" for i in range(count))
            (tmp_path / "hh" / subset / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return tmp_path / "hh"


def chosen(name, split="train", **options):
    """The chosen texts of a split in order, and the report."""
    report = Report()
    source = open_dataset(DataOptions(name=name, **options))
    rows = [located.value for located in source.rows(split, report)]
    assert all(isinstance(row, Preference) for row in rows)
    return [HH.text(row.chosen.messages) for row in rows], report


def texts(subsets, split):
    return [pair(subset, split, i)["chosen"] for subset in subsets for i in range(SIZES[split])]


@pytest.mark.parametrize("split", ["train", "test"])
def test_hh_is_all_subsets_in_order(hh_root, split):
    assert chosen("hh", split, root=str(hh_root))[0] == texts(HH_SUBSETS, split)


@pytest.mark.parametrize("subset", HH_SUBSETS)
def test_hh_subset_is_that_subset(hh_root, subset):
    assert chosen(f"hh:{subset}", root=str(hh_root))[0] == texts([subset], "train")


def test_hh_rows_keep_their_rejected_answer(hh_root):
    source = open_dataset(DataOptions(name="hh", root=str(hh_root)))
    first = next(source.rows("train", Report())).value
    assert HH.text(first.rejected.messages) == pair(HH_SUBSETS[0], "train", 0)["rejected"]


def test_unknown_subset_lists_the_right_ones(hh_root):
    with pytest.raises(UserError, match="hh:harmless-base, hh:helpful-base"):
        open_dataset(DataOptions(name="hh:helpful", root=str(hh_root)))


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_hh_static_is_hh_without_rm_statics_rows_of_the_same_split(hh_root, tmp_path, form, split):
    """Every third row lies in rm-static (cut into prompt and answer); the other split's rows must not count."""
    static = tmp_path / "rm"
    static.mkdir()
    for part in SIZES:
        rows = []
        for text in texts(HH_SUBSETS, part)[:: 3 if part == "train" else 2]:
            at = text.index("Assistant:") + len("Assistant:")
            rows.append({"prompt": text[:at], "response": text[at:], "chosen": text[at:], "rejected": " bad"})
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), static / f"{part}-00000-of-00001.parquet")
        else:
            (static / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, report = chosen("hh-static", split, root=str(hh_root), rm_static=str(static))
    every = texts(HH_SUBSETS, split)
    expected = [text for i, text in enumerate(every) if i % (3 if split == "train" else 2)]
    assert found == expected
    assert report.rows == len(expected)


def test_hh_static_without_its_local_copy_says_what_it_needs(hh_root, tmp_path):
    with pytest.raises(UserError, match=r"--data\.rm_static .* train\.\* and test\.\*"):
        open_dataset(DataOptions(name="hh-static", root=str(hh_root), rm_static=str(tmp_path / "nowhere")))


def test_rm_static_with_bad_rows_is_an_error_and_no_crash(hh_root, tmp_path):
    """Were such rows passed over, the data set would silently be all of HH."""
    static = tmp_path / "rm"
    static.mkdir()
    for row, told in (
        ('{"text": "x"}', r"train\.jsonl:1.*prompt.*chosen"),
        ('{"prompt": ', r"invalid JSON.*train\.jsonl:1"),
    ):
        for split in SIZES:
            (static / f"{split}.jsonl").write_text(f"{row}\n")
        with pytest.raises(UserError, match=told):
            chosen("hh-static", root=str(hh_root), rm_static=str(static))


@pytest.mark.parametrize("split", ["train", "test"])
def test_hh_helpful_half_has_the_reports_rows_in_the_reports_order(hh_root, split):
    """First half of helpful-base, shuffled by torch.manual_seed(123); torch.randperm(n // 2)."""
    every = texts(["helpful-base"], split)
    torch.manual_seed(123)
    order = torch.randperm(len(every) // 2).tolist()
    for seed in (1, 2):
        assert chosen("hh-helpful-half", split, root=str(hh_root), seed=seed)[0] == [every[i] for i in order]


def test_hh_pairs_is_a_seeded_random_half_of_helpful_base(hh_root):
    every = texts(["helpful-base"], "train")
    halves = {}
    for seed in range(4):
        halves[seed] = chosen("hh-pairs", root=str(hh_root), seed=seed)[0]
        assert chosen("hh-pairs", root=str(hh_root), seed=seed)[0] == halves[seed]
        assert len(set(halves[seed])) == len(halves[seed]) == len(every) // 2
        assert set(halves[seed]) < set(every)
    assert len({frozenset(half) for half in halves.values()}) > 1, "another seed, another half"


@pytest.mark.parametrize("name", ["hh-helpful-half", "hh-pairs"])
def test_halves_need_only_their_own_subset(hh_root, name):
    for subset in HH_SUBSETS:
        if subset != "helpful-base":
            (hh_root / subset / "train.jsonl.gz").unlink()
    assert len(chosen(name, root=str(hh_root))[0]) == 5


def test_missing_subsets_are_listed_or_allowed(hh_root):
    (hh_root / "helpful-online" / "test.jsonl.gz").unlink()
    (hh_root / "harmless-base" / "train.jsonl.gz").unlink()
    with pytest.raises(UserError, match="allow_missing") as error:
        open_dataset(DataOptions(name="hh", root=str(hh_root)))
    told = str(error.value)
    assert "harmless-base" in told
    assert "helpful-online" in told
    assert "helpful-base" not in told
    left = ("helpful-base", "helpful-rejection-sampled")
    assert chosen("hh", root=str(hh_root), allow_missing=True)[0] == texts(left, "train")
    source = open_dataset(DataOptions(name="hh", root=str(hh_root), allow_missing=True))
    assert "harmless-base" in source.notes[0]
    assert "helpful-online" in source.notes[0]


def test_nothing_there_is_an_error_even_when_missing_is_allowed(hh_root, tmp_path):
    with pytest.raises(UserError, match="helpful-rejection-sampled"):
        open_dataset(DataOptions(name="hh", root=str(tmp_path), allow_missing=True))
    with pytest.raises(UserError, match="is not a directory"):
        open_dataset(DataOptions(name="hh", root=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("name", "published"), [("hh", "160,800"), ("hh:helpful-base", "43,835"), ("hh-helpful-half", "21,917")]
)
def test_another_row_count_than_the_published_one_is_noted(hh_root, name, published):
    _, report = chosen(name, root=str(hh_root))
    assert len(report.notes) == 1
    assert f"{name} train: {report.rows}" in report.notes[0]
    assert published in report.notes[0]
    assert chosen(name, root=str(hh_root), max_rows=3)[1].notes == [], "asked for fewer: nothing to note"


def test_a_cached_data_set_keeps_the_note_of_its_own_name(hh_root, tokenizer):
    """`hh` with three subsets missing has the rows of `hh:helpful-base`, and yet another published count."""
    for subset in HH_SUBSETS:
        if subset != "helpful-base":
            (hh_root / subset / "train.jsonl.gz").unlink()
    for name, published in (("hh:helpful-base", "43,835"), ("hh", "160,800")):
        source = open_dataset(DataOptions(name=name, root=str(hh_root), allow_missing=True))
        notes = tokenise(source, "train", tokenizer).report.notes
        assert len(notes) == 1
        assert published in notes[0]


def test_bad_rows_name_their_subsets_file(hh_root):
    """Four files are called train.jsonl.gz; the message must tell them apart."""
    file = hh_root / "helpful-online" / "train.jsonl.gz"
    lines = gzip.decompress(file.read_bytes()).splitlines()
    lines[4] = json.dumps(
        {"chosen": "\n\nHuman: hi\n\nAssistant:", "rejected": "\n\nHuman: hi\n\nAssistant: no"}
    ).encode()
    file.write_bytes(gzip.compress(b"\n".join(lines)))
    _, report = chosen("hh", root=str(hh_root))
    assert report.bad == {"empty answer": 1}
    assert report.places["empty answer"] == ["helpful-online/train.jsonl.gz:5"]
