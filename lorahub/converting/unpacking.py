"""A source that is a pickle, as safetensors in a folder of their own while it is converted: only here are any opened.

What a pickle may hold, and how it is kept from running anything, ``lorahub.files.pickles`` says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lorahub.adapter import Adapter, AdapterHeader
from lorahub.errors import LorahubError, UsageError
from lorahub.fetching import as_ref, pull
from lorahub.files.containers import CONTAINERS
from lorahub.files.header import read_header
from lorahub.files.pickles import PICKLES, left_out, unpack, weights_among
from lorahub.names import Ref
from lorahub.sources import Given

__all__ = ["Unpacked", "unpacked"]

_WEIGHTS = frozenset({"adapter_model.bin", "pytorch_adapter.bin", "pytorch_lora_weights.bin"})
"""What tools call an adapter's weights; beside them lie optimizers and other states of a training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpacked:
    """A source that can be read: what was given, or what a pickle held.

    Attributes:
        source: what to read.
        label: what people call it, where that is not its place.
        originals: the files that were given, where others are read.
        folder: where a pickle was unpacked, which is nobody's business.
        left_out: what a pickle held besides tensors and notes.
    """

    source: Given
    label: str = ""
    originals: tuple[Path, ...] = ()
    folder: str = ""
    left_out: tuple[str, ...] = ()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors speak of what was given, not of where it was unpacked."""
        try:
            yield
        except LorahubError as error:
            if not self.folder or self.folder not in error.message:
                raise
            place = os.fspath(self.originals[0].parent)
            raise type(error)(error.message.replace(self.folder, place), error.hint, error.findings) from None


@contextmanager
def unpacked(source: Given, hub: str | None) -> Iterator[Unpacked]:
    """The source, or safetensors in a folder of their own where it is a pickle: the one place that opens any."""
    if isinstance(source, Adapter | AdapterHeader):
        yield Unpacked(source=source)
        return
    ref = as_ref(source)
    if ref.path is None:
        pulled = pull(ref, hub=hub)
        place, label = pulled.folder / pulled.pin.file, str(pulled.pin)
    else:
        place, label = Path(ref.path).expanduser(), ref.path
    pickle = _pickle(place)
    if pickle is None:
        yield Unpacked(source=source)
        return
    with TemporaryDirectory(prefix="lorahub-") as folder:
        there = unpack(pickle, folder)
        configs = tuple(pickle.parent / path.name for path in sorted(Path(folder).glob("*.json")))
        left = left_out(read_header(there).metadata)
        yield Unpacked(
            source=Ref(path=os.fspath(there)),
            label=label,
            originals=(pickle, *configs),
            folder=folder,
            left_out=left,
        )


def _pickle(place: Path) -> Path | None:
    """The pickle that is meant, or None: a file with such a name, or the only weights in a folder."""
    if place.is_file():
        return place if place.name.endswith(PICKLES) else None
    if not place.is_dir():
        return None
    names = sorted(path.name for path in place.iterdir() if path.is_file())
    if any(name.endswith(tuple(CONTAINERS)) for name in names):
        return None
    found = weights_among(names)
    found = [name for name in found if name in _WEIGHTS] or found
    if len(found) > 1:
        raise UsageError(f"{place} holds several files: {', '.join(found[:5])}", f"name one: {place / found[0]}")
    return place / found[0] if found else None
