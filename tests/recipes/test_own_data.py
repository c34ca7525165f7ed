"""Files as people have them: of each kind what is read, what is counted as left out, or the line that refuses it.

The README's table of kinds is made of the names here.
"""

import gzip
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from PIL import Image, PngImagePlugin

from shared.command_line import UsageError
from shared.data import left_out
from shared.fields import Corpus, Images
from shared.images import captioned, labelled
from shared.images.decoding import EncodedImage
from shared.text.documents import open_corpora, open_held_out
from shared.text.sentence_cache import split_corpus
from shared.text.tables import load_split
from shared.text.wordpiece import train_wordpiece
from tests.conftest import ROOT

# ----------------------------------------------------------------------------------------------------------------------
# What writes them


def write(folder: Path, files: dict[str, bytes | str]) -> str:
    """Files by their names below a new folder, whose name is returned."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder)


def image(form: str = "PNG", shade: int = 200) -> bytes:
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(stream := io.BytesIO(), form)
    return stream.getvalue()


def deep() -> bytes:
    Image.new("I;16", (16, 16), 40_000).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def images(folder: Path, *names: str) -> str:
    forms = {"jpg": "JPEG", "tif": "TIFF"}
    return write(folder, {name: image(forms.get(end := name.rpartition(".")[2], end.upper())) for name in names})


def tar(folder: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as archive:
        for name, content in members.items():
            (member := tarfile.TarInfo(name)).size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return write(folder, {"train-0.tar": stream.getvalue()})


def parquet(folder: Path, columns: dict[str, Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), stream := io.BytesIO())
    return write(folder, {"train.parquet": stream.getvalue()})


def shards(folder: Path, *parts: dict[str, Any]) -> str:
    """A Parquet file of each part."""
    for number, columns in enumerate(parts):
        data = Path(parquet(folder / "made", columns), "train.parquet")
        data.rename(folder / f"train-{number:05}-of-{len(parts):05}.parquet")
    return str(folder)


def wide_zst(text: str) -> bytes:
    """As `zstd --ultra -22 --long=31` writes it."""
    options = {"window_log": 31, "enable_ldm": True, "write_content_size": False}
    form = zstandard.ZstdCompressionParameters.from_level(19, **options)
    compressor = zstandard.ZstdCompressor(compression_params=form).compressobj()
    return compressor.compress(text.encode()) + compressor.flush()


def padded_gz(text: str) -> bytes:
    return gzip.compress(text.encode()) + bytes(512)


def heavy_png() -> bytes:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "x" * 5_000_000, zip=True)
    options = {"pnginfo": texts, "icc_profile": bytes(3_000_000)}
    Image.new("RGB", (16, 16), "red").save(stream := io.BytesIO(), "PNG", **options)
    return stream.getvalue()


def linked(folder: Path, *names: str) -> str:
    """Images in a folder beside the data, which links to it twice, and whose link leads back."""
    images(folder.with_name("elsewhere"), *names)
    images(folder, "bird/1.png", "bird/2.png")
    for child in folder.with_name("elsewhere").iterdir():
        (folder / child.name).symlink_to(child)
        (child / "up").symlink_to(folder)
    return str(folder)


def captions(folder: Path, number: int, *texts: object) -> str:
    images(folder, *(f"{index}.png" for index in range(number)))
    rows = [json.dumps({"file_name": f"{index}.png", "text": text}) for index, text in enumerate(texts)]
    return write(folder, {"metadata.jsonl": "\n".join(rows)})


def lines(*texts: object) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


CLASSES = {"cat/1.png": image(), "cat/2.png": image(), "dog/1.png": image(), "dog/2.png": image()}
TWO = ("cat/1.{0}", "cat/2.{0}", "dog/1.{0}", "dog/2.{0}")
SAMPLES = {f"{place}.{end}": content for place in "01" for end, content in (("png", image()), ("cls", place.encode()))}
BYTES = {"image": [image()] * 4, "label": [0, 0, 1, 1]}
STRUCTS = {"image": [{"bytes": image(), "path": None}] * 4, "label": ["a", "a", "b", "b"]}
METADATA = {"metadata.jsonl": json.dumps({"file_name": "1.png", "text": "b"})}
STRAY = image("JPEG").replace(b"\xff\xd9", b"\x00\x00\xff\xd9" + b"\x00" * 9)
MIXED = [(n, end) for n in range(4) for end in ("cls", "jpg" if n < 2 else "png")]
NAMES = [(n, end) for n in range(4) for end in (".cls", ".png")]
SECOND = {"2.jpg": image("JPEG"), "2.json": b'{"caption": "b", "n": 7}'}
THAI, DNA = "กขคงจฉชซฌญ" * 20, "acgtggtca" * 40

# ----------------------------------------------------------------------------------------------------------------------
# What reads them, and says how much there was


def classes(data: str) -> int:
    train, held_out = labelled.open_splits(Images(data=data, eval_fraction=0.5), "", largest=8)
    for split in (train, held_out):
        for place in range(len(split)):
            EncodedImage(split.files.read(place)).center_crop(8, 1.0)
    return len(train) + len(held_out)


def tables(data: str) -> int:
    return len(load_split(data, "", "train"))


def with_captions(data: str) -> int:
    options = {"config": "", "split": "train", "image_column": "", "caption_column": "", "max_bad_fraction": 0.5}
    return len(captioned.open_captioned(data, **options))


def texts(data: str) -> int:
    held_out, _ = open_held_out(Corpus(data=data))
    found = [*open_corpora(data, config="", split="train", text_column=""), *held_out]
    assert not any(mark in text for source in found for text in source for mark in "\ufeff\x00")
    return sum(len(list(source)) for source in found)


def bert_texts(data: str) -> int:
    [source] = open_corpora(data, config="", split="train", text_column="")
    known = ["the cat sees the dog. it is big.", "किताब पानी में है। घर है।"]
    tokenizer = train_wordpiece(known, vocab_size=200, seq_length=64, lowercase=True)
    options: dict[str, Any] = {"language": "en", "one_sentence_per_line": True, "eval_fraction": 1.0}
    folder = Path(data).with_name("cache")
    return len(split_corpus(source, tokenizer, **options, cache_dir=folder, num_processes=1)[1].document_ends)


Made = Callable[[Path], str]
READ: dict[str, tuple[Callable[[str], int], Made, int]] = {
    "texts with a byte-order mark": (texts, lambda f: write(f, {"a.jsonl": "\ufeff" + lines("one", "two")}), 2),
    "UTF-16 and UTF-32 with a mark": (
        texts,
        lambda f: write(f, {f"{code}.txt": "one two\n".encode(code) for code in ("utf-16", "utf-32")}),
        2,
    ),
    "text columns that are categories": (
        texts,
        lambda f: parquet(f, {"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}),
        3,
    ),
    "zst with a window of 2 GB, gz with zeros behind its end": (
        texts,
        lambda f: write(f, {"a.jsonl.zst": wide_zst(lines("a", "b")), "b.jsonl.gz": padded_gz(lines("c"))}),
        3,
    ),
    "shards of texts without a value in a column": (
        texts,
        lambda f: shards(f, {"text": ["c"], "n": pyarrow.nulls(1)}, {"text": ["a", "b"], "n": [1, 2]}),
        3,
    ),
    "names that are not UTF-8": (
        texts,
        lambda f: (
            (write(f, {"a": ""}), (f / "a").unlink(), Path(os.fsdecode(bytes(f) + b"/caf\xe9.txt")).write_text("x"))
            and str(f)
        ),
        1,
    ),
    "tables in UTF-16 with a mark, .tsv with quotation marks at the beginning of texts": (
        tables,
        lambda f: write(f, {"train.tsv": 'text\tlabel\n"one\tpos\ntwo"\tneg\n'.encode("utf-16")}),
        2,
    ),
    "Parquet without a row": (
        classes,
        lambda f: shards(f, {**STRUCTS, "label": ["a", "b"] * 2}, {"image": STRUCTS["image"][:0], "label": []}),
        4,
    ),
    "commas in names": (texts, lambda f: write(f / "a,b", {"c,d.txt": "one\n"}), 1),
    "texts in splits by their names": (
        texts,
        lambda f: write(f, {"train-00000-of-00001.jsonl": lines("a", "b"), "validation.jsonl": lines("c")}),
        3,
    ),
    "words for splits in the names of images": (
        classes,
        lambda f: images(f, "cat/train_1.png", "cat/a test.png", "dog/val.png", "dog/photo of a train.png"),
        4,
    ),
    "one class called train, or classes called train, test and dev": (
        classes,
        lambda f: images(f, "train/1.png", "train/2.png", "plane/1.png", "plane/2.png"),
        4,
    ),
    "classes with underscores, brackets and blanks": (
        classes,
        lambda f: images(f / "a [v1]", "__background__/1.png", "__background__/2.png", "c d/1.png", "c d/2.png"),
        4,
    ),
    "linked folders, each once": (classes, lambda f: linked(f, "cat/1.png", "cat/2.png"), 4),
    "JPEGs with stray bytes": (
        classes,
        lambda f: write(f, dict.fromkeys(("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"), STRAY)),
        4,
    ),
    "BMP, GIF, TIFF and WebP": (
        classes,
        lambda f: images(f, *(name.format(end) for name in TWO for end in ("bmp", "gif", "tif", "webp"))),
        16,
    ),
    "images as structures of bytes and path in Parquet": (classes, lambda f: parquet(f, STRUCTS), 4),
    "shards of images without a value in a column": (
        classes,
        lambda f: shards(
            f, {**STRUCTS, "note": pyarrow.array([None] * 4, pyarrow.null())}, {**STRUCTS, "note": ["x"] * 4}
        ),
        8,
    ),
    "PNGs with large texts and profiles": (
        classes,
        lambda f: write(f, dict.fromkeys((name.format("png") for name in TWO), heavy_png())),
        4,
    ),
    "images as plain bytes in Parquet": (classes, lambda f: parquet(f, BYTES), 4),
    "several suffixes in a tar, and dots in names": (
        classes,
        lambda f: tar(f, {f"x.{n}.{end}": image() if end != "cls" else b"%d" % (n % 2) for n, end in MIXED}),
        4,
    ),
    "classes of tars as names": (
        classes,
        lambda f: tar(f, {f"{n}{end}": image() if end == ".png" else b"dog" * (n % 2) or b"cat" for n, end in NAMES}),
        4,
    ),
    "captions in .json of tars, null at first": (
        with_captions,
        lambda f: tar(f, {"1.jpg": image("JPEG"), "1.json": b'{"caption": "a", "n": null}', **SECOND}),
        2,
    ),
    "captions that say train": (with_captions, lambda f: captions(f, 2, "a photo of a train", "a test"), 2),
}


COUNTED: dict[str, tuple[Callable[[str], int], Made, int, dict[str, int]]] = {
    "empty and null documents": (
        texts,
        lambda f: shards(f, {"text": pyarrow.nulls(2)}, {"text": ["a", "", "b"]}),
        2,
        {"empty_documents": 3},
    ),
    "pipes and the like among files": (
        classes,
        lambda f: (write(f, CLASSES), os.mkfifo(f / "cat" / "3.png"))[0],
        4,
        {"broken_links_and_locked_folders": 1},
    ),
    "READMEs beside texts": (
        texts,
        lambda f: write(f, {"README.txt": "about", "a.txt": "one\n"}),
        1,
        {"texts_about_the_data": 1},
    ),
    "files of other kinds": (
        classes,
        lambda f: write(f, {**CLASSES, "cat/3.heic": b"?", "dog/notes.odt": b"?"}),
        4,
        {"files_of_other_kinds": 2},
    ),
    "links that lead nowhere": (
        classes,
        lambda f: (write(f, CLASSES), (f / "cat/4.png").symlink_to(f / "gone.png"))[0],
        4,
        {"broken_links_and_locked_folders": 1},
    ),
    "splits that nothing reads": (
        classes,
        lambda f: write(f, {f"{split}/{name}": image() for split in ("train", "dev", "test") for name in CLASSES}),
        8,
        {"files_of_other_splits": 4},
    ),
    "images that the metadata does not name": (
        with_captions,
        lambda f: captions(f, 5, "a", "b"),
        2,
        {"images_without_metadata": 3},
    ),
    "rows of the metadata without an image": (
        with_captions,
        lambda f: captions(f, 2, "a", "b", "c"),
        2,
        {"metadata_rows_without_an_image": 1},
    ),
    "empty captions": (
        with_captions,
        lambda f: captions(f, 3, "a", " ", "b"),
        2,
        {"images_without_a_caption": 1},
    ),
    "samples of tars without an image, or with several": (
        classes,
        lambda f: tar(f, {**SAMPLES, **{f"2{name}": data for name, data in SAMPLES.items()}, "9.cls": b"1"}),
        4,
        {"samples_without_an_image": 1},
    ),
    "vowel signs under BERT's lowercase": (
        bert_texts,
        lambda f: write(f, {"a.txt": "किताब पानी में है।\nघर है।\n\nघर है।\nपानी में है।\n"}),
        2,
        {"vowel_signs": 8, "unknown_characters": 0},
    ),
    "bytes that are not UTF-8 under BERT": (
        bert_texts,
        lambda f: write(f, {"a.txt": ("the cat sees it.\nthe dog.\n\n" * 2).encode() + b"caf\xe9.\nit is big.\n"}),
        3,
        {"bytes_that_are_not_utf8": 1},
    ),
    "documents of one sentence, and blank ones, under BERT": (
        bert_texts,
        lambda f: write(f, {"a.txt": "the cat.\nthe dog.\n\nthe cat.\n\nit is.\nbig.\n"}),
        2,
        {"documents_without_a_pair": 1},
    ),
}
REFUSED: dict[str, tuple[Callable[[str], int], Made, str]] = {
    "rows of .csv with more or fewer cells than the header": (
        tables,
        lambda f: write(f, {"train.csv": "text,label\nhello, world,pos\nx,neg\n"}),
        "2 cells in row 0, as in the header, got 3",
    ),
    "metadata.csv with commas in captions without marks": (
        with_captions,
        lambda f: write(f, {"1.png": image(), "metadata.csv": "file_name,text\n1.png,a dog, a cat\n"}),
        "2 cells in row 0, as in the header, got 3",
    ),
    "an image in two metadata files": (
        with_captions,
        lambda f: write(f, {"1.png": image(), "metadata.csv": "file_name,text\n1.png,a\n", **METADATA}),
        "1.png in one metadata file",
    ),
    "lists of lists of labels": (
        classes,
        lambda f: parquet(f, {**STRUCTS, "label": [[["a"]]] * 4}),
        "lists of the classes that an image has",
    ),
    "UTF-16 without a mark": (texts, lambda f: write(f, {"a.txt": "one two\n".encode("utf-16-le")}), "zero bytes"),
    "numbers among the texts": (texts, lambda f: write(f, {"a.jsonl": lines("a", "b", 3)}), "expected text in .*:3"),
    "texts of which some are of splits and some of none": (
        texts,
        lambda f: write(f, {"train.txt": "a", "test.txt": "b", "notes.txt": "c"}),
        "notes.txt is of none",
    ),
    "text without blanks under BERT (Thai, DNA)": (
        bert_texts,
        lambda f: write(f, {"a.txt": f"{THAI}.\n{DNA}.\n\nthe cat.\nit is.\n"}),
        "of the characters are in words that are unknown",
    ),
    "images without a label": (
        classes,
        lambda f: parquet(f, {**STRUCTS, "label": ["a", None, "b", "b"]}),
        "expected a label from 0 to 1 of each image, got none",
    ),
    "lists of captions": (with_captions, lambda f: captions(f, 2, ["a", "b"], ["c"]), "columns that are no texts"),
    "one class": (classes, lambda f: images(f, "cat/1.png", "cat/2.png"), "at least two classes"),
    "16 bits a pixel": (
        classes,
        lambda f: write(f, {name.format("png"): deep() for name in TWO}),
        "8 bits a pixel",
    ),
    "compressed texts that were cut off": (
        texts,
        lambda f: write(f, {"a.jsonl.zst": wide_zst(lines(*"abcdefgh" * 999))[:-9]}),
        "cut off",
    ),
    "damaged archives": (
        classes,
        lambda f: write(f, {"train-0.tar": Path(tar(f / "x", SAMPLES), "train-0.tar").read_bytes()[:700]}),
        "a tar that can be read",
    ),
    "tars beside Parquet": (
        classes,
        lambda f: write(f, {"a.tar": b"", "b.parquet": b""}),
        "files of one kind",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path: Path, name: str) -> None:
    read, made, number = READ[name]
    assert read(made(tmp_path / "data")) == number
    assert left_out.counts() == {}


@pytest.mark.parametrize("name", COUNTED)
def test_what_is_left_out_is_counted(tmp_path: Path, name: str) -> None:
    read, made, number, counts = COUNTED[name]
    assert read(made(tmp_path / "data")) == number
    found = left_out.counts()
    assert {what: found.get(what, 0) for what in counts} == counts


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    read, made, expected = REFUSED[name]
    with pytest.raises(UsageError, match=expected) as caught:
        read(made(tmp_path / "data"))
    assert "\n" not in str(caught.value)


def test_the_readme_has_the_kinds() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for outcome, kinds in (("read", READ), ("read, what is left out is counted", COUNTED), ("refused", REFUSED)):
        assert f"| {outcome} | {'; '.join(kinds)} |" in text
