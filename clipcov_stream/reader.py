"""Streaming's reader of MDS shards, which takes no shard's word for how long a sample is.

Streaming reads as many bytes as a shard's offsets say, into memory that is taken first: one wrong bit is 4 GB, and a
sample whose columns claim more bytes than it has is cut to whatever is there.
"""

from __future__ import annotations

import os
import struct
from typing import Any

from streaming.base.format.mds import MDSReader
from streaming.base.format.mds.encodings import mds_decode


class BoundedReader(MDSReader):
    """An MDSReader whose samples lie in their file and fill their bytes; see `bounded`."""

    def get_sample_data(self, idx: int) -> bytes:
        """The bytes of a sample.

        Raises:
            ValueError: offsets that lie outside of the file.
            FileNotFoundError: no such file, which Streaming then fetches.
        """
        name = os.path.join(self.dirname, self.split, self.raw_data.basename)
        with open(name, "rb", 0) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(4 * (1 + idx))
            offsets = file.read(8)
            begin, end = struct.unpack("<2I", offsets) if len(offsets) == 8 else (0, 0)
            if not 4 * (2 + self.samples) <= begin < end <= size:
                raise ValueError(
                    f"sample {idx} of {self.raw_data.basename} is said to lie from byte {begin} to {end} of {size}"
                )
            file.seek(begin)
            return file.read(end - begin)

    def decode_sample(self, data: bytes) -> dict[str, Any]:
        """A sample's values by column.

        Raises:
            ValueError: columns that do not fill the sample's bytes.
            Exception: an encoding's own.
        """
        num_sizes = sum(not size for size in self.column_sizes)
        head = 4 * num_sizes
        told = iter(struct.unpack_from(f"<{num_sizes}I", data)) if len(data) >= head else iter([len(data)] * num_sizes)
        sizes = [size or next(told) for size in self.column_sizes]
        if head + sum(sizes) != len(data):
            raise ValueError(
                f"a sample of {self.raw_data.basename} has {len(data)} bytes, its columns claim {head + sum(sizes)}"
            )
        sample, at = {}, head
        for name, encoding, size in zip(self.column_names, self.column_encodings, sizes, strict=True):
            sample[name] = mds_decode(encoding, data[at : at + size])
            at += size
        return sample


def bounded(reader: Any) -> Any:
    """The same reader as a BoundedReader, in place: Streaming makes its readers itself."""
    reader.__class__ = BoundedReader
    return reader
