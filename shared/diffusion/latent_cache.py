"""Images as latents of an autoencoder, encoded once: Arrow shards and a manifest that says what they are made of.

A folder holds `data/SPLIT-00000-of-00010.arrow` and so on, `identity.json` from the start and `manifest.json` once all
shards are there. A shard is written aside and renamed, and which images it holds follows from its number, so a run that
was killed goes on with the shards that are missing, on any number of processes. The shards are Arrow streams, which are
read where they lie: of Parquet files `datasets` would keep a copy of the same size.

The columns of a row: `index` of the image in its split; `caption`; `height` and `width` of the latents; `mean` and
`std` of the autoencoder's posterior as float16 bytes (C, h, w), or one `sample` of it, and, if asked for, the same of
the mirror image as `mirrored_mean` and so on; the caption's embedding as `text`, float16 bytes (L, D), if there is an
encoder.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.command_line import UsageError, expect
from shared.data import left_out
from shared.data.local_files import EVALUATION_SPLITS
from shared.data.randomness import derive_seed, shuffled_indices
from shared.images.files import HELD_OUT_SEED, spread

_SIDES, _SUFFIX = ["height", "width"], ".arrow"


@dataclass(frozen=True)
class Shard:
    """A file of the cache and the images that it holds.

    Attributes:
        file: path below the cache's folder.
        split: of the data set.
        indices: positions of its images in the split.
    """

    file: str
    split: str
    indices: range


def plan_shards(sizes: dict[str, int], images_per_shard: int) -> list[Shard]:
    """All shards of a cache, in order.

    Args:
        sizes: number of images of each split.
        images_per_shard: of all shards but the last of a split.
    """
    shards = []
    for split, size in sizes.items():
        starts = range(0, size, images_per_shard)
        for number, start in enumerate(starts):
            file = f"data/{split}-{number:05d}-of-{len(starts):05d}{_SUFFIX}"
            shards.append(Shard(file, split, range(start, min(start + images_per_shard, size))))
    return shards


def posterior_columns(sampled: bool) -> tuple[str, ...]:
    """Columns of an image's latents: one sample of the posterior, or its mean and standard deviation."""
    return ("sample",) if sampled else ("mean", "std")


def bytes_of_image(
    latent_shape: Sequence[int], text_shape: Sequence[int] | None, *, mirrored: bool, sampled: bool
) -> tuple[int, int]:
    """Bytes of an image's latents and of its caption's embedding on disk, both float16.

    Args:
        latent_shape: (C, h, w).
        text_shape: (L, D); None = no embeddings.
        mirrored: whether mirror images are encoded as well.
        sampled: see `posterior_columns`.
    """
    latents = math.prod(latent_shape) * len(posterior_columns(sampled)) * (1 + mirrored)
    return 2 * latents, 2 * math.prod(text_shape) if text_shape else 0


def begin_cache(folder: Path, identity: dict[str, Any]) -> None:
    """Make the folder, or see that it is one of the same identity. One process calls this before all others go on.

    Raises:
        UsageError: it holds something else, or a cache made of something else (the message names what differs).
    """
    name, file = f"output_dir: {str(folder)!r}", folder / "identity.json"
    if file.is_file():
        found = _read_json(file, name)
        expect("sampled" in found, "output_dir", str(folder), "an empty folder, it holds a cache of an older version")
        differences = _differences(identity, found)
        expect(not differences, "output_dir", str(folder), f"an empty folder or the same cache, not {differences}")
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise UsageError(f"{name}: expected an empty folder or a cache of latents, it holds other files")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    _write_json(file, identity)


def write_shard(folder: Path, shard: Shard, rows: Iterable[dict[str, Any]], arrays: Sequence[str]) -> None:
    """Write a shard that is there whole or not at all.

    Args:
        folder: of the cache.
        shard: where it goes.
        rows: values of the columns, arrays of any float type; there may be none.
        arrays: names of the columns that hold arrays.
    """
    import pyarrow

    plain = [
        {
            name: np.asarray(value, dtype=np.float16).tobytes() if isinstance(value, np.ndarray) else value
            for name, value in row.items()
        }
        for row in rows
    ]
    sides = [("height", pyarrow.int32()), ("width", pyarrow.int32())]
    columns = [("index", pyarrow.int64()), ("caption", pyarrow.string()), *sides]
    schema = pyarrow.schema([*columns, *((name, pyarrow.binary()) for name in arrays)])
    aside = folder / "data" / f".{Path(shard.file).name}"
    with aside.open("wb") as stream:
        with pyarrow.ipc.new_stream(stream, schema) as writer:
            writer.write_table(pyarrow.Table.from_pylist(plain, schema=schema))
        stream.flush()
        os.fsync(stream.fileno())  # else a power cut could leave the new name and not the content
    aside.replace(folder / shard.file)


def missing_shards(folder: Path, shards: Iterable[Shard]) -> list[Shard]:
    """Those that are not written yet."""
    return [shard for shard in shards if not (folder / shard.file).is_file()]


def finish_cache(
    folder: Path, identity: dict[str, Any], shards: list[Shard], max_bad_fraction: float
) -> dict[str, Any]:
    """Write the manifest of a cache whose shards are all there, and return it. One process calls this.

    Raises:
        UsageError: more than this share of the images is in no shard, since they could not be decoded.
    """
    entries: list[dict[str, Any]] = [
        {
            "file": shard.file,
            "rows": len(_open_shard(folder / shard.file)),
            "images": len(shard.indices),
            "bytes": (folder / shard.file).stat().st_size,
            "sha256": _digest(folder / shard.file),
        }
        for shard in shards
    ]
    images, rows = (sum(entry[name] for entry in entries) for name in ("images", "rows"))
    expected = f"at least {1 - rows / images:.3f}, the share of images that could not be decoded"
    expect(images - rows <= max_bad_fraction * images, "max_bad_fraction", max_bad_fraction, expected)
    left_out.note("damaged_images", images - rows, where=str(folder))
    manifest = {**identity, "images": images, "rows": rows, "left_out": left_out.counts(), "shards": entries}
    _write_json(folder / "manifest.json", manifest)
    return manifest


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a cache, complete or not."""
    return (folder / "identity.json").is_file() or (folder / "manifest.json").is_file()


def read_manifest(folder: Path, field: str) -> dict[str, Any]:
    """What a complete cache says of itself.

    Args:
        folder: of the cache.
        field: the configuration field that it comes from, for the message.

    Raises:
        UsageError: it is no cache, not complete or of another version, or a shard is lost or has another size.
    """
    name = f"{field}: {str(folder)!r}"
    if not (folder / "manifest.json").is_file():
        is_begun = (folder / "identity.json").is_file()
        reason = "it is not complete, the command that made it goes on" if is_begun else "there is no manifest.json"
        raise UsageError(f"{name}: expected a cache of latents, {reason}")
    manifest = _read_json(folder / "manifest.json", name)
    for entry in manifest["shards"]:
        file = folder / entry["file"]
        expect(file.suffix == _SUFFIX, field, str(folder), f"shards with the suffix {_SUFFIX}, make another cache")
        is_whole = file.is_file() and file.stat().st_size == entry["bytes"]
        expect(is_whole, field, str(folder), f"the shards of its manifest, {entry['file']} is lost or changed")
    return manifest


def fingerprints(manifest: dict[str, Any]) -> dict[str, Any]:
    """For the record of a run: data_fingerprint of the images, latents_fingerprint of how they were encoded as well."""
    found = ("images", "rows", "left_out", "shards")
    identity = {name: value for name, value in manifest.items() if name not in found}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return {"data_fingerprint": manifest["data"], "latents_fingerprint": digest}


def check_identity(manifest: dict[str, Any], identity: dict[str, Any], field: str, folder: Path) -> None:
    """Refuse a cache that is made of something else.

    Args:
        manifest: see `read_manifest`.
        identity: what it must say.
        field: the configuration field that the folder comes from, for the message.
        folder: of the cache.

    Raises:
        UsageError: it names what differs.
    """
    differences = _differences(identity, manifest)
    expect(not differences, field, str(folder), f"a cache as configured, not {differences}")


class Latents:
    """The latents of a split, by row.

    Args:
        folder: of a complete cache.
        manifest: its own.
        split: of the data set.

    Attributes:
        has_mirrored: whether there are mirror images.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], split: str) -> None:
        import datasets

        files = [entry["file"] for entry in manifest["shards"] if entry["file"].startswith(f"data/{split}-")]
        self._rows = datasets.concatenate_datasets([_open_shard(folder / file) for file in files])
        self._channels, self._text_shape = manifest["latent_channels"], manifest["text_shape"]
        self._sampled: bool = manifest["sampled"]
        self.has_mirrored: bool = manifest["mirrored"]

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, chosen: np.ndarray) -> "Latents":
        """Those in the given rows."""
        part = copy.copy(self)
        part._rows = self._rows.select(chosen)
        return part

    def buckets(self) -> list[tuple[tuple[int, int, int], np.ndarray]]:
        """Each shape (C, h, w) that occurs, in order, and the rows that have it, int64 (N,)."""
        columns = self._rows.select_columns(_SIDES).with_format("numpy")[:]
        sides, numbers = np.unique(np.stack([columns[side] for side in _SIDES]), axis=1, return_inverse=True)
        shapes = [(self._channels, height, width) for height, width in sides.T.tolist()]
        return [(shape, np.flatnonzero(numbers.ravel() == number)) for number, shape in enumerate(shapes)]

    def squarest_shape(self) -> tuple[int, int, int]:
        """The shape (C, h, w) whose sides differ least, which is that of images shown."""
        return min((shape for shape, _ in self.buckets()), key=lambda shape: abs(shape[1] - shape[2]))

    def read(self, index: int, *, mirrored: bool) -> dict[str, Any]:
        """A row's `caption`, and `mean` and `std` of the image's posterior or its mirror image's: float16 (C, h, w).

        Where one sample of it was kept, that is the mean and the deviation is 0. Of a cache that has embeddings of
        captions also `text`, float16 (L, D).
        """
        row, prefix = self._rows[index], "mirrored_" if mirrored else ""
        shape = (self._channels, row["height"], row["width"])
        arrays = {
            name: np.frombuffer(row[prefix + name], dtype=np.float16).reshape(shape)
            for name in posterior_columns(self._sampled)
        }
        mean = arrays["sample" if self._sampled else "mean"]
        sample = {"mean": mean, "std": np.zeros_like(mean) if self._sampled else arrays["std"]}
        if self._text_shape:
            sample["text"] = np.frombuffer(row["text"], dtype=np.float16).reshape(self._text_shape)
        return {"caption": row["caption"], **sample}

    def captions(self) -> list[str]:
        """Of all images."""
        return list(self._rows["caption"])


def open_splits(
    folder: Path, manifest: dict[str, Any], split: str, eval_splits: str, eval_fraction: float
) -> tuple[Latents, dict[str, Latents]]:
    """Latents to train on, and those to evaluate on by the names of their splits.

    Args:
        folder: of a complete cache.
        manifest: its own.
        split: to train on.
        eval_splits: comma-separated; "" = those whose names begin with validation, val or test.
        eval_fraction: share of the samples that is held out where there is none; 0 = none is.

    Raises:
        UsageError: a split is not there, or too few samples to hold some out.
    """
    names = list(manifest["data"])
    expected = f"a split of the latents, there are: {', '.join(names)}"
    expect(split in names, "data_split", split, expected)
    asked = [name.strip() for name in eval_splits.split(",") if name.strip()]
    for name in asked:
        expect(name in names, "eval_splits", name, expected)
    train, others = Latents(folder, manifest, split), [name for name in names if name != split]
    asked = asked or [name for name in others if name.startswith(EVALUATION_SPLITS)]
    if asked:
        return train, {name: Latents(folder, manifest, name) for name in asked}
    if not eval_fraction:
        return train, {}
    number = round(len(train) * eval_fraction)
    expect(0 < number < len(train), "eval_fraction", eval_fraction, f"to split {len(train)} samples in two")
    order = shuffled_indices(np.arange(len(train)), len(train), derive_seed(HELD_OUT_SEED, "held out"))
    return train.subset(np.sort(order[number:])), {"held_out": train.subset(np.sort(order[:number]))}


def matching_captions(
    train: Latents, held_out: dict[str, Latents], wanted: str, unwanted: str
) -> tuple[Latents, dict[str, Latents]]:
    """Samples whose caption has `wanted` and has not `unwanted`; splits to evaluate on that have none are left out.

    Args:
        train: to train on.
        held_out: to evaluate on, by the names of their splits.
        wanted: text; "" = of all.
        unwanted: text; "" = of none.

    Raises:
        UsageError: there is none to train on, or none to evaluate on.
    """
    if not (wanted or unwanted):
        return train, held_out

    def matching(latents: Latents) -> Latents:
        pairs = enumerate(latents.captions())
        kept = [row for row, text in pairs if wanted in text and not (unwanted and unwanted in text)]
        return latents.subset(np.array(kept, dtype=np.int64))

    field, value = ("captions_with", wanted) if wanted else ("captions_without", unwanted)
    train, others = matching(train), {name: matching(latents) for name, latents in held_out.items()}
    others = {name: latents for name, latents in others.items() if len(latents)}
    expect(len(train) > 0, field, value, "text that leaves samples to train on")
    expect(bool(others) == bool(held_out), field, value, "text that leaves samples to evaluate on")
    return train, others


def some_captions(splits: Iterable[Latents], number: int) -> list[str]:
    """So many captions, evenly spread over each split, of each as many."""
    every = [latents.captions() for latents in splits]
    share = math.ceil(number / len(every))
    return [captions[index] for captions in every for index in spread(len(captions), share)][:number]


def weights_digest(module: torch.nn.Module) -> str:
    """Changes when a weight of the module does, whatever file it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _open_shard(file: Path) -> Any:
    """The rows of a shard as a `datasets.Dataset`, mapped into memory."""
    import datasets

    return datasets.Dataset.from_file(str(file))


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {found.get(key)!r} -> {value!r}" for key, value in wanted.items() if found.get(key) != value
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_json(file: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: expected a cache of latents, its {file.name} cannot be read")
    return content


def _write_json(file: Path, content: dict[str, Any]) -> None:
    aside = file.with_name(f".{file.name}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(file)
