"""Images of a prompt: the path of a file, encoded bytes as `datasets` holds them, or one of Pillow's.

They are told apart by a digest of what they hold and opened each time they are read, so that a large data set does not
have to fit into memory.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cepo.errors import InputError, one_line


def digest(image: Any) -> str:
    """Twelve hexadecimal digits of what `image` holds. Raises InputError if it cannot be read."""
    if isinstance(image, str):
        return _of_file(image)
    if isinstance(image, Mapping):
        return _of_file(image["path"]) if image.get("bytes") is None else _digits(image["bytes"])
    return _digits(f"{image.mode} {image.size} ".encode() + image.tobytes())


def opened(image: Any) -> Any:
    """`image` as one of Pillow's, in RGB. Raises InputError if it is none, or a damaged one."""
    from PIL import Image, ImageOps

    try:
        if isinstance(image, Mapping):
            image = image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
        if isinstance(image, str | io.BytesIO):
            with Image.open(image) as file:
                # A camera may have written the picture lying on its side, and a note of it.
                return ImageOps.exif_transpose(file).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # a damaged file fails in whatever way its format's reader does
        name = image if isinstance(image, str) else "bytes or picture"
        raise InputError(f"image: cannot read {name!r}: {one_line(error)[:200]}") from error


def is_image(value: Any) -> bool:
    """Whether `value` is of a kind that can be opened; what it holds is not looked at."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes) or isinstance(value.get("path"), str)
    return isinstance(value, str) or (hasattr(value, "convert") and hasattr(value, "tobytes"))


def located(image: Any, folder: Path) -> Any:
    """`image`, a relative path taken to start in `folder`."""
    return str(folder / Path(image).expanduser()) if isinstance(image, str) else image


@cache
def _of_file(path: str) -> str:
    try:
        return _digits(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"image: cannot read {path!r}: {error.strerror}") from error


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
