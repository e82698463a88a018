"""Tables in, encoded rows and batches out.

``tables`` reads files, ``joins`` adds side tables, ``blocks`` and ``texts`` give values one
spelling, ``encode`` learns and applies vocabularies, ``cache`` keeps the result, ``dataset`` holds
it and draws batches. Imports ``common`` and ``metrics`` alone: this room knows no op and no model.
"""

from stem_fast.data.dataset import Batch, Dataset, Known
from stem_fast.data.encode import fit_encoding, load
from stem_fast.data.joins import Join
from stem_fast.data.schema import Encoding, Schema, SequenceField

__all__ = [
    "Batch",
    "Dataset",
    "Encoding",
    "Join",
    "Known",
    "Schema",
    "SequenceField",
    "fit_encoding",
    "load",
]
