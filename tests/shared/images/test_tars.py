"""Images in tars: every sample with an image is read, whatever its name, suffix and neighbours."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared.command_line import UsageError
from shared.data import left_out
from shared.images import captioned, files, labelled, streaming

OPTIONS = {"config": "", "split": "train", "image_column": "", "label_column": ""}


def picture(form: str = "PNG", shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, form)
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def opened(path: Path) -> list[tuple[bytes, str]]:
    images = labelled.open_images(str(path), **OPTIONS)
    return [(images.files.read(place), images.class_names[label]) for place, label in enumerate(images.labels)]


def test_suffixes_may_differ_between_samples_and_tars(tmp_path: Path) -> None:
    write(tmp_path / "a-0.tar", {"0.jpg": picture("JPEG"), "0.cls": b"cat", "1.PNG": picture(), "1.cls": b" dog\n"})
    write(tmp_path / "a-1.tar", {"0.webp": picture("WEBP"), "0.cls": b"cat"})
    assert opened(tmp_path) == [(picture("JPEG"), "cat"), (picture(), "dog"), (picture("WEBP"), "cat")]


def test_names_may_have_dots_and_samples_more_than_one_image(tmp_path: Path) -> None:
    members = {"d/photo.1.png": picture(shade=1), "d/photo.1.cls": b"0", "d/photo.2.png": picture(shade=2)}
    members |= {"d/photo.2.cls": b"10", "d/photo.3.png": picture(shade=3), "d/photo.3.cls": b"2"}
    members |= {"d/._photo.1.png": b"of another system", "d/photo.lonely.cls": b"1"}
    path = write(tmp_path / "a.tar", members)
    assert opened(path) == [(picture(shade=1), "0"), (picture(shade=2), "10"), (picture(shade=3), "2")]
    assert left_out.counts() == {"samples_without_an_image": 1}
    stream = files.open_split(str(path), "", "train", "", streaming=True)[0]
    assert [record["cls"] for record in stream] == [0, 10, 2]
    members = {"1.depth.png": picture(), "1.png": picture(shade=1), "1.cls": b"a"}
    members |= {"2.cls": b"b", "2.png": picture(shade=2), "2.seg.png": picture()}
    assert opened(write(tmp_path / "b.tar", members)) == [(picture(shade=1), "a"), (picture(shade=2), "b")]
    assert left_out.counts() == {"samples_without_an_image": 1, "further_images_of_samples": 2}
    single = {"img.jpg": picture("JPEG"), "img.cls": b"a", "img.1.jpg": picture("JPEG"), "img.1.cls": b"b"}
    single |= {"img.2.jpg": picture("JPEG"), "img.2.cls": b"b"}
    assert len(opened(write(tmp_path / "c.tar", single))) == 3


def test_a_missing_class_is_named_and_a_class_in_json_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar", {"0.jpg": picture(), "0.cls": b"a", "1.jpg": picture(), "2.jpg": picture(), "2.cls": b"b"}
    )
    with pytest.raises(
        UsageError, match=r"expected a label from 0 to 1 of each image, got none of 1.jpg \(row 1\), 1 such"
    ):
        opened(path)
    of_json = {
        f"{n}.{kind}": picture() if kind == "jpg" else b'{"label": "%d"}' % n
        for n in (0, 1)
        for kind in ("jpg", "json")
    }
    assert [name for _, name in opened(write(tmp_path / "b.tar", of_json))] == ["0", "1"]


def test_captions_are_read_from_json_that_begins_with_nulls(tmp_path: Path) -> None:
    """As img2dataset writes them."""
    metadata: list[dict[str, Any]] = [{"caption": "a red square", "error": None, "exif": "{}"} for _ in range(12)]
    metadata[9] |= {"error": "none", "size": 3, "caption": "a blue one"}
    metadata[11] |= {"error": 7}
    members: dict[str, bytes] = {}
    for number, row in enumerate(metadata):
        members |= {f"{number:03d}.jpg": picture("JPEG"), f"{number:03d}.json": json.dumps(row).encode("utf-8-sig")}
    write(tmp_path / "train" / "a.tar", members)
    write(tmp_path / "test" / "a.tar", members)
    options = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    found = captioned.open_captioned(str(tmp_path), split="train", **options)
    assert list(found.captions) == [row["caption"] for row in metadata]
    dataset, image = files.open_split(str(tmp_path), "", "test", "", streaming=False)
    assert image == "jpg"
    assert dataset["error"][8:] == [None, "none", None, "7"]
    assert dataset["size"][8:11] == [None, 3, None]


def test_tars_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", {"0.jpg": picture(), "0.cls": b"a", "1.jpg": picture(), "1.cls": b"b"})
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1800])
    broken = bytearray(whole.read_bytes())
    broken[2 * 1024 : 2 * 1024 + 200] = bytes(range(1, 201))
    (tmp_path / "broken.tar").write_bytes(broken)
    cases = {
        tmp_path / "cut.tar": "expected a tar that can be read: ",
        tmp_path / "broken.tar": "expected a tar that can be read: the header at byte 2048 is damaged",
        write(tmp_path / "texts.tar", {"0.txt": b"a", "0.cls": b"a"}): "expected samples with an image, found none",
        write(
            tmp_path / "wrong.tar", {"0.jpg": picture(), "0.json": b"{"}
        ): "expected UTF-8, and JSON in .json, in 0.json",
    }
    for path, expected in cases.items():
        with pytest.raises(UsageError, match=expected) as caught:
            opened(path)
        assert "\n" not in str(caught.value)


def test_lists_are_several_labels_and_a_stream_has_the_types_of_its_first_tar(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, labels in enumerate((["b", "a"], [], ["a"])):
        row = {"label": labels, "is_new": True, "sizes": [number, 4]}
        members |= {f"{number}.jpg": picture(), f"{number}.json": json.dumps(row).encode()}
    images = labelled.open_images(str(write(tmp_path / "a.tar", members)), **OPTIONS)
    assert (images.class_names, images.labels.tolist()) == (("a", "b"), [[1, 1], [0, 0], [1, 0]])
    dataset = files.open_split(str(tmp_path / "a.tar"), "", "train", "", streaming=False)[0]
    assert (dataset["is_new"][0], dataset["sizes"][2]) == (True, [2, 4])
    write(tmp_path / "two" / "0.tar", {"0.jpg": picture(), "0.cls": b"3", "0.json": b'{"score": 1}'})
    write(tmp_path / "two" / "1.tar", {"0.jpg": picture(), "0.cls": b"cat", "0.json": b'{"score": 0.5}'})
    stream = files.open_split(str(tmp_path / "two"), "", "train", "", streaming=True)[0]
    with pytest.raises(UsageError, match=r"expected a value of type int64 in (cls|score), as in the first tar, got"):
        list(stream)


def test_tars_are_streamed_by_shard(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"train-{number}.tar", {f"{number}{n}.png": picture(shade=10 * number + n) for n in range(2)})
    dataset, image = files.open_split(str(tmp_path), "", "train", "", streaming=True)
    assert dataset.num_shards == 3
    shards = [list(files.without_decoding(dataset.shard(3, number), image)) for number in range(3)]
    assert [[record["png"]["bytes"] for record in shard] for shard in shards] == [
        [picture(shade=10 * number + n) for n in range(2)] for number in range(3)
    ]
    with pytest.raises(UsageError, match="label_column: '': expected the column of the classes"):
        streaming.open_image_stream(str(tmp_path), **OPTIONS)
