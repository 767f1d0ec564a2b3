"""The token store, the boundary between data_prep and engine: this package is all that engine may import.

Imports only errors of data_prep.
Read first: store.py, whose docstring is the format.
"""

from data_prep.token_store.format import (
    CURRENT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    StoreError,
    content_digest,
    hash_file,
    is_content_file,
    read_manifest,
    resolve_store,
)
from data_prep.token_store.ids import documents_with_ids_from, largest_id
from data_prep.token_store.rows import ROW_COLUMNS, Rows, RowSource, open_rows
from data_prep.token_store.store import TokenStore

__all__ = [
    "CURRENT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "ROW_COLUMNS",
    "RowSource",
    "Rows",
    "StoreError",
    "TokenStore",
    "content_digest",
    "documents_with_ids_from",
    "hash_file",
    "is_content_file",
    "largest_id",
    "open_rows",
    "read_manifest",
    "resolve_store",
]
