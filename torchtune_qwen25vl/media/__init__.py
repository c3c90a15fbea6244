"""Bytes, paths, URLs and tables to images, frames and rows.

locate            where an image or video lies: a file, or its bytes
load_image        decode an image as a person sees it
image_size        width and height of an image, by its header
is_image          whether a file is an image, whatever its name
PIXEL_LIMIT       pixels of the largest image that is decoded
SUFFIXES          of files that are images
LACKING           of those that need an extra which is not installed
images_in         the images of a folder
Sieve             which of its files they are, and what is left out for which reason
THUMBNAILS        folder of small images in that of a job, where none is looked for
frames_in         the images of a folder that is a video
Downloads         a folder of images and videos that were downloaded
url_of            the URL of what is to be downloaded
load_video        decode the frames of a video that are kept
Rows              what a reader needs of a set of rows
JsonRows          rows kept as JSON text
JoinedRows        several sets of rows, one after the other
SelectedRows      some rows of a set
json_texts        JSON text of rows made in Python
StreamRows        rows of a stream, which one process reads in order and hands to others
BUFFER            option of `open_rows` that says among how many rows a stream is shuffled
open_rows         open a table or data set by where it lies
numbers_of_split  the rows that a split such as train[:95%] names
cache_folder      a folder of the package in the user's cache
read_content      read a file that may be compressed
EXTRA_FIELDS      key of what a table's header does not name
"""

from torchtune_qwen25vl.media._compressed import cache_folder, read_content
from torchtune_qwen25vl.media._downloads import Downloads, url_of
from torchtune_qwen25vl.media._folders import THUMBNAILS, Sieve, frames_in, images_in
from torchtune_qwen25vl.media._images import (
    LACKING,
    PIXEL_LIMIT,
    SUFFIXES,
    image_size,
    is_image,
    load_image,
)
from torchtune_qwen25vl.media._open import open_rows
from torchtune_qwen25vl.media._rows import EXTRA_FIELDS, JsonRows, Rows, json_texts
from torchtune_qwen25vl.media._selected import JoinedRows, SelectedRows
from torchtune_qwen25vl.media._sources import locate
from torchtune_qwen25vl.media._splits import numbers_of_split
from torchtune_qwen25vl.media._streams import BUFFER, StreamRows
from torchtune_qwen25vl.media._videos import load_video

__all__ = [
    "BUFFER",
    "EXTRA_FIELDS",
    "LACKING",
    "PIXEL_LIMIT",
    "SUFFIXES",
    "THUMBNAILS",
    "Downloads",
    "JoinedRows",
    "JsonRows",
    "Rows",
    "SelectedRows",
    "Sieve",
    "StreamRows",
    "cache_folder",
    "frames_in",
    "image_size",
    "images_in",
    "is_image",
    "json_texts",
    "load_image",
    "load_video",
    "locate",
    "numbers_of_split",
    "open_rows",
    "read_content",
    "url_of",
]
