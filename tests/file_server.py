"""Files of a folder over HTTP on this machine, whole or in ranges, and what was asked of them."""

import re
from collections import Counter
from contextlib import contextmanager

from loopback import Kept, listening


@contextmanager
def serving(folder):
    """The address of the files, and how many bytes of each were sent."""
    sent = Counter()

    class Handler(Kept):
        def do_GET(self):
            path = folder / self.path.lstrip("/")
            data = path.read_bytes() if path.is_file() else None
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, end = 0, len(data or b"")
            if asked:
                first, end = int(asked[1]), min(int(asked[2] or end) + 1, end)
            self.send_response(404 if data is None else 206 if asked else 200)
            self.send_header("Content-Length", str(end - first))
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{end - 1}/{len(data)}")
            self.end_headers()
            if self.command == "GET" and data is not None:
                sent[path.name] += end - first
                self.wfile.write(data[first:end])

    with listening(Handler) as address:
        yield address, sent
