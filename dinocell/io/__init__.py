"""Files ↔ arrays: images and label images in, labels, images and maps out."""

from dinocell.io.names import find_images, natural_key
from dinocell.io.planes import select_channels
from dinocell.io.read import Image, read_image, read_labels
from dinocell.io.write import write_image, write_labels

__all__ = [
    "Image",
    "find_images",
    "natural_key",
    "read_image",
    "read_labels",
    "select_channels",
    "write_image",
    "write_labels",
]
