"""Bytes, paths, URLs and tables to images, frames and rows.

locate          where an image or video lies: a file, or its bytes
load_image      decode an image as a person sees it
as_seen         an opened image upright, opaque and RGB
PIXEL_LIMIT     pixels of the largest image that is decoded
load_video      decode the frames of a video that are kept
resampled_rate  a rate at which sampling keeps all frames
SAMPLING        what a row may say about sampling
Rows            what a reader needs of a set of rows
JsonRows        rows kept as JSON text
json_texts      JSON text of rows made in Python
open_rows       open a table or data set by where it lies
EXTRA_FIELDS    key of what a table's header does not name
"""

from torchtune_qwen25vl.media._images import PIXEL_LIMIT, SUFFIXES, as_seen, load_image
from torchtune_qwen25vl.media._rows import EXTRA_FIELDS, JsonRows, Rows, json_texts, open_rows
from torchtune_qwen25vl.media._sources import locate
from torchtune_qwen25vl.media._videos import SAMPLING, load_video, resampled_rate

__all__ = [
    "EXTRA_FIELDS",
    "PIXEL_LIMIT",
    "SAMPLING",
    "SUFFIXES",
    "JsonRows",
    "Rows",
    "as_seen",
    "json_texts",
    "load_image",
    "load_video",
    "locate",
    "open_rows",
    "resampled_rate",
]
