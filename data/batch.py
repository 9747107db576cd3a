"""The one contract between data and training: what a batch is.

Letters: B rows of the batch, T positions of a row. Nothing but these arrays passes from `data` to `training`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One batch of packed rows; every field but `tiles` is an array [B, T] on the host or on the mesh.

    Rows are chunk-aligned (`data/packing.py`): a document that crosses a multiple of the model's attention
    chunk started on one, so chunks of a row and chunks of a document's positions are the same thing.
    Arrays are numpy's on the host and jax's on devices. A NamedTuple is already a pytree, so a batch goes through
    `jit` as it is.
    """

    tokens: Any  # int32, token ids; padding holds the tokenizer's pad id
    labels: Any  # int32, the next token of the same document, shifted when the row was packed
    segment_ids: Any  # int32, 1.. for the pieces of a row in order, 0 for padding
    positions: Any  # int32, position in the document (restarts at 0 with every piece; 0 in padding)
    loss_mask: Any  # float32, 1 where the label counts, 0 in padding and after a document's last token
    domain: Any  # int32, index into the list of domain names; 0 in padding (masked)
    first_visit: Any  # bool, the document is seen for the first time in this run (epoch 0)
    document_id: Any  # int32, the document's index within its domain; -1 in padding
    tiles: Any = None  # uint8 [B, J, S, S, 3], pixels of a row's tiles, in order, zeros behind them; None: text alone
    slots: Any = None  # int32, which of the row's tile tokens stands here instead of a token; -1 for none


class ImageShape(NamedTuple):
    """What images are in a batch."""

    tiles: int  # J, for which a row has room
    size: int  # S, pixels of a tile's side
    tokens: int  # M, of a tile


DTYPES = dict(
    tokens=np.int32, labels=np.int32, segment_ids=np.int32, positions=np.int32,
    loss_mask=np.float32, domain=np.int32, first_visit=np.bool_, document_id=np.int32,
)  # fmt: skip
FIELDS = tuple(DTYPES)  # those that every batch has


def padding(rows: int, seq_len: int, pad_id: int, images: ImageShape | None = None) -> Batch:
    """A batch [B, T] of nothing but padding, to be written into; with room for images where their shape is given."""
    fill = dict(tokens=pad_id, labels=pad_id, document_id=-1)
    batch = Batch(**{name: np.full((rows, seq_len), fill[name], dtype) if name in fill else
                     np.zeros((rows, seq_len), dtype) for name, dtype in DTYPES.items()})  # fmt: skip
    if images is None:
        return batch
    tiles = np.zeros((rows, images.tiles, images.size, images.size, 3), np.uint8)
    return batch._replace(tiles=tiles, slots=np.full((rows, seq_len), -1, np.int32))
