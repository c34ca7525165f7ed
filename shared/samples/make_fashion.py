"""Write fashion/train.parquet and fashion/test.parquet from the raw files of Fashion-MNIST, one row an image.

    python shared/samples/make_fashion.py FOLDER

The folder holds `train-images-idx3-ubyte.gz`, `train-labels-idx1-ubyte.gz` and the same two that begin with `t10k`, in
the format of MNIST: big-endian sizes, then bytes. Images are stored as PNG, in the order of the raw files.
"""

import gzip
import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SPLITS = {"train": "train", "test": "t10k"}
ROWS_IN_GROUP = 1000


def main(raw: Path) -> None:
    """Convert the four raw files in `raw` into the two Parquet files beside this script."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    for split, prefix in SPLITS.items():
        images = read_idx(raw / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(raw / f"{prefix}-labels-idx1-ubyte.gz")
        encoded = [{"bytes": to_png(image), "path": f"{row:05d}.png"} for row, image in enumerate(images)]
        table = pyarrow.table({"image": encoded, "label": labels.astype(np.int64)}, schema=features.arrow_schema)
        target = Path(__file__).parent / "fashion" / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, target, row_group_size=ROWS_IN_GROUP, compression="zstd")
        sys.stdout.write(f"{target}: {len(images)} images, {target.stat().st_size:,} bytes\n")


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file of unsigned bytes: two zeros, the type (8), how many dimensions, their sizes."""
    with gzip.open(path) as stream:
        content = stream.read()
    zeros, kind, num_dimensions = content[:2], content[2], content[3]
    if zeros != b"\0\0" or kind != 8:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = np.frombuffer(content, ">u4", num_dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def to_png(image: np.ndarray) -> bytes:
    """Grey image, uint8 (H, W), as PNG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return stream.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
