"""Files ↔ arrays: images and label images in, labels, images and maps out."""

from dinocell.io.names import (
    FoundImages,
    find_images,
    natural_key,
    refuse_long_names,
    search_images,
)
from dinocell.io.planes import select_channels
from dinocell.io.read import (
    Contents,
    Image,
    describe_image,
    read_image,
    read_label_file,
    read_labels,
)
from dinocell.io.stacks import Series
from dinocell.io.write import write_image, write_labels

__all__ = [
    "Contents",
    "FoundImages",
    "Image",
    "Series",
    "describe_image",
    "find_images",
    "natural_key",
    "read_image",
    "read_label_file",
    "read_labels",
    "refuse_long_names",
    "search_images",
    "select_channels",
    "write_image",
    "write_labels",
]
